"""FLUX.2 klein: a transformer over text and image tokens, prompts by a Qwen3, real classifier-free guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor, nn

from ..core.machine import to_device
from .denoiser import Conditioning, Controls, SeveralTexts, TokenKind, unbound
from .flow import TOKENS, FlowDenoiser
from .original_names import OriginalNames
from .split_linear import join_layers, split_layers

LAYERS = (9, 18, 27)  # of the text encoder, whose states are the prompt
# Without norm_out: the original has its two halves in the other order, which diffusers' LoRA reader does not know.
ORIGINAL = OriginalNames(
    (
        (r"transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"double_blocks.\1.img_attn.qkv", r"\2"),
        (r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj", r"double_blocks.\1.txt_attn.qkv", r"\2"),
        (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj", ""),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj", ""),
        (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0", ""),
        (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2", ""),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0", ""),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2", ""),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1", ""),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2", ""),
        (r"x_embedder", "img_in", ""),
        (r"context_embedder", "txt_in", ""),
        (r"time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer", ""),
        (r"time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer", ""),
        (r"((?:single_stream|double_stream)_modulation\w*)\.linear", r"\1.lin", ""),
        (r"proj_out", "final_layer.linear", ""),
    )
)


class Flux2KleinDenoiser(FlowDenoiser):
    """FLUX.2 klein, base and distilled. Latents are the autoencoder's in patches of 2 × 2, normalized."""

    title: ClassVar[str] = "FLUX.2 klein"
    architecture: ClassVar[str] = "flux-2-klein"
    base_version: ClassVar[str] = "flux2"
    pipeline_class: ClassVar[Any] = Flux2KleinPipeline
    pipeline_options: ClassVar[tuple[str, ...]] = ("is_distilled",)
    network_class: ClassVar[Any] = Flux2Transformer2DModel

    attention: ClassVar[Literal["cross", "joint"]] = "joint"
    original_names: ClassVar[OriginalNames | None] = ORIGINAL
    controls: ClassVar[Controls | None] = "reference"

    @classmethod
    def prepare(cls, pipeline: Any) -> None:
        """Show the fused projections of the single-stream blocks as separate layers."""
        split_layers(pipeline.transformer, fused_rows)

    @classmethod
    def release(cls, pipeline: Any) -> None:
        super().release(pipeline)
        join_layers(pipeline.transformer)

    @property
    def vae_scale(self) -> int:
        return 2 * super().vae_scale  # a cell is a patch

    # ------------------------------------------------------------------ latents

    def normalize(self, raw: Tensor) -> Tensor:
        mean, std = self._statistics(raw)
        patches: Tensor = Flux2KleinPipeline._patchify_latents(raw)
        return (patches - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        raw: Tensor = Flux2KleinPipeline._unpatchify_latents(latents * std + mean)
        return raw

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, c, 1, 1) of the patches."""
        norm: Any = self.vae.bn
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        return norm.running_mean.view(1, -1, 1, 1).to(like), std.view(1, -1, 1, 1).to(like)

    def raw_output(self, latents: Tensor, height: int, width: int) -> Tensor:
        return latents  # as this pipeline gives them

    def from_output(self, latents: Tensor, height: int, width: int) -> Tensor:
        return self.normalize(latents)

    def step_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        rows, columns = height // self.vae_scale, width // self.vae_scale
        return latents.transpose(1, 2).unflatten(2, (rows, columns))

    # ------------------------------------------------------------------ prompts

    @property
    def prompt_layers(self) -> tuple[int, ...]:
        """The states of the text encoder that are concatenated; a small one's thirds."""
        count = int(self.pipeline.text_encoder.config.num_hidden_layers)
        return LAYERS if count >= LAYERS[-1] else tuple(-(-count * part // 3) for part in (1, 2, 3))

    def encode_one(self, prompt: str) -> Conditioning:
        device, options = self.encoder_device, {"text_encoder_out_layers": self.prompt_layers}
        embeddings: Tensor = self.pipeline.encode_prompt(
            [prompt], device, max_sequence_length=self.max_tokens, **options
        )[0]
        return Conditioning({"encoder_hidden_states": embeddings[0]})

    def effective_guidance(self, scale: float) -> float:
        return 1.0 if self.pipeline.config.is_distilled else super().effective_guidance(scale)

    def hollow_conditioning(self, count: int, layers: int = 1) -> Conditioning:
        width = self.network.config.joint_attention_dim
        return Conditioning({"encoder_hidden_states": torch.empty(count, TOKENS, width, dtype=self.dtype)})

    def embedding_options(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        name = "encoder_hidden_states"
        return {"prompt_embeds": positive.tensors[name], "negative_prompt_embeds": negative.tensors[name]}

    def token_kind(self, layer: str) -> TokenKind:
        if ".single_transformer_blocks." in layer:
            return "both"
        if ".transformer_blocks." not in layer:
            raise unbound(layer)
        return "text" if ".attn.add_" in layer or layer.endswith("to_add_out") or ".ff_context." in layer else "image"

    @contextmanager
    def several_texts(self, pipeline: Any, texts: SeveralTexts) -> Iterator[None]:
        ids = pipeline._prepare_text_ids

        def apart(embeddings: Tensor, t_coord: Any = None) -> Tensor:
            return torch.cat([ids(embeddings[:, :length]) for length in texts.lengths(0)], 1)

        def masked(network: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask = texts.mask("both", len(options["hidden_states"]))
            return inputs, options | {"joint_attention_kwargs": {"attention_mask": mask}}

        handle = self.network.register_forward_pre_hook(masked, with_kwargs=True)
        pipeline._prepare_text_ids = apart
        try:
            yield
        finally:
            del pipeline._prepare_text_ids
            handle.remove()

    # ------------------------------------------------------------------ prediction and sampling

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **extra: Any) -> Tensor:
        words = conditioning.tensors["encoder_hidden_states"].to(self.dtype)
        predicted: Tensor = self.network(
            hidden_states=Flux2KleinPipeline._pack_latents(noisy.to(self.dtype)),
            timestep=self.sigmas(timesteps).to(self.dtype),
            guidance=None,
            encoder_hidden_states=words,
            txt_ids=to_device(Flux2KleinPipeline._prepare_text_ids(words), self.device),
            img_ids=to_device(Flux2KleinPipeline._prepare_latent_ids(noisy), self.device),
            return_dict=False,
            **extra,
        )[0]
        return predicted.transpose(1, 2).unflatten(2, noisy.shape[-2:]).float()


def fused_rows(module: nn.Module) -> dict[str, dict[str, int]]:
    """The fused layer of a single-stream block: queries, keys, values, and both halves of the feed-forward layer."""
    if not hasattr(module, "to_qkv_mlp_proj"):
        return {}
    inner, hidden = int(module.inner_dim), int(module.mlp_hidden_dim)  # type: ignore[arg-type]
    rows = {"q": inner, "k": inner, "v": inner, "mlp_gate": hidden, "mlp_value": hidden}
    return {"to_qkv_mlp_proj": rows}
