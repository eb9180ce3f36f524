"""The pocket transformer: a FLUX.2 klein of 7 M parameters for 128 pixels, trained on the pocket world by a flow.

Its autoencoder is pocket@2's, in the class and with the normalization of FLUX.2. Its text encoder is a tiny Qwen3, read
as the pipeline reads the large one: the states of several layers side by side, padded to a fixed length.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from spectral_diffusion.models.denoiser import Conditioning
from spectral_diffusion.models.flux2 import Flux2KleinDenoiser

from .averaging import AveragedRecipe, AveragedTraining, object_weights
from .batches import Batch
from .bpe import WORD_END, vocabulary_of, whole_words
from .map_heads import TokenMapHead
from .models import open_in_float32
from .muon import MuonAdamW
from .teacher import FlowTeacher
from .world import vocabulary

LENGTH = 40  # tokens of a prompt with its template
WIDTH, LAYERS = 128, 3  # of the text encoder; the pipeline takes the states of every third of its layers
HEADS, DEPTH = 8, (1, 5)  # of the transformer: heads of 32 columns, and blocks with two streams and with one
SHIFT = 2.0  # of the sampler's noise levels
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in which every word of the world is one token; any other text can be typed too."""
    merges = whole_words([*vocabulary(), "user", "assistant"])
    vocab = vocabulary_of(merges, (PAD, START, END))
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Lowercase()
    split = (pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(WORD_END, "Ġ"), decoders.ByteLevel()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=[START],
        model_max_length=LENGTH, padding_side="right",
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def chat_ids(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids (n, 40) of captions in the chat template, as FLUX.2's pipeline makes them."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in captions
    ]
    ids: Tensor = tokenizer(
        texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids
    return ids


def build_text_encoder(tokenizer: Any) -> Qwen3ForCausalLM:
    """A Qwen3 of three layers."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=WIDTH // 32, num_key_value_heads=WIDTH // 32, head_dim=32, tie_word_embeddings=True,
            max_position_embeddings=LENGTH, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def build_transformer(channels: int = 32) -> Flux2Transformer2DModel:
    """7 M parameters; a picture of 128 pixels is 64 tokens."""
    return Flux2Transformer2DModel(
        patch_size=1, in_channels=channels, num_layers=DEPTH[0], num_single_layers=DEPTH[1], attention_head_dim=32,
        num_attention_heads=HEADS, joint_attention_dim=LAYERS * WIDTH, timestep_guidance_channels=256,
        axes_dims_rope=(4, 12, 12, 4), guidance_embeds=False,
    )  # fmt: skip


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """A flow's, with a fixed shift: the pipeline's own is for pictures of a thousand tokens and more."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False)


@torch.no_grad()
def flux2_vae(vae: AutoencoderKL, pictures: Iterable[Tensor]) -> AutoencoderKLFlux2:
    """An autoencoder as FLUX.2 has it, with the same weights.

    Args:
        pictures: batches in −1…1, whose latents' mean and deviation the normalization takes.
    """
    names = (
        "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
        "latent_channels", "norm_num_groups", "sample_size", "mid_block_add_attention",
    )  # fmt: skip
    made = AutoencoderKLFlux2(**{name: vae.config[name] for name in names})
    made.load_state_dict(vae.state_dict(), strict=False)
    patches = [
        Flux2KleinPipeline._patchify_latents(made.encode(batch).latent_dist.mean).movedim(1, -1).flatten(0, -2)
        for batch in pictures
    ]
    every = torch.cat(patches)
    made.bn.running_mean.copy_(every.mean(0))
    made.bn.running_var.copy_(every.var(0))
    return made.eval().requires_grad_(False)


class FlowTrainee(nn.Module):
    """The networks that are trained together, and the frozen autoencoder, which says how latents are normalized."""

    def __init__(self, vae: AutoencoderKLFlux2) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(self.tokenizer)
        self.transformer = build_transformer(4 * int(vae.config.latent_channels))
        self.denoiser = Flux2KleinDenoiser({"transformer": self.transformer}, vae, torch.float32)

    def words(self, ids: Tensor) -> Tensor:
        """What the transformer reads of token ids (n, length), as the pipeline makes it: (n, length, 384)."""
        out = self.text_encoder.model(
            input_ids=ids, attention_mask=ids != self.tokenizer.pad_token_id, output_hidden_states=True, use_cache=False
        )
        return torch.cat([out.hidden_states[layer] for layer in range(1, LAYERS + 1)], -1)

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Velocities (n, 32, h, w) for noisy latents, at integer timesteps (n,)."""
        return self.denoiser.predict(noisy, timesteps, Conditioning({"encoder_hidden_states": self.words(ids)}))

    def pipeline(self) -> Flux2KleinPipeline:
        """The stock pipeline of these networks."""
        return Flux2KleinPipeline(
            scheduler=build_scheduler(), vae=self.denoiser.vae, text_encoder=self.text_encoder,
            tokenizer=self.tokenizer, transformer=self.transformer,
        )  # fmt: skip


@dataclass(frozen=True)
class FlowRecipe(AveragedRecipe):
    """How the transformer is trained on what the batches show."""

    rate: float = 2e-3  # of the inner matrices, by Muon
    rate_share: float = 0.5  # of that for everything else, by AdamW
    timestep_power: float = 0.7
    weight_decay: float = 1e-2
    maps: float = 0.1
    taught: tuple[int, int] = (600, 950)  # timesteps from and before which a teacher's expectation is the target


class FlowTraining(AveragedTraining):
    """Text encoder and transformer with their optimizer, moving averages and progress.

    Attributes:
        teacher: where it is given, the batches' rows have its token ids behind the trainee's own.
    """

    trainee: FlowTrainee
    teacher: FlowTeacher | None = None

    def build_head(self) -> TokenMapHead:
        return TokenMapHead(self.trainee.transformer)

    def build_optimizer(self) -> MuonAdamW:
        return MuonAdamW(self, self.recipe.rate_share)

    def loss(self, batch: Batch) -> Tensor:
        """The error of the velocity, weighted by where the things are."""
        generator, denoiser = self.compute.generator(self.progress.step), self.trainee.denoiser
        latents = denoiser.normalize(batch.latents)
        noise = torch.randn(latents.shape, generator=generator, device=self.compute.device)
        timesteps = self.spread_timesteps(len(latents), denoiser.num_timesteps, generator)
        noisy = denoiser.add_noise(latents, noise, timesteps)
        target = denoiser.target(latents, noise, timesteps)
        ids, teachers = batch.ids[:, :LENGTH], batch.ids[:, LENGTH:]
        with self.compute.autocast():
            if self.teacher:
                first, end = self.recipe.taught
                rows = ((timesteps >= first) & (timesteps < end)).nonzero()[:, 0]
                if len(rows):
                    target[rows] = self.teacher.velocity(noisy[rows], timesteps[rows], teachers[rows])
            with self.attention():
                predicted = self.trainee(noisy, timesteps, ids)
                maps = self.map_loss(batch)
        weights = object_weights(batch, self.recipe.object_weight, latents.shape[-2])
        return ((predicted - target).square() * weights).mean() + maps

    def attention(self) -> AbstractContextManager[None]:
        """On a processor plain attention: the backward pass of the fused one takes a third of a step there."""
        plain = self.compute.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    @torch.no_grad()
    def averaged(self, average: int = 0) -> FlowTrainee:
        """Networks with one of the moving averages as their weights."""
        shown = FlowTrainee(self.trainee.denoiser.vae)
        shown.load_state_dict(self.averaged_weights(average), strict=False)  # without the buffers
        shown.text_encoder.tie_weights()
        return shown.to(self.compute.device).eval()


def export_transformer(training: FlowTraining, folder: Path, average: int = 0) -> None:
    """Write the pipeline with one of the moving averages as its weights, in fp16."""
    pipeline = training.averaged(average).pipeline()
    for part in (pipeline.text_encoder, pipeline.transformer):
        part.to("cpu", torch.float16)
    config = {name: value for name, value in pipeline.vae.config.items() if name != "_name_or_path"}  # this machine's
    vae = AutoencoderKLFlux2.from_config(config)
    vae.load_state_dict(pipeline.vae.state_dict())
    pipeline.register_modules(vae=vae.to(torch.float16))
    pipeline.save_pretrained(folder)
    open_in_float32(folder)
    training.write_about(folder)


def transformer_pictures(pipeline: Any, prompts: list[str], steps: int = 20, scale: float = 4.0) -> list[Any]:
    """One picture per prompt, each with its own seed."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(100 + index) for index in range(len(prompts))]
    images: list[Any] = pipeline(
        prompt=prompts, num_inference_steps=steps, guidance_scale=scale, generator=generators, width=128, height=128,
        max_sequence_length=LENGTH, text_encoder_out_layers=tuple(range(1, LAYERS + 1)),
    ).images  # fmt: skip
    return images
