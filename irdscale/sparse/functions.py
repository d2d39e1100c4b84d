"""Autograd functions: forward with the patched weight, backward with k gradients.

Each function takes the frozen weight, which already holds base + delta at the mask's entries, and the trainable
`values` at those entries. It returns gradients of its input and of `values`, never one of the weight's size. A weight
that DeepSpeed gathers again for the backward pass comes without the deltas, and is patched again. A quantised weight
comes as a function that makes its patched matrix, once for each of the two products.

Under autocast the matrix products take `lowered` inputs, and convert a weight of another type for each product; the
backward pass converts it again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from irdscale.sparse.products import Product, Side


def lowered(x: Tensor) -> Tensor:
    """The input in autocast's type for matrix products, if autocast is on; differentiable. float64 stays float64."""
    kind = x.device.type
    if not _is_lowering(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind)) if x.is_floating_point() and x.dtype != torch.float64 else x


def unlowered(kind: str) -> AbstractContextManager[Any]:
    """In the body, autocast is off on this type of device."""
    return torch.autocast(kind, enabled=False) if _is_lowering(kind) else nullcontext()


def _is_lowering(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def needed_input(x: Tensor, side: Side) -> Tensor:
    """The input columns that backward needs: a copy if they are few, so that the input is freed, else the input."""
    if side.taken is None or 2 * len(side.taken) > x.shape[-1]:
        return x
    return side.take(x.reshape(-1, x.shape[-1]))


class SparseMatmul(torch.autograd.Function):
    """x W^T + b (Linear) or x W + b (Conv1D), with gradients for entries of W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | Callable[[], Tensor],
        bias: Tensor | None,
        weight_values: Tensor | None,
        bias_values: Tensor | None,
        product: Product | None,
        weight_index: Tensor | None,
        bias_index: Tensor | None,
        transposed: bool,
        patch_again: Callable[[], None] | None,
    ) -> Tensor:
        ctx.weight, ctx.transposed, ctx.product = weight, transposed, product
        ctx.weight_index, ctx.bias_index, ctx.patch_again = weight_index, bias_index, patch_again
        ctx.value_types = [None if v is None else v.dtype for v in (weight_values, bias_values)]
        kept = None
        if weight_values is not None and ctx.needs_input_grad[3]:
            assert product is not None
            kept = needed_input(x, product.rows if transposed else product.columns)
        ctx.save_for_backward(kept)
        if not isinstance(weight, Tensor):
            return F.linear(x, weight().to(x.dtype), None if bias is None else bias.to(x.dtype))
        if not transposed:
            return F.linear(x, weight, bias)
        flat_TI = x.reshape(-1, x.shape[-1])
        y_TO = flat_TI @ weight if bias is None else torch.addmm(bias, flat_TI, weight)
        return y_TO.view(*x.shape[:-1], weight.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = weight_grad = bias_grad = None
        dy_TO = dy.reshape(-1, dy.shape[-1])
        (x,) = ctx.saved_tensors
        # Before dx, so that dx and the product's temporaries are not in memory together.
        if x is not None:
            x_TI = x.reshape(-1, x.shape[-1])
            left, right = (x_TI, dy_TO) if ctx.transposed else (dy_TO, x_TI)
            weight_grad = ctx.product.entries(left, right, ctx.weight_index).to(ctx.value_types[0])
        if ctx.needs_input_grad[4]:
            bias_grad = dy_TO.sum(0).index_select(0, ctx.bias_index).to(ctx.value_types[1])
        if ctx.needs_input_grad[0]:
            if ctx.patch_again is not None:
                ctx.patch_again()
            weight = (ctx.weight if isinstance(ctx.weight, Tensor) else ctx.weight()).to(dy.dtype)
            dx = dy @ (weight.t() if ctx.transposed else weight)
        return dx, None, None, weight_grad, bias_grad, None, None, None, None, None


class SparseEmbedding(torch.autograd.Function):
    """Rows of a table, with gradients for entries of the rows that were looked up."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, values: Tensor, index: Tensor, padding_idx: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.index, ctx.shape, ctx.padding_idx, ctx.dtype = index, weight.shape, padding_idx, values.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        ids_N, width = ids.reshape(-1), dy.shape[-1]
        dy_ND = dy.reshape(-1, width)
        if ctx.padding_idx is not None:
            dy_ND = dy_ND.masked_fill((ids_N == ctx.padding_idx).unsqueeze(1), 0)
        # Equal ids are summed at the last written of their places: `unique` would wait for the device.
        place_V = torch.full((ctx.shape[0],), -1, dtype=torch.int64, device=ids.device)
        place_V.index_copy_(0, ids_N, torch.arange(len(ids_N), device=ids.device))
        sums_ND = dy.new_zeros(dy_ND.shape).index_add_(0, place_V.index_select(0, ids_N), dy_ND)
        place_k = place_V.index_select(0, ctx.index // width)
        gradient = sums_ND.view(-1).index_select(0, place_k.clamp_min(0) * width + ctx.index % width)
        return None, None, gradient.masked_fill_(place_k < 0, 0).to(ctx.dtype), None, None


class Patched(torch.autograd.Function):
    """The patched parameter itself, for any use; backward takes the entries from its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.dtype = index, values.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        return None, dw.reshape(-1).index_select(0, ctx.index).to(ctx.dtype), None
