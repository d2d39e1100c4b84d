"""A model's outputs for the samples of a split, to get metrics and predictions from the same pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Outputs:
    """A model's outputs, by kind of task; None until they are computed.

    Attributes:
        logits: logits of classification and regression [N, C], float64.
        choices: loss, tokens and right tokens of each choice [all choices, 3], float64, in the order of the samples.
        generated: tokens generated for each sample, including the one that ends the answer.
    """

    logits: Tensor | None = None
    choices: Tensor | None = None
    generated: list[list[int]] | None = None
