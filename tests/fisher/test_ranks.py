"""Two and three ranks against one process: the same Fisher, traces and masks, and errors on all ranks at once."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from irdscale import accumulate_fisher, top_k
from irdscale.distributed.ranks import (
    BUCKET_ENTRIES,
    all_reduce_sum,
    end_rank,
    failing_together,
    gather_texts,
    rank_and_world,
    shard,
)
from irdscale.errors import InputError, RunError
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.activations import of_linear_layers
from irdscale.fisher.nested import ranked_entries_by_prefix
from tests.spawned import run_ranks
from tests.tiny_models import collate, samples, tiny

COUNTS = (7, 2, 1)
FAMILIES = ("bert", "gpt2", "deberta")
LAYOUTS: tuple[Any, ...] = ("replicated", "sharded")
SIZES = [7, 3, 1]
# Masks of so many entries, 1 to 10 % of the pretrained model's, show a difference of 0.001.
MANY = (2600, 8000, 26000)
PRETRAINED = Path(__file__).resolve().parents[2] / "configs/models/stories260K"
SCORES: tuple[Any, ...] = ("gradient", "saliency", "gem", "gallop", "magnitude", "random")
OF_INPUTS: tuple[Any, ...] = ("activation", "mean_activation")
PAIRS = [(s, p) for s in SIZES for p in (200, 100, 50)]


def mask_hashes(gradients: SampleGradients, order: Any = range(7), **options: Any) -> list[str]:
    options = {"dtype": torch.float64, **options}
    rankings = ranked_entries_by_prefix(gradients, order, SIZES, 200, **options)
    return [rankings[s].prefix(p).hash for s, p in PAIRS]


def gradients_of(model: Any, **options: Any) -> SampleGradients:
    return SampleGradients(model, samples(count=7), collate, scored_parameters(model), batch_size=2, **options)


def work(layout: Any) -> dict[str, Any]:
    """What every world size and layout must agree on."""
    found: dict[str, Any] = {}
    for family in FAMILIES:
        model = tiny(family)
        for count in COUNTS:
            rows = samples(count=7)[:count]
            fisher = accumulate_fisher(
                model, rows, collate_fn=collate, batch_size=2, dtype=torch.float64, layout=layout
            )
            found[f"{family} {count}"] = {
                "trace": fisher.sample_trace,
                "taken": torch.tensor(fisher.sample_gradients),
                **fisher.gather(),
            }
        for part in fisher.diagonal.values():
            # A key's bias has a gradient of rounding errors, which differ by the number of threads.
            part[part < 1e-20] = 0
        found[f"{family} mask"] = {k: top_k(fisher, k).hash for k in (0, 1, 100, 3000)}
        gradients = gradients_of(model)
        traces = torch.zeros(7, dtype=torch.float64)
        gradients.add_traces(range(7), traces)
        order = traces.sort(descending=True, stable=True).indices.tolist()
        hashes = mask_hashes(gradients, order, layout=layout)
        found[f"{family} losses"] = {"loss": gradients.label_losses([i % 3 for i in range(7)])}
        found[f"{family} masks"] = {"trace": traces, "taken": torch.tensor(gradients.taken), "hashes": hashes}
    model = tiny("bert")
    for score in SCORES:
        found[score] = {"hashes": mask_hashes(gradients_of(model), score=score, layout=layout)}
    for score in OF_INPUTS:
        gradients = gradients_of(model)
        gradients.scored = of_linear_layers(model, gradients.scored)
        found[score] = {"hashes": mask_hashes(gradients, score=score, layout=layout)}
    for objective in ("expected", "sampled"):
        gradients = gradients_of(model, objective=objective)
        found[objective] = {"hashes": mask_hashes(gradients, layout=layout), "taken": torch.tensor(gradients.taken)}
    found["layerwise"] = {"hashes": mask_hashes(gradients_of(model), scope="layerwise", layout=layout)}
    found["offload"] = {"hashes": mask_hashes(gradients_of(model), layout=layout, offload=True)}
    found["float32"] = {"masks": float32_masks(layout)}
    return found


def float32_masks(layout: Any) -> dict[str, torch.Tensor]:
    """The masks of a pretrained model by float32 sums, as entries numbered through the model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(PRETRAINED, dtype=torch.float32).eval()
    rows = samples("lm", count=24, longest=24)
    gradients = SampleGradients(model, rows, collate, scored_parameters(model), batch_size=4)
    rankings = ranked_entries_by_prefix(gradients, range(24), [24, 11], max(MANY), layout=layout)
    return {
        f"{s} samples, {p} entries": ranking.parameter[:p] * 10**6 + ranking.index[:p]
        for s, ranking in rankings.items()
        for p in MANY
    }


