"""The registry of merges: how several adapters' changes of one weight become one change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...config.models import FuseConfig
from ...core.registry import Registry
from ...linalg import Factors, exact
from ...methods import Method
from ...slots.ledger import Slot
from ..activations import Activations


@dataclass(frozen=True)
class Contribution:
    """What one adapter brings to one weight."""

    name: str
    method: Method
    parameters: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    slot: Slot | None
    strength: float = 1.0
    inputs: Activations | None = None  # what the layer saw while this adapter acted, for merges that ask
    absent: tuple[int, int] | None = None  # the weight's sides, where the adapter leaves it as it is
    layer: str = ""  # the weight's name

    def factors(self) -> Factors:
        """The adapter's ΔW at strength 1, in float64; of rank 0 where it has none."""
        if self.absent:
            rows, columns = self.absent
            return Factors(torch.zeros(rows, 0).double(), torch.zeros(0, columns).double())
        return Factors(*(exact(part) for part in self.method.delta(self.parameters, self.frozen)))


@dataclass(frozen=True)
class Merge:
    """One way to merge.

    Attributes:
        combine: ``(contributions, settings, ordinary)`` to ΔW in float64: factors where it is low-rank, else dense.
            ``ordinary`` is what the layer saw on prompts without any concept, for merges that ask.
        check: what has to hold of the adapters, asked before anything is drawn or changed; it raises UserError.
        activations: whether it asks what layers see.
        advice: by the least number of adapters, what the studies say to somebody who fuses as many.
    """

    name: str
    summary: str
    combine: Callable[[Sequence[Contribution], FuseConfig, Activations | None], Factors | Tensor]
    activations: bool = False
    check: Callable[[Sequence[Adapter]], None] = lambda adapters: None
    advice: Mapping[int, str] = field(default_factory=dict)

    def advise(self, count: int) -> str | None:
        """The advice for so many adapters."""
        return next((self.advice[least] for least in sorted(self.advice, reverse=True) if count >= least), None)


MERGES: Registry[Merge] = Registry("merge", __package__)


def merge(
    name: str,
    summary: str,
    activations: bool = False,
    check: Callable[[Sequence[Adapter]], None] = lambda adapters: None,
    advice: Mapping[int, str] | None = None,
) -> Callable[[Callable], Callable]:
    """Register a ``combine`` function under a name."""

    def decorate(function: Callable) -> Callable:
        MERGES.add(name, Merge(name, summary, function, activations, check, advice or {}))
        return function

    return decorate


def weighted_sum(contributions: Sequence[Contribution], weights: Sequence[float]) -> Factors:
    """Σ w_i ΔW_i as factors side by side: up (out, Σk), down (Σk, in)."""
    parts = [one.factors() for one in contributions]
    up = torch.cat([part.up * weight for part, weight in zip(parts, weights, strict=True)], 1)
    return Factors(up, torch.cat([part.down for part in parts], 0))


def all_merges() -> dict[str, Merge]:
    """Every merge by name."""
    return MERGES.all()


def get_merge(name: str) -> Merge:
    """The merge of that name.

    Raises:
        UserError: there is none.
    """
    return MERGES.get(name)
