"""Stable Diffusion XL: two text encoders, a pooled prompt, and the size of the picture as conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLAdapterPipeline, StableDiffusionXLPipeline
from torch import Tensor

from .denoiser import Conditioning
from .sd import SDDenoiser


class SDXLDenoiser(SDDenoiser):
    """Stable Diffusion XL. Its empty prompt is zeros, where the pipeline says so."""

    title: ClassVar[str] = "Stable Diffusion XL"
    pipeline_class: ClassVar[Any] = StableDiffusionXLPipeline
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    network_parts: ClassVar[tuple[str, ...]] = ("unet", "text_encoder", "text_encoder_2")
    t2i_adapters: ClassVar[Mapping[str, str]] = {
        "sketch": "TencentARC/t2i-adapter-sketch-sdxl-1.0",
        "keypose": "TencentARC/t2i-adapter-openpose-sdxl-1.0",
    }
    architecture: ClassVar[str] = "stable-diffusion-xl-v1-base"
    decodes_latents: ClassVar[bool] = True
    adapter_pipeline_class: ClassVar[Any] = StableDiffusionXLAdapterPipeline

    def encode(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        words, pooled = self._encoded(prompts)
        return self._conditioning(words, pooled, [not prompt for prompt in prompts], size)

    def encode_ids(
        self, ids: Mapping[str, Tensor], empty: Sequence[bool], size: tuple[int, int] | None = None
    ) -> Conditioning:
        # XL reads the last hidden layer but one of both encoders, and the second one's pooled projection.
        outputs = {name: self.models[name](ids[name], output_hidden_states=True) for name in ids}
        words = torch.cat([output.hidden_states[-2] for output in outputs.values()], -1)
        return self._conditioning(words, outputs["text_encoder_2"][0], empty, size)

    def _conditioning(
        self, words: Tensor, pooled: Tensor, empty: Sequence[bool], size: tuple[int, int] | None
    ) -> Conditioning:
        """Words (n, length, width), pooled (n, width) and time ids (n, 6): original size, crop, target size."""
        if any(empty) and self.pipeline is not None and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            where = torch.tensor(list(empty), device=words.device)
            words = words.masked_fill(where.view(-1, 1, 1), 0.0)
            pooled = pooled.masked_fill(where.view(-1, 1), 0.0)
        sides = size or (self.size, self.size)
        ids = torch.tensor([(*sides, 0, 0, *sides)] * len(empty), device=words.device)
        return Conditioning({"encoder_hidden_states": words, "text_embeds": pooled, "time_ids": ids})

    def embedding_options(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {
            **super().embedding_options(positive, negative),
            "pooled_prompt_embeds": positive.tensors["text_embeds"],
            "negative_pooled_prompt_embeds": negative.tensors["text_embeds"],
        }

    def network_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        added = dict(conditioning.tensors)
        return {"encoder_hidden_states": added.pop("encoder_hidden_states"), "added_cond_kwargs": added}

    def pipeline_options(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.pipeline.config.force_zeros_for_empty_prompt}
