"""Frozen float32 weights in autocast's precision while a training computes on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..core.precision import DTYPES, MixedPrecision
from ..methods import Method


def halvable(network: nn.Module) -> list[nn.Parameter]:
    """The frozen float32 weights that autocast rounds whenever they are used: of linear layers and convolutions.

    Without the module of the first parameter, by which diffusers tells a network's dtype.
    """
    first = next(network.parameters())
    return [
        parameter
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight is not first
        for parameter in module.parameters(recurse=False)
        if parameter.dtype == torch.float32 and not parameter.requires_grad
    ]


def halves(device: torch.device | str, precision: MixedPrecision, method: Method) -> bool:
    """Whether a training keeps frozen weights in half precision: autocast rounds them, and nothing else reads them."""
    return torch.device(device).type == "cuda" and precision != "no" and method.builds_on != "weight"


@contextmanager
def half_weights(network: nn.Module, precision: MixedPrecision) -> Iterator[None]:
    """Hold a network's frozen weights as autocast would round them, with the same results.

    Autocast rounds them at every use and keeps the copies for the backward pass: half of the weights' memory more,
    instead of half of it less. The float32 ones wait in main memory and come back in the end.
    """
    whole = [(parameter, parameter.data.cpu(), parameter.device) for parameter in halvable(network)]
    try:
        for parameter, _, _ in whole:
            parameter.data = parameter.data.to(DTYPES[precision])
        yield
    finally:
        for parameter, data, device in whole:
            parameter.data = data.to(device)
