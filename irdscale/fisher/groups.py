"""Fisher passes over groups of parameters, one group after another, if the sums of all do not fit in memory together.

Each pass takes the gradients of one group alone. A group is a run of parameters in the model's order, such as some of
its layers. Its sums equal those of one pass over all parameters bit for bit.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from irdscale.config.schema import Scope, Score
from irdscale.distributed.ranks import gather_texts, rank_and_world
from irdscale.fisher.accumulate import new_sums
from irdscale.fisher.checkpoint import SavedPass
from irdscale.fisher.diagonal import Fisher, Layout, Shapes
from irdscale.fisher.memory_check import bytes_needed, free_main_memory
from irdscale.fisher.passes import SampleGradients
from irdscale.fisher.scores import entry_scores, summed
from irdscale.masks.mask import Ranking
from irdscale.masks.parts import Candidates, candidates_of, ranking_of
from irdscale.masks.topk import Chosen
from irdscale.utils.groups import divided

Passes = int | Literal["auto"]
# Largest share of the free memory that the sums of a group may take.
USED = 0.9
log = logging.getLogger(__name__)


def fewest(shapes: Shapes, fits: Callable[[Shapes], bool]) -> int:
    """The fewest passes whose groups all fit; the number of parameters if there are none."""
    for passes in range(1, len(shapes)):
        if all(fits({name: shapes[name] for name in group}) for group in divided(shapes, passes)):
            return passes
    return max(1, len(shapes))


def groups_for(
    samples: SampleGradients, passes: Passes, dtype: torch.dtype, layout: Layout, offload: bool
) -> list[list[str]]:
    """The groups of the scored parameters; collective: the rank with the least free memory decides for all.

    Args:
        passes: number of groups, or `auto` for the fewest whose sums fit in the free memory
    """
    shapes, world = samples.shapes, rank_and_world()[1]
    if passes == "auto":
        hosts = gather_texts(socket.gethostname())
        on_device = samples.device.type == "cuda" and not offload
        main = free_main_memory() / hosts.count(socket.gethostname())
        free = USED * (torch.cuda.mem_get_info(samples.device)[0] if on_device else main)
        least = min(map(int, gather_texts(str(int(free)))))
        passes = fewest(shapes, lambda group: bytes_needed(group, dtype.itemsize, layout, world) <= least)
    return divided(shapes, passes)


def ranked_by_groups(
    samples: SampleGradients,
    order: Sequence[int],
    sizes: Sequence[int],
    k: int,
    groups: Sequence[Sequence[str]],
    *,
    traces: Tensor | None = None,
    progress: bool = False,
    saved: Sequence[SavedPass] = (),
    **options: Any,
) -> dict[int, Ranking]:
    """The result of `irdscale.fisher.nested.ranked_entries_by_prefix`, from one accumulation pass per group.

    Args:
        groups: names of the scored parameters by group, in their order
        traces: float64 [N], to which each visited sample's Fisher trace is added
        saved: saves the state of each group's pass; may be empty. A killed run takes all groups again, each from its
            last saved state.
        options: `score`, `scope`, `dtype`, `layout` and `offload` of that function
    """
    if rank_and_world()[0] == 0:
        log.info("fisher.passes: %d passes over the samples, each with the sums of some parameters", len(groups))
    found: dict[int, list[Candidates]] = {size: [] for size in sizes}
    states: Sequence[SavedPass | None] = saved or [None] * len(groups)
    for place, (names, state) in enumerate(zip(groups, states, strict=True)):
        group = _Group(samples, names, k, f"Masks {place + 1}/{len(groups)}", **options)
        for size, candidates in group.candidates(order, sizes, traces, progress, state).items():
            found[size].append(candidates)
    for one in saved:
        one.remove()
    return {size: ranking_of(found[size], k, options.get("scope", "global"), samples.shapes) for size in sizes}


@dataclass(frozen=True)
class _Group:
    """One group's pass over the samples."""

    samples: SampleGradients
    names: Sequence[str]
    k: int
    description: str
    score: Score = "fisher"
    scope: Scope = "global"
    dtype: torch.dtype = torch.float32
    layout: Layout = "replicated"
    offload: bool = False

    def candidates(
        self,
        order: Sequence[int],
        sizes: Sequence[int],
        traces: Tensor | None,
        progress: bool,
        saved: SavedPass | None,
    ) -> dict[int, Candidates]:
        """The group's candidates at each size of sample sets."""
        part, add = self._part(), summed(self.score)
        assert add is not None, "a score that reads no samples has no sums"
        layout: Layout = "replicated" if rank_and_world()[1] == 1 else self.layout
        sums = new_sums(part, order, layout=layout, dtype=self.dtype, add=add, offload=self.offload)
        found: dict[int, Candidates] = {}

        def snapshot(size: int) -> None:
            scores = entry_scores(self.score, part.scored, sums.tensors, part.seed, layout)
            shapes = part.shapes if layout == "sharded" else None
            fisher = Fisher(scores, torch.zeros(0, dtype=torch.float64), 0, layout, shapes)
            found[size] = candidates_of(fisher, self.k, self.scope, self.samples.shapes)
            if saved is not None:
                saved.save_result(f"candidates-{size}", _as_tensors(found[size]))

        part.accumulate(
            order[: max(sizes)],
            sums,
            traces,
            boundaries=sizes,
            at_boundary=snapshot,
            progress=progress,
            description=self.description,
            saved=saved,
        )
        self.samples.taken += part.taken
        for size in sizes:
            if size not in found:
                assert saved is not None, "only a continued pass skips a boundary"
                found[size] = _as_candidates(saved.load_result(f"candidates-{size}"))
        return found

    def _part(self) -> SampleGradients:
        scored = {name: self.samples.scored[name] for name in self.names}
        return replace(self.samples, scored=scored, taken=0)


def _as_tensors(candidates: Candidates) -> dict[str, Tensor]:
    tensors = {"largest": torch.tensor(candidates.largest, dtype=torch.float64)}
    for name, entries in candidates.chosen.items():
        tensors |= {f"index.{name}": entries.index, f"scores.{name}": entries.scores.contiguous()}
    return tensors


def _as_candidates(tensors: dict[str, Tensor]) -> Candidates:
    names = [key.removeprefix("index.") for key in tensors if key.startswith("index.")]
    chosen = {name: Chosen(tensors[f"index.{name}"], tensors[f"scores.{name}"]) for name in names}
    return Candidates(chosen, float(tensors["largest"]))
