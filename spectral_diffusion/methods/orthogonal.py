"""Orthogonal Adaptation (Po et al. 2024): LoRA whose down factor is rows of one shared orthogonal basis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from ..core.rng import keyed_generator
from ..linalg import Factors, orthogonal_basis
from ..slots.ledger import Slot
from .registry import Method, Shapes, Tensors, register_method


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """B (out, r), zero at the start."""
    return {"B": (out_features, rank)}


@lru_cache(maxsize=16)
def _basis(size: int) -> Tensor:
    return orthogonal_basis(size, keyed_generator("orthogonal", size)).float()


def init_frozen(out_features: int, in_features: int, rank: int, slot: Slot | None) -> dict[str, Tensor]:
    """The concept's own rows (r, in) of the basis that all concepts share."""
    assert slot is not None
    return {"down": _basis(in_features)[list(slot.columns)]}


def factors(parameters: Tensors, frozen: Tensors) -> Factors:
    """ΔW = B Q_rows. Changes in disjoint rows act on orthogonal inputs."""
    return Factors(parameters["B"], frozen["down"])


def ranks(sides: Sequence[tuple[int, int]]) -> Sequence[int]:
    """As many rows as the narrowest input has."""
    return range(1, min(side[1] for side in sides) + 1)


METHOD = register_method(
    Method(
        name="orthogonal",
        summary="Orthogonal Adaptation (Po et al. 2024): rows of a shared orthogonal basis, distinct per concept",
        shapes=shapes,
        factors=factors,
        builds_on="random",
        slot="rows",
        init_frozen=init_frozen,
        ranks=ranks,
    )
)
