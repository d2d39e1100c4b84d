"""Per-sample squared gradients: the Fisher diagonal, Fisher traces of samples, and all masks of a search."""

from irdscale.fisher.accumulate import accumulate_fisher, scored_parameters
from irdscale.fisher.diagonal import Fisher
from irdscale.fisher.passes import SampleGradients

__all__ = ["Fisher", "SampleGradients", "accumulate_fisher", "scored_parameters"]
