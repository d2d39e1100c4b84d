"""The state of a pass over samples on disk, so that a pass that was killed goes on where it was.

    FOLDER/state.json               which set of files is whole, and of which work it is
    FOLDER/<set>/rank-<r>.safetensors   each rank's sums, traces and samples that are left
    FOLDER/<name>.safetensors       results that a finished part of the pass has left

A set becomes the state when every rank has written its file, so a kill at any moment leaves the one before.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irdscale.distributed.ranks import all_reduce_sum, failing_together, gather_texts, rank_and_world, slice_of
from irdscale.errors import InputError
from irdscale.fisher.diagonal import Layout
from irdscale.utils.files import digest, read_json, read_tensors, write_by, write_json

log = logging.getLogger(__name__)

VERSION = 2
SUM = "sum/"


@dataclass
class PassState:
    """How far a pass is on this rank.

    Attributes:
        traces: float64 [N], this rank's share of them; empty where none are wanted.
        sums: name -> this rank's sums.
        stop: the pass is in the segment that ends before this place of the order; 0 before the first.
        left: samples of that segment that this rank has still to take.
        taken: gradients of single samples that this rank took.
        done: samples that all ranks together had taken when the state was loaded.
    """

    traces: Tensor
    sums: dict[str, Tensor]
    stop: int = 0
    left: list[int] = field(default_factory=list)
    taken: int = 0
    done: int = 0


class SavedPass:
    """Keeps one pass's state in `folder`, which all ranks share, every so many minutes.

    Args:
        also: what tells the pass from others beside its work.
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
        """Fill `state` from a pass that was interrupted, of any number of ranks; without one, start anew. Collective.

        Args:
            layout: of the state's sums; the pass that was interrupted may have had the other one.

        Raises:
            InputError: a rank's file is missing or damaged.
        """
        rank, _ = rank_and_world()
        self._made_by, self._layout = digest({**work, "also": self._also}), layout
        with failing_together():
            found = self._meta() if rank == 0 else None
        meta = json.loads(gather_texts(json.dumps(found))[0])
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
            log.info("going on with a pass that was interrupted: %d samples are done", state.done)

    def _meta(self) -> dict[str, Any] | None:
        file = self._folder / "state.json"
        if not file.exists():
            return None
        meta = read_json(file, "state of a Fisher pass")
        if not isinstance(meta, dict) or meta.get("version") != VERSION or meta.get("made_by") != self._made_by:
            log.info("%s is of other work and is not used", self._folder)
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
            tensors = read_tensors(self._file(meta["set"], old), "state of a Fisher pass (all ranks share its folder)")
            left += tensors["left"].tolist()
            if mine:
                state.taken += int(tensors["taken"])
                state.traces += tensors["traces"]
            if mine or self._layout == "sharded":
                self._read_sums(state.sums, tensors, old, meta, shapes)
        state.left = left if same else left[rank::world]

    def _read_sums(
        self,
        sums: dict[str, Tensor],
        stored: dict[str, Tensor],
        old: int,
        meta: dict[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Add what this rank holds of an old rank's sums: in either layout, all ranks' together are the sum."""
        for name, own in sums.items():
            numel = torch.Size(shapes[name]).numel()
            own_start, own_stop = slice_of(numel) if self._layout == "sharded" else (0, numel)
            start, stop = slice_of(numel, old, meta["world"]) if meta["layout"] == "sharded" else (0, numel)
            first, last = max(own_start, start), min(own_stop, stop)
            if first < last:
                part = stored[SUM + name].view(-1)[first - start : last - start]
                own.view(-1)[first - own_start : last - own_start] += part.to(own.device)

    def due(self) -> bool:
        """Whether it is time to save: rank 0's clock counts."""
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
                meta["layout"] = self._layout
                write_json(self._folder / "state.json", {**meta, "set": self._set})
        if rank == 0:
            shutil.rmtree(self._folder / str(before), ignore_errors=True)
        self._saved = time.monotonic()

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep a result that later parts of the pass do not make again; collective."""
        from safetensors.torch import save_file

        with failing_together():
            if rank_and_world()[0] == 0:
                write_by(self._folder / f"{name}.safetensors", lambda path: save_file(tensors, path))

    def kept(self, name: str) -> dict[str, Tensor]:
        """What `keep` kept under this name.

        Raises:
            InputError: it is not there.
        """
        file = self._folder / f"{name}.safetensors"
        if not file.exists():
            raise InputError(f"{file}: not found; expected it beside state.json, in a folder that all ranks share")
        return read_tensors(file, "part of the state of a Fisher pass")

    def remove(self) -> None:
        """The pass has ended and its result is kept elsewhere."""
        if rank_and_world()[0] == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
