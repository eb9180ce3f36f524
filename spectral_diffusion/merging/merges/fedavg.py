"""FedAvg (McMahan et al. 2017): the weighted mean of the changes."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.errors import Fix, UserError
from ...linalg import Factors
from .registry import Contribution, MergeContext, register_merge, weighted_sum


@register_merge("fedavg", "FedAvg: the mean, weighted by the scales", paper="McMahan et al. 2017, arXiv:1602.05629")
def fedavg(contributions: Sequence[Contribution], context: MergeContext) -> Factors:
    """ΔW = Σ λ_i ΔW_i / Σ λ_i; nothing where all λ_i are 0, as of a component that is left out.

    Raises:
        UserError: the scales sum to 0.
    """
    total = sum(contribution.scale for contribution in contributions)
    if not any(contribution.scale for contribution in contributions):
        return weighted_sum(contributions, [0.0] * len(contributions))
    if total <= 0:
        raise UserError(
            "fedavg divides by the sum of the scales, which is not positive.",
            Fix("scales", so="to give one concept more than 0"),
        )
    return weighted_sum(contributions, [contribution.scale / total for contribution in contributions])
