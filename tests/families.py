"""Tiny random bases of the families besides Stable Diffusion: they test plumbing, never quality."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ProcessorMixin,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)

from tools.pocket.models import build_tokenizer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
MULTIMODAL = (  # each message's content is a list of parts
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}{{ part.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
LENGTH = 96  # tokens of a prompt: one per byte


def byte_tokenizer(*pieces: str) -> Any:
    """A Qwen tokenizer with a token for every byte and each of these pieces, and no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = Qwen2TokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token=None,
        additional_special_tokens=["<|im_start|>", *pieces], model_max_length=LENGTH,
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def text_config(tokenizer: Any) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, vocab_size=len(tokenizer) + 4, max_position_embeddings=LENGTH,
    )  # fmt: skip


def vision_language_config(tokenizer: Any) -> Qwen3VLConfig:
    """The settings of a Qwen3-VL whose eyes nobody uses."""
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer) + 4, "max_position_embeddings": LENGTH,
        "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16,
        "num_position_embeddings": 4, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision)


def make_tiny_krea_2(folder: Path, seed: int = 0) -> Path:
    """A Krea 2 of some thousand numbers for pictures of 32 pixels, as a diffusers folder."""
    torch.manual_seed(seed)
    system = (  # 29 tokens and 5 of the template around it: the pipeline drops 34 before the prompt
        "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:"
    )
    cuts = [round(len(system) * part / 29) for part in range(30)]
    tokenizer = byte_tokenizer(*dict.fromkeys(system[a:b] for a, b in pairwise(cuts)), "user\n", "assistant")
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=32, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    with torch.no_grad():  # the tables are made as zeros, which would hide the prompt and the time
        for name, parameter in transformer.named_parameters():
            if name.endswith("scale_shift_table"):
                parameter.normal_(std=0.5)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.5, -0.3, 0.1, 1.0], latents_std=[2.0, 0.7, 1.5, 1.1],
    )  # fmt: skip
    vae.register_to_config(sample_size=32)
    pipeline = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400), vae=vae,
        text_encoder=Qwen3VLModel(vision_language_config(tokenizer)), tokenizer=tokenizer, transformer=transformer,
        text_encoder_select_layers=(1, 2, 3),
    )  # fmt: skip
    pipeline.save_pretrained(str(folder))
    return folder


class TinyProcessor(ProcessorMixin):
    """A Qwen3-VL processor that reads texts only: the real one needs torchvision."""

    return_mm_token_type_ids = True

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None, **more: Any) -> None:
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(tokenizer, chat_template=chat_template)


def make_tiny_qwen_image_21(folder: Path, seed: int = 0) -> Path:
    """A Qwen-Image-2.1 of some thousand numbers for pictures of 32 pixels, as a diffusers folder."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer("<|image_pad|>", "system", "Comprehend and analyze the provided prompt.", "assistant")
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False] * 4, latents_mean=[0.5, -0.3, 0.1, 1.0], latents_std=[2.0, 0.7, 1.5, 1.1],
    )  # fmt: skip
    vae.register_to_config(sample_size=32)
    pipeline = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae,
        text_encoder=Qwen3VLForConditionalGeneration(vision_language_config(tokenizer)),
        processor=TinyProcessor(tokenizer, chat_template=MULTIMODAL), transformer=transformer,
    )  # fmt: skip
    pipeline.save_pretrained(str(folder))
    return folder


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


MAKERS: dict[str, Callable[[Path], Path]] = {
    "klein": make_tiny_klein, "z-image": make_tiny_z_image, "krea-2": make_tiny_krea_2,
    "qwen-image-2.1": make_tiny_qwen_image_21,
}  # fmt: skip
SPELLINGS: dict[str, dict[str, Any]] = {  # what a stock pipeline must know of so small a text encoder
    "klein": {"max_sequence_length": LENGTH, "text_encoder_out_layers": (1, 2, 3)},
}


def clip_config(width: int, heads: int = 2, act: str = "quick_gelu") -> CLIPTextConfig:
    tokenizer = build_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=heads, max_position_embeddings=32, hidden_act=act,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def tiny_unet(width: int, **more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=(2, 4), norm_num_groups=4, use_linear_projection=True, **more,
    )  # fmt: skip


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip


def make_tiny_sdxl(folder: Path) -> Path:
    """A random Stable Diffusion XL for pictures of 16 pixels, as a diffusers folder."""
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(clip_config(16)), tokenizer=build_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(24, act="gelu")), tokenizer_2=build_tokenizer(),
        unet=tiny_unet(
            40, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8, transformer_layers_per_block=(1, 2),
        ),
        scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder
