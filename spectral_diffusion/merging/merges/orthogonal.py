"""Orthogonal Adaptation (Po et al. 2024): the sum, exact because the rows are distinct."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ...adapters.adapter import Adapter, shared_columns
from ...config.fuse import MergeConfig
from ...core.errors import UserError
from ...linalg import Factors
from .registry import Contribution, MergeContext, register_merge, weighted_sum


def distinct_rows(adapters: Sequence[Adapter], config: MergeConfig) -> None:
    """Only Orthogonal Adaptation's own adapters, each with rows of its own.

    Raises:
        UserError: an adapter of another method, or rows that two of them share.
    """
    for adapter in adapters:
        if adapter.method.slot != "rows":
            raise UserError(
                f"The merge orthogonal needs orthogonal adapters; '{adapter.name}' is {adapter.method.name}."
            )
    for adapter, other in itertools.combinations(adapters, 2):
        if shared_columns(adapter, other):
            raise UserError(
                f"'{adapter.name}' ({adapter.slot}) and '{other.name}' ({other.slot}) share rows; train one of them "
                "again in the same folder as the other."
            )


@register_merge(
    "orthogonal",
    "Orthogonal Adaptation: the sum, after checking that the rows are distinct",
    check=distinct_rows,
    is_sum=lambda options: True,
    paper="Po et al. 2024, arXiv:2312.02432",
)
def orthogonal(contributions: Sequence[Contribution], context: MergeContext) -> Factors:
    """ΔW = Σ λ_i B_i Q_i with disjoint rows Q_i of one orthogonal basis."""
    return weighted_sum(contributions, [contribution.scale for contribution in contributions])
