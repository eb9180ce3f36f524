"""The registry of merges: how several adapters' changes of one weight become one change."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from ..errors import UserError, nearest
from ..linalg import Band, Factors
from ..methods import Method
from ..slots import Slot


@dataclass(frozen=True)
class Contribution:
    """What one adapter brings to one weight."""

    name: str
    method: Method
    parameters: Mapping[str, Tensor]
    band: Band | None
    slot: Slot | None
    strength: float = 1.0

    def factors(self) -> Factors:
        """The adapter's ΔW at strength 1."""
        return self.method.factors(self.parameters, self.band)


Merge = Callable[[Sequence[Contribution], str], Tensor]

_MERGES: dict[str, Merge] = {}


def merge(name: str) -> Callable[[Merge], Merge]:
    """Register ``(contributions, form) -> ΔW (out, in) in float64`` under a name."""

    def keep(function: Merge) -> Merge:
        _MERGES[name] = function
        return function

    return keep


def all_merges() -> dict[str, Merge]:
    """Every merge by name."""
    _import_merges()
    return dict(sorted(_MERGES.items()))


@cache
def _import_merges() -> None:
    """Import every file of this folder, so that each registers its merge."""
    package = __name__.rsplit(".", 1)[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name not in {"registry", "recipe"}:
            importlib.import_module(f"{package}.{module.name}")


def get_merge(name: str) -> Merge:
    """The merge of that name.

    Raises:
        UserError: there is none.
    """
    merges = all_merges()
    if name not in merges:
        raise UserError(f"Unknown merge '{name}'{nearest(name, merges)}; known: {', '.join(sorted(merges))}.")
    return merges[name]
