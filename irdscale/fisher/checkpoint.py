"""The state of a pass over samples on disk, from which a killed pass continues.

    FOLDER/state.json                   the complete set of files, and the work that it belongs to
    FOLDER/<set>/rank-<r>.safetensors   a rank's sums, traces and remaining samples
    FOLDER/<name>.safetensors           results of finished parts of the pass

A set becomes the state when every rank has written its file, so a kill at any moment leaves the previous set.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irdscale.distributed.ranks import all_reduce_sum, broadcast_json, failing_together, rank_and_world, slice_of
from irdscale.fisher.diagonal import Layout
from irdscale.utils.files import digest, read_json, read_tensors, write_by, write_json

log = logging.getLogger(__name__)

VERSION = 3
SUM = "sum/"
# Named in errors.
WHAT = "state of a Fisher pass (all ranks share its folder)"


@dataclass
class PassState:
    """Progress of a pass on this rank.

    Attributes:
        traces: float64 [N], traces of this rank's samples; empty if the pass computes none
        sums: name -> this rank's sums
        stop: end of the current segment of the order; 0 before the first
        left: samples of that segment that this rank has not taken yet
        taken: gradients of single samples that this rank has taken
        done: samples that all ranks had taken when the state was loaded
    """

    traces: Tensor
    sums: dict[str, Tensor]
    stop: int = 0
    left: list[int] = field(default_factory=list)
    taken: int = 0
    done: int = 0


class SavedPass:
    """Saves one pass's state in `folder`, which all ranks share, at intervals of `minutes`.

    Args:
        also: facts that identify the pass, beside its work
    """

    def __init__(self, folder: Path, minutes: float, also: Mapping[str, Any] | None = None) -> None:
        self._folder, self._minutes, self._also = folder, minutes, dict(also or {})
        self._made_by = ""
        self._layout: Layout = "replicated"
        self._set = 0
        self._saved = time.monotonic()

    def load(
        self, state: PassState, work: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], layout: Layout
    ) -> None:
        """Fill `state` from an interrupted pass, if there is one, of any number of ranks and either layout. Collective.

        Args:
            layout: layout of `state.sums`

        Raises:
            InputError: a rank's file is missing or damaged.
        """
        rank, _ = rank_and_world()
        self._made_by, self._layout = digest({**work, "also": self._also}), layout
        with failing_together():
            found = self._meta() if rank == 0 else None
        meta = broadcast_json(found)
        if meta is None:
            if rank == 0:
                shutil.rmtree(self._folder, ignore_errors=True)
            return
        self._set = meta["set"]
        with failing_together():
            self._read(state, meta, shapes)
        counts = torch.tensor([len(state.left)])
        all_reduce_sum([counts])
        state.done = state.stop - int(counts)
        if rank == 0:
            log.info("continuing an interrupted pass: %d samples are done", state.done)

    def _meta(self) -> dict[str, Any] | None:
        file = self._folder / "state.json"
        if not file.exists():
            return None
        meta = read_json(file, "state of a Fisher pass")
        if not isinstance(meta, dict) or meta.get("version") != VERSION or meta.get("made_by") != self._made_by:
            log.info("%s belongs to other work and is not used", self._folder)
            return None
        return meta

    def _file(self, which: int, rank: int) -> Path:
        return self._folder / str(which) / f"rank-{rank}.safetensors"

    def _read(self, state: PassState, meta: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        rank, world = rank_and_world()
        same = (world, self._layout) == (meta["world"], meta["layout"])
        state.stop, left = meta["stop"], []
        for old in range(meta["world"]):
            mine = old % world == rank
            if same and not mine:
                continue
            tensors = read_tensors(self._file(meta["set"], old), WHAT)
            left += tensors["left"].tolist()
            if mine:
                state.taken += int(tensors["taken"])
                state.traces += tensors["traces"]
            if mine or self._layout == "sharded":
                # In either layout, the parts of all ranks add up to the sum.
                for name, own in state.sums.items():
                    numel = torch.Size(shapes[name]).numel()
                    own_start, own_stop = slice_of(numel) if self._layout == "sharded" else (0, numel)
                    start, stop = slice_of(numel, old, meta["world"]) if meta["layout"] == "sharded" else (0, numel)
                    first, last = max(own_start, start), min(own_stop, stop)
                    if first < last:
                        part = tensors[SUM + name].view(-1)[first - start : last - start]
                        own.view(-1)[first - own_start : last - own_start] += part.to(own.device)
        state.left = left if same else left[rank::world]

    def due(self) -> bool:
        """Whether it is time to save, by the clock of rank 0."""
        return rank_and_world()[0] == 0 and time.monotonic() - self._saved >= 60 * self._minutes

    def save(self, state: PassState) -> None:
        """Write the state; collective."""
        from safetensors.torch import save_file

        rank, world = rank_and_world()
        before, self._set = self._set, self._set + 1
        tensors = {SUM + name: part.contiguous().cpu() for name, part in state.sums.items()}
        tensors |= {
            "left": torch.tensor(state.left, dtype=torch.int64),
            "traces": state.traces,
            "taken": torch.tensor(state.taken),
        }
        with failing_together():
            write_by(self._file(self._set, rank), lambda path: save_file(tensors, path))
        with failing_together():
            if rank == 0:
                meta = {"version": VERSION, "made_by": self._made_by, "world": world, "stop": state.stop}
                write_json(self._folder / "state.json", {**meta, "layout": self._layout, "set": self._set})
        if rank == 0:
            shutil.rmtree(self._folder / str(before), ignore_errors=True)
        self._saved = time.monotonic()

    def save_result(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save a result of a finished part of the pass; collective."""
        from safetensors.torch import save_file

        with failing_together():
            if rank_and_world()[0] == 0:
                write_by(self._folder / f"{name}.safetensors", lambda path: save_file(tensors, path))

    def load_result(self, name: str) -> dict[str, Tensor]:
        """A result that `save_result` saved.

        Raises:
            InputError: it is missing or damaged.
        """
        return read_tensors(self._folder / f"{name}.safetensors", WHAT)

    def remove(self) -> None:
        """Remove the state of a finished pass."""
        if rank_and_world()[0] == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
