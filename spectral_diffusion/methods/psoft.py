"""PSOFT (PEFT's): an orthogonal map inside the principal subspace, with a scale before and behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Factors, SandwichFactors, cayley_change
from .registry import Method, Shapes, Tensors, register_method


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """A (r, r), whose skew part turns the subspace; b and a (r), whose 1 + b and 1 + a scale it on both sides."""
    return {"A": (rank, rank), "b": (rank,), "a": (rank,)}


def prepare(parameters: Tensors, frozen: Tensors) -> dict[str, Tensor]:
    """M = diag(1 + b) R diag(1 + a) − I for R = I + D by Cayley's map, without cancellation."""
    b, a = parameters["b"][..., :, None], parameters["a"][..., None, :]
    with torch.autocast(a.device.type, enabled=False):
        D = cayley_change(parameters["A"])
        eye = torch.eye(D.shape[-1], dtype=D.dtype, device=D.device)
        return {"M": D + b * (D + eye) + (1 + b) * (D + eye) * a}


def core(prepared: Tensors, frozen: Tensors) -> SandwichFactors:
    """ΔW = U_b S_b M V_bᵀ."""
    return SandwichFactors(frozen["U"], frozen["S"][..., :, None] * prepared["M"], frozen["V"].mT)


def factors(prepared: Tensors, frozen: Tensors) -> Factors:
    """The same as up (out, r), down (r, in)."""
    with torch.autocast(frozen["U"].device.type, enabled=False):
        return core(prepared, frozen).factors()


METHOD = register_method(
    Method(
        name="psoft",
        summary="PSOFT (Wu et al. 2026, as PEFT has it): a slot's subspace turned and scaled, S_b included",
        shapes=shapes,
        factors=factors,
        builds_on="columns",
        slot="columns",
        sandwich=core,
        prepare=prepare,
        lr_scale=10.0,
    )
)
