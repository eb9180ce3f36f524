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

MARK = "_spectral_offloaded"


class FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b for rows x (n, in), with a frozen weight (out, in) and bias, elsewhere or quantized perhaps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        bias = None if bias is None else bias.to(x.device, x.dtype)
        y = F.linear(x, brought(weight, x), bias)
        # torchao gives a view, and some of PEFT's layers add in place.
        return y if type(weight) in (Tensor, nn.Parameter) else y.clone()

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
    """Undo :func:`keep_nothing`, of this file alone; the network must be on one device."""
    for layer in module.modules():
        forward = layer.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is frozen_forward:
            del layer.forward
    if is_offloaded(module):
        delattr(module, MARK)


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep the linear layers of a network's blocks in main memory; everything else goes to ``device``.

    Adapters that are attached later stay where the network computes.
    """
    layers = block_layers(module)
    inside = {id(layer) for layer in layers}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is None or (id(child) in inside and name == "weight"):
                continue
            if type(parameter) is nn.Parameter:
                parameter.data = parameter.data.to(device)
            else:  # torchao's keep their numbers in tensors inside
                child._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else buffer.to(device)
    for layer in layers:
        keep_nothing(layer)
    setattr(module, MARK, True)


def block_layers(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of a network's blocks, each once."""
    blocks = [block for parent in module.modules() if isinstance(parent, nn.ModuleList) for block in parent]
    layers = [layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear]
    return list({id(layer): layer for layer in layers}.values())


def is_offloaded(module: nn.Module) -> bool:
    """Whether :func:`offload` was called for it."""
    return bool(getattr(module, MARK, False))
