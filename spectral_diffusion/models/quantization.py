"""Frozen networks in 8 or 4 bits, through diffusers' quantizers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from torch import nn

from ..config.settings import Quantization
from ..core.errors import Fix, UserError

QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)


class Storage(NamedTuple):
    """How a kind of quantization keeps a weight.

    Attributes:
        package: that does the work.
        bytes_per_weight: with the scales, for rows of a thousand columns or more.
    """

    package: str
    bytes_per_weight: float


STORAGE = {
    "int8": Storage("torchao", 1.002),
    "fp8": Storage("torchao", 1.002),
    "nf4": Storage("bitsandbytes", 0.5 + 4 / 64),  # one float32 scale for 64 weights
}


def check_quantization(name: str, device: torch.device, dtype: torch.dtype, offload: bool = False) -> None:
    """Refuse a quantization that cannot be had here.

    Raises:
        UserError: it needs another precision, a GPU, or a package that is not installed.
    """
    if name not in QUANTIZATIONS:
        raise UserError(f"Unknown quantization '{name}'; use {', '.join(QUANTIZATIONS)}.")
    if name == "none":
        return
    if dtype == torch.float32:
        raise UserError(f"A base in {name} computes in half precision.", Fix("dtype", "bfloat16"))
    package = STORAGE[name].package
    if find_spec(package) is None:
        raise UserError(f"quantization={name} needs {package}; install it with pip install {package}.")
    if name == "nf4" and device.type == "cpu":
        raise UserError("quantization=nf4 needs a GPU.", Fix("quantization", "int8", "which works on the CPU too"))
    if name == "nf4" and offload:
        raise UserError(
            "A base in nf4 is not moved block by block.",
            Fix("layer_offload", "false"),
            Fix("quantization", "int8"),
        )


def quantizer(name: str, dtype: torch.dtype) -> Any:
    """diffusers' settings for a kind of quantization.

    Args:
        dtype: of the computation.
    """
    if name == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if name == "int8" else Float8WeightOnlyConfig())


def load_quantized(kind: Any, folder: Path, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A network of a diffusers folder, quantized weight by weight while it is read.

    Args:
        kind: the network's class in diffusers.
    """
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True}
    if device.type != "cpu":
        options["device_map"] = {"": str(device)}
    return kind.from_pretrained(str(folder), quantization_config=quantizer(name, dtype), **options)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is not the plain tensor that its shape says."""
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    return not weight.is_floating_point() or is_torchao(layer)


def is_torchao(layer: nn.Module) -> bool:
    """Whether torchao has quantized a layer's weight."""
    return type(getattr(layer, "weight", None)).__module__.startswith("torchao.")


def quantization_of(model: nn.Module) -> Quantization:
    """How a network's linear layers are quantized, as nearly as it matters for the memory."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and is_quantized(module)]
    if not layers:
        return "none"
    kind = type(layers[0].weight).__name__
    return "nf4" if kind == "Params4bit" else "fp8" if "Float8" in kind else "int8"


def quantized_bytes(model: nn.Module, name: str) -> int:
    """The bytes of a network's parameters once its linear layers are quantized."""
    linear = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    count = sum(weight.numel() for weight in linear.values())
    others = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in linear)
    return round(count * STORAGE[name].bytes_per_weight) + others


def working_bytes(model: nn.Module) -> int:
    """The most that a layer's weight takes while it computes, brought to the device or dequantized."""
    return max(linear_bytes(model))


def block_bytes(model: nn.Module) -> int:
    """The bytes of the linear layers in a network's blocks, which offloading keeps in main memory."""
    blocks = [block for parent in model.children() if isinstance(parent, nn.ModuleList) for block in parent]
    return sum(sum(linear_bytes(block)) for block in blocks)


def linear_bytes(module: nn.Module) -> list[int]:
    """The bytes of each linear layer's weight in the precision of the computation."""
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    return [weight.numel() * weight.element_size() for weight in weights]
