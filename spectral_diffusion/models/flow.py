"""What families that match a flow have in common: straight paths from images to noise (Lipman et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from ..core.errors import Fix, UserError
from .denoiser import Conditioning, Denoiser

ROOM = 1.15  # of a module's own bytes, with what it computes
TOKENS, TIMESTEPS = 512, 1000  # of a prompt and of a schedule, as the pipelines have them


class FlowDenoiser(Denoiser):
    """x_σ = (1 − σ) x_0 + σ noise, and the network predicts the velocity noise − x_0. Timestep t is σ = (t + 1) / T."""

    resting: ClassVar[tuple[str, ...]] = ("text_encoder",)

    pipeline_options: ClassVar[tuple[str, ...]] = ()  # of the pipeline's config, which a new pipeline is given

    @property
    def size(self) -> int:
        return int(self.vae.config.sample_size)

    @property
    def max_tokens(self) -> int:
        """The longest prompt in tokens."""
        config: Any = self.pipeline.text_encoder.config.get_text_config()
        return min(TOKENS, int(config.max_position_embeddings))

    def prompt_options(self, prompts: Sequence[str], negative: str | None) -> dict[str, Any]:
        # Encoded here, since the pipeline's noise takes the precision of its prompts, which autocast would lower.
        nothing = Conditioning.stack([self.encode([negative or ""])[0]] * len(prompts))
        return self.embedding_options(self.encode(prompts), nothing)

    @property
    def num_timesteps(self) -> int:
        return int(self.pipeline.scheduler.config.num_train_timesteps) if self.pipeline else TIMESTEPS

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """σ (n,) of timesteps (n,), in 0…1."""
        return (timesteps.float() + 1) / self.num_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self.sigmas(timesteps).view(-1, *[1] * (latents.dim() - 1)).to(latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    @cached_property
    def sampling_pipeline(self) -> Any:
        """Without the text encoder: prompts come encoded, and a resting part would name the wrong device."""
        return self.make_pipeline(self.pipeline.scheduler, text_encoders=False)

    @contextmanager
    def text_encoder_at_work(self) -> Iterator[None]:
        """Have the text encoder on the network's device for a while; the network makes room if both do not fit."""
        encoder, device = self.pipeline.text_encoder, self.device
        if encoder.device == device:
            yield
            return
        swap = not has_room(encoder, device)
        try:
            if swap:
                self.network.to("cpu")
            encoder.to(device)
            yield
        finally:
            encoder.to("cpu")
            self.network.to(device)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Keep the steps in float32: the scheduler takes the precision of the prediction, which autocast lowers."""

        def full(module: Any, inputs: Any, outputs: Any) -> Any:
            return (outputs[0].float(), *outputs[1:]) if isinstance(outputs, tuple) else outputs

        def own(module: Any, inputs: Any, options: dict[str, Any]) -> Any:  # not every pipeline casts the latents
            latents = options["hidden_states"].to(self.dtype)
            return inputs, {**options, "hidden_states": latents}

        handles = [
            self.network.register_forward_hook(full),
            self.network.register_forward_pre_hook(own, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def plain_attention_is_faster(self, half: bool, size: int) -> bool:
        return False  # transformers have no plain processor

    def timestep_weights(self, timesteps: Tensor, gamma: float) -> Tensor | None:
        if gamma:
            raise UserError(
                "Min-SNR weights are for bases that predict noise; this one matches a flow.",
                Fix("objective.snr_gamma", "0"),
            )
        return None

    def scheduler(self, name: str) -> Any:
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)

    def make_pipeline(self, scheduler: Any, t2i_adapter: Any = None, text_encoders: bool = True) -> Any:
        parts = {**self.pipeline.components, "scheduler": scheduler}
        if not text_encoders:
            parts["text_encoder"] = None
        options = {name: self.pipeline.config[name] for name in self.pipeline_options}
        pipeline = self.pipeline_class(**parts, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def convert_lora(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if any("dora_scale" in key for key in tensors):  # which diffusers would leave out
            return dict(tensors)
        try:
            return dict(self.pipeline.lora_state_dict(dict(tensors)))
        except (ValueError, KeyError, IndexError, RuntimeError):
            return dict(tensors)  # none of its spellings: the caller says what is wrong with it


def has_room(module: nn.Module, device: torch.device) -> bool:
    """Whether a GPU has the memory for a module beside what is there; of other devices nobody can tell."""
    if device.type != "cuda":
        return False
    free: int = torch.cuda.mem_get_info(device)[0]
    return free > ROOM * sum(p.numel() * p.element_size() for p in module.parameters())
