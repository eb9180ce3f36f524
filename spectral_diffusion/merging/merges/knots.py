"""KnOTS (Stoica et al. 2025): the changes in one common basis, and there TIES."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.merge_utils import ties

from ...linalg import Factors
from .peft_merges import DensityOptions
from .registry import Contribution, MergeContext, register_merge

NOISE = 1e-12


@register_merge(
    "knots",
    "KnOTS: TIES in the changes' common singular basis",
    options=DensityOptions,
    paper="Stoica et al. 2025, arXiv:2410.19735",
)
def knots(contributions: Sequence[Contribution], context: MergeContext) -> Factors:
    """[λ_1 ΔW_1 … λ_K ΔW_K] = U Σ [V_1ᵀ … V_Kᵀ], and ΔW = U Σ ties(V_1ᵀ, …, V_Kᵀ).

    The decomposition is that of a small core: with up = Q_u R_u side by side and down_iᵀ = Q_i R_i it is
    R_u blockdiag(λ_i R_iᵀ). The result has the rank of all factors together.
    """
    parts = [contribution.factors() for contribution in contributions]
    left, R = torch.linalg.qr(torch.cat([part.up for part in parts], 1))
    right = [torch.linalg.qr(part.down.mT) for part in parts]
    scaled = [c.scale * factor.R.mT for c, factor in zip(contributions, right, strict=True)]
    U, S, Vh = torch.linalg.svd(R @ torch.block_diag(*scaled), full_matrices=False)
    widths = [factor.Q.shape[1] for factor in right]
    # Rounding would count as a vote: what is nothing beside the largest singular value is none.
    noise = NOISE * S.max().clamp_min(1e-300)
    blocks = [own * ((S[:, None] * own).norm() > noise) for own in Vh.split(widths, 1)]
    tasks = [own @ factor.Q.mT for own, factor in zip(blocks, right, strict=True)]
    kept = noise < S
    weights = torch.ones(len(tasks), dtype=torch.float64, device=S.device)
    merged = ties([task[kept] for task in tasks], weights, context.get(DensityOptions).density)
    return Factors((left @ U * S)[:, kept], merged)
