"""Checks of a model by a few small forward passes: does padding matter, is it causal, is its loss that of its logits.

The model must be in evaluation mode, so that dropout is off. A ZeRO-3 model must be inside `gathering`, and all ranks
call together. A forward pass that fails here shows nothing; the error appears again in the pass itself.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from irdscale.distributed.ranks import largest_of
from irdscale.distributed.zero3 import device_of, is_partitioned
from irdscale.errors import InputError
from irdscale.models.batches import FIRST, Collate, SizedDataset, by_token, moved, rows_of
from irdscale.utils.quantized import dtype_of

log = logging.getLogger(__name__)

# Samples whose lengths are read, where rows hold tokens and where they must be collated first.
PROBED = 256
COLLATED = 32
# Samples in a check of padding: the shortest ones and the longest.
TRIED = 4
# Tokens before the first changed one whose logits are compared.
NEAREST = 8
# Largest differences that count as rounding, relative to the largest logit: of padded and unpadded samples, and of
# tokens before a changed one. In 16 bits, and with quantised weights, the median counts.
PADDING_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-5}
CAUSAL_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5}
TF32_TOLERANCE = 1e-2
HALF_PADDING_TOLERANCE = 2e-2
HALF_CAUSAL_TOLERANCE = 1e-2
# Largest relative difference of two losses of the same logits that counts as rounding.
LOSS_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
HALF_LOSS_TOLERANCE = 2e-2
# Classes whose losses are compared.
CLASSES = 16

# Results of earlier checks of the same model.
_PADDING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_CAUSAL: WeakSet[nn.Module] = WeakSet()


def uneven_rows(rows: SizedDataset, collate: Collate, *, longest: int | None = None) -> list[Any]:
    """A few samples of different lengths, the longest last; none if all have the same length.

    Args:
        longest: return two samples, cut to this many tokens and to a quarter of them
    """
    total = len(rows)
    if total == 0:
        return []
    has_tokens = _tokens_of(rows[0]) is not None
    some = min(total, PROBED if has_tokens else COLLATED)

    def size(row: Any) -> int:
        batch = {} if has_tokens else collate([row])
        return _tokens_of(row) or sum(value.numel() for value in batch.values() if isinstance(value, Tensor))

    sizes = {place: size(rows[place]) for place in (total * i // some for i in range(some))}
    order = sorted(sizes, key=lambda place: sizes[place])
    shorter = [place for place in order if sizes[place] != sizes[order[-1]]]
    if not shorter:
        return []
    if longest is not None:
        return [_cut(rows[shorter[0]], longest // 4), _cut(rows[order[-1]], longest)]
    return [rows[place] for place in (*shorter[: TRIED - 1], order[-1])]


def _tokens_of(row: Any) -> int | None:
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    return len(ids) if isinstance(ids, (Sequence, Tensor, np.ndarray)) else None


def _cut(row: Any, tokens: int) -> Any:
    """A row cut to its first tokens, in all fields that have a value per token."""
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
    """Whether a sample's logits depend on its padding in a batch, on the side where `collate` pads.

    Args:
        rows: samples of different lengths, as `uneven_rows` returns them
        logits_of: function from a collated batch to logits; default: the model's forward

    Returns:
        None if unknown: none of the rows is padded, or the model fails on such a batch.
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
        # After padding on the left, the first token of a text is a target too.
        return True
    # The batch runs first, as in a pass: a short text can change a model permanently (BigBird).
    batch_logits = logits_of(together)
    if batch_logits is None and len(rows) > 2:
        # It may not fit in memory.
        return padding_matters(model, collate, [rows[0], rows[-1]], logits_of)
    if batch_logits is None or len(batch_logits) != len(rows):
        return None
    half = _is_half(model, batch_logits)
    differences, scales = [], []
    for place, (one, begin) in enumerate(zip(alone, begins, strict=True)):
        # In 16 bits rounding alone can route a token to another expert, so only padded samples are compared.
        if begin is None or (half and not padded[place]):
            continue
        logits_1 = logits_of(one)
        if logits_1 is None:
            return None
        found, expected = batch_logits[place].double(), logits_1[0].double()
        if expected.dim() == 2:
            found = found[begin : begin + len(expected)]
        if found.shape != expected.shape:
            return None
        differences.append((found - expected).abs().amax(-1).reshape(-1))
        scales.append(expected.abs().amax().reshape(1))
    difference_N = torch.cat(differences)
    difference = difference_N.median() if half else difference_N.max()
    tolerance = HALF_PADDING_TOLERANCE if half else _tolerance(PADDING_TOLERANCE, batch_logits)
    return _beyond(difference, torch.cat(scales).max(), tolerance)


def _targets(batch: dict[str, Any], place: int) -> int:
    """Number of target tokens of a text."""
    labels = batch.get("labels")
    return int((labels[place, 1:] >= 0).sum()) if isinstance(labels, Tensor) and labels.dim() == 2 else 0


