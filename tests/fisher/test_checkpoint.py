"""An interrupted pass continues to the same result, bit for bit."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from irdscale import accumulate_fisher
from irdscale.distributed import ranks, watchdog
from irdscale.distributed.ranks import end_rank
from irdscale.errors import InputError
from irdscale.fisher import Fisher, SampleGradients, checkpoint, scored_parameters
from irdscale.fisher.checkpoint import PassState, SavedPass
from irdscale.fisher.nested import ranked_entries_by_prefix
from tests.spawned import run_ranks
from tests.tiny_models import collate, samples, tiny

ROWS = 40
SIZES = [40, 20, 10]


class Interrupted(BaseException):
    pass


class Collate:
    """Stops the program after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches
        self.rows = 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        self.rows += len(rows)
        return collate(rows)


def rows_before(model: Any, rows: list[dict[str, Any]], state: Path, **options: Any) -> int:
    """Rows that are looked at before a pass: by the comparison of the work, and by what is tried on the model."""
    counting, options = Collate(1000), {"batch_size": 1, **options}
    accumulate_fisher(model, rows, collate_fn=counting, save_to=state, **options)
    return counting.rows - len(rows)


@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_an_interrupted_pass_goes_on_to_the_same_bits(family: str, tmp_path: Path) -> None:
    model, rows = tiny(family).float(), samples(count=ROWS)
    options: dict[str, Any] = {"batch_size": 1, "save_to": tmp_path / "state", "save_minutes": 0}
    before = rows_before(model, rows, tmp_path / "whole")
    # As many batches as are taken between two savings, twice.
    batches = before + (32 if family == "deberta" else 16) + 3
    expected = accumulate_fisher(model, rows, collate_fn=collate, batch_size=1)
    with pytest.raises(Interrupted):
        accumulate_fisher(model, rows, collate_fn=Collate(batches), **options)
    assert (tmp_path / "state" / "state.json").exists()
    counting = Collate(1000)
    fisher = accumulate_fisher(model, rows, collate_fn=counting, **options)
    assert counting.rows - before <= ROWS - 16, "what was done is not done again"
    assert all(torch.equal(fisher.diagonal[name], d) for name, d in expected.diagonal.items())
    assert torch.equal(fisher.sample_trace, expected.sample_trace)
    assert fisher.sample_gradients == expected.sample_gradients == ROWS
    assert not (tmp_path / "state").exists()


def test_the_state_of_other_work_is_not_used(tmp_path: Path) -> None:
    model, rows = tiny("bert").float(), samples(count=ROWS)
    options: dict[str, Any] = {"batch_size": 1, "save_to": tmp_path / "state", "save_minutes": 0}
    with pytest.raises(Interrupted):
        accumulate_fisher(model, rows, collate_fn=Collate(40), **options)
    other = tiny("bert", seed=1).float()
    expected = accumulate_fisher(other, rows, collate_fn=collate, batch_size=1)
    fisher = accumulate_fisher(other, rows, collate_fn=collate, **options)
    assert all(torch.equal(fisher.diagonal[name], d) for name, d in expected.diagonal.items())
    assert fisher.sample_gradients == ROWS


def test_the_state_of_a_pass_with_another_head_is_not_used(tmp_path: Path) -> None:
    model, rows = tiny("bert").float(), samples(count=ROWS)

    def visited(saved: SavedPass, collate_fn: Collate) -> int:
        gradients = SampleGradients(model, rows, collate_fn, scored_parameters(model), batch_size=1)
        gradients.add_traces(range(ROWS), torch.zeros(ROWS, dtype=torch.float64), saved=saved)
        return collate_fn.rows

    with pytest.raises(Interrupted):
        visited(SavedPass(tmp_path, 0, {"seed": 0}), Collate(40))
    assert visited(SavedPass(tmp_path, 0, {"seed": 1}), Collate(1000)) >= ROWS
    with pytest.raises(Interrupted):
        visited(SavedPass(tmp_path / "again", 0, {"seed": 0}), Collate(40))
    assert visited(SavedPass(tmp_path / "again", 0, {"seed": 0}), Collate(1000)) < ROWS


