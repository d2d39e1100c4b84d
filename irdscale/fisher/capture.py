"""Hooks that turn the inputs and output gradients of modules into terms, while autograd computes only dX.

With all parameters frozen, the autograd graph starts at the output of the lowest module that holds a scored parameter,
and a backward pass computes only gradients of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from irdscale.fisher.rules import ModuleCall, Rule, rule_for
from irdscale.fisher.terms import Dense, Term
from irdscale.utils.quantized import is_quantized

Arrived = Callable[[str, list[Term]], None]


@contextmanager
def frozen(model: nn.Module, train_only: dict[str, nn.Parameter] | None = None) -> Iterator[None]:
    """Evaluation mode inside, with gradients only for `train_only`; flags and modes are restored at the end.

    Generation caches are off: they copy every layer's keys and values, and grow when a layer runs again.
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
            # Autograd computes no gradient of a quantised weight.
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
    """module -> {local name: scored name}, for every module that holds a scored parameter."""
    names = {id(p): name for name, p in scored.items()}
    held: dict[nn.Module, dict[str, str]] = {}
    for module in model.modules():
        own = {local: names[id(p)] for local, p in module._parameters.items() if p is not None and id(p) in names}
        if own:
            held[module] = own
    return held


class Capture:
    """Hooks on the modules that hold scored parameters.

    `forward` runs the model. Each `backward` then calls `arrived(name, terms)` once for each scored parameter that the
    loss depends on, as soon as all its uses are behind. With gradient checkpointing, layers keep only their inputs and
    run again in the backward pass.

    Args:
        recompute: whether layers run again; False keeps all activations
    """

    def __init__(self, model: nn.Module, scored: dict[str, nn.Parameter], recompute: bool = True) -> None:
        self._model, self._recompute = model, recompute
        self._arrived: Arrived = lambda name, terms: None
        self._held = holders(model, scored)
        self._rules: dict[nn.Module, Rule] = {}
        for module in self._held:
            rule = rule_for(module)
            assert rule is not None, "verify the rules before capturing"
            self._rules[module] = rule
        self._size = 0
        # Uses of each scored parameter in the forward pass, and those not yet reached by the backward pass.
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
        layers = checkpointed_layers(self._model) if self._recompute else []
        for layer in layers:
            vars(layer)["forward"] = partial(_recomputed, layer.forward)
            self._cleaning.callback(vars(layer).pop, "forward")
        if layers:
            # A layer runs again only if its input requires a gradient.
            embedding = self._model.get_input_embeddings()  # type: ignore[operator]
            self._cleaning.callback(embedding.register_forward_hook(_requiring_gradient).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._cleaning.close()

    def begin(self, size: int) -> None:
        """Start a forward pass of `size` samples."""
        self._size, self._uses = size, {}

    def forward(self, inputs: dict[str, Any], size: int) -> Any:
        """Run the model on a batch of `size` samples."""
        self.begin(size)
        return self._model(**inputs)

    def backward(self, losses_B: Tensor, arrived: Arrived, *, retain_graph: bool = False) -> None:
        """Back-propagate the samples' losses and deliver every parameter's terms."""
        self._left, self._terms, self._arrived = dict(self._uses), {}, arrived
        self._in_backward = True
        try:
            if losses_B.requires_grad:
                losses_B.sum().backward(retain_graph=retain_graph)
        finally:
            self._in_backward, self._busy = False, False
        # Uses that the loss does not depend on get no gradient.
        for name in list(self._terms):
            self._arrived(name, self._terms.pop(name))

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._busy:
            return None
        if not self._in_backward:
            for name in self._held[module].values():
                self._uses[name] = self._uses.get(name, 0) + 1
        if self._size > 1 and output.shape[0] == 1:
            # Computed once and broadcast over the batch, as position embeddings are: expanded to a row per sample.
            output = output.expand(self._size, *output.shape[1:])
        if not torch.is_grad_enabled():
            # A checkpointed layer delivers its terms when it runs again.
            return output
        if not output.requires_grad:
            # A clone, since the model may change it in place, which a leaf forbids.
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


class SampleCapture:
    """Gradients of one sample at a time by autograd, delivered like those of `Capture`; exact for any model.

    Autograd computes none of quantised weights, whose gradients are outer products of their linear layers. For one
    sample this rule is exact whatever else the model does: all tokens that a layer sees are the sample's.
    """

    def __init__(self, model: nn.Module, scored: dict[str, nn.Parameter]) -> None:
        quantized = {name: p for name, p in scored.items() if is_quantized(p)}
        self._scored = {name: p for name, p in scored.items() if name not in quantized}
        self._quantized = Capture(model, quantized, recompute=False)
        self._arrived: Arrived = lambda name, terms: None
        self._cleaning = ExitStack()

    def __enter__(self) -> SampleCapture:
        self._cleaning.enter_context(self._quantized)
        for name, parameter in self._scored.items():
            self._cleaning.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
            handle = parameter.register_post_accumulate_grad_hook(partial(self._deliver, name))
            self._cleaning.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._cleaning.close()

    def forward(self, inputs: dict[str, Any], size: int) -> Any:
        """Run the model on one sample."""
        return self._quantized.forward(inputs, size)

    def backward(self, loss_1: Tensor, arrived: Arrived, *, retain_graph: bool = False) -> None:
        """Back-propagate the sample's loss and deliver every parameter's gradient as soon as it is complete."""
        self._arrived = arrived
        self._quantized.backward(loss_1, arrived, retain_graph=retain_graph)

    def _deliver(self, name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        with torch.no_grad():
            self._arrived(name, [Dense(gradient.unsqueeze(0))])


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers for which gradient checkpointing is on (`model.gradient_checkpointing_enable()`)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer without keeping its activations; transformers does so only in training mode."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    names = list(kwargs)

    def run(*values: Any) -> Any:
        return forward(*values[: len(args)], **dict(zip(names, values[len(args) :], strict=True)))

    # Reentrant checkpointing runs the layer again and then its backward pass, so hooks see both.
    return checkpoint(run, *args, *kwargs.values(), use_reentrant=True, preserve_rng_state=False)


def _requiring_gradient(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_().clone()


def arrival_order(model: nn.Module, scored: dict[str, nn.Parameter], batch: dict[str, Any]) -> list[str]:
    """The scored names in the order in which a backward pass delivers their terms. Takes one forward pass.

    A parameter's terms are complete with the gradient of its first use, and autograd visits uses in reverse order.
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
