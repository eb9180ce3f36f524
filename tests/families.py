"""Tiny random bases of the families besides Stable Diffusion: they test plumbing, never quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
LENGTH = 96  # tokens of a prompt: one per byte


def byte_tokenizer() -> Any:
    """A Qwen tokenizer with a token for every byte and no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = Qwen2TokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token=None,
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def text_config(tokenizer: Any) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, vocab_size=len(tokenizer) + 4, max_position_embeddings=LENGTH,
    )  # fmt: skip


def make_tiny_klein(folder: Path, seed: int = 0) -> Path:
    """A FLUX.2 klein of some thousand numbers for pictures of 32 pixels, as a diffusers folder."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        sample_size=32, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    with torch.no_grad():
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=Qwen3ForCausalLM(text_config(tokenizer)),
        tokenizer=tokenizer, transformer=transformer, is_distilled=False,
    )  # fmt: skip
    pipeline.save_pretrained(str(folder))
    return folder


def make_tiny_z_image(folder: Path, seed: int = 0) -> Path:
    """A Z-Image of some thousand numbers for pictures of 32 pixels, as a diffusers folder."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # the two are made without values
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    vae = AutoencoderKL(
        sample_size=32, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.36,
        shift_factor=0.11,
    )  # fmt: skip
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=Qwen3Model(text_config(tokenizer)),
        tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip
    pipeline.save_pretrained(str(folder))
    return folder
