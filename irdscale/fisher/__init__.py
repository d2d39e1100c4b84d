"""Per-sample squared gradients: the Fisher diagonal, sample traces, and the masks of a whole search."""

from irdscale.fisher.accumulate import Fisher, SampleGradients, accumulate_fisher, scored_parameters

__all__ = ["Fisher", "SampleGradients", "accumulate_fisher", "scored_parameters"]
