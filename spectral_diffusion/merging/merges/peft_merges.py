"""Merges that PEFT brings: TIES and DARE on the dense changes; a truncated sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.merge_utils import dare_linear, ties
from pydantic import Field
from torch import Tensor

from ...config.settings import Settings
from ...core.rng import keyed_generator
from ...linalg import Factors, truncate
from .registry import Contribution, MergeContext, register_merge, weighted_sum


class DensityOptions(Settings):
    """The share of each change that is kept."""

    density: float = Field(0.5, gt=0, le=1, description="Share of each change's entries that is kept.")


class RankOptions(Settings):
    """The rank of the result."""

    svd_rank: int = Field(16, ge=1, le=4096, description="Rank of the result.")


@register_merge(
    "ties",
    "TIES by PEFT: trim, elect signs, average what agrees",
    options=DensityOptions,
    paper="Yadav et al. 2023, arXiv:2306.01708",
)
def ties_merge(contributions: Sequence[Contribution], context: MergeContext) -> Tensor:
    """Dense ΔW of PEFT's ``ties`` at the configured density, of the changes at their strengths: those vote too."""
    deltas = [contribution.scale * contribution.factors().delta() for contribution in contributions]
    weights = torch.ones(len(deltas), dtype=torch.float64, device=deltas[0].device)
    return ties(deltas, weights, context.get(DensityOptions).density)


@register_merge(
    "dare",
    "DARE by PEFT: drop at random, rescale, sum",
    options=DensityOptions,
    paper="Yu et al. 2024, arXiv:2311.03099",
)
def dare(contributions: Sequence[Contribution], context: MergeContext) -> Tensor:
    """Dense ΔW of PEFT's ``dare_linear`` at the configured density.

    What is dropped of an adapter depends on the seed, its name and the layer alone, so it is drawn on the CPU.
    """
    deltas = []
    for contribution in contributions:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                keyed_generator("dare", context.seed, contribution.name, contribution.layer).initial_seed()
            )
            strength = torch.tensor([contribution.scale], dtype=torch.float64)
            change = contribution.factors().delta().cpu()
            deltas.append(dare_linear([change], strength, context.get(DensityOptions).density))
    return torch.stack(deltas).sum(0)


@register_merge("cat", "The factors side by side: Σ λ_i ΔW_i of any methods", is_sum=lambda options: True)
def cat(contributions: Sequence[Contribution], context: MergeContext) -> Factors:
    """Σ λ_i ΔW_i, exact."""
    return weighted_sum(contributions, [contribution.scale for contribution in contributions])


@register_merge("svd", "The sum, cut to rank svd_rank by a singular value decomposition", options=RankOptions)
def svd(contributions: Sequence[Contribution], context: MergeContext) -> Factors:
    """The best approximation of Σ λ_i ΔW_i of rank ``svd_rank``, from the small core of its factors."""
    return truncate(
        weighted_sum(contributions, [contribution.scale for contribution in contributions]),
        context.get(RankOptions).svd_rank,
    )
