"""How far predictions are from their targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from ..config.train import ObjectiveConfig
from ..linalg import to_float64


def weighted_mse(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of (n, c, h, w), each place times its weight (n, 1, h, w), as masks give them.

    Weights that are all 1 give the bits of the plain error, and of its gradient.
    """
    if weights is None:
        return F.mse_loss(predicted, target)
    return (weights * F.mse_loss(predicted, target, reduction="none")).mean()


def diffusion_loss(
    predicted: Tensor, target: Tensor, weights: Tensor | None, times: Tensor | None, objective: ObjectiveConfig
) -> Tensor:
    """The mean error that the settings ask for, each place times ``weights`` (n, 1, h, w), each sample times ``times``.

    Huber's is the smooth one, 2δ(√(e² + δ²) − δ): e² for small errors e, 2δ|e| for large ones.
    """
    if objective.loss_type == "mse" and times is None:
        return weighted_mse(predicted, target, weights)
    if objective.loss_type == "huber":
        delta = objective.huber_delta
        error = 2 * delta * (torch.sqrt((predicted - target) ** 2 + delta**2) - delta)
    else:
        error = F.mse_loss(predicted, target, reduction="none")
    if weights is not None:
        error = weights * error
    return (error if times is None else times[:, None, None, None] * error).mean()


def timestep_weights(schedule: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor | None:
    """Min-SNR-γ weights (n,) of the timesteps (Hang et al. 2023); None where γ is 0.

    min(snr, γ) / snr where ε is predicted and min(snr, γ) / (snr + 1) where v is, so that both weigh the error of the
    picture alike. A step that is all noise (snr 0) counts 1 for ε and 0 for v.
    """
    if gamma == 0:
        return None
    snr = to_float64(compute_snr(schedule, timesteps))
    if schedule.config.prediction_type == "v_prediction":
        weights = snr.clamp_max(gamma) / (snr + 1)
    else:
        weights = (gamma / snr).clamp_max(1)  # γ / 0 is infinite, so 1
    return weights.float().to(timesteps.device)
