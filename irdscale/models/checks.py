"""What a few small forward passes show of a model before a pass: padding that matters, targets seen, a loss of its own.

The model must be in evaluation mode, so that dropout is off; one in ZeRO-3 partitions must be gathering, and all ranks
call alike. What cannot be tried shows nothing: the pass itself says what is wrong.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from irdscale.distributed.ranks import largest_of
from irdscale.distributed.zero3 import device_of, is_partitioned
from irdscale.errors import InputError
from irdscale.utils.quantized import dtype_of

log = logging.getLogger(__name__)

Collate = Callable[[list[Any]], dict[str, Any]]

# Samples whose lengths are looked at, and those that must be collated for it.
PROBED = 256
COLLATED = 32
# Samples that are tried: the shortest ones and the longest.
TRIED = 4
# Tokens of a text that is tried, and those before a changed one whose logits are compared.
FIRST = 64
NEAREST = 8
# How far logits may differ, as a share of the largest, of a sample padded and not, and before changed tokens. Equal
# shapes leave little to rounding; in 16 bits, and with quantised weights, only what most numbers show counts.
PADDING_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-5}
CAUSAL_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5}
# Products by TF32.
TF32_TOLERANCE = 1e-2
HALF_PADDING_TOLERANCE = 2e-2
HALF_CAUSAL_TOLERANCE = 1e-2
# How far two losses of the same logits may differ, as a share.
LOSS_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
HALF_LOSS_TOLERANCE = 2e-2
# Classes whose losses are compared.
CLASSES = 16

# What was seen of models before.
_PADDING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_CAUSAL: WeakSet[nn.Module] = WeakSet()


class SampleRows(Protocol):
    """Anything with a length and rows."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def uneven_rows(rows: SampleRows, collate: Collate, *, longest: int | None = None) -> list[Any]:
    """A few samples of unlike lengths, the longest last; none where all have one length.

    Args:
        longest: give two samples, cut to so many tokens and a quarter of them.
    """
    total = len(rows)
    if total == 0:
        return []
    has_tokens = _tokens_of(rows[0]) is not None
    some = min(total, PROBED if has_tokens else COLLATED)
    places = [total * i // some for i in range(some)]
    sizes = {place: _tokens_of(rows[place]) if has_tokens else _entries(collate([rows[place]])) for place in places}
    order = sorted(places, key=lambda place: sizes[place] or 0)
    shorter = [place for place in order if sizes[place] != sizes[order[-1]]]
    if not shorter:
        return []
    if longest is not None:
        return [_cut(rows[shorter[0]], longest // 4), _cut(rows[order[-1]], longest)]
    return [rows[place] for place in (*shorter[: TRIED - 1], order[-1])]


def _tokens_of(row: Any) -> int | None:
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    return len(ids) if isinstance(ids, (Sequence, Tensor, np.ndarray)) else None


def _entries(batch: dict[str, Any]) -> int:
    return sum(value.numel() for value in batch.values() if isinstance(value, Tensor))


def _cut(row: Any, tokens: int) -> Any:
    """A row's first tokens, with what else it has a value a token of."""
    length = _tokens_of(row)
    if length is None or length <= tokens:
        return row
    has_all = lambda v: hasattr(v, "__len__") and not isinstance(v, str) and len(v) == length  # noqa: E731
    return {key: value[:tokens] if has_all(value) else value for key, value in row.items()}


def padding_matters(
    model: nn.Module,
    collate: Collate,
    rows: Sequence[Any],
    logits_of: Callable[[dict[str, Any]], Tensor | None] | None = None,
) -> bool | None:
    """Whether a sample's logits change with how far it is padded in a batch, on the side where `collate` pads.

    Args:
        rows: samples of unlike lengths, as `uneven_rows` chooses them.
        logits_of: a collated batch; those of the model's forward unless given.

    Returns:
        None where that was not seen: none of the rows is padded, or the model does not take such a batch.
    """
    if len(rows) < 2:
        return None
    logits_of = logits_of or partial(_logits, model)
    together, alone = collate(list(rows)), [collate([row]) for row in rows]
    begins = [_begin(one, together, place) for place, one in enumerate(alone)]
    padded = [_width(one) < _width(together) for one in alone]
    if not any(is_padded and begin is not None for is_padded, begin in zip(padded, begins, strict=True)):
        return None
    if any(_targets(one, 0) != _targets(together, place) for place, one in enumerate(alone)):
        # Behind padding on the left a text's first token is a target, too.
        return True
    # A model may change for good by what it sees (BigBird at a short text): first as in a pass.
    whole_B = logits_of(together)
    if whole_B is None and len(rows) > 2:
        # It may not fit in memory.
        return padding_matters(model, collate, [rows[0], rows[-1]], logits_of)
    if whole_B is None or len(whole_B) != len(rows):
        return None
    half = _is_half(model, whole_B)
    differences, scales = [], []
    for place, (one, begin) in enumerate(zip(alone, begins, strict=True)):
        # Rounding alone may send a token to another expert: in 16 bits all that are padded must agree.
        if begin is None or (half and not padded[place]):
            continue
        logits_1 = logits_of(one)
        if logits_1 is None:
            return None
        found, expected = whole_B[place].double(), logits_1[0].double()
        if expected.dim() == 2:
            found = found[begin : begin + len(expected)]
        if found.shape != expected.shape:
            return None
        differences.append((found - expected).abs().amax(-1).reshape(-1))
        scales.append(expected.abs().amax().reshape(1))
    difference_N = torch.cat(differences)
    difference = difference_N.median() if half else difference_N.max()
    tolerance = HALF_PADDING_TOLERANCE if half else _tolerance(PADDING_TOLERANCE, whole_B)
    return _beyond(difference, torch.cat(scales).max(), tolerance)


def _targets(batch: dict[str, Any], place: int) -> int:
    """How many tokens of a text are predicted."""
    labels = batch.get("labels")
    return int((labels[place, 1:] >= 0).sum()) if isinstance(labels, Tensor) and labels.dim() == 2 else 0


def padding_known_to_matter(model: nn.Module, collate: Collate, rows: SampleRows) -> bool:
    """`padding_matters` by some of the rows, or as it was seen of this model before; False where it was not seen.

    Collective: ranks say the same.
    """
    if model not in _PADDING:
        found = padding_matters(model, collate, uneven_rows(rows, collate))
        if largest_of([found is not None])[0] == 0:
            return False
        _PADDING[model] = largest_of([bool(found)])[0] == 1
    return _PADDING[model]


def _begin(one: dict[str, Any], together: dict[str, Any], place: int) -> int | None:
    """Where a sample begins in its row of a batch; None if it is another one there, as where a collate draws."""
    keys = [key for key in ("input_ids", "attention_mask") if isinstance(one.get(key), Tensor)]
    if not keys:
        return 0
    length, width = _width(one), _width(together)
    for begin in {0: None, width - length: None}:
        if begin >= 0 and all(torch.equal(together[k][place, begin : begin + length], one[k][0]) for k in keys):
            return begin
    return None


def _width(batch: dict[str, Any]) -> int:
    tokens = batch.get("input_ids")
    if not isinstance(tokens, Tensor):
        tokens = next((v for v in batch.values() if isinstance(v, Tensor) and v.dim() > 1), None)
    return tokens.shape[1] if tokens is not None and tokens.dim() > 1 else 1


def require_causal(model: nn.Module, batch: dict[str, Any]) -> None:
    """Refuse a language model whose logits change with later tokens: it sees what it is to predict.

    Args:
        batch: collated texts, of which the first one is tried.

    Raises:
        InputError: names the model's class.
    """
    tried = None if model in _CAUSAL else _tried_text(batch)
    if tried is None:
        return
    tokens = tried["input_ids"][0].tolist()
    middle = len(tokens) // 2
    other = lambda token: next((t for t in tokens[:middle] if t != token), token - 1 if token else 1)  # noqa: E731
    changed = torch.tensor([[*tokens[:middle], *map(other, tokens[middle:])]], dtype=tried["input_ids"].dtype)
    found, expected = _logits(model, {**tried, "input_ids": changed}), _logits(model, tried)
    if found is None or expected is None or expected.dim() != 3 or found.shape != expected.shape:
        return
    near = slice(max(0, middle - NEAREST), middle)
    difference_T = (found[0, near].double() - expected[0, near].double()).abs().amax(-1)
    half = _is_half(model, expected)
    tolerance = HALF_CAUSAL_TOLERANCE if half else _tolerance(CAUSAL_TOLERANCE, expected, exact=True)
    if _beyond(difference_T.median(), expected.double().abs().amax(), tolerance):
        raise InputError(
            f"{type(model).__name__}: found logits of a token that change with later tokens, which they are to "
            f"predict; expected a causal language model (of an encoder: is_decoder=true in its config.json)"
        )
    _CAUSAL.add(model)


def _tried_text(batch: dict[str, Any]) -> dict[str, Any] | None:
    """The first tokens of a batch's first text, without its padding, on the CPU; None of one that is too short."""
    ids = batch["input_ids"]
    one = {k: v[:1].cpu() if isinstance(v, Tensor) and v.dim() and len(v) == len(ids) else v for k, v in batch.items()}
    mask = one.get("attention_mask")
    plain = isinstance(mask, Tensor) and mask.shape == one["input_ids"].shape
    places = one["attention_mask"][0].nonzero().flatten().tolist() if plain else list(range(ids.shape[1]))
    if len(places) < 2:
        return None
    kept = slice(places[0], min(places[0] + FIRST, places[-1] + 1))
    return {
        key: value[:, kept]
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == ids.shape[1]
        else value
        for key, value in one.items()
        if key != "labels"
    }


def loss_differs(model: nn.Module, batch: dict[str, Any], ours: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether the model's own `.loss` of a batch of one differs from ours of the same logits; False where it has none.

    Args:
        batch: one sample, collated, with labels.
        ours: takes logits and labels, and gives the loss [1].
    """
    if not _takes_labels(model):
        return False
    tried = _both_ends(batch)
    device = device_of(model)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tried.items()}
    try:
        with torch.no_grad():
            output = model(**moved)
            own, logits = getattr(output, "loss", None), getattr(output, "logits", None)
            if not isinstance(own, Tensor) or not isinstance(logits, Tensor) or own.numel() != 1:
                return False
            found = torch.stack([own.double().reshape(()), ours(logits, moved["labels"]).double().reshape(())])
    except Exception as error:  # whatever a model says to labels that are not its own
        log.debug("%s: no loss of its own for these labels: %s", type(model).__name__, error)
        return False
    theirs, expected = found.tolist()
    tolerance = LOSS_TOLERANCE.get(own.dtype, HALF_LOSS_TOLERANCE)
    # A loss that is no number is named by the pass.
    return abs(theirs - expected) > tolerance * (1.0 + abs(expected))


def _takes_labels(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "labels" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _both_ends(batch: dict[str, Any]) -> dict[str, Any]:
    """A long text's first and last tokens, each with a label if none has one; any other batch as it is."""
    ids, labels = batch.get("input_ids"), batch["labels"]
    if not isinstance(ids, Tensor) or labels.dim() != 2 or ids.shape != labels.shape or ids.shape[1] <= FIRST:
        return batch
    half = FIRST // 2
    found = {
        k: torch.cat([v[:, :half], v[:, -half:]], 1)
        if isinstance(v, Tensor) and v.dim() > 1 and v.shape[1] == ids.shape[1]
        else v
        for k, v in batch.items()
    }
    if bool((found["labels"][:, 1:] < 0).all()):
        found["labels"] = found["input_ids"].clone()
    return found


@cache
def warn_once(message: str) -> None:
    """Log a warning, once in a process."""
    log.warning(message)


def _logits(model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
    device = device_of(model)
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
    try:
        with torch.no_grad():
            output = model(**inputs)
    except Exception as error:  # the pass itself says what is wrong with a batch
        log.debug("%s could not be tried: %s", type(model).__name__, error)
        return None
    logits = getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) and logits.dim() > 1 else None


@contextmanager
def unheard(model: nn.Module) -> Iterator[None]:
    """Inside, who listens to calls of the modules hears nothing of them; but DeepSpeed gathers by listening."""
    if is_partitioned(model):
        yield
        return
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    held = [(vars(module), kind, vars(module)[kind]) for module in model.modules() for kind in kinds]
    try:
        for attributes, kind, hooks in held:
            attributes[kind] = type(hooks)()
        yield
    finally:
        for attributes, kind, hooks in held:
            # Transformers begins to listen for good at a first call.
            hooks.update(attributes[kind])
            attributes[kind] = hooks


def _is_half(model: nn.Module, logits: Tensor) -> bool:
    """Whether the logits are as rough as 16 bits."""
    kinds = {logits.dtype, *map(dtype_of, model.parameters())}
    return any(kind.itemsize < 4 for kind in kinds)


def _tolerance(by_dtype: dict[torch.dtype, float], logits: Tensor, exact: bool = False) -> float:
    rough = logits.is_cuda and torch.get_float32_matmul_precision() != "highest" and not exact
    return TF32_TOLERANCE if rough else by_dtype[logits.dtype]


def _beyond(difference: Tensor, scale: Tensor, tolerance: float) -> bool:
    """Whether a difference is more than rounding; not of what is no number."""
    found, largest = torch.stack([difference, scale]).tolist()
    return found > tolerance * largest > 0
