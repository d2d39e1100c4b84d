"""Performance as ratios, measured side by side in one run: every figure is a median over interleaved repeats.

Models are random, 20-40M parameters, batches of 8: `bert` (384 wide, 6 layers) and `llama` (512 wide, 6 layers), with
a classification head. Absolute times are printed too, and mean nothing on another machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from irdscale.errors import InputError
from irdscale.fisher import SampleGradients, accumulate_fisher, scored_parameters
from irdscale.fisher.accumulate import new_sums
from irdscale.mask import top_k
from irdscale.progress import bar
from irdscale.sparse import entries_of, sparsify

PARTS = ("fisher", "train")
MODELS = ("bert", "llama")
BATCH = 8
REPEATS = 9
RATIO = 0.005
HEAD = r"^(classifier|score)\."


def run_bench(part: str = "all", progress: bool = True) -> dict[str, Any]:
    """Measure `fisher`, `train` or `all`.

    Returns:
        {"threads", "rows": [{"part", "what", "model", "tokens", "ratio", "low", "high", "bar", "met", "seconds"}]}:
        `ratio` is the median over repeats, `low` and `high` its quartiles, `bar` what was asked for.

    Raises:
        InputError: there is no such part.
    """
    if part not in (*PARTS, "all"):
        raise InputError(f"bench: found {part!r}; expected one of {', '.join((*PARTS, 'all'))}")
    parts = PARTS if part == "all" else (part,)
    rows: list[dict[str, Any]] = []
    measures = {"fisher": (_bench_fisher, 4), "train": (_bench_train, 2)}
    with bar("Benchmarks", sum(measures[p][1] for p in parts), enabled=progress) as advance:
        for name in parts:
            rows += measures[name][0](advance)
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}


def make_model(name: str) -> Any:
    """A random classifier of 20-40M parameters, in evaluation mode (dropout would differ between the measured)."""
    import transformers

    torch.manual_seed(0)
    if name == "bert":
        config: Any = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
    else:
        config = transformers.LlamaConfig(
            hidden_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
            intermediate_size=1376,
            pad_token_id=0,
        )
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def make_rows(tokens: int, count: int = BATCH, seed: int = 0) -> list[dict[str, Any]]:
    """Random samples of equal length."""
    generator = torch.Generator().manual_seed(seed)
    ids_NT = torch.randint(5, 30_000, (count, tokens), generator=generator)
    return [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(ids_NT)]


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids_BT = torch.stack([row["input_ids"] for row in rows])
    labels_B = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels_B}


def side_by_side(measured: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function in each repeat; the order turns from repeat to repeat. One warm-up goes first."""
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    names = list(measured)
    for repeat in range(repeats + 1):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            measured[name]()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _row(
    part: str,
    what: str,
    model: str,
    tokens: int,
    seconds: dict[str, list[float]],
    over: str,
    under: str,
    limit: float | None = None,
    at_least: float | None = None,
) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    met = None
    if limit is not None:
        met = ratio <= limit
    elif at_least is not None:
        met = ratio >= at_least
    asked = f"<= {limit}" if limit is not None else f">= {at_least}" if at_least is not None else ""
    times = {name: statistics.median(seconds[name]) for name in (over, under)}
    return {
        "part": part,
        "what": what,
        "model": model,
        "tokens": tokens,
        "ratio": round(ratio, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "bar": asked,
        "met": met,
        "seconds": {name: round(value, 4) for name, value in times.items()},
    }


def _bench_fisher(advance: Callable[..., None]) -> list[dict[str, Any]]:
    rows = []
    for name in MODELS:
        model = make_model(name)
        scored = scored_parameters(model)
        for tokens in (128, 32):
            data = make_rows(tokens)
            batch = _collate(data)
            samples = SampleGradients(model, data, _collate, scored, batch_size=BATCH)
            traces = torch.zeros(len(data), dtype=torch.float64)
            order = range(len(data))
            sums = new_sums(samples, order)

            def plain(model: Any = model, batch: Any = batch) -> None:
                model.zero_grad(set_to_none=True)
                model(**batch).loss.backward()

            def one_sample_loop(model: Any = model, data: Any = data, sums: Any = sums) -> None:
                for row in data:
                    model.zero_grad(set_to_none=True)
                    model(**_collate([row])).loss.backward()
                    for parameter_name, parameter in model.named_parameters():
                        if parameter.grad is not None:
                            sums.tensors[parameter_name].addcmul_(parameter.grad, parameter.grad)

            def fisher(samples: Any = samples, order: Any = order, sums: Any = sums) -> None:
                samples.accumulate(order, sums)

            def trace(samples: Any = samples, order: Any = order, traces: Any = traces) -> None:
                samples.add_traces(order, traces)

            seconds = side_by_side({"plain": plain, "fisher": fisher, "trace": trace, "loop": one_sample_loop}, REPEATS)
            model.zero_grad(set_to_none=True)
            limit = 1.4 if tokens == 128 else None
            faster = 1.5 if tokens == 32 else 1.0
            what = "Fisher pass / plain forward+backward"
            rows.append(_row("fisher", what, name, tokens, seconds, "fisher", "plain", limit=limit))
            what = "one-sample loop (FISH) / Fisher pass"
            rows.append(_row("fisher", what, name, tokens, seconds, "loop", "fisher", at_least=faster))
            what = "trace pass / plain forward+backward"
            rows.append(_row("fisher", what, name, tokens, seconds, "trace", "plain"))
            advance()
    return rows


def _bench_train(advance: Callable[..., None]) -> list[dict[str, Any]]:
    rows = []
    tokens = 128
    for name in MODELS:
        data = make_rows(tokens)
        batch = _collate(data)
        full, limit, sparse, lora = make_model(name), make_model(name), make_model(name), make_model(name)
        fisher = accumulate_fisher(sparse, data, collate_fn=_collate, exclude=HEAD)
        sparsify(sparse, top_k(fisher, round(RATIO * sum(p.numel() for p in sparse.parameters()))), always_train=[HEAD])
        steps = {
            "sparse": _step(sparse, batch),
            "full": _step(full, batch),
            "limit": _limit(limit, batch),
            "lora": _step(_with_lora(lora, name), batch),
        }
        assert all(entries.values.requires_grad for entries in entries_of(sparse).values())
        seconds = side_by_side(steps, REPEATS)
        for what, under, bound in (
            ("sparse step / full fine-tuning step", "full", 0.85),
            ("sparse step / LoRA r=8 step (PEFT)", "lora", 1.0),
            ("sparse step / the limit (forward + input gradients)", "limit", 1.2),
        ):
            rows.append(_row("train", what, name, tokens, seconds, "sparse", under, limit=bound))
        advance()
    return rows


def _step(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()

    return step


def _limit(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and input gradients, nothing trainable: what no training of these layers can beat."""
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_().clone())

    def step() -> None:
        model(**batch).loss.backward()

    return step


def _with_lora(model: Any, name: str) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("bench train: found no peft; expected it installed (pip install 'irdscale[bench]')") from None
    targets = {
        "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
        "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=targets[name])).eval()
