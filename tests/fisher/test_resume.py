"""A pass that was interrupted goes on to the same result, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale import accumulate_fisher
from irdscale.errors import InputError
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.lattice import ranked_entries_by_prefix
from irdscale.fisher.resume import SavedPass
from tests.models import collate, samples, tiny

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


@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_an_interrupted_pass_goes_on_to_the_same_bits(family: str, tmp_path: Path) -> None:
    model, rows = tiny(family).float(), samples(count=ROWS)
    # As many batches as are taken between two savings, twice, and the comparison of the work.
    batches = 9 + 1 + 32 + 3 if family == "deberta" else 9 + 1 + 16 + 3
    options: dict[str, Any] = {"batch_size": 1, "save_to": tmp_path / "state", "save_minutes": 0}
    expected = accumulate_fisher(model, rows, collate_fn=collate, batch_size=1)
    with pytest.raises(Interrupted):
        accumulate_fisher(model, rows, collate_fn=Collate(batches), **options)
    assert (tmp_path / "state" / "state.json").exists()
    counting = Collate(1000)
    fisher = accumulate_fisher(model, rows, collate_fn=counting, **options)
    assert counting.rows < ROWS, "what was done is not done again"
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
def test_a_lattice_goes_on_with_the_rankings_that_it_passed(stop_after: int, tmp_path: Path) -> None:
    model, rows = tiny("bert").float(), samples(count=ROWS)

    def run(collate_fn: Any, saved: SavedPass | None) -> tuple[dict[int, Any], SampleGradients]:
        gradients = SampleGradients(model, rows, collate_fn, scored_parameters(model), batch_size=1)
        return ranked_entries_by_prefix(gradients, range(ROWS), SIZES, 300, saved=saved), gradients

    expected, _ = run(collate, None)
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

    first = run(collate)
    counting = Collate(1000)
    assert torch.equal(run(counting), first)
    # The work is compared, and the rules are checked on two samples.
    assert counting.rows == 6 + 2


RANK = """
import os, signal, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from irdscale import accumulate_fisher, watch
from tests.models import collate, samples, tiny

rank, folder, layout, stops = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
watch.SILENT_S = 12.0
dist.init_process_group("gloo", init_method=f"file://{folder}/store-{stops}", rank=rank, world_size=2,
                        timeout=timedelta(seconds=300))
batches = 0

def counted(rows):
    global batches
    batches += 1
    if stops != "none" and rank == 1 and batches > 40:
        os.kill(os.getpid(), getattr(signal, stops))
    return collate(rows)

fisher = accumulate_fisher(tiny("bert"), samples(count=120), collate_fn=counted, batch_size=1, layout=layout,
                           dtype=torch.float64, save_to=f"{folder}/state", save_minutes=0)
if rank == 0:
    print("batches", batches)
whole = fisher.gather()
torch.save({"diagonal": whole, "trace": fisher.sample_trace}, f"{folder}/result-{rank}.pt")
"""


def run_ranks(folder: Path, layout: str, stops: str) -> list[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": os.getcwd()}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder), layout, stops],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    ("layout", "stops"),
    [("sharded", "SIGKILL"), ("replicated", "SIGKILL"), pytest.param("sharded", "SIGSTOP", marks=pytest.mark.slow)],
)
def test_a_rank_that_dies_ends_the_others_and_the_pass_goes_on(layout: str, stops: str, tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, layout, stops)
    try:
        if stops == "SIGKILL":
            assert ranks[1].wait(200) == -signal.SIGKILL
        died = time.monotonic()
        _, errors = ranks[0].communicate(timeout=200)
        assert ranks[0].returncode == 1
        assert "rank 1 does not answer: killed, out of memory, or its machine is gone" in errors
        assert stops != "SIGKILL" or time.monotonic() - died < 60, "a machine under load is given four times as long"
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    again = run_ranks(tmp_path, layout, "none")
    outputs = [process.communicate(timeout=300) for process in again]
    assert [process.returncode for process in again] == [0, 0], outputs
    model, rows = tiny("bert"), samples(count=120)
    expected = accumulate_fisher(model, rows, collate_fn=collate, batch_size=1, dtype=torch.float64)
    assert int(outputs[0][0].split()[-1]) < 60, "what was done is not done again"
    for rank in range(2):
        found = torch.load(tmp_path / f"result-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["trace"], expected.sample_trace, rtol=1e-12, atol=1e-18)
        for name, diagonal in expected.diagonal.items():
            torch.testing.assert_close(found["diagonal"][name], diagonal, rtol=1e-12, atol=1e-18)
    assert not (tmp_path / "state").exists()
