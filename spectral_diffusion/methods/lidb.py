"""LiDB, the Lightweight DreamBooth of HyperDreamBooth (Ruiz et al. 2023): a LoRA inside random orthogonal frames."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.rng import keyed_generator
from ..linalg import Factors
from ..slots.ledger import Slot
from .registry import Method, Shapes, Tensors, register_method

LEFT, RIGHT = 50, 100  # a and b of the paper


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """A (a, r), random at the start, and B (r, b), zero at the start."""
    return {"A": (LEFT, rank), "B": (rank, RIGHT)}


def init_frozen(out_features: int, in_features: int, rank: int, slot: Slot | None) -> dict[str, Tensor]:
    """The frozen frames up (out, a) and down (b, in), orthonormal where there is room, from sizes alone."""
    up = torch.randn(out_features, LEFT, generator=keyed_generator("lidb", "up", out_features))
    down = torch.randn(in_features, RIGHT, generator=keyed_generator("lidb", "down", in_features))
    return {"up": _orthonormal(up), "down": _orthonormal(down).mT.contiguous()}


def _orthonormal(matrix: Tensor) -> Tensor:
    tall = matrix.shape[0] >= matrix.shape[1]
    Q = torch.linalg.qr(matrix.double() if tall else matrix.mT.double()).Q
    return (Q if tall else Q.mT).float()


def factors(parameters: Tensors, frozen: Tensors) -> Factors:
    """ΔW = A_aux A B B_aux."""
    return Factors(frozen["up"] @ parameters["A"], parameters["B"] @ frozen["down"])


def initial(shapes: Shapes, generator: torch.Generator) -> dict[str, Tensor]:
    """A normal with variance 1 / a, B zero."""
    return {"A": torch.randn(shapes["A"], generator=generator) / LEFT**0.5, "B": torch.zeros(shapes["B"])}


METHOD = register_method(
    Method(
        name="lidb",
        summary="LiDB (Ruiz et al. 2023): a small LoRA between frozen random frames, a = 50 and b = 100",
        shapes=shapes,
        factors=factors,
        builds_on="random",
        init_frozen=init_frozen,
        initial=initial,
        lr_scale=3.0,
        ranks=lambda sides: range(1, LEFT + 1),
    )
)
