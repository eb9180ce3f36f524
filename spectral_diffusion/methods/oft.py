"""OFT (Qiu et al. 2023) with one shared block: every group of inputs is rotated by the same Cayley map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg import Factors, cayley_change
from .registry import Method, Shapes, Tensors, register_method


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """A (in / blocks, in / blocks), whose skew part turns each of the ``rank`` blocks of inputs.

    Raises:
        ValueError: the blocks do not divide the inputs.
    """
    if in_features % rank:
        raise ValueError(f"{rank} blocks do not divide {in_features} inputs")
    return {"A": (in_features // rank, in_features // rank)}


def prepare(parameters: Tensors, frozen: Tensors) -> dict[str, Tensor]:
    """D = R − I of the shared block."""
    return {"D": cayley_change(parameters["A"])}


def map_input(x: Tensor, prepared: Tensors) -> Tensor:
    """Every block of x (…, in) through Rᵀ: x + x Dᵀ, block by block."""
    D = prepared["D"].to(x.dtype)
    blocks = x.reshape(*x.shape[:-1], -1, len(D))
    return x + (blocks @ D.mT).reshape(x.shape)


def factors(prepared: Tensors, frozen: Tensors) -> Factors:
    """ΔW = W (R_blocks − I) as (W, R_blocks − I): of full rank in general."""
    W, D = frozen["W"], prepared["D"]
    return Factors(W, torch.block_diag(*[D] * (W.shape[1] // len(D))))


def ranks(sides: Sequence[tuple[int, int]]) -> Sequence[int]:
    """The numbers of blocks that divide every input; blocks of at least two."""
    inputs = [side[1] for side in sides]
    common = math.gcd(*inputs)
    return [blocks for blocks in range(1, min(inputs) // 2 + 1) if common % blocks == 0]


METHOD = register_method(
    Method(
        name="oft",
        summary="OFT (Qiu et al. 2023) with a shared block; the rank is the number of blocks",
        shapes=shapes,
        factors=factors,
        builds_on="weight",
        prepare=prepare,
        map_input=map_input,
        low_rank=False,
        ranks=ranks,
    )
)
