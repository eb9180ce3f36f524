"""A frozen Linear or convolution plus a low-rank change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg import SandwichFactors


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + (x downᵀ) upᵀ, with W and b frozen as a rule: they get gradients only where they require them.

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
        kept = rows if ctx.needs_input_grad[4] or ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, weight, up, down, inner)
        ctx.shape, ctx.frozen = x.shape, frozen
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, up, down, inner = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        g_inner = g @ up
        g_x = (g @ weight).addmm_(g_inner, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        g_up = None
        if ctx.needs_input_grad[3]:
            g_up = (inner[:, : inner.shape[1] - ctx.frozen].mT @ g).mT  # thin on the left: the faster way round
            g_up = F.pad(g_up, (0, ctx.frozen)) if ctx.frozen else g_up
        g_down = g_inner.mT @ rows if ctx.needs_input_grad[4] else None
        return g_x, *base_gradients(ctx, rows, g), g_up, g_down, None


class CoreLinear(torch.autograd.Function):
    """y = x Wᵀ + b + x rightᵀ middleᵀ leftᵀ with frozen outer parts, and W and b frozen as a rule.

    Shapes: x (…, in), W (out, in), left (out, k), middle (k, k), right (k, in). Saved for backward beside what is
    frozen: the (…, k) inner product. Two thin products forward and two backward, where a LoRA has two and four.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, middle: Tensor, right: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ right.mT
        y = F.linear(rows, weight, bias).addmm_(inner @ middle.mT, left.mT)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight, left, middle, right, inner)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, left, middle, right, inner = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        g_left = g @ left
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = (g @ weight).addmm_(g_left @ middle, right).view(ctx.shape)
        g_middle = g_left.mT @ inner if ctx.needs_input_grad[4] else None
        return g_x, *base_gradients(ctx, rows, g), None, g_middle, None


def base_gradients(ctx: Any, rows: Tensor | None, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of W and b, where they are trained too, from x (n, in) and that of y (n, out)."""
    g_weight = g.mT @ rows if rows is not None and ctx.needs_input_grad[1] else None
    return g_weight, g.sum(0) if ctx.needs_input_grad[2] else None


def frozen_linear(function: type[torch.autograd.Function], x: Tensor, weight: Tensor, bias: Tensor | None,
                  parts: Sequence[Tensor], *more: Any) -> Tensor:  # fmt: skip
    """:class:`LowRankLinear` or :class:`CoreLinear` that follows autocast as ``F.linear`` would."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            return function.apply(x, weight, bias, *(part.to(dtype) for part in parts), *more)
    return function.apply(x, weight, bias, *(part.to(x.dtype) for part in parts), *more)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, frozen: int = 0
) -> Tensor:
    """A frozen Linear plus up · down; the last ``frozen`` columns of ``up`` get no gradient."""
    return frozen_linear(LowRankLinear, x, weight, bias, (up, down), frozen)


def core_linear(x: Tensor, weight: Tensor, bias: Tensor | None, core: SandwichFactors) -> Tensor:
    """A frozen Linear plus left · middle · right."""
    return frozen_linear(CoreLinear, x, weight, bias, core)


def padded(x: Tensor, layer: nn.Conv2d) -> tuple[Tensor, Any]:
    """A convolution's input, padded already unless with zeros, and the padding that is left to do."""
    if layer.padding_mode == "zeros":
        return x, layer.padding
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


def low_rank_conv(x: Tensor, layer: nn.Conv2d, up: Tensor, down: Tensor) -> Tensor:
    """The change alone, (n, out, h, w): a thin convolution with down (k, in·kh·kw), then 1×1 with up (out, k)."""
    return F.conv2d(thin_conv(x, layer, down), up[:, :, None, None].to(x.dtype))


def thin_conv(x: Tensor, layer: nn.Conv2d, down: Tensor) -> Tensor:
    """The first of the two, (n, k, h, w)."""
    kernel = down.view(len(down), *layer.weight.shape[1:]).to(x.dtype)
    x, padding = padded(x, layer)
    return F.conv2d(x, kernel, None, layer.stride, padding, layer.dilation)
