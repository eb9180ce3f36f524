"""The pocket base's networks, untrained, and the folder they are shipped in."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, T2IAdapter, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .world import vocabulary

LENGTH = 32  # text positions


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which every word of the world, and many more, is one token.

    Byte-level BPE trained until each listed word is whole, so any other text can be typed too.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=20000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(vocabulary(), trainer)
    import json

    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += [word for word in ("".join(pair) for pair in merges) if word not in set(tokens)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 128 over 32 positions."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """5.7 M parameters; cross-attention at every level going down, at 8×8 and 4×4 going up.

    The first block is a CrossAttnDownBlock2D, so T2I-Adapter features act at full latent size.
    """
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 3, 4),
        norm_num_groups=16,
    )
    unet.set_attn_processor(AttnProcessor())  # SDPA's backward is slow on CPU
    return unet


def build_t2i_adapter(channels: int) -> T2IAdapter:
    """A condition (a sketch has 1 channel, a keypose 3) to features of the three U-Net levels."""
    return T2IAdapter(
        in_channels=channels, channels=[64, 96, 128], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter"
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
    for name in ("t2i_sketch", "t2i_keypose"):
        half[name].save_pretrained(folder / name)
