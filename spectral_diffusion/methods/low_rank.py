"""A frozen Linear or convolution plus a low-rank change."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + (x downᵀ) upᵀ with W and b frozen.

    Shapes: x (…, in), W (out, in), b (out,) or None, up (out, k), down (k, in). All of one dtype. The
    addition is folded into the second product (addmm), forward and backward, so the change costs two thin
    products and no extra pass over y. Saved for backward: the (…, k) inner product, and x where ``down`` is trained.
    The last ``frozen`` columns of ``up`` get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, frozen: int
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ down.mT
        y = F.linear(rows, weight, bias).addmm_(inner, up.mT)
        ctx.save_for_backward(rows if ctx.needs_input_grad[4] else None, weight, up, down, inner)
        ctx.shape, ctx.frozen = x.shape, frozen
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        rows, weight, up, down, inner = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        g_inner = g @ up
        g_x = (g @ weight).addmm_(g_inner, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        g_up = None
        if ctx.needs_input_grad[3]:
            g_up = g.mT @ inner[:, : inner.shape[1] - ctx.frozen]
            g_up = F.pad(g_up, (0, ctx.frozen)) if ctx.frozen else g_up
        g_down = g_inner.mT @ rows if ctx.needs_input_grad[4] else None
        return g_x, None, None, g_up, g_down, None


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, frozen: int = 0
) -> Tensor:
    """:class:`LowRankLinear` that follows autocast as ``F.linear`` would."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            return LowRankLinear.apply(x, weight, bias, up.to(dtype), down.to(dtype), frozen)
    return LowRankLinear.apply(x, weight, bias, up.to(x.dtype), down.to(x.dtype), frozen)


def low_rank_conv(x: Tensor, layer: nn.Conv2d, up: Tensor, down: Tensor) -> Tensor:
    """The change alone, (n, out, h, w): a thin convolution with down (k, in·kh·kw), then 1×1 with up (out, k)."""
    kernel = down.view(len(down), *layer.weight.shape[1:]).to(x.dtype)
    inner = F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)
    return F.conv2d(inner, up[:, :, None, None].to(x.dtype))