def one_error_for_all(rank: int, world: int) -> list[str]:
    """Mistakes of one rank, as every rank sees them."""
    seen = []
    model = tiny("bert", "regression")

    def attempt(rows: list[dict[str, Any]], **options: Any) -> None:
        chosen = options.pop("model", model)
        try:
            accumulate_fisher(chosen, rows, collate_fn=collate, batch_size=2, **options)
        except (InputError, RuntimeError) as error:
            seen.append(str(error))

    rows = samples("regression", count=7)
    attempt(rows if rank == 0 else rows[:-1])
    attempt(rows if rank == 0 else [rows[1], *rows[1:]])
    attempt(rows, model=model if rank == 0 else tiny("bert", "regression", hidden_size=8))
    attempt(rows, model=model if rank == 0 else tiny("bert", "regression", seed=1))
    attempt(rows, objective="label" if rank == 0 else "sampled")
    attempt(rows, layout="sharded" if rank == 0 else "replicated")
    attempt(rows, dtype=torch.float32 if rank == 0 else torch.float64)
    with pytest.raises(InputError, match=r"rank 1 has another order of samples"):
        mask_hashes(gradients_of(tiny("bert")), range(7) if rank == 0 else [1, 0, *range(2, 7)])
    broken = [rows[0], {**rows[1], "labels": float("nan")}, *rows[2:]]
    with pytest.raises(InputError, match=r"sample 1 \(row 1 of its split\): found a loss of nan"):
        SampleGradients(model, broken, collate, scored_parameters(model), batch_size=1).label_losses(range(7))
    for layout in LAYOUTS:
        # Sample 1 falls to rank 1 alone.
        attempt(broken, layout=layout)
        attempt(rows, model=Failing(model, rank == world - 1), layout=layout)
    try:
        with failing_together():
            if rank == world - 1:
                raise MemoryError("no room")
    except (RunError, MemoryError) as error:
        seen.append(str(error))
    return seen


class Failing(torch.nn.Module):
    """Breaks in the backward pass after its last layer has sent its gradient, if asked to."""

    def __init__(self, model: Any, fails: bool) -> None:
        super().__init__()
        self.model, self.fails = model, fails
        self.config = model.config

    def forward(self, **inputs: Any) -> Any:
        handle = self.model.bert.register_forward_hook(self._spoil) if self.fails else None
        try:
            return self.model(**inputs)
        finally:
            if handle is not None:
                handle.remove()

    def _spoil(self, _module: Any, _args: Any, output: Any) -> None:
        def fail(_gradient: Any) -> None:
            raise RuntimeError("broken layer")

        if output.pooler_output.requires_grad:
            output.pooler_output.register_hook(fail)


def on_rank(rank: int, world: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    assert rank_and_world() == (rank, world)
    shares = gather_texts(" ".join(map(str, shard(range(5)))))
    assert sorted(int(i) for share in shares for i in share.split()) == list(range(5))
    # More than a bucket, two types, one tensor that is not contiguous.
    tensors = [
        torch.full((BUCKET_ENTRIES,), rank + 1.0),
        torch.full((3, 2), rank + 1.0).t(),
        torch.full((2,), rank + 1, dtype=torch.int64),
        torch.full((5,), rank + 1.0),
    ]
    all_reduce_sum(tensors)
    for tensor in tensors:
        assert bool((tensor == world * (world + 1) // 2).all())
    found = {layout: work(layout) for layout in LAYOUTS}
    torch.save({"found": found, "errors": one_error_for_all(rank, world)}, f"{folder}/{world}-{rank}.pt")
    end_rank()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return work("replicated")


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of a mask's entries that another mask of as many has too."""
    assert len(a) == len(b) == len(a.unique()) == len(b.unique())
    return float(torch.isin(a, b).double().mean())


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_with_one_process(world: int, alone: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(on_rank, world, str(tmp_path))
    results = [torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    for result in results:
        for layout in LAYOUTS:
            found_here = result["found"][layout]
            assert found_here.keys() == alone.keys()
            for case, expected in alone.items():
                for name, value in expected.items():
                    found = found_here[case][name]
                    if isinstance(value, torch.Tensor):
                        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-18, msg=f"{layout} {case}: {name}")
                    elif case == "float32":
                        overlaps = {mask: overlap(found[mask], entries) for mask, entries in value.items()}
                        print(f"{world} ranks, {layout}, float32: overlap with one process {overlaps}")
                        assert min(overlaps.values()) >= 0.999
                    else:
                        assert found == value, f"{layout} {case}: {name}"
    expected_errors = [
        "has another number of samples: found 6; expected 7, as on rank 0",
        "has another data set: found",
        "has another model: found",
        "has another model: found",
        "has another objective: found sampled, mean, seed 0; expected label, mean, seed 0",
        "has another layout: found replicated; expected sharded, as on rank 0",
        "has another data type of the sums: found torch.float64; expected torch.float32, as on rank 0",
        *["sample 1 (row 1 of its split): found a loss of nan", "broken layer"] * 2,
        "no room",
    ]
    for rank, result in enumerate(results):
        assert len(result["errors"]) == len(expected_errors)
        for found, part in zip(result["errors"], expected_errors, strict=True):
            assert part in found
            assert found.startswith("rank ") or rank in (1, world - 1)
    other = results[0]["errors"]
    assert other[0].startswith("rank 1 ")
    assert other[7].startswith("rank 1: sample 1")
    assert other[8] == other[10] == f"rank {world - 1}: broken layer"
    assert other[11] == f"rank {world - 1}: no room"
