"""Whether a training's loss fell: where it began, where it ended, and what to say where it rose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any

# Loss is compared between so large a part of the steps at the beginning and at the end.
PART = 5
# With fewer losses in a part, their spread is not known.
FEWEST = 3
_ADVICE = "train.learning_rate may be too large, or train.steps too few."


def loss_trend(losses: Sequence[float]) -> dict[str, Any] | None:
    """Where the loss of a training began and ended.

    Args:
        losses: one of each step.

    Returns:
        {"began", "ended", "rose"}: means over the first and the last fifth of the steps; it rose where the end is above
        the beginning by more than the standard error of their difference. None for fewer than two steps.
    """
    if len(losses) < 2:
        return None
    count = max(1, len(losses) // PART)
    first, last = losses[:count], losses[-count:]
    began, ended = fmean(first), fmean(last)
    error = math.sqrt((variance(first) + variance(last)) / count) if count >= FEWEST else 0.0
    return {"began": began, "ended": ended, "rose": ended - began > error}


def said_of_rise(trend: Mapping[str, Any]) -> str:
    """One line on a loss that rose."""
    return f"The loss ended at {trend['ended']:.4g}, above {trend['began']:.4g} where it began: {_ADVICE}"


def said_of_rises(trends: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """One line on the trainings whose loss rose, none where it rose in none.

    Args:
        trends: name of each training -> its trend; None where it is not known.
    """
    known = {name: trend for name, trend in trends.items() if trend is not None}
    rose = [name for name, trend in known.items() if trend["rose"]]
    if not rose:
        return []
    worst = max(rose, key=lambda name: known[name]["ended"] - known[name]["began"])
    trend = known[worst]
    return [
        f"The loss ended above where it began in {len(rose):,} of {len(known):,} trainings, most in that of {worst}: "
        f"{trend['began']:.4g} to {trend['ended']:.4g}; {_ADVICE}"
    ]
