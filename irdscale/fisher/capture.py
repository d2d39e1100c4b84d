"""Catch, for each scored parameter, what its modules saw and what came back, while autograd computes only dX.

With every parameter frozen, the graph starts at the output of the lowest module that holds a scored parameter, and a
backward pass costs the gradients of the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from irdscale.fisher.rules import ModuleCall, Rule, Term, is_generic, rule_for

Arrived = Callable[[str, list[Term]], None]


def batch_size(batch: dict[str, Any]) -> int:
    """Samples in a collated batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def rows_of(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Some samples of a collated batch, with the padding of the whole batch."""
    size = batch_size(batch)
    return {
        key: value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
        for key, value in batch.items()
    }


@contextmanager
def frozen(model: nn.Module, train_only: dict[str, nn.Parameter] | None = None) -> Iterator[None]:
    """Evaluation mode, with gradients for the parameters of `train_only` alone; everything is put back at the end.

    Generation caches are off: they hold copies of every layer's keys and values, and grow when a layer runs again.
    """
    wanted = {id(p) for p in (train_only or {}).values()}
    before = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", False)
    try:
        model.eval()
        if cached:
            config.use_cache = False  # type: ignore[union-attr]
        for p, _ in before:
            # Of a quantised weight no gradient exists; its modules are listened to.
            p.requires_grad_(id(p) in wanted and p.is_floating_point())
        yield
    finally:
        if cached:
            config.use_cache = cached  # type: ignore[union-attr]
        for p, required in before:
            p.requires_grad_(required)
        for module, mode in modes:
            module.training = mode


def holders(model: nn.Module, scored: dict[str, nn.Parameter]) -> dict[nn.Module, dict[str, str]]:
    """module -> {its own name of the parameter: the scored name}, for every module that holds a scored parameter."""
    names = {id(p): name for name, p in scored.items()}
    held: dict[nn.Module, dict[str, str]] = {}
    for module in model.modules():
        own = {local: names[id(p)] for local, p in module._parameters.items() if p is not None and id(p) in names}
        if own:
            held[module] = own
    return held


class Capture:
    """Hooks on the modules that hold scored parameters.

    `forward` runs the model; each `backward` over its output then calls `arrived(name, terms)` once for each
    scored parameter that the loss depends on, as soon as its last use has been passed. Where the user has turned on
    gradient checkpointing, layers keep only their inputs and run again in the backward pass.
    """

    def __init__(self, model: nn.Module, scored: dict[str, nn.Parameter]) -> None:
        self._model = model
        self._arrived: Arrived = lambda name, terms: None
        self._held = holders(model, scored)
        self._rules: dict[nn.Module, Rule] = {}
        for module in self._held:
            rule = rule_for(module)
            assert rule is not None, "verify the rules before capturing"
            self._rules[module] = rule
        self._size = 0
        self._uses: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._terms: dict[str, list[Term]] = {}
        self._busy = False
        self._in_backward = False
        self._cleaning = ExitStack()

    def __enter__(self) -> Capture:
        for module in self._held:
            handle = module.register_forward_hook(self._on_forward, with_kwargs=True)
            self._cleaning.callback(handle.remove)
        layers = checkpointed_layers(self._model)
        for layer in layers:
            vars(layer)["forward"] = partial(_recomputed, layer.forward)
            self._cleaning.callback(vars(layer).pop, "forward")
        if layers:
            # A layer runs again only for inputs that want a gradient.
            embedding = self._model.get_input_embeddings()  # type: ignore[operator]
            self._cleaning.callback(embedding.register_forward_hook(_wanting_gradient).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._cleaning.close()

    def forward(self, inputs: dict[str, Any], size: int) -> Any:
        """Run the model on a batch of `size` samples."""
        self._size, self._uses = size, {}
        return self._model(**inputs)

    def backward(self, losses_B: Tensor, arrived: Arrived, *, retain_graph: bool = False) -> None:
        """Back-propagate each sample's loss, delivering every parameter's terms."""
        self._left, self._terms, self._arrived = dict(self._uses), {}, arrived
        self._in_backward = True
        try:
            if losses_B.requires_grad:
                losses_B.sum().backward(retain_graph=retain_graph)
        finally:
            self._in_backward, self._busy = False, False
        # Uses that the loss does not depend on send nothing back.
        for name in list(self._terms):
            self._arrived(name, self._terms.pop(name))

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._busy:
            return None
        if not self._in_backward:
            for name in self._held[module].values():
                self._uses[name] = self._uses.get(name, 0) + 1
        if self._size > 1 and output.shape[0] == 1:
            # Computed once and broadcast over the batch, as position embeddings: one row for each sample.
            output = output.expand(self._size, *output.shape[1:])
        if not torch.is_grad_enabled():
            # A layer that will run again: its terms come then.
            return output
        if not output.requires_grad:
            # A clone, for the model may go on in place, which a leaf forbids.
            output = output.detach().requires_grad_().clone()
        call = ModuleCall(module, args, kwargs, self._size)
        version = call.x._version
        output.register_hook(lambda dy: self._on_backward(call, version, dy))
        return output

    def _on_backward(self, call: ModuleCall, version: int, dy: Tensor) -> None:
        if call.x._version != version:
            raise RuntimeError(f"the input of {type(call.module).__name__} was changed in place after its use")
        own = self._held[call.module]
        self._busy = True
        try:
            with torch.no_grad():
                terms = self._rules[call.module](call, dy.detach(), set(own))
                for local, name in own.items():
                    self._terms.setdefault(name, []).append(terms[local])
                    self._left[name] -= 1
                    if self._left[name] == 0:
                        self._arrived(name, self._terms.pop(name))
        finally:
            self._busy = False


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers for which gradient checkpointing is on (`model.gradient_checkpointing_enable()`)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer without keeping what is inside; transformers itself does so only in training mode."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    names = list(kwargs)

    def run(*values: Any) -> Any:
        return forward(*values[: len(args)], **dict(zip(names, values[len(args) :], strict=True)))

    # The reentrant kind runs the layer's own backward pass after running it again: hooks see both as ever.
    return checkpoint(run, *args, *kwargs.values(), use_reentrant=True, preserve_rng_state=False)


def _wanting_gradient(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_().clone()


def arrival_order(model: nn.Module, scored: dict[str, nn.Parameter], batch: dict[str, Any]) -> list[str]:
    """The scored names in the order in which a backward pass has all of each one's terms. Takes a forward pass.

    A parameter is complete with the gradient of its first use, and autograd goes backwards through the uses.
    """
    held = holders(model, scored)
    first: dict[str, int] = {}
    calls = 0

    def on_forward(module: nn.Module, *_: Any) -> None:
        nonlocal calls
        calls += 1
        for name in held[module].values():
            first.setdefault(name, calls)

    handles = [module.register_forward_hook(on_forward) for module in held]
    try:
        with frozen(model), torch.no_grad():
            model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    called = sorted(first, key=lambda name: -first[name])
    return called + [name for name in scored if name not in first]


def why_no_rules(model: nn.Module, scored: dict[str, nn.Parameter], batch: dict[str, Any]) -> str | None:
    """Why the rules would not be exact for this model, or None if they are. Takes forward passes only.

    Checked on up to two samples: every module that holds a scored parameter has a rule; what it sees of a sample is a
    row of the first dimension, or a run of rows, and does not depend on the other samples of the batch; its inputs
    are not changed in place afterwards, nor is an output that is a view; and no scored parameter is used anywhere but
    in the forward of such a module (counted as edges of the autograd graph).
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
    for (module, x_B, y_B), (other, x_1, y_1) in zip(together, alone, strict=True):
        name = next(iter(held[module].values()))
        rule = rule_for(module)
        assert rule is not None
        for many, one in ((x_B, x_1), (y_B, y_1)):
            last = _last_sample(many, one, size)
            if module is not other or last is None or (is_generic(rule) and one.shape[0] != 1):
                return f"{name} does not see samples along its first dimension"
            if not _close(last, one):
                return f"what {name} sees of a sample depends on the other samples of the batch"
    return None


def _last_sample(many: Tensor, one: Tensor, size: int) -> Tensor | None:
    """The last sample's part of what a batch sees: a row, the only row of a broadcast, or its tokens of [B T, D]."""
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


def _calls_of(
    model: nn.Module,
    held: dict[nn.Module, dict[str, str]],
    inputs: dict[str, Any],
    scored: dict[str, nn.Parameter],
) -> tuple[list[tuple[nn.Module, Tensor, Tensor]], str | None]:
    """The calls of the holding modules in one forward pass; with `scored`, also whether they are its only uses."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    versions: list[int] = []
    views: list[tuple[nn.Module, Tensor, int]] = []
    expected: dict[int, int] = {}
    problem: list[str] = []
    busy = False

    def on_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal busy
        if busy or problem:
            return
        name = next(iter(held[module].values()))
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None or not isinstance(output, Tensor) or x.dim() == 0:
            problem.append(f"{type(module).__name__}, which holds {name}, does not map one tensor to one tensor")
            return
        calls.append((module, x.detach(), output.detach()))
        versions.append(x._version)
        if output._is_view():
            views.append((module, output.detach(), output._version))
        if scored:
            rule = rule_for(module)
            again = output
            if rule is not None and is_generic(rule):
                busy = True
                again = module(*[_detached(a) for a in args], **{k: _detached(v) for k, v in kwargs.items()})
                busy = False
            local = _edges(again) if again is not output else None
            for parameter in module._parameters.values():
                if parameter is not None:
                    more = local.get(id(parameter), 0) if local is not None else 1
                    expected[id(parameter)] = expected.get(id(parameter), 0) + more

    handles = [module.register_forward_hook(on_forward, with_kwargs=True) for module in held]
    try:
        with frozen(model, scored), torch.set_grad_enabled(bool(scored)):
            output = model(**{k: v for k, v in inputs.items() if k != "labels"})
            for (module, x, _), version in zip(calls, versions, strict=False):
                if x._version != version and not problem:
                    problem.append(f"the input of {type(module).__name__} is changed in place after its use")
            for module, y, version in views:
                # Autograd then passes by what hangs on the view.
                if y._version != version and not problem:
                    problem.append(f"the output of {type(module).__name__} is changed in place, and is a view")
            if scored and not problem:
                edges = _edges(output.logits if hasattr(output, "logits") else output)
                for name, parameter in scored.items():
                    if edges.get(id(parameter), 0) > expected.get(id(parameter), 0):
                        problem.append(f"{name} is used outside the forward of the module that holds it")
                        break
    finally:
        for handle in handles:
            handle.remove()
    return calls, problem[0] if problem else None


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _edges(output: Tensor) -> dict[int, int]:
    """How many edges of the autograd graph below `output` lead to each leaf, by the leaf's id."""
    counts: dict[int, int] = {}
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
                counts[id(leaf)] = counts.get(id(leaf), 0) + 1
            else:
                stack.append(following)
    return counts
