"""Trials that share a GPU: what is refused, what is warned of, and what is said."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from irdscale.cluster.share import Card
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.memory import gpu_sharing
from irdscale.memory.gpu_sharing import describe, share_by_memory, sharing_of
from irdscale.memory.sizes import GIB

H100, L4 = Card("one", "H100", 80 * GIB, True), Card("two", "L4", 22 * GIB, True)
CONFIG = RunConfig.model_validate({"model": {"path": "a"}, "task": {"dataset": "glue/rte"}})


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch):
    """Have a trial's tensors take so many GiB."""

    def take(gib: float) -> None:
        monkeypatch.setattr(gpu_sharing, "trial_peak", lambda config, tokens: ("train", int(gib * GIB)))

    return take


def test_trials_that_fit(takes):
    takes(4.5)
    found = sharing_of(CONFIG, 0.25, [H100, L4])
    # Of the smaller GPU each has 5.5 GiB, half a one for CUDA.
    assert asdict(found) == {
        "share": 0.25,
        "trials": 4,
        "gpu": "L4",
        "gpu_gib": 22.0,
        "mps": True,
        "phase": "train",
        "trial_gib": 5.0,
        "most": 4,
        "fits": True,
    }
    assert json.loads(json.dumps(asdict(found))) == asdict(found)
    assert describe(found) == (
        "search.ray.gpus_per_rank=0.25: up to 4 trials may share a GPU by CUDA MPS; a trial needs an estimated 5.00 "
        "GiB, its share of L4 is 5.50 GiB, and 4 trials would fit"
    )
    assert sharing_of(CONFIG, 0.25, [H100]).most == 16


@pytest.mark.parametrize(("gib", "fits"), [(5.0, True), (5.01, False), (5.49, False)])
def test_what_a_plan_may_be_wrong_by_is_warned_of(takes, gib, fits):
    takes(gib)
    found = sharing_of(CONFIG, 0.25, [L4])
    assert found.fits is fits
    assert ("this is close: a trial that exceeds its share runs out of memory" in describe(found)) is not fits


