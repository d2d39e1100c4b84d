"""One sample's gradient of quantised weights, which autograd gives none: by the outer product of their linear layers.

Of a single sample that rule is exact whatever else the model does: all tokens that a layer sees are the sample's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.fisher.capture import holders
from irdscale.fisher.rules import ModuleCall, Term, rule_for
from irdscale.utils.quantized import is_quantized

Arrived = Callable[[str, list[Term]], None]


class QuantizedTerms:
    """Hooks on the layers of quantised scored weights, for a forward pass of one sample and its backward passes.

    `arrived(name, terms)` is called once for each such weight in each backward pass that `begin` and `end` enclose.
    """

    def __init__(self, model: nn.Module, scored: dict[str, nn.Parameter], arrived: Arrived) -> None:
        self._held = holders(model, {name: p for name, p in scored.items() if is_quantized(p)})
        self._arrived = arrived
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

    def begin(self) -> None:
        """A backward pass begins."""
        self._left, self._terms = dict(self._uses), {}

    def end(self) -> None:
        """A backward pass is over; uses that the loss does not depend on sent nothing back."""
        for name in list(self._terms):
            self._arrived(name, self._terms.pop(name))

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        for name in self._held[module].values():
            self._uses[name] = self._uses.get(name, 0) + 1
        if not output.requires_grad:
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
