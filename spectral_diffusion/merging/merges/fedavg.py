"""FedAvg (McMahan et al. 2017): the weighted mean of the changes."""

from __future__ import annotations

from collections.abc import Sequence

from ...adapters.adapter import Adapter
from ...config.fuse import MergeConfig
from ...core.errors import Fix, UserError
from ...linalg import Factors
from .registry import Contribution, MergeContext, register_merge, scales_by_component, weighted_sum


def positive_sum(adapters: Sequence[Adapter], config: MergeConfig) -> None:
    """Only scales with a positive sum, or all 0, as of a component that is left out.

    Raises:
        UserError: the scales of a component sum to 0 or less.
    """
    if any(any(scales) and sum(scales) <= 0 for scales in scales_by_component(adapters, config)):
        raise UserError(
            "fedavg divides by the sum of the scales, which is not positive.",
            Fix("scales", so="to give one concept more than 0"),
        )


@register_merge(
    "fedavg",
    "FedAvg: the mean, weighted by the scales",
    check=positive_sum,
    paper="McMahan et al. 2017, arXiv:1602.05629",
)
def fedavg(contributions: Sequence[Contribution], context: MergeContext) -> Factors:
    """ΔW = Σ λ_i ΔW_i / Σ λ_i; nothing where all λ_i are 0."""
    total = sum(contribution.scale for contribution in contributions)
    if not any(contribution.scale for contribution in contributions):
        return weighted_sum(contributions, [0.0] * len(contributions))
    return weighted_sum(contributions, [contribution.scale / total for contribution in contributions])
