"""Architectures without weights, on the meta device: enough to count parameters."""

from __future__ import annotations

import json

import torch
from torch import nn

from . import pocket
from .errors import UserError, nearest
from .linalg import sides
from .methods import all_methods
from .methods.targets import find_targets

RANKS = (1, 2, 4, 8, 16, 32)


def build_meta(arch: str) -> dict[str, nn.Module]:
    """The U-Net and text encoder of ``sd15`` or ``pocket`` on the meta device.

    Raises:
        UserError: another name.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        if arch == "sd15":
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
            text = CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                projection_dim=768,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        elif arch == "pocket":
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(pocket.path() / "unet"))
            text = CLIPTextConfig(**json.loads((pocket.path() / "text_encoder" / "config.json").read_text()))
        else:
            raise UserError(f"Unknown architecture '{arch}'{nearest(arch, ['sd15', 'pocket'])}; known: sd15, pocket.")
        return {"unet": unet, "text_encoder": CLIPTextModel(text)}


def count_table(arch: str, ranks: tuple[int, ...] = RANKS, targets: str = "attention") -> list[dict]:
    """Trainable numbers of every method at every rank that fits: ``{method, rank, trainable}`` rows."""
    shapes = [sides(layer.weight) for layer in find_targets(build_meta(arch), targets).values()]
    rows = []
    for name, method in sorted(all_methods().items()):
        for rank in ranks:
            if rank > min(min(shape) for shape in shapes):
                continue
            total = sum(method.count(out, inside, rank) for out, inside in shapes)
            rows.append({"method": name, "rank": rank, "trainable": total, "layers": len(shapes)})
    return rows
