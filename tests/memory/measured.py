"""What real passes keep in memory at their peak, on ranks of this machine's processors."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import end_rank
from irdscale.fisher.nested import ranked_entries_by_prefix
from irdscale.fisher.pool import pass_options, sample_gradients
from irdscale.masks.mask import Mask
from irdscale.models.build import build_model
from irdscale.tasks import Task, load_task
from irdscale.training.trainable import sparse_model, trained_densely
from irdscale.training.trainer import fine_tune
from irdscale.utils.quantized import is_quantized, parts_of
from tests.helpers import Family, tiny_model
from tests.sparse.oracle import random_mask

TOKENS, BATCH, SAMPLES, STEPS = 64, 8, 16, 3
SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 640,
        "num_hidden_layers": 6,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "intermediate_size": 1728,
        "max_position_embeddings": 128,
    },
    "bert": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "max_position_embeddings": 128,
    },
}


# A causal language model whose vocabulary is much of it.
SIZES["text"] = SIZES["llama"] | {"vocab_size": 16384}


def make_folder(folder: Path, family: str) -> Path:
    """A random model of 25 to 45 million parameters, texts of which one in four is short, and a configuration."""
    text = family == "text"
    model: Family = "llama" if text else family  # type: ignore[assignment]
    tiny_model(model, folder / "model", causal=text, **SIZES[family])
    rows = [{"text": "good film " * (20 if i % 4 == 3 else 60), "label": i % 2} for i in range(80)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model")},
        "task": {
            "dataset": str(folder / "data.jsonl"),
            "kind": "sequence-classification",
            "columns": {"text": ["text"], "label": "label"},
            "max_length": TOKENS,
        },
        # The masks here are random, of all matrices alike.
        "fisher": {"samples": SAMPLES, "batch_size": BATCH, "scope": "layerwise"},
        "search": {"min_samples": SAMPLES},
        "train": {"steps": STEPS, "batch_size": BATCH},
    }
    if text:
        config["task"] |= {"kind": "causal-lm", "columns": {"text": ["text"]}}
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def held(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, of a partitioned one those of its partition."""
    tensors = [getattr(t, "ds_tensor", t) for t in (*model.parameters(), *model.buffers())]
    tensors += [part for p in model.parameters() if is_quantized(p) for part in parts_of(p).values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak(work: Callable[[], object]) -> int:
    """The most bytes of tensors that are live at once, above those before.

    The profiler does not see what a thread of gloo's frees: a place that is given out again has been freed before.
    """
    # What an earlier model leaves must not be freed while this one is watched.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    held: dict[int, int] = {}
    live = most = 0
    for fields in _allocations(results.experimental_event_tree()):
        live -= held.pop(fields.ptr, 0 if fields.alloc_size > 0 else -fields.alloc_size)
        if fields.alloc_size > 0:
            held[fields.ptr] = fields.alloc_size
            live += fields.alloc_size
        most = max(most, live)
    return most


def _allocations(events: list[Any]) -> list[Any]:
    """What is given out and taken back, in order."""
    found, left = [], list(events)
    while left:
        event = left.pop()
        left += event.children
        if event.tag == _EventType.Allocation:
            found.append(event)
    return [event.extra_fields for event in sorted(found, key=lambda event: event.start_time_ns)]


def fisher_peak(config: RunConfig, task: Task) -> int:
    """Bytes of a rank at the peak of the two passes over samples, the model's included."""
    model, new = build_model(config, task, 0)
    samples = sample_gradients(config, task, model, range(SAMPLES), trained_densely(config, model, new))
    traces = torch.zeros(SAMPLES, dtype=torch.float64)

    def work() -> None:
        samples.add_traces(range(SAMPLES), traces)
        ranked_entries_by_prefix(samples, range(SAMPLES), [SAMPLES], 1000, **pass_options(config))

    return held(model) + peak(work)


def train_peak(config: RunConfig, task: Task, mask: Mask) -> int:
    """Bytes of a rank at the peak of some training steps, the model's included."""
    model = sparse_model(config, task, mask, 0)
    before = held(model) + sum(t.nbytes for e in model._irdscale.entries.values() for t in (e.index, e.base))  # type: ignore[union-attr]
    return before + peak(lambda: fine_tune(model, task, config, 0))


def mask_for(config: RunConfig, task: Task) -> Mask:
    """A mask of the search's size, spread over all matrices."""
    plain = config.model_copy(
        update={
            "model": config.model.model_copy(update={"quantize": None}),
            "train": config.train.model_copy(update={"deepspeed": None}),
        }
    )
    model, new = build_model(plain, task, 0)
    return random_mask(model, config.search.ratio, leave=tuple(new))


def on_rank(rank: int, world: int, folder: str, family: str, cases: dict[str, tuple[str, list[str]]]) -> None:
    """Measure cases, name -> (`fisher` or `train`, overrides), and have rank 0 write their peaks."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        store = f"file://{folder}/store-{family}-{world}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    found = {}
    for name, (what, overrides) in cases.items():
        config = load_config(Path(folder) / family / "config.yaml", overrides)
        task = load_task(config)
        found[name] = (
            fisher_peak(config, task) if what == "fisher" else train_peak(config, task, mask_for(config, task))
        )
    if rank == 0:
        (Path(folder) / f"peaks-{family}-{world}.json").write_text(json.dumps(found))
    if world > 1:
        end_rank()
    os._exit(0)
