"""LoRA files as other programs read them: kohya's spelling, ComfyUI's and diffusers'; :mod:`.reading` reads them.

One layer is ``up (out, k) @ down (k, in)``, times alpha / k for kohya; kernels are folded out for convolutions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ...core.files import atomic
from ...linalg import Factors, balance
from ...models.original_names import PREFIX, OriginalNames
from .checkpoint import unet_key

Kernels = Mapping[str, tuple[int, int, int]]
PROJECTION = "text_projection"  # of SDXL's second text encoder, outside its ``text_model``


def kohya_name(layer: str, xl: bool = False, layers_per_block: int = 2) -> str:
    """``unet.down_blocks.0…to_q`` to ``lora_unet_down_blocks_0_…_to_q``; SDXL's U-Net in the original's spelling.

    ``layers_per_block`` is the U-Net's, which that spelling counts with.
    """
    component, _, path = layer.partition(".")
    if component == "unet":
        if xl:
            path = unet_key(f"{path}.weight", layers_per_block, set(range(8))).removesuffix(".weight")
        return "lora_unet_" + path.replace(".", "_")
    if component == "transformer":
        return "lora_unet_" + path.replace(".", "_")
    prefix = {"text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}[component]
    if path == PROJECTION:
        return f"{prefix}_{PROJECTION}"
    return f"{prefix}_text_model_{path.removeprefix('text_model.').replace('.', '_')}"


def diffusers_name(layer: str) -> str:
    """The layer with the ``text_model.`` level that diffusers' files have for every version of transformers."""
    component, _, path = layer.partition(".")
    if component in ("unet", "transformer") or path == PROJECTION:
        return layer
    return f"{component}.text_model.{path.removeprefix('text_model.')}"


def shaped(factors: Factors, kernel: tuple[int, int, int] | None) -> tuple[Tensor, Tensor]:
    """(up, down) as a Linear's matrices, or as a thin convolution and a 1×1 one."""
    up, down = factors
    return (up, down) if kernel is None else (up[:, :, None, None], down.reshape(len(down), *kernel))


def kohya_tensors(
    factors: Mapping[str, Factors], kernels: Kernels, dtype: torch.dtype, xl: bool = False
) -> dict[str, Tensor]:
    """A kohya state dict, factors balanced and rounded to ``dtype``.

    Every layer has the same alpha, the largest rank, and the scale is folded into up where a layer's rank is lower:
    diffusers mixes the layers up where a text encoder has several alphas.
    """
    alpha = float(max(len(pair.down) for pair in factors.values()))
    out = {}
    for layer, pair in factors.items():
        name = kohya_name(layer, xl)
        even = balance(Factors(pair.up * (len(pair.down) / alpha), pair.down))
        up, down = shaped(even, kernels.get(layer))
        out[f"{name}.lora_up.weight"], out[f"{name}.lora_down.weight"] = up.to(dtype), down.to(dtype)
        out[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return out


def diffusers_tensors(factors: Mapping[str, Factors], kernels: Kernels, dtype: torch.dtype) -> dict[str, Tensor]:
    """A diffusers / PEFT state dict, factors balanced and rounded to ``dtype``.

    A component's layers are padded to one rank: where ranks differ older versions scale all by the first layer's.
    """
    most: dict[str, int] = {}
    for layer, pair in factors.items():
        component = layer.partition(".")[0]
        most[component] = max(most.get(component, 0), len(pair.down))
    out = {}
    for layer, pair in factors.items():
        missing = most[layer.partition(".")[0]] - len(pair.down)
        even = balance(pair)
        padded = Factors(F.pad(even.up, (0, missing)), F.pad(even.down, (0, 0, 0, missing)))
        up, down = shaped(padded, kernels.get(layer))
        name = diffusers_name(layer)
        out[f"{name}.lora_B.weight"], out[f"{name}.lora_A.weight"] = up.to(dtype), down.to(dtype)
    return out


def comfyui_tensors(factors: Mapping[str, Factors], names: OriginalNames, dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict under the original's names without alpha, factors balanced and rounded to ``dtype``.

    Args:
        factors: by layers of :func:`.fused_projections.original_layers`.
    """
    out = {}
    for layer, pair in factors.items():
        name, even = PREFIX + layer.partition(".")[2], balance(pair)
        out[f"{name}.{names.up}"], out[f"{name}.{names.down}"] = even.up.to(dtype), even.down.to(dtype)
    return out


def write_hashed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with ModelSpec's ``modelspec.hash_sha256`` over its tensor data.

    It is written twice, the first time to be hashed, since a checkpoint need not fit into memory another time.
    """
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic(path) as temporary:
        save_file(stored, temporary)
        with temporary.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            digest = hashlib.sha256()
            while part := file.read(2**20):
                digest.update(part)
        save_file(stored, temporary, {**metadata, "modelspec.hash_sha256": f"0x{digest.hexdigest()}"})


def names_of(layers: Iterable[str]) -> dict[str, str]:
    """Every spelling of a base's layers to the layer."""
    layers = list(layers)
    xl = any(layer.startswith("text_encoder_2.") for layer in layers)
    per_block = 1 + max((int(m[1]) for n in layers if (m := re.match(r"unet\.down_blocks\.\d+\.resnets\.(\d+)\.", n))),
                        default=1)  # fmt: skip
    out: dict[str, str] = {}
    for layer in layers:
        out |= {diffusers_name(layer): layer, layer: layer, kohya_name(layer): layer}
        if xl:
            out[kohya_name(layer, True, per_block)] = layer
    return out


def lora_metadata(
    factors: Mapping[str, Factors], base_model: str, about: Mapping[str, str], version: str = ""
) -> dict[str, str]:
    """The metadata that kohya's tools and ModelSpec 1.0.1 read. No timestamps: the same content is the same file.

    ``version`` is kohya's name of the base; default: Stable Diffusion's.

    diffusers' ``lora_adapter_metadata`` is left out: it names modules, and the text encoder's names changed with
    transformers 5.6; ranks and alpha are in the tensors.
    """
    ranks = {len(pair.down) for pair in factors.values()}
    versions = {"stable-diffusion-xl-v1-base": "sdxl_base_v1-0", "stable-diffusion-v2": "sd_v2"}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_base_model_version": version or versions.get(base_model, "sd_v1"),
        "ss_v2": str(base_model == "stable-diffusion-v2"),
        "ss_output_name": about.get("title", "adapter"),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base_model}/lora",
        "modelspec.implementation": "https://github.com/kohya-ss/sd-scripts",
        **{f"modelspec.{key}": value for key, value in about.items() if value},
    }
