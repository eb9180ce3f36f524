"""Architectures without weights, on the meta device: enough to count parameters, or to fill with random ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import pocket
from ..core.errors import UserError, nearest
from ..linalg import matrix_shape
from ..methods import all_methods
from .targets import find_targets

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

NAMES = ("sd15", "sdxl", "pocket")
RANKS = (1, 2, 4, 8, 16, 32, 64, 1024)


def build_meta(arch: str) -> dict[str, nn.Module]:
    """The U-Net and text encoders of ``sd15``, ``sdxl`` or ``pocket`` on the meta device.

    Raises:
        UserError: another name.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

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
        elif arch == "sdxl":
            unet = UNet2DConditionModel(
                sample_size=128,
                cross_attention_dim=2048,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(320, 640, 1280),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            )
            text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            second = CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                projection_dim=1280,
                num_hidden_layers=32,
                num_attention_heads=20,
                hidden_act="gelu",
            )
            return {
                "unet": unet,
                "text_encoder": CLIPTextModel(text),
                "text_encoder_2": CLIPTextModelWithProjection(second),
            }
        elif arch == "pocket":
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(pocket.path() / "unet"))
            text = CLIPTextConfig(**json.loads((pocket.path() / "text_encoder" / "config.json").read_text()))
        else:
            raise UserError(f"Unknown architecture '{arch}'{nearest(arch, NAMES)}; known: {', '.join(NAMES)}.")
        return {"unet": unet, "text_encoder": CLIPTextModel(text)}


def build_vae_meta() -> AutoencoderKL:
    """The autoencoder of Stable Diffusion 1.x, 2.x and XL on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        )  # fmt: skip


def fill_randomly(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Give a model of the meta device small random weights on the CPU, in place: for tests and benchmarks."""
    model.to_empty(device="cpu")
    if dtype != torch.float32:  # diffusers warns of every cast
        model.to(dtype)
    for name, parameter in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        parameter.data.fill_(1.0) if norm else parameter.data.normal_(std=0.02)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])


def count_table(arch: str, ranks: tuple[int, ...] = RANKS, targets: str = "attention") -> list[dict]:
    """A row for every method and rank that fits: ``{method, rank, trainable, layers, lr_scale}``."""
    shapes = [matrix_shape(layer.weight) for layer in find_targets(build_meta(arch), targets).values()]
    rows = []
    for name, method in sorted(all_methods().items()):
        allowed = method.ranks(shapes)
        for rank in ranks if allowed != (1,) else allowed:
            if rank in allowed:
                total = method.total(shapes, rank)
                row = {"method": name, "rank": rank, "trainable": total, "layers": len(shapes)}
                rows.append({**row, "lr_scale": method.lr_scale})
    return rows
