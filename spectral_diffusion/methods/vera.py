"""VeRA (Kopiczko et al. 2024): two random matrices shared by all layers, scaled by two trained vectors."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..core.rng import keyed_generator
from ..linalg import Factors
from ..slots.ledger import Slot
from .registry import Method, Shapes, Tensors, register_method

START = 0.1  # of the vector d, as in the paper


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """d (r), 0.1 at the start, and b (out), zero at the start."""
    return {"d": (rank,), "b": (out_features,)}


@lru_cache(maxsize=4)
def _uniform(name: str, features: int, rank: int, fan: int) -> Tensor:
    """Kaiming-uniform (rank, features) for ``fan`` inputs, as PEFT draws it: the same for every layer of the size."""
    bound = math.sqrt(6 / fan)
    return (torch.rand(rank, features, generator=keyed_generator("vera", name, features)) * 2 - 1) * bound


def init_frozen(out_features: int, in_features: int, rank: int, slot: Slot | None) -> dict[str, Tensor]:
    """The frozen A (r, in) and B (out, r), from sizes alone."""
    return {"A": _uniform("A", in_features, rank, in_features), "B": _uniform("B", out_features, rank, rank).mT}


def factors(parameters: Tensors, frozen: Tensors) -> Factors:
    """ΔW = diag(b) B diag(d) A."""
    return Factors(parameters["b"][:, None] * frozen["B"], parameters["d"][:, None] * frozen["A"])


def initial(shapes: Shapes, generator: torch.Generator) -> dict[str, Tensor]:
    """d = 0.1, b = 0."""
    return {"d": torch.full(shapes["d"], START), "b": torch.zeros(shapes["b"])}


METHOD = register_method(
    Method(
        name="vera",
        summary="VeRA (Kopiczko et al. 2024): shared random matrices, trained scales",
        shapes=shapes,
        factors=factors,
        builds_on="random",
        init_frozen=init_frozen,
        initial=initial,
        lr_scale=10.0,
        ranks=lambda sides: range(1, 4097),
        neutral=frozenset({"d"}),
        revision=2,  # B was scaled by its outputs in the first
    )
)
