"""Fisher passes over models in DeepSpeed ZeRO-3 partitions, against the same models without partitions."""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from irdscale import accumulate_fisher, top_k
from irdscale.distributed.deepspeed import compile_nothing
from irdscale.distributed.ranks import end_rank
from irdscale.distributed.zero3 import unwrapped
from irdscale.errors import InputError
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.activations import input_sizes
from irdscale.fisher.nested import ranked_entries_by_prefix
from irdscale.fisher.scores import entry_scores
from irdscale.fisher.sums import ReplicatedSums, ShardedSums
from tests.spawned import run_ranks
from tests.tiny_models import collate, samples, tiny

# Family, head, and which parameters: of a language model's blocks alone, the head runs a few tokens at a time.
CASES = (
    ("llama", "classification", None),
    ("bert", "classification", None),
    ("gpt2", "lm", None),
    ("llama", "lm", r"\.layers\."),
    ("albert", "classification", None),
)
SIZES = [7, 3, 1]
# Nothing stays gathered and nothing is gathered ahead, so that the tests see every gathering.
ZERO = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    },
}

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def partitioned(folder: str) -> Any:
    """Loaded straight into partitions: no rank ever holds the whole model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.integrations import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig(ZERO)
    auto = AutoModelForCausalLM if folder.endswith("lm") else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder)
    del keep
    assert all(p.numel() == 0 for p in model.parameters())
    return model


def gradients_of(model: Any, rows: list[dict[str, Any]], include: str | None = None) -> SampleGradients:
    return SampleGradients(model, rows, collate, scored_parameters(model, include), batch_size=2)


def hashes(model: Any, rows: list[dict[str, Any]], score: Any, layout: Any) -> list[str]:
    gradients = gradients_of(model, rows)
    options: dict[str, Any] = {"score": score, "layout": layout, "dtype": torch.float64}
    rankings = ranked_entries_by_prefix(gradients, range(len(rows)), SIZES, 200, **options)
    return [rankings[s].prefix(p).hash for s in SIZES for p in (200, 100)]


def close(found: Any, expected: Any) -> None:
    """float32 gradients agree to rounding, which is small beside a layer's largest entry."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = float(value.max())
        # A key's bias has no gradient but rounding.
        assert float((found[name] - value).abs().max()) <= 2e-6 * largest + 1e-12, name


def check(rank: int, folder: str, family: str, head: str, include: str | None) -> None:
    import deepspeed

    whole = tiny(family, head).float()
    place = f"{folder}/{family}-{head}"
    if rank == 0:
        whole.save_pretrained(place)
    dist.barrier()
    for count in (7, 1):
        rows = samples(head, count=7)[:count]
        options: dict[str, Any] = {"collate_fn": collate, "batch_size": 2, "dtype": torch.float64, "include": include}
        expected = accumulate_fisher(whole, rows, **options)
        losses = gradients_of(whole, rows, include).label_losses(range(count))
        for turn, layout in enumerate(("replicated", "sharded")):
            # Each layout with and without it: once on seven samples, once on one.
            checkpointing = family in ("llama", "gpt2") and (turn + (count == 1) + (family == "gpt2")) % 2 == 1
            model = partitioned(place)
            if checkpointing:
                model.gradient_checkpointing_enable()
            # Only loaded into partitions, then in an engine.
            for in_engine in (False, True):
                given = deepspeed.initialize(model=model, config=ZERO)[0] if in_engine else model
                fisher = accumulate_fisher(given, rows, layout=layout, **options)
                close(fisher.gather(), expected.diagonal)
                torch.testing.assert_close(fisher.sample_trace, expected.sample_trace, rtol=1e-5, atol=0)
                assert fisher.sample_gradients == count
                found = gradients_of(unwrapped(given), rows, include).label_losses(range(count))
                torch.testing.assert_close(found, losses, rtol=1e-5, atol=0)
                assert top_k(fisher, 99).k == 99
                # An engine keeps some of what runs twice until its next step; the head apart does.
                twice = checkpointing or family == "albert" or include is not None
                assert (twice and in_engine) or all(p.numel() == 0 for p in model.parameters())


def gathered_at_once(rank: int, folder: str) -> None:
    """The parameters that are whole while a layer's terms arrive: that layer's, not the model's."""
    import deepspeed

    model = partitioned(f"{folder}/llama-classification")
    engine = deepspeed.initialize(model=model, config=ZERO)[0]
    total = sum(p.ds_numel for p in model.parameters())
    seen: list[int] = []
    for kind in (ReplicatedSums, ShardedSums):
        arrive = kind.arrive

        def spy(self: Any, *args: Any, arrive: Any = arrive) -> None:
            seen.append(sum(p.numel() for p in model.parameters()))
            arrive(self, *args)

        kind.arrive = spy  # type: ignore[method-assign]
        layout: Any = "sharded" if kind is ShardedSums else "replicated"
        accumulate_fisher(engine, samples(count=4), collate_fn=collate, batch_size=2, layout=layout)
        kind.arrive = arrive  # type: ignore[method-assign]
    assert seen
    assert max(seen) < total / 3, (max(seen), total)


def one_that_fails(rank: int, folder: str) -> None:
    model = partitioned(f"{folder}/llama-classification")
    rows = samples(count=7)
    rows[1] = {**rows[1], "labels": 99}
    with pytest.raises((InputError, IndexError, RuntimeError)):
        accumulate_fisher(model, rows, collate_fn=collate, batch_size=2)
    whole = tiny("deberta").float()
    if rank == 0:
        whole.save_pretrained(f"{folder}/deberta")
    dist.barrier()
    with pytest.raises(InputError, match="DebertaV2ForSequenceClassification: cannot run in ZeRO-3 partitions"):
        accumulate_fisher(partitioned(f"{folder}/deberta"), samples(count=7), collate_fn=collate)


def on_rank(rank: int, world: int, folder: str) -> None:
    import deepspeed

    torch.set_num_threads(1)
    # DeepSpeed asks for a launcher's variables.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    timeout = timedelta(seconds=90)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    compile_nothing()
    deepspeed.init_distributed("gloo")
    for family, head, include in CASES:
        check(rank, folder, family, head, include)
    for layout in ("replicated", "sharded"):
        rows, whole = samples(count=7), tiny("bert").float()
        for score in ("saliency", "gem", "magnitude", "random"):
            found = hashes(partitioned(f"{folder}/bert-classification"), rows, score, layout)
            assert score in ("saliency", "gem") or found == hashes(whole, rows, score, layout), (score, layout)
        # Five samples for two ranks, so that one makes a pass that does not count.
        models = [partitioned(f"{folder}/bert-classification"), whole]
        own = [gradients_of(model, rows[:5], r"(query|dense)\.weight") for model in models]
        sizes = [input_sizes(one, range(5), [5], "activation", layout=layout)[5] for one in own]
        scores = [entry_scores("activation", one.scored, size, 0, layout) for one, size in zip(own, sizes, strict=True)]
        for name, value in scores[1].items():
            torch.testing.assert_close(scores[0][name], value, rtol=1e-5, atol=1e-6)
    gathered_at_once(rank, folder)
    one_that_fails(rank, folder)
    (Path(folder) / f"done-{rank}").touch()
    end_rank()


@needs_deepspeed
@pytest.mark.usefixtures("ranks_of_deepspeed")
def test_partitioned_models_equal_whole_ones(tmp_path: Path) -> None:
    run_ranks(on_rank, 2, str(tmp_path))
    assert [(tmp_path / f"done-{rank}").exists() for rank in range(2)] == [True, True]
