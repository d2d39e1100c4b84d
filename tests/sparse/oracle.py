"""The slow obvious sparse training: dense gradients, masked, and AdamW written out with masked decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from irdscale.masks.mask import Mask


def dense_masks(model: nn.Module, mask: Mask, always_train: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """name -> 1 where the entry is trained, in the parameter's shape."""
    masks = {}
    for name, parameter in model.named_parameters():
        flat = torch.zeros(parameter.numel(), dtype=parameter.dtype)
        if name in mask.indices:
            flat[mask.indices[name].long()] = 1
        if name in always_train:
            flat[:] = 1
        masks[name] = flat.view(parameter.shape)
    return masks


class MaskedAdamW:
    """AdamW (decoupled decay) of a dense model in which only the masked entries move."""

    def __init__(
        self, model: nn.Module, masks: dict[str, Tensor], lr: float, weight_decay: float = 0.0, decay: str = "delta"
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.masks, self.lr, self.weight_decay = masks, lr, weight_decay
        self.start = {n: p.detach().clone() for n, p in self.parameters.items()}
        if decay == "weight":
            self.start = {n: torch.zeros_like(p) for n, p in self.start.items()}
        self.m = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.v = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        # Share of `lr` that a parameter has, 1 unless it is named.
        self.shares: dict[str, float] = {}
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """One step with betas (0.9, 0.999) and epsilon 1e-8."""
        self.steps += 1
        for name, p in self.parameters.items():
            g = (torch.zeros_like(p) if p.grad is None else p.grad) * self.masks[name]
            self.m[name].mul_(0.9).add_(0.1 * g)
            self.v[name].mul_(0.999).add_(0.001 * g * g)
            m_hat = self.m[name] / (1 - 0.9**self.steps)
            v_hat = self.v[name] / (1 - 0.999**self.steps)
            lr = self.lr * self.shares.get(name, 1.0)
            decay = lr * self.weight_decay * (p - self.start[name]) * self.masks[name]
            p -= decay + lr * self.masks[name] * m_hat / (v_hat.sqrt() + 1e-8)


def random_mask(model: nn.Module, share: float, seed: int = 0, leave: tuple[str, ...] = ()) -> Mask:
    """Entries of every parameter, drawn at random, at least one each."""
    generator = torch.Generator().manual_seed(seed)
    indices, shapes = {}, {}
    for name, p in model.named_parameters():
        if name not in leave:
            count = max(1, int(share * p.numel()))
            indices[name] = torch.randperm(p.numel(), generator=generator)[:count].sort().values.to(torch.int32)
            shapes[name] = tuple(p.shape)
    return Mask(indices, shapes)


def batches(rows: list[dict[str, Any]], size: int, steps: int) -> list[list[dict[str, Any]]]:
    """`steps` batches, going round the rows."""
    return [[rows[(s * size + i) % len(rows)] for i in range(size)] for s in range(steps)]
