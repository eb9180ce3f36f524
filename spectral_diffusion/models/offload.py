"""Frozen linear layers whose weights are read anew when they are used: from main memory, or dequantized.

diffusers' group offloading moves weights back when a layer has computed, where the backward pass no longer finds
them, and torchao keeps a dequantized copy of each weight for it. Here a layer keeps nothing: its forward and its
backward pass each bring the weight to the device for themselves, and it never is copied back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantization import is_quantized
from .split_linear import SplitLinear

MARK = "_spectral_offloaded"


class FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b for rows x (n, in), with a frozen weight (out, in) and bias, elsewhere or quantized perhaps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        bias = None if bias is None else bias.to(x.device, x.dtype)
        y = F.linear(x, brought(weight, x), bias)
        return y.clone() if y._is_view() else y  # torchao's is one, and some of PEFT's layers add in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0]
        weight = brought(ctx.weight, g)
        if hasattr(weight, "dequantize") and type(weight) not in (Tensor, nn.Parameter):
            weight = weight.dequantize()
        return g @ weight.to(g.dtype), None, None


def brought(weight: Tensor, like: Tensor) -> Tensor:
    """A weight on a tensor's device; plain ones in its precision too."""
    if weight.device != like.device:
        weight = weight.to(like.device, non_blocking=like.device.type == "cuda")
    return weight.to(like.dtype) if type(weight) in (Tensor, nn.Parameter) else weight


def frozen_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer's output, by :class:`FrozenLinear`; it follows autocast as the layer itself would."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        y: Tensor = FrozenLinear.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias)
        return y.view(*x.shape[:-1], -1)


def keep_nothing(layer: nn.Linear) -> None:
    """Have a frozen layer read its weight anew in the forward and in the backward pass."""
    layer.forward = partial(frozen_forward, layer)  # type: ignore[method-assign]


def release(module: nn.Module) -> None:
    """Undo :func:`keep_nothing` for the layers of a network that was not offloaded."""
    for layer in module.modules():
        if isinstance(layer.__dict__.get("forward"), partial) and not is_offloaded(module):
            del layer.forward


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep the linear layers of a network's blocks in main memory; everything else goes to ``device``.

    Adapters that are attached later stay where the network computes.
    """
    held = held_layers(module)
    for child in module.modules():
        if isinstance(child, SplitLinear) and device.type == "cuda":
            child.pin()
    inside = {id(layer) for layer in held}
    for child in module.modules():
        if id(child) not in inside:
            for name, value in (*child._parameters.items(), *child._buffers.items()):
                if value is not None and name in child._parameters:
                    value.data = value.data.to(device)
                elif value is not None:
                    child._buffers[name] = value.to(device)
    for layer in held:
        if device.type == "cuda" and not (is_quantized(layer) or layer.weight.is_pinned()):
            layer.weight.data = layer.weight.data.pin_memory()
        keep_nothing(layer)
    setattr(module, MARK, True)


def held_layers(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of a network's blocks, without their biases' owners outside."""
    blocks = [block for parent in module.modules() if isinstance(parent, nn.ModuleList) for block in parent]
    layers = [layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear]
    return list({id(layer): layer for layer in layers}.values())


def is_offloaded(module: nn.Module) -> bool:
    """Whether :func:`offload` was called for it."""
    return bool(getattr(module, MARK, False))
