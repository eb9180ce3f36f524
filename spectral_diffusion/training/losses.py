"""How far predictions are from their targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.train import ObjectiveConfig


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
    """The mean error of the settings, each position times ``weights`` (n, 1, h, w), each sample times ``times``.

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
