"""FedAvg (McMahan et al. 2017): the weighted mean of the changes."""

from __future__ import annotations

from collections.abc import Sequence

from ...config.models import FuseConfig
from ...core.errors import UserError
from ...linalg import Factors
from ..activations import Activations
from .registry import Contribution, merge, weighted_sum


@merge("fedavg", "FedAvg (McMahan et al. 2017): the mean, weighted by the strengths")
def fedavg(contributions: Sequence[Contribution], config: FuseConfig, ordinary: Activations | None) -> Factors:
    """ΔW = Σ λ_i ΔW_i / Σ λ_i; nothing where all λ_i are 0, as of a component that is left out.

    Raises:
        UserError: the strengths sum to nothing.
    """
    total = sum(one.strength for one in contributions)
    if not any(one.strength for one in contributions):
        return weighted_sum(contributions, [0.0] * len(contributions))
    if total <= 0:
        raise UserError(
            "fedavg divides by the sum of the strengths, which is not positive; give one --strength above 0."
        )
    return weighted_sum(contributions, [one.strength / total for one in contributions])
