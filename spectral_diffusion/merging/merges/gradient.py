"""Gradient fusion (Gu et al. 2023, Mix-of-Show) in closed form, with a prior on generic prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...config.settings import Settings
from ...linalg import Factors
from ..activations import GramAccumulator
from .registry import Contribution, MergeContext, register_merge


class GradientOptions(Settings):
    """How the least squares problem is solved."""

    ridge: float = Field(1e-6, ge=0, description="Ridge, as a share of the Gram matrices' mean diagonal.")
    ridge_to: Literal["zero", "mean"] = Field(
        "zero", description="Where directions without activations go: no change, or the mean change."
    )


@register_merge(
    "gradient",
    "Gradient Fusion in closed form: every concept as its own adapter draws it",
    options=GradientOptions,
    needs_activations=True,
    paper="Gu et al. 2023 (Mix-of-Show), arXiv:2305.18292",
)
def gradient(contributions: Sequence[Contribution], context: MergeContext) -> Factors:
    """argmin over ΔW of Σ_i |(ΔW − λ_i ΔW_i) X_i|² + μ |ΔW X_0|² + ρ |ΔW − T|².

    X_i (n, rows) is the layer's inputs while adapter i generates its concept, X_0 those on generic prompts, T is
    0 or the mean change. With G = X Xᵀ the answer is ΔW = (Σ λ_i ΔW_i G_i + ρ T)(Σ G_i + μ G_0 + ρ I)⁻¹, which is
    low-rank: up = [up_1 … up_K], down = [λ_i down_i (G_i + ρ/K I)]_i (Σ G_i + μ G_0 + ρ I)⁻¹.
    """
    options = context.get(GradientOptions)
    parts = [contribution.factors() for contribution in contributions]
    inputs = [contribution.inputs for contribution in contributions]
    assert all(gram is not None for gram in inputs)
    grams = [gram for gram in inputs if gram is not None]
    downs = [contribution.scale * part.down for contribution, part in zip(contributions, parts, strict=True)]
    sources = [(gram, 1.0) for gram in grams]
    if context.prior is not None and context.prior_weight > 0:
        # as much as ``prior_weight`` concepts weigh, however many rows were recorded
        weight = context.prior_weight * sum(gram.count for gram in grams) / len(grams) / max(context.prior.count, 1)
        sources.append((context.prior, weight))
    ridge = options.ridge * mean_diagonal(sources)
    toward = ridge / len(contributions) if options.ridge_to == "mean" else 0.0
    if all(gram.is_raw for gram, _ in sources) and sum(gram.count for gram, _ in sources) < grams[0].size:
        down = dual(downs, sources, ridge, toward)
    else:
        total = sum((weight * gram.gram() for gram, weight in sources), start=torch.zeros(1, 1, dtype=torch.float64))
        right = torch.cat([gram.matmul(down) + toward * down for down, gram in zip(downs, grams, strict=True)])
        down = solve(total, right, ridge)
    return Factors(torch.cat([part.up for part in parts], 1), down)


def mean_diagonal(sources: Sequence[tuple[GramAccumulator, float]]) -> float:
    """The mean diagonal entry of the weighted Gram matrices' sum."""
    total = 0.0
    for gram, weight in sources:
        trace = gram.matrix().square().sum() if gram.is_raw else gram.gram().diagonal().sum()
        total += weight * float(trace) / gram.size
    return total


def solve(total: Tensor, right: Tensor, ridge: float) -> Tensor:
    """right (total + ρ I)⁻¹ by Cholesky; by eigenvalues where the matrix is singular and there is no ridge."""
    shifted = total + ridge * torch.eye(len(total), dtype=total.dtype)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    diagonal = factor.diagonal()
    if not failed and float(diagonal.min()) > 1e-7 * float(diagonal.max()):
        return torch.cholesky_solve(right.mT, factor).mT
    values, vectors = torch.linalg.eigh(shifted)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    inverse = torch.where(kept, 1 / values.where(kept, torch.ones_like(values)), torch.zeros_like(values))
    return ((right @ vectors) * inverse) @ vectors.mT


def dual(
    downs: Sequence[Tensor], sources: Sequence[tuple[GramAccumulator, float]], ridge: float, toward: float
) -> Tensor:
    """The same answer from the rows themselves: with fewer rows than inputs the Gram matrix is singular.

    With X the weighted rows stacked (m, n), (XᵀX + ρ I)⁻¹ Xᵀ = Xᵀ (X Xᵀ + ρ I)⁻¹, and what is orthogonal to all rows
    keeps only the ridge's target.
    """
    rows = torch.cat([weight**0.5 * gram.matrix() for gram, weight in sources])
    targets = []
    for index, down in enumerate(downs):
        block = torch.zeros(len(down), len(rows), dtype=torch.float64)
        start = sum(len(gram.matrix()) for gram, _ in sources[:index])
        own = sources[index][0].matrix()
        block[:, start : start + len(own)] = down @ own.mT
        targets.append(block)
    answers = torch.cat(targets)  # what each row should become, (k, m)
    goal = torch.cat(list(downs)) * (toward / ridge) if toward else None
    if goal is not None:
        answers = answers - goal @ rows.mT
    solution = solve(rows @ rows.mT, answers, ridge) @ rows
    return solution if goal is None else solution + goal
