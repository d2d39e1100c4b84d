"""Exactness on a device, against float64 on the CPU: the Fisher diagonal, sparse steps, and `fine_tune`.

Each expected value is computed independently of the checked code: by one backward pass per sample, and by dense AdamW
with masked gradients. Models are tiny and random, with the same rounded weights on both sides.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import gather_texts, rank_and_world
from irdscale.distributed.zero3 import gathered_parameters
from irdscale.fisher import Fisher, accumulate_fisher
from irdscale.fisher.diagonal import Layout
from irdscale.masks.mask import Mask, top_k
from irdscale.models.build import build_model
from irdscale.models.chunked_losses import IGNORED
from irdscale.sparse import merge, sparsify, trained_numbers
from irdscale.tasks import Task, load_task
from irdscale.training.trainable import sparse_model
from irdscale.training.trainer import fine_tune, training_order

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart_llm.yaml"
FAMILIES = ("bert", "gpt2", "llama", "mixtral")
DTYPES = (torch.float32, torch.bfloat16)
HEAD = r"^(classifier|score)\."
VOCABULARY, HIDDEN, MLP, LAYERS, HEADS, LONGEST = 96, 32, 48, 2, 2, 24
SAMPLES, BATCH = 6, 4
RATIO, STEPS, RATE, DECAY = 0.02, 4, 1e-2, 0.1
# Settings of the training of the quickstart's model.
TUNING = (
    "train.steps=4",
    "train.learning_rate=0.01",
    "train.schedule=constant_with_warmup",
    "train.warmup_ratio=0",
    "train.max_grad_norm=1e9",
)


@dataclass(frozen=True)
class Limits:
    """Largest allowed errors of a device relative to float64.

    In float32 each entry's error is divided by its parameter's largest entry: eight seeds on a CPU had errors of at
    most 4e-6 (diagonal) and 2e-5 (deltas). In bfloat16, which rounds by 2^-9 at each operation, the norm of the error
    is divided by the norm: at most 0.07 and 0.11.

    Attributes:
        diagonal: error of the Fisher diagonal.
        floor: least share of the model's largest entry by which an error is divided: some gradients are 0 up to
            rounding.
        deltas: error of the trained deltas.
        norm: whether norms are compared.
    """

    diagonal: float
    floor: float
    deltas: float
    norm: bool


LIMITS = {torch.float32: Limits(1e-5, 1e-6, 2e-4, False), torch.bfloat16: Limits(0.1, 1e-3, 0.15, True)}
# Error of `fine_tune`, whose batches are larger; a CPU has 2e-5.
TUNED_LIMIT = 1e-3


@dataclass(frozen=True)
class Check:
    """A check, its error (or another value with an upper limit), and an exception's text instead."""

    name: str
    error: float
    limit: float
    seconds: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether it passed; a NaN error does not."""
        return not self.problem and self.error <= self.limit

    def line(self) -> str:
        """The check as a line of text."""
        found = self.problem or f"{self.error:.1e}, at most {self.limit:.0e}"
        return f"{'ok    ' if self.ok else 'FAILED'} {self.seconds:6.1f} s  {self.name}: {found}"


def checked(name: str, limit: float, work: Callable[[], float]) -> Check:
    """Run a check; an exception makes it fail. Collective: the largest error of all ranks counts."""
    started = time.perf_counter()
    error, problem = float("inf"), ""
    try:
        error = work()
    except Exception as raised:  # devices, compilers and libraries raise anything; the other checks go on
        problem = " ".join(f"{type(raised).__name__}: {raised}".split())[:300]
    found = [text.partition(" ") for text in gather_texts(f"{error} {problem}")]
    error = max((float(part[0]) for part in found), key=lambda e: float("inf") if e != e else e)
    problem = next((part[2] for part in found if part[2]), "")
    return Check(name, error, limit, time.perf_counter() - started, problem)


def exactness(device: torch.device) -> Iterator[Check]:
    """The Fisher diagonal and sparse steps of each family and data type, and the quickstart's model in `fine_tune`."""
    for family in FAMILIES:
        for dtype in DTYPES:
            limits, name = LIMITS[dtype], f"{family}, {str(dtype).removeprefix('torch.')}"
            yield checked(f"Fisher diagonal, {name}", limits.diagonal, partial(diagonal_error, family, dtype, device))
            yield checked(f"sparse AdamW steps, {name}", limits.deltas, partial(steps_error, family, dtype, device))
    yield checked("fine_tune, Llama of the quickstart, float32", TUNED_LIMIT, tuned_error)


