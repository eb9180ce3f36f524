"""Merges that PEFT brings: TIES and DARE on the dense changes; a truncated sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

from ...config.models import FuseConfig
from ...core.rng import keyed_generator
from ...linalg import Factors, truncate
from ..activations import Activations
from .registry import Contribution, merge, weighted_sum


@merge("ties", "TIES (Yadav et al. 2023) by PEFT: trim, elect signs, average what agrees")
def ties_merge(contributions: Sequence[Contribution], config: FuseConfig, ordinary: Activations | None) -> Tensor:
    """Dense ΔW of PEFT's ``ties`` at the configured density, of the changes at their strengths: those vote too."""
    deltas = [one.strength * one.factors().delta() for one in contributions]
    return ties(deltas, torch.ones(len(deltas), dtype=torch.float64), config.density)


@merge("dare", "DARE (Yu et al. 2024) by PEFT: drop at random, rescale, sum")
def dare(contributions: Sequence[Contribution], config: FuseConfig, ordinary: Activations | None) -> Tensor:
    """Dense ΔW of PEFT's ``dare_linear`` at the configured density.

    What is dropped of an adapter depends on the seed, its name and the layer alone.
    """
    kept = []
    for one in contributions:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator("dare", config.seed, one.name, one.layer).initial_seed())
            strength = torch.tensor([one.strength], dtype=torch.float64)
            kept.append(dare_linear([one.factors().delta()], strength, config.density))
    return torch.stack(kept).sum(0)


@merge("cat", "The factors side by side: Σ λ_i ΔW_i of any methods")
def cat(contributions: Sequence[Contribution], config: FuseConfig, ordinary: Activations | None) -> Factors:
    """Σ λ_i ΔW_i, exact."""
    return weighted_sum(contributions, [one.strength for one in contributions])


@merge("svd", "The sum, cut to rank svd_rank by a singular value decomposition")
def svd(contributions: Sequence[Contribution], config: FuseConfig, ordinary: Activations | None) -> Factors:
    """The best approximation of Σ λ_i ΔW_i of rank ``svd_rank``, from the small core of its factors."""
    return truncate(weighted_sum(contributions, [one.strength for one in contributions]), config.svd_rank)
