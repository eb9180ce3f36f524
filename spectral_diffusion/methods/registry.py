"""The registry of methods: how an adapter parametrises the change of one weight.

A method is one short pure file that registers a :class:`Method`. Its ``factors`` function is the only place
where its ΔW is written; training, merging, fusing and exporting all go through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..linalg import Band, Factors
from ..registry import Registry

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Method:
    """One way to parametrise ΔW of a weight (out, in).

    Attributes:
        name: what a person types after ``--method``.
        summary: one sentence, with its source.
        banded: whether it lives on columns of the spectrum, so that every concept needs a slot.
        shapes: ``(out, in, rank)`` to the shapes of its trainable parameters.
        factors: its parameters and its band (None if not banded) to ``up (out, k), down (k, in)``.
        rank_of_delta: the k above for a rank.
        frozen_up: whether the second half of ``up``'s columns is the band's own U, which needs no gradient.
    """

    name: str
    summary: str
    banded: bool
    shapes: Callable[[int, int, int], Shapes]
    factors: Callable[[Mapping[str, Tensor], Band | None], Factors]
    rank_of_delta: Callable[[int], int]
    frozen_up: bool = False

    def count(self, out_features: int, in_features: int, rank: int) -> int:
        """Trainable numbers for one weight."""
        total = 0
        for shape in self.shapes(out_features, in_features, rank).values():
            size = 1
            for side in shape:
                size *= side
            total += size
        return total


METHODS: Registry[Method] = Registry("method", __package__, {"registry", "attach", "targets", "low_rank"})


def register(method: Method) -> Method:
    """Add a method under its name."""
    return METHODS.add(method.name, method)


def all_methods() -> dict[str, Method]:
    """Every method by name."""
    return METHODS.all()


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none.
    """
    return METHODS.get(name)