def test_a_damaged_state_is_an_error(tmp_path: Path) -> None:
    model, rows = tiny("bert").float(), samples(count=ROWS)
    options: dict[str, Any] = {"batch_size": 1, "save_to": tmp_path / "state", "save_minutes": 0}
    with pytest.raises(Interrupted):
        accumulate_fisher(model, rows, collate_fn=Collate(40), **options)
    (file,) = (tmp_path / "state").glob("*/rank-0.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"rank-0\.safetensors: damaged state of a Fisher pass"):
        accumulate_fisher(model, rows, collate_fn=collate, **options)


@pytest.mark.parametrize("stop_after", [20, 35, 45])
def test_a_pass_over_prefixes_continues_with_its_finished_rankings(stop_after: int, tmp_path: Path) -> None:
    model, rows = tiny("bert").float(), samples(count=ROWS)

    def run(collate_fn: Any, *saved: SavedPass) -> tuple[dict[int, Any], SampleGradients]:
        gradients = SampleGradients(model, rows, collate_fn, scored_parameters(model), batch_size=1)
        return ranked_entries_by_prefix(gradients, range(ROWS), SIZES, 300, saved=saved), gradients

    expected, _ = run(collate)
    with pytest.raises(Interrupted):
        run(Collate(stop_after), SavedPass(tmp_path, 0))
    rankings, gradients = run(collate, SavedPass(tmp_path, 0))
    for size in SIZES:
        assert torch.equal(rankings[size].parameter, expected[size].parameter)
        assert torch.equal(rankings[size].index, expected[size].index)
    assert gradients.taken == ROWS


def test_a_finished_trace_pass_is_not_made_again(tmp_path: Path) -> None:
    model, rows = tiny("bert"), samples(count=6)

    def run(collate_fn: Any) -> torch.Tensor:
        gradients = SampleGradients(model, rows, collate_fn, scored_parameters(model), batch_size=2)
        traces = torch.zeros(6, dtype=torch.float64)
        gradients.add_traces(range(6), traces, saved=SavedPass(tmp_path, 60))
        assert gradients.taken == 6
        return traces

    whole, counting = Collate(1000), Collate(1000)
    first = run(whole)
    assert torch.equal(run(counting), first)
    # The work is compared and the model tried again; the pass is not made.
    assert counting.rows == whole.rows - 6


@pytest.mark.parametrize("after", [("replicated", 1), ("replicated", 2), ("sharded", 2), ("sharded", 3)])
@pytest.mark.parametrize(
    "before", [("replicated", 1), ("replicated", 2), ("replicated", 3), ("sharded", 2), ("sharded", 3)]
)
def test_the_state_of_any_ranks_and_layout_is_shared_out(
    before: Any, after: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank in turn, as `SavedPass` sees it: nothing of the sums or samples is lost or counted twice."""
    shapes = {"matrix": (3, 5), "one": (1,)}
    generator = torch.Generator().manual_seed(0)
    for module in (checkpoint, ranks):
        monkeypatch.setattr(module, "rank_and_world", lambda: here)
    monkeypatch.setattr(checkpoint, "failing_together", nullcontext)
    monkeypatch.setattr(checkpoint, "all_reduce_sum", lambda tensors: None)
    monkeypatch.setattr(checkpoint, "broadcast_json", lambda _: SavedPass._meta(going_on))

    def held(layout: str, shape: tuple[int, ...]) -> torch.Tensor:
        start, stop = ranks.slice_of(math.prod(shape))
        return torch.zeros(shape if layout == "replicated" else stop - start, dtype=torch.float64)

    def gathered(states: list[PassState], layout: str, name: str) -> torch.Tensor:
        parts = [state.sums[name].view(-1) for state in states]
        return torch.stack(parts).sum(0) if layout == "replicated" else torch.cat(parts)

    def loaded(layout: str, world: int) -> list[tuple[PassState, SavedPass]]:
        nonlocal here, going_on
        found = []
        for rank in range(world):
            here, going_on = (rank, world), SavedPass(tmp_path, 0)
            sums = {name: held(layout, shape) for name, shape in shapes.items()}
            state = PassState(torch.zeros(7, dtype=torch.float64), sums)
            going_on.load(state, {"work": 1}, shapes, layout)  # type: ignore[arg-type]
            found.append((state, going_on))
        return found

    here, going_on = (0, 1), SavedPass(tmp_path, 0)
    first = loaded(*before)
    # Rank 0 last: it says that the set is whole.
    for rank, (state, going_on) in reversed(list(enumerate(first))):
        here = (rank, len(first))
        for total in (state.traces, *state.sums.values()):
            total.copy_(torch.randn(total.shape, generator=generator, dtype=torch.float64))
        state.stop, state.left, state.taken = 20, list(range(rank, 11, len(first))), 9 + rank
        going_on.save(state)
    saved, found = [state for state, _ in first], [state for state, _ in loaded(*after)]
    for name in shapes:
        torch.testing.assert_close(gathered(found, after[0], name), gathered(saved, before[0], name))
    torch.testing.assert_close(sum(s.traces for s in found), sum(s.traces for s in saved))
    assert sorted(i for s in found for i in s.left) == list(range(11))
    assert max(len(s.left) for s in found) - min(len(s.left) for s in found) <= 1
    assert sum(s.taken for s in found) == sum(s.taken for s in saved)
    assert {s.stop for s in found} == {20}


def on_rank(rank: int, world: int, folder: str, layout: Any, stops: str) -> None:
    """A pass that writes what it says to a file; of which rank 1 gets a signal in the middle, unless it is "none"."""
    os.dup2(os.open(f"{folder}/said-{stops}-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    watchdog.SILENT_S = 12.0
    store, timeout = f"file://{folder}/store-{stops}", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    batches = 0

    def counted(rows: list[dict[str, Any]]) -> Any:
        nonlocal batches
        batches += 1
        if stops != "none" and rank == 1 and batches > 40:
            os.kill(os.getpid(), getattr(signal, stops))
        return collate(rows)

    options: dict[str, Any] = {"batch_size": 1, "layout": layout, "dtype": torch.float64, "save_minutes": 0}
    try:
        fisher = accumulate_fisher(
            tiny("bert"), samples(count=120), collate_fn=counted, save_to=f"{folder}/state", **options
        )
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
        raise
    result = {"diagonal": fisher.gather(), "trace": fisher.sample_trace, "taken": fisher.sample_gradients}
    torch.save({**result, "batches": batches}, f"{folder}/result-{rank}.pt")
    end_rank()


@pytest.mark.parametrize(
    ("layout", "stops"),
    [("sharded", "SIGKILL"), ("replicated", "SIGKILL"), pytest.param("sharded", "SIGSTOP", marks=pytest.mark.slow)],
)
def test_a_rank_that_dies_ends_the_others_and_the_pass_goes_on(layout: str, stops: str, tmp_path: Path) -> None:
    processes = run_ranks(on_rank, 2, str(tmp_path), layout, stops, join=False).processes
    try:
        if stops == "SIGKILL":
            processes[1].join(200)
            assert processes[1].exitcode == -signal.SIGKILL
        died = time.monotonic()
        processes[0].join(200)
        assert processes[0].exitcode == 1
        said = (tmp_path / f"said-{stops}-0").read_text()
        assert "rank 1 does not answer: killed, out of memory, or its machine is gone" in said
        assert stops != "SIGKILL" or time.monotonic() - died < 60, "a machine under load is given four times as long"
    finally:
        for process in processes:
            process.kill()
            process.join()
    for world in (1, 3) if stops == "SIGKILL" else ():
        shutil.copytree(tmp_path / "state", tmp_path / str(world) / "state")
    model, rows = tiny("bert"), samples(count=120)
    options: dict[str, Any] = {"batch_size": 1, "dtype": torch.float64, "layout": layout}
    expected = accumulate_fisher(model, rows, collate_fn=collate, **options)
    go_on(tmp_path, layout, 2, expected)
    if stops == "SIGKILL":
        go_on(tmp_path / "3", layout, 3, expected)
        counting = Collate(1000)
        found = accumulate_fisher(model, rows, collate_fn=counting, save_to=tmp_path / "1" / "state", **options)
        before = rows_before(model, rows, tmp_path / "whole", **options)
        assert counting.rows - before < 90, "what was done is not done again"
        assert found.sample_gradients == len(rows)
        check_same(found.gather(), found.sample_trace, expected)
        assert not (tmp_path / "1" / "state").exists()


def go_on(folder: Path, layout: str, world: int, expected: Fisher) -> None:
    """Finish an interrupted pass on some number of ranks."""
    run_ranks(on_rank, world, str(folder), layout, "none")
    for rank in range(world):
        found = torch.load(folder / f"result-{rank}.pt", weights_only=True)
        # Anew, it would be nine rows to compare, a batch to check, and this rank's share.
        assert rank or found["batches"] < 10 + 120 / world, "what was done is not done again"
        assert found["taken"] == 120
        check_same(found["diagonal"], found["trace"], expected)
    assert not (folder / "state").exists()


def check_same(diagonal: dict[str, torch.Tensor], trace: torch.Tensor, expected: Fisher) -> None:
    torch.testing.assert_close(trace, expected.sample_trace, rtol=1e-12, atol=1e-18)
    for name, value in expected.diagonal.items():
        torch.testing.assert_close(diagonal[name], value, rtol=1e-12, atol=1e-18)
