"""Whether a training's loss fell: its beginning, its end, and a warning if it rose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any

from irdscale.utils.formats import number

# The first and the last of so many equal parts of the steps are compared.
PARTS = 5
# Fewest losses in a part to compute their variance.
FEWEST = 3
_ADVICE = "train.learning_rate may be too large, or train.steps too few."


def loss_trend(losses: Sequence[float]) -> dict[str, Any] | None:
    """The loss of a training at its beginning and end.

    Args:
        losses: loss of each step.

    Returns:
        {"began", "ended", "rose"}: means over the first and the last fifth of the steps, and whether the difference
        exceeds its standard error. None for fewer than two steps.
    """
    if len(losses) < 2:
        return None
    count = max(1, len(losses) // PARTS)
    first, last = losses[:count], losses[-count:]
    began, ended = fmean(first), fmean(last)
    error = math.sqrt((variance(first) + variance(last)) / count) if count >= FEWEST else 0.0
    return {"began": began, "ended": ended, "rose": ended - began > error}


def rise_warning(trend: Mapping[str, Any]) -> str:
    """Warning about a loss that rose."""
    return f"The loss rose from {number(trend['began'])} to {number(trend['ended'])}: {_ADVICE}"


def rise_warnings(trends: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """Warning about the trainings whose loss rose, in a list that is empty if none rose.

    Args:
        trends: name of each training -> its trend; None if unknown.
    """
    known = {name: trend for name, trend in trends.items() if trend is not None}
    rose = [name for name, trend in known.items() if trend["rose"]]
    if not rose:
        return []
    worst = max(rose, key=lambda name: known[name]["ended"] - known[name]["began"])
    trend = known[worst]
    return [
        f"The loss rose in {len(rose):,} of {len(known):,} trainings, most in {worst}: "
        f"from {number(trend['began'])} to {number(trend['ended'])}; {_ADVICE}"
    ]
