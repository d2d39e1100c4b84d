"""Quantities of a configuration that determine its memory, and its layout over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil

from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.config.schema import RunConfig
from irdscale.distributed.deepspeed import micro_batch as checked_micro_batch
from irdscale.distributed.deepspeed import zero_file
from irdscale.errors import InputError
from irdscale.memory.items import Zero, zero_from
from irdscale.memory.sizes import PassBytes, PassSetting, Shapes


@dataclass(frozen=True)
class Layout:
    """One way to run a configuration on some GPUs, one rank per GPU.

    Attributes:
        zero: DeepSpeed settings.
        sharded, offload: layout of the Fisher sums.
        checkpointing: gradient checkpointing, in Fisher passes too.
        fisher_batch: largest batch of a Fisher pass, in samples.
        passes: passes over the samples for masks, each with the sums of some parameters; None for the fewest that fit.
        accumulation: gradient accumulation steps of a training step.
    """

    zero: Zero
    sharded: bool
    offload: bool
    checkpointing: bool
    fisher_batch: int
    passes: int | None
    accumulation: int
    nodes: int
    gpus_per_node: int

    @property
    def world(self) -> int:
        """World size."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Workload:
    """Quantities that determine a configuration's memory, without its layout.

    Attributes:
        k: entries of the largest mask.
        tokens: length of the longest sample.
        samples, batch, eval_batch: samples of the Fisher passes, of a training step and of an evaluation batch.
        traced: whether a pass computes the samples' Fisher traces before the masks.
        item: bytes per entry of the Fisher sums.
        language: whether the task trains a causal language model.
        scattered: whether mask entries are in all rows and columns, as with scope `layerwise`.
        ray_ranks: ranks of one trial on Ray; None with the local runner.
        gpu_memory: bytes of the GPU; None for a CPU.
        fisher_room: bytes for a rank's tensors in a Fisher pass; None if unknown.
        pass_bytes: kind of pass and setting -> bytes of one batch.
    """

    shapes: Shapes
    k: int
    tokens: int
    samples: int
    batch: int
    eval_batch: int
    traced: bool
    item: int
    language: bool
    scattered: bool
    ray_ranks: int | None
    gpu_memory: int | None
    fisher_room: float | None
    pass_bytes: Callable[[str, PassSetting], PassBytes] = field(repr=False)

    @property
    def ratio(self) -> float:
        """Mask entries over scored entries."""
        return self.k / max(1, sum(self.shapes.scored_sizes))

    def training_layout(self, layout: Layout) -> Layout:
        """The layout of one training: on Ray that of a trial's ranks."""
        if self.ray_ranks is None:
            return layout
        gpus = min(self.ray_ranks, layout.gpus_per_node)
        return replace(layout, nodes=ceil(self.ray_ranks / layout.gpus_per_node), gpus_per_node=gpus)

    def micro_batch(self, layout: Layout) -> int:
        """Samples per rank of one forward pass in training."""
        return max(1, self.batch // (self.training_layout(layout).world * layout.accumulation))


def workload_of(
    config: RunConfig, nodes: int, gpus_per_node: int, gpu_memory: int | None, tokens: int | None
) -> tuple[Workload, Layout]:
    """A configuration's workload and layout; reads the model's config.json alone.

    Args:
        gpu_memory: bytes of one GPU; None for a CPU.
        tokens: length of the longest sample; `task.max_length` if None.

    Raises:
        InputError: there is no such model, or the configuration does not fit the model or so many ranks.
    """
    gpus, ray = nodes * gpus_per_node, config.search.ray.ranks if config.search.runner == "ray" else None
    if ray is not None and ray > gpus:
        raise InputError(f"found {ray}", f"at most {gpus}, the GPUs", key="search.ray.ranks")
    checked_micro_batch(config, ray or gpus)
    settings = zero_file(config, ray or gpus)

    from irdscale.fisher.pool import mask_size
    from irdscale.memory.pass_bytes import cached_pass_bytes
    from irdscale.memory.shapes import meta_model, scored_of, shapes_of, task_kind
    from irdscale.models.quantize import refuse_zero3

    refuse_zero3(config, None if settings is None else settings["zero_optimization"]["stage"])
    model = meta_model(config)
    shapes = shapes_of(config, model)
    longest = config.task.max_length if tokens is None else tokens
    k = mask_size(config, model, sum(shapes.scored_sizes), shapes.dense)
    if shapes.positions is not None and longest > shapes.positions:
        key = "task.max_length" if tokens is None else "tokens"
        raise InputError(f"found {longest}", f"at most {shapes.positions}, the model's positions", key=key)
    workload = Workload(
        shapes=shapes,
        k=k,
        tokens=longest,
        samples=config.fisher.samples,
        batch=config.train.batch_size,
        eval_batch=config.train.eval_batch_size,
        traced=config.traced,
        item=8 if config.fisher.dtype == "float64" else 4,
        language=task_kind(config) in LANGUAGE_KINDS,
        scattered=config.scope == "layerwise",
        ray_ranks=ray,
        gpu_memory=gpu_memory,
        fisher_room=None,
        pass_bytes=cached_pass_bytes(model, scored_of(config, model)),
    )
    layout = Layout(
        zero=zero_from(settings, shapes.hidden),
        sharded=config.fisher.layout == "sharded",
        offload=config.fisher.offload,
        checkpointing=config.train.gradient_checkpointing,
        fisher_batch=config.fisher.batch_size,
        passes=None if config.fisher.passes == "auto" else config.fisher.passes,
        accumulation=config.train.gradient_accumulation,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
    )
    return workload, layout
