"""Stable Diffusion 1.x and 2.x: one text encoder, a U-Net that predicts ε or v."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from .denoiser import Conditioning, Controls, Denoiser, plain_attention_is_faster
from .lean_attention import LeanAttention

WORDS = 77  # tokens of a prompt


class SDDenoiser(Denoiser):
    """Stable Diffusion 1.x and 2.x."""

    title: ClassVar[str] = "Stable Diffusion 1.x and 2.x"
    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    network_class: ClassVar[Any] = UNet2DConditionModel
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    attention: ClassVar[Literal["cross", "joint"]] = "cross"
    controls: ClassVar[Controls | None] = "t2i"
    t2i_adapters: ClassVar[Mapping[str, str]] = {
        "sketch": "TencentARC/t2iadapter_sketch_sd15v2",
        "keypose": "TencentARC/t2iadapter_openpose_sd14v1",
    }
    supports_checkpoint: ClassVar[bool] = True
    comfyui_reads_kohya: ClassVar[bool] = True
    network_parts: ClassVar[tuple[str, ...]] = ("unet", "text_encoder")
    adapter_pipeline_class: ClassVar[Any] = StableDiffusionAdapterPipeline

    @classmethod
    def prepare(cls, pipeline: Any) -> None:
        channels = pipeline.unet.config.in_channels
        if channels != pipeline.vae.config.latent_channels:
            raise ValueError(
                f"an inpainting model ({channels} input channels); only text-to-image models are supported"
            )

    def encode(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        return Conditioning({"encoder_hidden_states": self._encoded(prompts)[0]})

    def _encoded(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """The positive outputs of the pipeline's own encoding."""
        words, _, *pooled = self.pipeline.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return words, *pooled[:1]

    def encode_ids(
        self, ids: Mapping[str, Tensor], empty: Sequence[bool], size: tuple[int, int] | None = None
    ) -> Conditioning:
        return Conditioning({"encoder_hidden_states": self.models["text_encoder"](ids["text_encoder"])[0]})

    def hollow_conditioning(self, count: int, layers: int = 1) -> Conditioning:
        lengths = {name: min(WORDS, self._positions(name)) for name in self.encoders}
        ids = {name: torch.zeros(count * layers, length, dtype=torch.long) for name, length in lengths.items()}
        return self.encode_ids(ids, [False] * count * layers)[:count]

    def _positions(self, encoder: str) -> int:
        """How many tokens a text encoder reads."""
        config: Any = self.models[encoder].config
        return int(config.max_position_embeddings)

    def set_lean_attention(self, device: str, half: bool, size: int) -> None:
        plain = plain_attention_is_faster(device, half, size // self.vae_scale)
        self.network.set_attn_processor(AttnProcessor() if plain else LeanAttention())

    def embedding_options(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        name = "encoder_hidden_states"
        return {"prompt_embeds": positive.tensors[name], "negative_prompt_embeds": negative.tensors[name]}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **extra: Any) -> Tensor:
        given = self.network_arguments(conditioning)
        predicted: Tensor = self.network(noisy.to(self.dtype), timesteps, **given, **extra).sample
        return predicted.float()

    def network_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """The conditioning as the U-Net's keyword arguments."""
        return dict(conditioning.tensors)

    @property
    def side_multiple(self) -> int:
        return int(self.vae_scale * 2 ** sum(bool(block.downsamplers) for block in self.network.down_blocks))

    def scheduler(self, name: str) -> Any:
        config = self.pipeline.scheduler.config
        if name == "ddim":
            return DDIMScheduler.from_config(config)
        if name == "euler":
            return EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
        return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")

    def make_pipeline(self, scheduler: Any, control: Any = None, text_encoders: bool = True) -> Any:
        parts = {name: part for name, part in self.pipeline.components.items() if name != "image_encoder"}
        parts["scheduler"] = scheduler
        if not text_encoders:
            parts |= {name: None for name in self.models if name != self.network_name}
        kind = self.adapter_pipeline_class if control is not None else type(self.pipeline)
        more = {"adapter": control} if control is not None else {}
        pipeline = kind(**parts, **more, **self.pipeline_options())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline_options(self) -> dict[str, Any]:
        """Arguments of the pipeline that are no parts of it."""
        return {"requires_safety_checker": False}