def padding_known_to_matter(model: nn.Module, collate: Collate, rows: SizedDataset) -> bool:
    """`padding_matters` for some of the rows, or the earlier result for this model; False if unknown. Collective."""
    if model not in _PADDING:
        found = padding_matters(model, collate, uneven_rows(rows, collate))
        if largest_of([found is not None])[0] == 0:
            return False
        _PADDING[model] = largest_of([bool(found)])[0] == 1
    return _PADDING[model]


def _begin(one: dict[str, Any], together: dict[str, Any], place: int) -> int | None:
    """Position at which a sample begins in its row of a batch; None if its tokens differ, as with a random collate."""
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
    """Check that a language model's logits do not depend on later tokens, its targets.

    Args:
        batch: collated texts; the first is used

    Raises:
        InputError: they do; names the model's class.
    """
    tried = None if model in _CAUSAL else _first_text(batch)
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
            "found logits of a token that change with later tokens, its targets",
            "a causal language model (for an encoder, set is_decoder=true in its config.json)",
            where=type(model).__name__,
        )
    _CAUSAL.add(model)


def _first_text(batch: dict[str, Any]) -> dict[str, Any] | None:
    """The first tokens of the first text of a batch, without padding, on the CPU; None if it is too short."""
    one = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in rows_of(batch, slice(1)).items() if k != "labels"}
    mask, ids = one.get("attention_mask"), one["input_ids"]
    plain = isinstance(mask, Tensor) and mask.shape == ids.shape
    places = one["attention_mask"][0].nonzero().flatten().tolist() if plain else list(range(ids.shape[1]))
    if len(places) < 2:
        return None
    kept = slice(places[0], min(places[0] + FIRST, places[-1] + 1))
    return by_token(one, lambda x_BT: x_BT[:, kept])


def loss_differs(model: nn.Module, batch: dict[str, Any], ours: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether the model's own `.loss` of a batch of one differs from `ours` of the same logits; False if it has none.

    Args:
        batch: one sample, collated, with labels
        ours: function from logits and labels to the loss [1]
    """
    if not _takes_labels(model):
        return False
    tried = moved(_both_ends(batch), device_of(model))
    try:
        with torch.no_grad():
            output = model(**tried)
            own, logits = getattr(output, "loss", None), getattr(output, "logits", None)
            if not isinstance(own, Tensor) or not isinstance(logits, Tensor) or own.numel() != 1:
                return False
            found = torch.stack([own.double().reshape(()), ours(logits, tried["labels"]).double().reshape(())])
    except Exception as error:  # models raise errors of any class for labels that they do not expect
        log.debug("%s: no loss of its own for these labels: %s", type(model).__name__, error)
        return False
    theirs, expected = found.tolist()
    tolerance = LOSS_TOLERANCE.get(own.dtype, HALF_LOSS_TOLERANCE)
    # A loss that is NaN is reported by the pass.
    return abs(theirs - expected) > tolerance * (1.0 + abs(expected))


def _takes_labels(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "labels" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _both_ends(batch: dict[str, Any]) -> dict[str, Any]:
    """The first and last tokens of a long text, all with labels if none had one; any other batch unchanged."""
    ids, labels = batch.get("input_ids"), batch["labels"]
    if not isinstance(ids, Tensor) or labels.dim() != 2 or ids.shape != labels.shape or ids.shape[1] <= FIRST:
        return batch
    half = FIRST // 2
    found = by_token(batch, lambda x_BT: torch.cat([x_BT[:, :half], x_BT[:, -half:]], 1))
    if bool((found["labels"][:, 1:] < 0).all()):
        found["labels"] = found["input_ids"].clone()
    return found


@cache
def warn_once(message: str) -> None:
    """Log a warning once per process."""
    log.warning(message)


def _logits(model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
    inputs = moved({k: v for k, v in batch.items() if k != "labels"}, device_of(model))
    try:
        with torch.no_grad():
            output = model(**inputs)
    except Exception as error:  # the pass reports what is wrong with a batch
        log.debug("%s: a forward pass before the pass failed: %s", type(model).__name__, error)
        return None
    logits = getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) and logits.dim() > 1 else None


@contextmanager
def unheard(model: nn.Module) -> Iterator[None]:
    """Disable the modules' forward hooks inside, except in a ZeRO-3 model, whose hooks gather its parameters."""
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
            # transformers adds permanent hooks in a model's first call.
            hooks.update(attributes[kind])
            attributes[kind] = hooks


def _is_half(model: nn.Module, logits: Tensor) -> bool:
    """Whether the logits have the precision of 16 bits, by their own data type or a parameter's."""
    kinds = {logits.dtype, *map(dtype_of, model.parameters())}
    return any(kind.itemsize < 4 for kind in kinds)


def _tolerance(by_dtype: dict[torch.dtype, float], logits: Tensor, exact: bool = False) -> float:
    rough = logits.is_cuda and torch.get_float32_matmul_precision() != "highest" and not exact
    return TF32_TOLERANCE if rough else by_dtype[logits.dtype]


def _beyond(difference: Tensor, scale: Tensor, tolerance: float) -> bool:
    """Whether a difference is more than rounding; False for NaN."""
    found, largest = torch.stack([difference, scale]).tolist()
    return found > tolerance * largest > 0