# Models and samples.


def tiny(family: str, dtype: torch.dtype) -> Any:
    """A random model of some thousand parameters on the CPU, in evaluation mode; every parameter has an effect."""
    import transformers as t

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    sizes |= {"intermediate_size": MLP, "max_position_embeddings": LONGEST, "pad_token_id": 0, "num_labels": 3}
    torch.manual_seed(0)
    config: Any
    if family == "bert":
        config = t.BertConfig(**sizes)
    elif family == "gpt2":
        config = t.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    elif family == "llama":
        config = t.LlamaConfig(**sizes, num_key_value_heads=1)
    else:
        # A rounded router may choose other experts: in bfloat16 each token uses all of them.
        chosen = 2 if dtype == torch.float32 else 4
        config = t.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=chosen)
    auto: Any = t.AutoModelForCausalLM if is_language(family) else t.AutoModelForSequenceClassification
    # The default implementation of experts does not support all types and devices.
    options = {"experts_implementation": "eager"} if family == "mixtral" else {}
    model = auto.from_config(config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases start at 0 and norms at 1: random values make a wrong rule visible.
            parameter += 0.2 * torch.randn_like(parameter)
            # Buffers stay float32, as rotary embeddings need.
            parameter.data = parameter.data.to(dtype)
    return model


def is_language(family: str) -> bool:
    """Whether the family is checked as a causal language model; else as a classifier."""
    return family in ("llama", "mixtral")


def in_float64(model: Any) -> Any:
    """A copy on the CPU with the same values in float64."""
    wide = copy.deepcopy(model).cpu()
    for parameter in wide.parameters():
        parameter.data = parameter.data.double()
    return wide


def samples(language: bool) -> list[dict[str, Any]]:
    """Samples of different lengths; the first is the longest."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(SAMPLES):
        length = LONGEST if i == 0 else int(torch.randint(2, LONGEST + 1, (1,), generator=generator))
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator)
        rows.append({"input_ids": ids, "labels": ids if language else torch.tensor(i % 3)})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch, padded on the right."""
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    ids = [row["input_ids"] for row in rows]
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": pad(ids),
        "attention_mask": pad([torch.ones_like(x) for x in ids]),
        "labels": pad(labels, padding_value=IGNORED) if labels[0].dim() else torch.stack(labels),
    }


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The Hugging Face loss of a batch, without its rounding of logits to float32."""
    logits, labels = model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
    if labels.dim() == 2:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    return F.cross_entropy(logits, labels)


# The Fisher diagonal.


@cache
def expected_diagonal(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The mean of squared gradients in float64, by one backward pass per sample."""
    model, rows = in_float64(tiny(family, dtype)), samples(is_language(family))
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        _loss(model, collate([row])).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad**2
    return {name: total / len(rows) for name, total in sums.items()}


