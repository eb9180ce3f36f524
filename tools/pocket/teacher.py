"""A Stable Diffusion as the teacher of a flow: what it expects is a target without the noise of single pictures.

Both see the same latents, up to a normalization near 1, so a noisy latent of the flow is one of the teacher's at
another scale: (1 − σ) x + σ n is √((1 − σ)² + σ²) times √ᾱ x + √(1 − ᾱ) n at the timestep whose ᾱ fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_diffusion.core.errors import Fix, UserError
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.denoiser import Conditioning
from spectral_diffusion.models.flux2 import Flux2KleinDenoiser
from spectral_diffusion.models.sd import SDDenoiser


class FlowTeacher:
    """Predicts the velocity of a FLUX.2 with a Stable Diffusion's U-Net over the same autoencoder.

    Args:
        base: the teacher, whose networks stay as they are.
        student: says how the flow's latents are normalized, and its noise levels.

    Raises:
        UserError: the base is no Stable Diffusion that predicts velocities.
    """

    def __init__(self, base: Base, student: Flux2KleinDenoiser) -> None:
        if type(base.denoiser) is not SDDenoiser or base.prediction_type != "v_prediction":
            raise UserError(
                "The teacher must be a Stable Diffusion that predicts velocities, such as the base pocket.",
                Fix("teacher", "pocket"),
            )
        self.denoiser, self.student = base.denoiser, student
        self.tokenizer, self.text_encoder = base.pipeline.tokenizer, base.pipeline.text_encoder
        cumulative = base.pipeline.scheduler.alphas_cumprod.double()
        self.angles = torch.acos(cumulative.sqrt()).float().to(base.device)  # of signal and noise, increasing

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """The timesteps (n,) with the signal-to-noise ratios of noise levels (n,); between two as a fraction."""
        angles = torch.atan2(sigmas, 1 - sigmas).clamp(self.angles[0], self.angles[-1])
        above = torch.searchsorted(self.angles, angles).clamp(1, len(self.angles) - 1)
        low, high = self.angles[above - 1], self.angles[above]
        return above - 1 + (angles - low) / (high - low)

    @torch.no_grad()
    def velocity(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Noise minus latents as the teacher expects them, normalized.

        Args:
            noisy: the flow's normalized latents (n, 4 c, h, w) at its timesteps (n,).
            ids: token ids of the captions (n, length) by the teacher's tokenizer.
        """
        sigmas = self.student.sigmas(timesteps)
        noise, signal = (part.view(-1, 1, 1, 1) for part in (sigmas, 1 - sigmas))
        length = (signal**2 + noise**2).sqrt()
        mean = self.student.denormalize(torch.zeros_like(noisy))
        seen = (self.student.denormalize(noisy) - noise * mean) / length  # only the signal has the latents' mean
        words = Conditioning({"encoder_hidden_states": self.text_encoder(ids)[0]})
        velocity = self.denoiser.predict(seen, self.timesteps(sigmas), words)
        latents = (signal * seen - noise * velocity) / length
        expected = (noise * seen + signal * velocity) / length
        return self.student.normalize(expected + mean) - self.student.normalize(latents)
