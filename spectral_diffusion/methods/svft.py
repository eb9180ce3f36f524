"""SVFT (Lingam et al. 2024), banded: a few diagonals between all singular vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg import Factors
from .registry import Method, Shapes, Tensors, register_method


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """M (2r + 1, n) for n = min(out, in): the main diagonal and r on each side, each as long as the main one."""
    return {"M": (2 * rank + 1, min(out_features, in_features))}


def banded(M: Tensor) -> Tensor:
    """The square matrix with the rows of ``M`` (2r + 1, n) as diagonals; what reaches over the edge counts nothing."""
    size, most = M.shape[1], len(M) // 2
    total = M.new_zeros(size, size)
    for row, offset in zip(M, range(-most, most + 1), strict=True):
        total = total + torch.diag_embed(row[: size - abs(offset)], offset)
    return total


def factors(parameters: Tensors, frozen: Tensors) -> Factors:
    """ΔW = U M Vᵀ; of full rank."""
    return Factors(frozen["U"] @ banded(parameters["M"]), frozen["V"].mT)


def ranks(sides: Sequence[tuple[int, int]]) -> Sequence[int]:
    """Diagonals on each side that the narrowest weight has room for."""
    return range(1, min(min(side) for side in sides))


METHOD = register_method(
    Method(
        name="svft",
        summary="SVFT (Lingam et al. 2024, arXiv 2405.19597), banded; the rank is the diagonals on each side",
        shapes=shapes,
        factors=factors,
        builds_on="full_svd",
        low_rank=False,
        lr_scale=10.0,
        ranks=ranks,
    )
)
