"""One sample's gradients of quantised weights, which autograd does not compute: outer products of their linear layers.

For a single sample that rule is exact whatever else the model does: all tokens that a layer sees are the sample's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.fisher.rules import ModuleCall, rule_for
from irdscale.fisher.terms import Term


class QuantizedTerms:
    """Hooks on the linear layers of quantised scored weights, for passes over one sample at a time.

    Each backward pass that `begin_backward` and `end_backward` enclose calls `arrived(name, terms)` once for each such
    weight that the loss depends on.

    Args:
        held: module -> {local name: scored name} of the quantised weights
    """

    def __init__(self, held: dict[nn.Module, dict[str, str]], arrived: Callable[[str, list[Term]], None]) -> None:
        self._held, self._arrived = held, arrived
        # Uses of each weight in the forward pass, and those not yet reached by the backward pass.
        self._uses: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._terms: dict[str, list[Term]] = {}
        self._cleaning = ExitStack()

    def __enter__(self) -> QuantizedTerms:
        for module in self._held:
            handle = module.register_forward_hook(self._on_forward, with_kwargs=True)
            self._cleaning.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._cleaning.close()

    def begin_forward(self) -> None:
        """Start a forward pass."""
        self._uses = {}

    def begin_backward(self) -> None:
        """Start a backward pass."""
        self._left, self._terms = dict(self._uses), {}

    def end_backward(self) -> None:
        """Deliver the rest: uses that the loss does not depend on get no gradient."""
        for name in list(self._terms):
            self._arrived(name, self._terms.pop(name))

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        for name in self._held[module].values():
            self._uses[name] = self._uses.get(name, 0) + 1
        if not output.requires_grad:
            # A clone, since the model may change it in place, which a leaf forbids.
            output = output.detach().requires_grad_().clone()
        call = ModuleCall(module, args, kwargs, 1)
        output.register_hook(lambda dy: self._on_backward(call, dy))
        return output

    def _on_backward(self, call: ModuleCall, dy: Tensor) -> None:
        own, rule = self._held[call.module], rule_for(call.module)
        assert rule is not None
        with torch.no_grad():
            for local, term in rule(call, dy.detach(), set(own)).items():
                name = own[local]
                self._terms.setdefault(name, []).append(term)
                self._left[name] -= 1
                if self._left[name] == 0:
                    self._arrived(name, self._terms.pop(name))
