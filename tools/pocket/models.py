"""The pocket base's networks, untrained, and the folder they are shipped in."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, T2IAdapter, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from spectral_diffusion.core.files import write_json

from .bpe import Pair, vocabulary_of, whole_words
from .world import vocabulary

if TYPE_CHECKING:
    from .batches import Batch

LENGTH = 32  # text positions
ROWS = "embeddings.token_embedding.weight"  # of the text encoder


@dataclass(frozen=True)
class Sizes:
    """Sizes of the trained networks."""

    widths: tuple[int, int, int] = (64, 96, 128)  # of the U-Net's levels, and of the T2I-Adapters' features
    heads: tuple[int, int, int] = (2, 3, 4)  # of 32 columns each
    groups: int = 16  # of the group norms
    text_width: int = 128
    text_layers: int = 2


NARROW = Sizes()
WIDE = Sizes(widths=(96, 128, 192), heads=(3, 4, 6))
SIZES = {"narrow": NARROW, "wide": WIDE}


@cache
def vocabulary_merges() -> list[Pair]:
    """The merges of the world's words."""
    return whole_words(vocabulary())


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which every word of the world, and many more, is one token; any text can be typed."""
    merges = vocabulary_merges()
    vocab = vocabulary_of(merges, ("<|startoftext|>", "<|endoftext|>"))
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer, sizes: Sizes = NARROW) -> CLIPTextModel:
    """A CLIPTextModel over 32 positions."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text_width,
            intermediate_size=4 * sizes.text_width,
            projection_dim=sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_width // 32,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(sizes: Sizes = NARROW) -> UNet2DConditionModel:
    """5.7 M parameters (narrow); cross-attention at every level going down, at 8×8 and 4×4 going up.

    The first block is a CrossAttnDownBlock2D, so T2I-Adapter features act at full latent size.
    """
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=sizes.widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.heads,
        norm_num_groups=sizes.groups,
    )
    unet.set_attn_processor(AttnProcessor())  # SDPA's backward is slow on CPU
    return unet


def build_t2i_adapter(channels: int, sizes: Sizes = NARROW, downscale: int = 8) -> T2IAdapter:
    """A condition (a sketch has 1 channel, a keypose 3) to features of the three U-Net levels.

    ``downscale`` is the picture's side over the latents'.
    """
    return T2IAdapter(
        in_channels=channels,
        channels=list(sizes.widths),
        num_res_blocks=1,
        downscale_factor=downscale,
        adapter_type="full_adapter",
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    sketch: T2IAdapter,
    keypose: T2IAdapter,
) -> None:
    """Write a stock diffusers folder in fp16, with the T2I-Adapters in ``t2i_sketch/`` and ``t2i_keypose/``."""
    half = {}
    parts = {"vae": vae, "text_encoder": text_encoder, "unet": unet, "t2i_sketch": sketch, "t2i_keypose": keypose}
    for name, model in parts.items():
        if name == "text_encoder":
            copy = type(model)(model.config)
        else:  # without the folder it was loaded from
            config = {key: value for key, value in model.config.items() if key != "_name_or_path"}
            copy = type(model).from_config(config)
        copy.load_state_dict(model.state_dict())
        half[name] = copy.to(torch.float16)
    pipeline = StableDiffusionPipeline(
        vae=half["vae"],
        text_encoder=half["text_encoder"],
        tokenizer=tokenizer,
        unet=half["unet"],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    open_in_float32(folder)
    for name in ("t2i_sketch", "t2i_keypose"):
        half[name].save_pretrained(folder / name)


def open_in_float32(folder: Path) -> None:
    """Let a stock pipeline open a folder in fp16 without a ``torch_dtype``.

    diffusers then loads float32, but transformers what the text encoder's config names.
    """
    config = folder / "text_encoder" / "config.json"
    write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"})


class Trainee(nn.Module):
    """The networks that are trained together."""

    def __init__(self, sizes: Sizes = NARROW, downscale: int = 8) -> None:
        super().__init__()
        self.sizes, self.downscale = sizes, downscale
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(self.tokenizer, sizes)
        self.unet = build_unet(sizes)
        self.t2i_sketch = build_t2i_adapter(1, sizes, downscale)
        self.t2i_keypose = build_t2i_adapter(3, sizes, downscale)

    def forward(self, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        words = self.text_encoder(batch.ids).last_hidden_state
        features: list[Tensor] | None = None
        for adapter, images, rows in (
            (self.t2i_sketch, batch.sketches, batch.sketch_rows),
            (self.t2i_keypose, batch.keyposes, batch.keypose_rows),
        ):
            if len(rows):
                mine = [
                    feature.new_zeros(len(noisy), *feature.shape[1:]).index_put((rows,), feature)
                    for feature in adapter(images)
                ]
                features = mine if features is None else [a + b for a, b in zip(features, mine, strict=True)]
        return self.unet(noisy, timesteps, words, down_intrablock_additional_residuals=features).sample

    @torch.no_grad()
    def load_pipeline(self, folder: Path, parts: Collection[str] | None = None) -> None:
        """Take the weights of a folder that :func:`save_pipeline` wrote; default: all parts."""
        for name, module in self.named_children():
            if parts is not None and name not in parts:
                continue
            kind: Any = type(module)
            weights = kind.from_pretrained(folder / name, dtype=torch.float32).state_dict()
            if name == "text_encoder":
                weights[ROWS] = self.rows_by_token(CLIPTokenizer.from_pretrained(folder / "tokenizer"), weights[ROWS])
            module.load_state_dict(weights)

    def rows_by_token(self, tokenizer: CLIPTokenizer, rows: Tensor) -> Tensor:
        """The word embeddings (vocabulary, width) of another tokenizer, each token's row at its id here."""
        ids, out = tokenizer.get_vocab(), self.text_encoder.state_dict()[ROWS].clone()
        for token, index in self.tokenizer.get_vocab().items():
            if token in ids:
                out[index] = rows[ids[token]]
        return out
