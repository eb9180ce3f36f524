"""Single-file Stable Diffusion checkpoints: the names that the original code, ComfyUI and A1111 use.

Only names and a few layouts differ from diffusers. Shapes: attention of the VAE is stored as 1×1 convolutions,
OpenCLIP's query, key and value as one matrix (3·width, width), its projection transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

UNET, VAE = "model.diffusion_model.", "first_stage_model."
UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = (
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("final_layer_norm", "ln_final"),
)


def unet_key(name: str, layers: int, attended: set[int]) -> str:
    """A U-Net key of diffusers in the original's spelling.

    Args:
        layers: resnets per down block; ``attended``: the up blocks that have attentions.
    """
    module, _, kind = name.rpartition(".")
    if module in UNET_TOP:
        return f"{UNET_TOP[module]}.{kind}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        side, block, part, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        position = block * (layers + 1) + index
        where = f"input_blocks.{position + 1}" if side == "down" else f"output_blocks.{position}"
        return f"{where}.1.{rest}" if part == "attentions" else f"{where}.0.{_resnet(rest)}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        position = 2 * int(match[2]) + (match[1] == "attentions")
        return f"middle_block.{position}.{match[3] if match[1] == 'attentions' else _resnet(match[3])}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", name):
        block = int(match[1])
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if block in attended else 1}.conv.{match[2]}"
    raise ValueError(f"{name} has no place in a single-file checkpoint")


def _resnet(rest: str) -> str:
    module, _, kind = rest.rpartition(".")
    return f"{RESNET[module]}.{kind}"


def vae_key(name: str, blocks: int) -> str:
    """A VAE key of diffusers in the original's spelling; ``blocks`` up blocks, which the original counts backwards."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        return f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    return (
        name.replace("resnets.", "block.")
        .replace("downsamplers.0.conv", "downsample.conv")
        .replace("upsamplers.0.conv", "upsample.conv")
    )


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    """The U-Net's weights under the original's names, prefix included."""
    layers = unet.config["layers_per_block"]
    attended = {i for i, block in enumerate(unet.up_blocks) if getattr(block, "attentions", None)}
    return {UNET + unet_key(name, layers, attended): value for name, value in unet.state_dict().items()}


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    """The VAE's weights under the original's names, prefix included."""
    blocks = len(vae.config["up_block_types"])
    out = {}
    for name, value in vae.state_dict().items():
        attention = ".attentions." in name and name.endswith(".weight") and value.dim() == 2
        out[VAE + vae_key(name, blocks)] = value[:, :, None, None] if attention else value
    return out


def clip_tensors(encoder: nn.Module, prefix: str, rows: int) -> dict[str, Tensor]:
    """A text encoder of OpenAI's CLIP; ``rows`` of its token table belong to the original vocabulary."""
    out = {}
    for name, value in encoder.state_dict().items():
        name = name.removeprefix("text_model.")
        out[f"{prefix}text_model.{name}"] = value[:rows] if name.endswith("token_embedding.weight") else value
    return out


def open_clip_tensors(encoder: nn.Module, prefix: str, rows: int) -> dict[str, Tensor]:
    """A text encoder of OpenCLIP, as Stable Diffusion 2 and XL have."""
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    out = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            if match[2] == "q":
                parts = [state[f"{match[1]}.self_attn.{part}_proj.{match[3]}"] for part in "qkv"]
                layer = match[1].replace("encoder.layers.", "transformer.resblocks.")
                out[f"{prefix}{layer}.attn.in_proj_{match[3]}"] = torch.cat(parts)
            continue
        if name == "text_projection.weight":
            out[f"{prefix}text_projection"] = value.mT
            continue
        value = value[:rows] if name.endswith("token_embedding.weight") else value
        for ours, theirs in OPEN_CLIP:
            name = name.replace(ours, theirs)
        out[prefix + name] = value
    return out


def checkpoint_tensors(models: Mapping[str, Any], vae: Any, rows: Mapping[str, int]) -> dict[str, Tensor]:
    """A whole pipeline as one checkpoint.

    Args:
        models: ``unet`` and the text encoders by component name.
        rows: how many rows of each encoder's token table are the original vocabulary's; such a file cannot hold more.
    """
    tensors = {**unet_tensors(models["unet"]), **vae_tensors(vae)}
    first, double = models["text_encoder"], "text_encoder_2" in models
    if double:
        tensors |= clip_tensors(first, "conditioner.embedders.0.transformer.", rows["text_encoder"])
        tensors |= open_clip_tensors(models["text_encoder_2"], "conditioner.embedders.1.model.", rows["text_encoder_2"])
    elif first.config.hidden_act == "gelu":  # OpenCLIP's; OpenAI's CLIP has quick_gelu
        tensors |= open_clip_tensors(first, "cond_stage_model.model.", rows["text_encoder"])
    else:
        tensors |= clip_tensors(first, "cond_stage_model.transformer.", rows["text_encoder"])
    return tensors
