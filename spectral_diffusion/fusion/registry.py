"""The registry of merges: how several adapters' changes of one weight become one change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..linalg import Factors
from ..methods import Method
from ..registry import Registry
from ..slots import Slot


@dataclass(frozen=True)
class Contribution:
    """What one adapter brings to one weight."""

    name: str
    method: Method
    parameters: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    slot: Slot | None
    strength: float = 1.0

    def factors(self) -> Factors:
        """The adapter's ΔW at strength 1."""
        return self.method.delta(self.parameters, self.frozen)


Merge = Callable[[Sequence[Contribution], str], Tensor]

MERGES: Registry[Merge] = Registry("merge", __package__, {"registry", "recipe"})


def merge(name: str) -> Callable[[Merge], Merge]:
    """Register ``(contributions, form) -> ΔW (out, in) in float64`` under a name."""
    return lambda function: MERGES.add(name, function)


def all_merges() -> dict[str, Merge]:
    """Every merge by name."""
    return MERGES.all()


def get_merge(name: str) -> Merge:
    """The merge of that name.

    Raises:
        UserError: there is none.
    """
    return MERGES.get(name)
