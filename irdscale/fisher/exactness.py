"""A check that the rules give exact per-sample gradients of a model, by forward passes over one and two samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.distributed.zero3 import is_partitioned
from irdscale.errors import InputError
from irdscale.fisher.capture import frozen, holders
from irdscale.fisher.rules import is_generic, rule_for
from irdscale.models.batches import batch_size, rows_of


def why_no_rules(model: nn.Module, scored: dict[str, nn.Parameter], batch: dict[str, Any]) -> str | None:
    """Why the rules would not be exact for this model; None if they are.

    The check uses at most two samples. The rules are exact if every module that holds a scored parameter has a rule;
    if a sample is a row of the module's input and output, or a run of rows, and does not depend on the other samples;
    if inputs, and outputs that are views, are not changed in place later; and if the forward of such modules contains
    all uses of the scored parameters, counted as edges of the autograd graph.

    Raises:
        InputError: the model cannot run in ZeRO-3 partitions.
    """
    held = holders(model, scored)
    for module, own in held.items():
        if rule_for(module) is None:
            return f"no rule for {next(iter(own.values()))} in {type(module).__name__}"
    size = min(2, batch_size(batch))
    together, problem = _calls_of(model, held, rows_of(batch, slice(0, size)), {})
    if problem:
        return problem
    alone, problem = _calls_of(model, held, rows_of(batch, slice(size - 1, size)), scored)
    if problem:
        return problem
    if len(together) != len(alone):
        return f"a batch of {size} calls {len(together)} modules, one of its samples {len(alone)}"
    for many, one in zip(together, alone, strict=True):
        name = next(iter(held[many.module].values()))
        rule = rule_for(many.module)
        assert rule is not None
        for x_B, x_1 in ((many.x, one.x), (many.y, one.y)):
            last = _last_sample(x_B, x_1, size)
            if many.module is not one.module or last is None or (is_generic(rule) and x_1.shape[0] != 1):
                return f"{name} does not see samples along its first dimension"
            if not _close(last, x_1):
                return f"what {name} sees of a sample depends on the other samples of the batch"
    return None


def _last_sample(many: Tensor, one: Tensor, size: int) -> Tensor | None:
    """The last sample's part of a batch: a row, the only row if it is broadcast, or its tokens of [B T, D]."""
    if many.shape[1:] != one.shape[1:]:
        return None
    if many.shape[0] == one.shape[0] == 1:
        return many
    return many[-one.shape[0] :] if many.shape[0] == size * one.shape[0] else None


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    if not bool(b.isfinite().all()):
        return True
    tolerance = 5e-2 if a.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return float((a.double() - b.double()).abs().max()) <= tolerance * float(b.double().abs().max()) + 1e-9


@dataclass
class _SeenCall:
    """Input and output of one call of a module, and their versions then; that of an output that is no view is None."""

    module: nn.Module
    x: Tensor
    y: Tensor
    x_version: int
    y_version: int | None


def _calls_of(
    model: nn.Module, held: dict[nn.Module, dict[str, str]], inputs: dict[str, Any], scored: dict[str, nn.Parameter]
) -> tuple[list[_SeenCall], str | None]:
    """The calls of the holding modules in one forward pass, and the first problem with them.

    Args:
        scored: parameters whose uses elsewhere are a problem too; may be empty
    """
    calls: list[_SeenCall] = []
    uses: Counter[int] = Counter()
    problems: list[str] = []
    busy = False

    def on_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal busy
        if busy or problems:
            return
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None or not isinstance(output, Tensor) or x.dim() == 0:
            name = next(iter(held[module].values()))
            problems.append(f"{type(module).__name__}, which holds {name}, does not map one tensor to one tensor")
            return
        version = output._version if output._is_view() else None
        calls.append(_SeenCall(module, x.detach(), output.detach(), x._version, version))
        if scored:
            busy = True
            uses.update(_own_uses(module, args, kwargs))
            busy = False

    with ExitStack() as stack:
        for module in held:
            stack.callback(module.register_forward_hook(on_forward, with_kwargs=True).remove)
        stack.enter_context(frozen(model, scored))
        stack.enter_context(torch.set_grad_enabled(bool(scored)))
        try:
            output = model(**{k: v for k, v in inputs.items() if k != "labels"})
        except RuntimeError as error:
            if not is_partitioned(model):
                raise
            # DeepSpeed gathers the parameters that a module itself holds, not those of a child that it reads.
            raise InputError(
                f"cannot run in ZeRO-3 partitions: {str(error).splitlines()[0]}",
                "a model whose modules read only their own parameters",
                where=type(model).__name__,
            ) from error
    return calls, next(chain(problems, _changes(calls), _outside_uses(output, uses, scored)), None)


def _own_uses(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Counter[int]:
    """How often one call of a module uses each of its own parameters, by their ids."""
    own = [id(p) for p in module._parameters.values() if p is not None]
    rule = rule_for(module)
    if rule is None or not is_generic(rule):
        return Counter(own)
    detached = [v.detach() if isinstance(v, Tensor) else v for v in (*args, *kwargs.values())]
    edges = _edges(module(*detached[: len(args)], **dict(zip(kwargs, detached[len(args) :], strict=True))))
    return Counter({parameter: edges[parameter] for parameter in own})


def _changes(calls: list[_SeenCall]) -> Iterator[str]:
    """Problems of tensors that were changed in place after the call."""
    for call in calls:
        if call.x._version != call.x_version:
            yield f"the input of {type(call.module).__name__} is changed in place after its use"
    for call in calls:
        # Hooks on the view would miss its gradient.
        if call.y_version is not None and call.y._version != call.y_version:
            yield f"the output of {type(call.module).__name__} is changed in place, and is a view"


def _outside_uses(output: Any, uses: Counter[int], scored: dict[str, nn.Parameter]) -> Iterator[str]:
    """Problems of parameters that are used more often than by the modules that hold them."""
    if scored:
        edges = _edges(output.logits if hasattr(output, "logits") else output)
        for name, parameter in scored.items():
            if edges[id(parameter)] > uses[id(parameter)]:
                yield f"{name} is used outside the forward of the module that holds it"


def _edges(output: Tensor) -> Counter[int]:
    """Number of edges of the autograd graph below `output` that lead to each leaf, by the leaf's id."""
    counts: Counter[int] = Counter()
    seen: set[Any] = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                counts[id(leaf)] += 1
            else:
                stack.append(following)
    return counts
