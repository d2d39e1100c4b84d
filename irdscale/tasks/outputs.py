"""A model's outputs for the samples of a split, kept for predictions beside metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Outputs:
    """What an evaluation found, by kind of task; each is None until it was computed.

    Attributes:
        logits: [N, C], float64, of classification and regression.
        choices: loss, tokens and right tokens of each choice [all choices, 3], float64, sample by sample.
        generated: tokens that were generated for each sample, up to and with the one that ended the answer.
    """

    logits: Tensor | None = None
    choices: Tensor | None = None
    generated: list[list[int]] | None = None
