"""Subspace Signal Routing (SSR-Merge, arXiv 2606.10617): a router between the adapters' inner signals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from pydantic import Field

from ...config.settings import Settings
from ...linalg import Factors, row_space
from ..activations import GramAccumulator
from .gradient import mean_diagonal, solve
from .registry import Accumulator, Contribution, MergeContext, register_accumulator


class SubspaceOptions(Settings):
    """How the least squares problem is solved."""

    ridge: float = Field(1e-6, ge=0, description="Ridge, as a share of the Gram matrices' mean diagonal.")


@register_accumulator(
    "ssr",
    "Subspace Signal Routing: least squares inside the adapters' own subspace",
    options=SubspaceOptions,
    paper="SSR-Merge, arXiv:2606.10617",
)
class SubspaceRouting(Accumulator):
    """ΔW = up R down with all factors side by side and the router R that least squares gives.

    Every ΔW_i is written with orthonormal rows of ``down`` first, so that the result does not depend on how it came
    factored. z = down x is the inner signal; R = (Σ λ_i P_i C_i)(Σ C_i + μ C_0 + ρ I)⁻¹ with C_i = down G_i downᵀ and
    P_i keeping adapter i's rows: its own signals pass while it is used, the others' are silenced.
    """

    def __init__(self, contributions: Sequence[Contribution], context: MergeContext) -> None:
        parts = [with_orthonormal_rows(contribution.factors()) for contribution in contributions]
        self.context, self.scales = context, [contribution.scale for contribution in contributions]
        self.up, self.down = torch.cat([part.up for part in parts], 1), torch.cat([part.down for part in parts], 0)
        self.stops = list(itertools.accumulate(len(part.down) for part in parts))
        self.total = torch.zeros(len(self.down), len(self.down), dtype=torch.float64, device=self.down.device)
        self.target = torch.zeros_like(self.total)
        self.count, self.diagonal = 0, 0.0

    def add(self, index: int, inputs: GramAccumulator) -> None:
        C = inputs.matmul(self.down) @ self.down.mT
        self.total += C
        own = slice(self.stops[index - 1] if index else 0, self.stops[index])
        self.target[own] += self.scales[index] * C[own]
        self.count += inputs.count
        self.diagonal += mean_diagonal([(inputs, 1.0)])

    def result(self) -> Factors:
        if not len(self.down):  # nothing changes this layer, as the last one of an encoder that is read before it
            return Factors(self.up, self.down)
        total, prior = self.total, self.context.prior
        if prior is not None and self.context.prior_weight > 0:
            weight = self.context.prior_weight * self.count / len(self.scales) / max(prior.count, 1)
            total = total + weight * prior.matmul(self.down) @ self.down.mT
        scale = float(total.diagonal().mean()) or self.diagonal
        return Factors(self.up, solve(total, self.target, self.context.get(SubspaceOptions).ridge * scale) @ self.down)


def with_orthonormal_rows(factors: Factors) -> Factors:
    """The same change with orthonormal rows of ``down``, as many as its rank."""
    basis = row_space(factors)
    return Factors(factors.up @ (factors.down @ basis), basis.mT)
