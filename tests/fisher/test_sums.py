"""Main memory that the sums of a pass take, measured on two ranks."""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from irdscale import accumulate_fisher
from irdscale.distributed.ranks import end_rank
from irdscale.fisher.memory_check import bytes_needed
from irdscale.fisher.sums import MainMemoryAdder
from tests.spawned import run_ranks
from tests.tiny_models import collate, samples

MIB = 2**20
# Of malloc.h.
MMAP_THRESHOLD = -3
STATUS = Path("/proc/self/status")


def memory(name: str) -> int:
    """Bytes of VmRSS (held now) or VmHWM (held at most since `forget_peak`)."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name)) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def wide_model() -> Any:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=4096,
        num_labels=3,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def on_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Large blocks go back to the system when they are freed, so that the peak is of what was held at one time.
    assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, MIB // 4) == 1
    store, timeout = f"file://{folder}/store", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    model, rows = wide_model(), samples(count=8)
    options: dict[str, Any] = {"collate_fn": collate, "batch_size": 2}
    # What a first pass leaves behind, such as the threads' arenas, is no part of the sums.
    accumulate_fisher(model, rows[:2], include=r"layer.0|classifier", layout="sharded", **options)
    found = {}
    for layout in ("sharded", "replicated"):
        # Freed memory that the process keeps for itself would hide what the next pass takes.
        ctypes.CDLL(None).malloc_trim(0)
        before = memory("VmRSS")
        forget_peak()
        fisher = accumulate_fisher(model, rows, layout=layout, **options)  # type: ignore[arg-type]
        found[layout] = memory("VmHWM") - before
        found[f"{layout} held"] = sum(d.numel() * d.element_size() for d in fisher.diagonal.values())
        del fisher
    torch.save(found, f"{folder}/{rank}.pt")
    end_rank()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to reset the peak")
def test_sharded_sums_take_their_share_of_memory_and_a_layers_buffers(tmp_path: Path) -> None:
    run_ranks(on_rank, 2, str(tmp_path))
    shapes = {name: tuple(p.shape) for name, p in wide_model().named_parameters()}
    whole = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    largest = 4 * max(torch.Size(shape).numel() for shape in shapes.values())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["replicated held"] == whole
        assert abs(found["sharded held"] - whole / 2) <= 4 * len(shapes)
        # One sample's gradient, a batch's sum and half of another on its way: 3 layers at most; activations are small.
        needed = bytes_needed(shapes, 4, "sharded", 2)
        assert needed <= whole / 2 + 4 * len(shapes) + 2 * largest
        # And 32 MiB for activations, the exchange's own buffers, and what malloc cannot use.
        assert found["sharded"] <= needed + largest + 32 * MIB, {k: v / MIB for k, v in found.items()}
        assert found["replicated"] >= whole, "or the measurement sees nothing"
        assert found["sharded"] < 0.8 * found["replicated"]


class _OnGpu(torch.Tensor):
    is_cuda = True


def test_sums_in_main_memory_stay_one_behind_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        count = 0

        def __init__(self) -> None:
            Event.count += 1
            self.name = str(Event.count)

        def record(self, _stream: object) -> None:
            happened.append(f"copy {self.name}")

        def synchronize(self) -> None:
            happened.append(f"wait {self.name}")

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **options: empty(*a, **options))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    adder, totals = MainMemoryAdder(), [torch.ones(2, 3), torch.ones(5), torch.ones(2, 2)]
    part = torch.zeros(6)
    for value, total in enumerate(totals, 1):
        # One buffer on the GPU for all, which is written to again at once.
        part.fill_(value)
        adder.add(total, part[: total.numel()].as_subclass(_OnGpu))
    assert happened == ["copy 1", "copy 2", "wait 1", "copy 3", "wait 2"]
    adder.finish()
    adder.finish()
    assert happened[5:] == ["wait 3"]
    for value, total in enumerate(totals, 1):
        assert torch.equal(total, torch.full_like(total, 1.0 + value))