def diagonal_error(family: str, dtype: torch.dtype, device: torch.device, layout: Layout = "replicated") -> float:
    """Error of `accumulate_fisher` on a device; collective."""
    model, expected = tiny(family, dtype).to(device), expected_diagonal(family, dtype)
    rows = samples(is_language(family))
    found = accumulate_fisher(model, rows, collate_fn=collate, batch_size=BATCH, layout=layout).gather()
    assert found.keys() == expected.keys(), "the diagonal covers other parameters"
    return largest_error(found, expected, LIMITS[dtype].floor, LIMITS[dtype].norm)


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor], floor: float, norm: bool) -> float:
    """The largest relative error over parameters; see `Limits`.

    Args:
        floor: least share of the model's largest entry (norm) by which an error is divided.
    """

    def size(x: Tensor) -> Tensor:
        return x.norm() if norm else x.abs().max()

    sizes = {name: size(x) for name, x in expected.items()}
    least = floor * max(sizes.values())
    errors = [size(found[n].cpu().double() - x) / torch.maximum(sizes[n], least) for n, x in expected.items()]
    # Python's max() would ignore NaN.
    return float(torch.stack(errors).max())


# Sparse training.


class _Dense:
    """AdamW in float64 on the CPU with masked gradients: of deltas in masked parameters, of the parameters in heads.

    A masked parameter's weights are base + delta, rounded to the type of the checked model.
    """

    def __init__(self, model: Any, mask: Mask, heads: tuple[str, ...], dtype: torch.dtype, **options: float) -> None:
        self.model, self._dtype = in_float64(model), dtype
        self._parameters = dict(self.model.named_parameters())
        self._base = {n: p.detach().clone() for n, p in self._parameters.items()}
        self._mask, self.trained = {}, {}
        for name, parameter in self._parameters.items():
            if name in mask.indices:
                chosen = torch.zeros(parameter.numel(), dtype=torch.bool)
                chosen[mask.indices[name].long()] = True
                self._mask[name] = chosen.view(parameter.shape)
                self.trained[name] = torch.zeros_like(parameter, requires_grad=True)
            elif name in heads:
                self._mask[name] = torch.ones_like(parameter, dtype=torch.bool)
                self.trained[name] = parameter.detach().clone().requires_grad_()
        self._heads = heads
        self._optimizer = torch.optim.AdamW(self.trained.values(), **options)  # type: ignore[arg-type]

    def step(self, batch: dict[str, Tensor]) -> float:
        """Make a step; returns the loss before it."""
        for name, trained in self.trained.items():
            weights = trained.detach() if name in self._heads else self._base[name] + trained.detach()
            kept = torch.where(self._mask[name], weights.to(self._dtype).double(), self._base[name])
            self._parameters[name].data.copy_(kept)
        self.model.zero_grad()
        loss = _loss(self.model, batch)
        loss.backward()
        for name, trained in self.trained.items():
            gradient = self._parameters[name].grad
            assert gradient is not None
            trained.grad = gradient * self._mask[name]
        self._optimizer.step()
        return float(loss.detach())

    def deltas(self) -> dict[str, Tensor]:
        """Name -> trained change of each entry, as a dense tensor."""
        return {n: t.detach() - self._base[n] if n in self._heads else t.detach() for n, t in self.trained.items()}