@pytest.mark.parametrize(
    ("gib", "each", "expected"),
    [
        (5.51, "6.01", "at least 0.3333, for 3 trials"),
        (7.0, "7.50", "at least 0.5, for 2 trials"),
        (10.6, "11.1", "1"),
        (99, "99.5", "1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(takes, gib, each, expected):
    takes(gib)
    with pytest.raises(InputError) as caught:
        sharing_of(CONFIG, 0.25, [H100, L4])
    assert str(caught.value) == (
        f"search.ray.gpus_per_rank: found 0.25, 4 trials of {each} GiB each on a GPU of 22.0 GiB "
        f"(L4 of two); expected {expected}"
    )
    if expected != "1":
        sharing_of(CONFIG, float(expected.split(",")[0].split()[-1]), [L4])


@pytest.mark.parametrize(
    ("gib", "share"),
    # CUDA's 0.5 GiB, and a tenth more than estimated.
    [(0.1, 0.125), (2.0, 0.125), (2.1, 0.1428), (9.5, 0.5), (9.6, 1), (30, 1)],
)
def test_as_many_trials_as_the_smallest_gpu_holds_share_it(takes, gib, share):
    takes(gib)
    assert share_by_memory(CONFIG, [H100, L4]) == share
    # None on a GPU alone is checked.
    if share < 1:
        assert sharing_of(CONFIG, share, [H100, L4]).fits


def test_shares_are_for_the_largest_training_and_need_a_gpu_and_an_estimate(monkeypatch, caplog):
    monkeypatch.setattr(gpu_sharing, "trial_peak", lambda config, tokens: ("train", config.search.ratio * 20 * GIB))
    assert share_by_memory(CONFIG, [L4]) == 0.125
    assert share_by_memory(CONFIG, [L4], ratio=0.4) == 0.5
    assert share_by_memory(CONFIG, []) == 1
    monkeypatch.setattr(gpu_sharing, "trial_peak", None)
    assert share_by_memory(CONFIG, [L4]) == 1
    assert "search.ray.gpus_per_rank: how many trials fit is not known" in caplog.text


@pytest.mark.parametrize(("share", "warned"), [(0.5, False), (0.3, True)])
def test_a_dense_training_that_may_exceed_its_share_is_warned_of(monkeypatch, caplog, share, warned):
    monkeypatch.setattr(gpu_sharing, "trial_peak", lambda config, tokens: ("train", config.search.ratio * 8 * GIB))
    found = sharing_of(CONFIG, share, [L4], ratio=1.0)
    assert found.fits
    assert found == sharing_of(CONFIG, share, [L4])
    line = "a training of 100 % of the parameters needs up to 8.50 GiB, and its share is 6.60 GiB"
    assert caplog.messages == [f"search.ray.gpus_per_rank: {line}"] * warned


def test_without_a_gpu_in_truth_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(gpu_sharing, "trial_peak", None)
    found = sharing_of(CONFIG, 0.1, [])
    assert (found.trials, found.fits, found.mps) == (10, None, None)
    assert "memory is not checked, because no node shows a GPU" in describe(found)


def test_a_model_that_cannot_be_planned_is_not_refused(monkeypatch, caplog):
    def fail(config, tokens):
        raise ValueError("no list\nof layers")

    monkeypatch.setattr(gpu_sharing, "trial_peak", fail)
    found = sharing_of(CONFIG, 0.25, [H100])
    assert (found.trials, found.fits, found.mps) == (4, None, True)
    assert caplog.messages == [
        "search.ray.gpus_per_rank: whether 4 trials fit on a GPU is not known: no list of layers"
    ]


def test_mps_counts_where_it_runs_on_every_node(takes):
    takes(1)
    other = Card("three", "L4", 22 * GIB, False)
    assert sharing_of(CONFIG, 0.5, [L4, other]).mps is False
    assert "by time slices (start nvidia-cuda-mps-control -d" in describe(sharing_of(CONFIG, 0.5, [L4, other]))


def test_a_share_less_than_cuda_takes(takes):
    takes(0.001)
    with pytest.raises(InputError, match=r"found 0.02, 0.44 GiB of a GPU of 22.0 GiB; expected more than the 0.50 GiB"):
        sharing_of(CONFIG, 0.02, [L4])


def test_the_peak_of_a_trial_is_a_plans(tmp_path: Path):
    from irdscale.memory.gpu_sharing import trial_peak
    from irdscale.plan import run_plan

    model = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    model |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(model))
    config = RunConfig.model_validate(
        {
            "model": {"path": str(tmp_path), "dtype": "bfloat16"},
            "task": {"dataset": "a/b", "kind": "sft", "max_length": 64},
            "search": {"runner": "ray", "ratio": 0.01, "ray": {"gpus_per_rank": 0.25}},
            "train": {"steps": 10, "batch_size": 4, "eval_batch_size": 2},
        }
    )
    found, (phase, needed) = run_plan(config, tokens=32), trial_peak(config, 32)
    assert phase == "train"
    assert round(needed / GIB, 4) == found["phases"]["train"]["total"]
    # A room of a quarter, but Fisher passes have a GPU alone.
    assert found["fits"]
    assert found["trials_a_gpu"] == 4
    assert found["room_gib"] == 0.95 * 80 - 2
    assert found["trial_room_gib"] == 0.95 * 20 - 2
    (said,) = [line for line in found["advice"] if "share a GPU" in line]
    assert said.startswith(
        "4 trials may share a GPU (search.ray.gpus_per_rank=0.25), at an assumed 1/4 of its speed each"
    )
    assert "it has room for " in said
    alone = run_plan(config.model_copy(update={"search": config.search.model_copy(update={"ray": WHOLE})}), tokens=32)
    assert found["hours"]["candidate"] == pytest.approx(4 * alone["hours"]["candidate"], rel=1e-3)
    assert found["samples_per_second"]["train"] == pytest.approx(alone["samples_per_second"]["train"] / 4, rel=1e-3)
    # One GPU takes as long for all of them, however many share it.
    assert found["hours"]["search"] == alone["hours"]["search"]
    assert found["hours"]["fisher"] == alone["hours"]["fisher"]
    ray = config.search.ray.model_copy(update={"gpus_per_rank": "auto"})
    auto = run_plan(config.model_copy(update={"search": config.search.model_copy(update={"ray": ray})}), tokens=32)
    assert (auto["trials_a_gpu"], auto["fits"]) == (8, True)
    assert (alone["trials_a_gpu"], alone["trial_room_gib"]) == (1, alone["room_gib"])
    assert not [line for line in alone["advice"] if "share a GPU" in line]


WHOLE = RunConfig.model_validate(
    {"model": {"path": "a"}, "task": {"dataset": "glue/rte"}, "search": {"ray": {"gpus_per_rank": 1}}}
).search.ray


def test_whether_a_plan_fits_counts_all_trials_of_a_gpu(monkeypatch):
    """By made-up phases, of which the Fisher pass has a GPU alone."""
    from types import SimpleNamespace

    from irdscale.memory.sizes import Items
    from irdscale.plan import advice, hardware
    from irdscale.plan.costs import Job

    card = hardware.GPUS["l40s-48gb"]
    job = SimpleNamespace(gpu=card, share=0.25)
    job.room = lambda phase: Job.room(job, phase)
    rooms = {phase: job.room(phase) / GIB for phase in ("fisher", "traces", "begin", "train", "evaluate")}
    assert rooms == pytest.approx({"fisher": 43.6, "traces": 43.6} | dict.fromkeys(("begin", "train", "evaluate"), 9.4))
    for train, fits, most in ((9.3, True, 4), (9.5, False, 3), (20, False, 2), (50, False, 0)):
        found = {
            "fisher": Items(fisher=40 * GIB),
            "train": Items(weights=int(train * GIB)),
            "evaluate": Items(weights=GIB),
        }
        monkeypatch.setattr(advice, "phases", lambda job, layout, found=found: found)
        assert advice.fits(job, None) is fits
        assert Job.most_trials(job, found) == most
        # The phase that decides, not the one with the most bytes.
        assert advice.peak(job, None)[0] == "train"
    monkeypatch.setattr(advice, "phases", lambda job, layout: {"fisher": Items(fisher=44 * GIB)})
    assert not advice.fits(job, None)
