"""PiSSA (Meng et al. 2024) and MiLoRA (Wang et al. 2024): a LoRA that starts as a band of the weight itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Factors
from .registry import Method, Shapes, Tensors, register_method


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """dB (out, r) and dA (r, in): what training adds to both factors; zero at the start."""
    return {"dB": (out_features, rank), "dA": (rank, in_features)}


def factors(parameters: Tensors, frozen: Tensors) -> Factors:
    """ΔW = (B + dB)(A + dA) − B A with B = U_b √S_b and A = √S_b V_bᵀ, without cancellation.

    The papers take B A out of the weight and train B and A; their difference from the start is this change.
    """
    root = frozen["S"].clamp_min(0).sqrt()
    B, A = frozen["U"] * root[..., None, :], root[..., :, None] * frozen["V"].mT
    dB, dA = parameters["dB"], parameters["dA"]
    up: Tensor = torch.cat([dB, B.to(dB)], -1)
    return Factors(up, torch.cat([A.to(dA) + dA, dA], -2))


METHOD = register_method(
    Method(
        name="pissa",
        summary="PiSSA (Meng et al. 2024, arXiv 2404.02948): a LoRA that starts as a slot's columns",
        shapes=shapes,
        factors=factors,
        builds_on="columns",
        slot="columns",
    )
)
MINOR = register_method(
    Method(
        name="milora",
        summary="MiLoRA (Wang et al. 2024, arXiv 2406.09044): the same with the smallest singular values",
        shapes=shapes,
        factors=factors,
        builds_on="columns",
        slot="columns",
        slot_policy="bottom",
    )
)
