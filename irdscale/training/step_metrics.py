"""Losses, gradient norms and tokens of a training's steps, read from the device a few times a minute at most."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from irdscale.distributed.ranks import all_reduce_sum, rank_and_world


@dataclass
class StepMetrics:
    """Metrics of one optimizer step.

    Attributes:
        step: number of steps made with it.
        loss: mean over its passes; over the ranks too after `StepLosses.average`.
        learning_rate: rate of the step.
        tokens: tokens of its batch, without padding; 0 if unknown. Those of all ranks after `StepLosses.average`.
        grad_norm: norm of the trained parameters' gradient before clipping; None if unknown or not finite.
    """

    step: int
    loss: float
    learning_rate: float
    tokens: float = 0.0
    grad_norm: float | None = None


@dataclass
class StepLosses:
    """Metrics of a training's steps. They stay on the device until `read`, because reading waits for the device."""

    _unread: list[tuple[int, float, Tensor, Tensor | None]] = field(default_factory=list)
    _norms: dict[int, Tensor | float] = field(default_factory=dict)
    _unseen: dict[int, StepMetrics] = field(default_factory=dict)
    _losses: list[float] = field(default_factory=list)

    def add(self, step: int, loss: Tensor, rate: float, mask: Tensor | None = None) -> None:
        """Add the loss of one forward pass, the learning rate, and the attention mask of its batch if it has one."""
        tokens = None if mask is None else mask.detach().sum()
        self._unread.append((step, rate, loss, tokens))

    def add_norm(self, step: int, norm: Tensor | float) -> None:
        """Add the gradient norm of a step."""
        self._norms[step] = norm.detach().view(()) if isinstance(norm, Tensor) else norm

    def read(self) -> tuple[int, str] | None:
        """Read all unread metrics in one transfer; returns the first step with a bad loss, and what is wrong."""
        unread, self._unread = self._unread, []
        norms, self._norms = self._norms, {}
        if not unread:
            return None
        device = unread[0][2].device
        masks = [tokens for _, _, _, tokens in unread if tokens is not None]
        masks = masks if len(masks) == len(unread) else []
        on_device = {step: norm for step, norm in norms.items() if isinstance(norm, Tensor)}
        parts = [[loss for _, _, loss, _ in unread], masks, list(on_device.values())]
        numbers = torch.cat([_together(part, device) for part in parts if part]).tolist()
        read_norms = dict(zip(on_device, numbers[len(unread) + len(masks) :], strict=True))
        tokens = numbers[len(unread) : len(unread) + len(masks)] or [0.0] * len(unread)
        for (step, rate, _, _), loss, count in zip(unread, numbers[: len(unread)], tokens, strict=True):
            if not math.isfinite(loss):
                return step, f"the loss is {loss} at step {step}, learning rate {rate:.3g}"
            # The Trainer has divided a pass's loss by the number of passes.
            metrics = self._unseen.setdefault(step, StepMetrics(step, 0.0, rate))
            metrics.loss += loss
            metrics.tokens += count
        for step, norm in norms.items():
            number = read_norms[step] if step in read_norms else float(norm)
            self._unseen[step].grad_norm = number if math.isfinite(number) else None
        return None

    def average(self) -> None:
        """Take the mean loss and the tokens of all ranks for the steps read since `take_unseen`; collective."""
        steps = list(self._unseen.values())
        own = torch.tensor([[of.loss, of.tokens] for of in steps], dtype=torch.float64).reshape(-1, 2)
        all_reduce_sum([own])
        for of, (loss, tokens) in zip(steps, own.tolist(), strict=True):
            of.loss, of.tokens = loss / rank_and_world()[1], tokens
        self._losses += [of.loss for of in steps]

    def take_unseen(self) -> list[StepMetrics]:
        """Metrics of each step read since the last call, in order."""
        unseen, self._unseen = self._unseen, {}
        return list(unseen.values())

    def means(self) -> list[float]:
        """The loss of each averaged step."""
        return list(self._losses)


def _together(numbers: list[Tensor], device: torch.device) -> Tensor:
    """Scalars as one float64 vector on a device."""
    return torch.stack([number.to(device, non_blocking=True) for number in numbers]).double()