def steps_error(family: str, dtype: torch.dtype, device: torch.device) -> float:
    """Error of AdamW steps of a sparse model on a device, relative to dense masked steps in float64.

    Raises:
        AssertionError: an entry outside the mask has changed.
    """
    model, rows = tiny(family, dtype), samples(is_language(family))
    mask = fisher_mask(family, dtype)
    heads = tuple(name for name, _ in model.named_parameters() if re.search(HEAD, name))
    oracle = _Dense(model, mask, heads, dtype, lr=RATE, weight_decay=DECAY)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    sparse = sparsify(model.to(device), mask, always_train=[HEAD] if heads else [])
    optimizer = torch.optim.AdamW([p for p in sparse.parameters() if p.requires_grad], lr=RATE, weight_decay=DECAY)
    batches = [collate(rows[start:] + rows[:start]) for start in range(STEPS)]
    worst = 0.0
    for batch in batches:
        expected = oracle.step(batch)
        optimizer.zero_grad(set_to_none=True)
        loss = sparse(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        worst = max(worst, abs(float(loss.detach()) - expected) / abs(expected))
    found = delta_error(sparse, base, oracle, dtype)
    return max(worst, found)


def fisher_mask(family: str, dtype: torch.dtype) -> Mask:
    """The largest entries of the expected diagonal outside the head."""
    diagonal = {n: d for n, d in expected_diagonal(family, dtype).items() if not re.search(HEAD, n)}
    scored = Fisher({name: d.float() for name, d in diagonal.items()}, torch.zeros(0, dtype=torch.float64))
    return top_k(scored, round(RATIO * sum(d.numel() for d in diagonal.values())))


def delta_error(sparse: nn.Module, base: dict[str, Tensor], oracle: _Dense, dtype: torch.dtype) -> float:
    """Error of a sparse model's deltas, relative to the oracle's; merges the model; collective.

    Raises:
        AssertionError: an entry outside the mask has changed.
    """
    expected = oracle.deltas()
    deltas, dense = trained_numbers(sparse)
    mask = {name: oracle._mask[name] for name in deltas}
    merged = dict(merge(sparse).named_parameters())
    for name, start in base.items():
        outside = ~mask[name] if name in mask else torch.full(start.shape, name not in dense)
        with gathered_parameters([merged[name]]):
            kept = merged[name].detach().cpu()[outside]
        assert torch.equal(kept, start[outside].to(kept.dtype)), f"{name}: entries outside the mask have moved"
    errors, sizes = [], []
    for name, delta in expected.items():
        found = deltas[name] if name in deltas else dense[name].double() - base[name].double()
        wanted = delta[mask[name]] if name in deltas else delta
        errors.append((found.double() - wanted).flatten())
        sizes.append(wanted.flatten())
    error, size = torch.cat(errors), torch.cat(sizes)
    return float(error.norm() / size.norm() if LIMITS[dtype].norm else error.abs().max() / size.abs().max())


# A training by `fine_tune`.


def tuning_config(*overrides: str, batch: int = 8) -> RunConfig:
    """Some steps of the quickstart's language model, of at least `batch` samples that divide among the ranks."""
    world = rank_and_world()[1]
    return load_config(CONFIG, [*TUNING, f"train.batch_size={world * -(-batch // world)}", *overrides])


def tuned_error(*overrides: str) -> float:
    """Error of `fine_tune` with these settings, relative to dense masked AdamW in float64; collective.

    Raises:
        AssertionError: an entry outside the mask has changed.
    """
    config = tuning_config(*overrides)
    task, seed = load_task(config), config.search.seeds[0]
    oracle, mask, base = _expected_tuning(tuning_config(), task, seed)
    model = sparse_model(config, task, mask, seed)
    fine_tune(model, task, config, seed)
    return delta_error(model, base, oracle, torch.float32)


def tuning_mask(model: nn.Module, ratio: float) -> Mask:
    """Equally spaced entries of each of the decoder's matrices, this share of them: a mask without a Fisher pass."""
    indices, shapes = {}, {}
    for name, p in model.named_parameters():
        if p.dim() == 2 and ".layers." in name:
            indices[name] = torch.arange(0, p.numel(), round(1 / ratio), dtype=torch.int32)
            shapes[name] = tuple(p.shape)
    return Mask(indices, shapes)


def _expected_tuning(config: RunConfig, task: Task, seed: int) -> tuple[_Dense, Mask, dict[str, Tensor]]:
    model = build_model(config, task, seed)[0].eval()
    mask = tuning_mask(model, config.search.ratio)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    train = config.train
    assert train.steps is not None
    oracle = _Dense(model, mask, (), torch.float32, lr=train.learning_rate, weight_decay=train.weight_decay)
    order = training_order(len(task.trained), train.steps * train.batch_size, seed)
    for start in range(0, len(order), train.batch_size):
        oracle.step(task.collate([task.trained[i] for i in order[start : start + train.batch_size]]))
    return oracle, mask, base
