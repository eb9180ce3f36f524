"""Subspace Signal Routing (SSR-Merge, arXiv 2606.10617): a router between the adapters' inner signals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from ...config.settings import Settings
from ...linalg import Factors
from .gradient import mean_diagonal, solve
from .registry import Contribution, MergeContext, register_merge


class SubspaceOptions(Settings):
    """How the least squares problem is solved."""

    ridge: float = Field(1e-6, ge=0, description="Ridge, as a share of the Gram matrices' mean diagonal.")


@register_merge(
    "ssr",
    "Subspace Signal Routing: least squares inside the adapters' own subspace",
    options=SubspaceOptions,
    needs_activations=True,
    paper="SSR-Merge, arXiv:2606.10617",
)
def ssr(contributions: Sequence[Contribution], context: MergeContext) -> Factors:
    """ΔW = up R down with all factors side by side and the router R that least squares gives.

    z = down x is the inner signal; R = (Σ λ_i P_i C_i)(Σ C_i + μ C_0 + ρ I)⁻¹ with C_i = down G_i downᵀ and P_i keeping
    adapter i's rows: its own signals pass while it is used, the others' are silenced.
    """
    parts = [contribution.factors() for contribution in contributions]
    up, down = torch.cat([part.up for part in parts], 1), torch.cat([part.down for part in parts], 0)
    total = torch.zeros(len(down), len(down), dtype=torch.float64)
    target = torch.zeros_like(total)
    start = 0
    grams = []
    for contribution, part in zip(contributions, parts, strict=True):
        assert contribution.inputs is not None
        C = contribution.inputs.matmul(down) @ down.mT
        total += C
        stop = start + len(part.down)
        target[start:stop] += contribution.scale * C[start:stop]
        start = stop
        grams.append(contribution.inputs)
    if context.prior is not None and context.prior_weight > 0:
        weight = context.prior_weight * sum(gram.count for gram in grams) / len(grams) / max(context.prior.count, 1)
        total += weight * context.prior.matmul(down) @ down.mT
    scale = float(total.diagonal().mean()) or mean_diagonal([(gram, 1.0) for gram in grams])
    return Factors(up, solve(total, target, context.get(SubspaceOptions).ridge * scale) @ down)
