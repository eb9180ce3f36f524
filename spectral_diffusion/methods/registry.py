"""The registry of methods: how an adapter parametrises the change of one weight.

A method is one short pure file that registers a :class:`Method`. Its ``factors`` function is the only place
where its ΔW is written; training, merging, fusing and exporting all go through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor, nn

from ..core.registry import Registry
from ..linalg import Factors, SandwichFactors
from ..slots.ledger import Slot

Shapes = dict[str, tuple[int, ...]]
Tensors = Mapping[str, Tensor]


class Schedule(Protocol):
    """A method's actions between steps on one network."""

    def after_step(self, step: int) -> None:
        """The optimizer has made ``step`` steps."""

    def prune(self) -> None:
        """Remove for good what the schedule has removed, where an average of the parameters brings it back."""

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """The state that a resumed training needs: tensors, and JSON-able values."""

    def load_state(self, tensors: Tensors, pattern: Any) -> None:
        """Take :meth:`state` back."""


@dataclass(frozen=True)
class Peft:
    """A method that PEFT trains.

    Attributes:
        kind: PEFT's name of the method.
        options: PEFT's settings for a rank and a number of steps.
        parameters: our name to the layer's attribute.
        initialize: sets parameters from the layer's weight where PEFT's own start is not exact enough.
        schedule: what happens between the steps, for a network, PEFT's config and the adapter's name.
    """

    kind: str
    options: Callable[[int, int], dict[str, Any]]
    parameters: dict[str, str]
    initialize: Callable[[Tensor, Mapping[str, Tensor]], None] | None = None
    schedule: Callable[[nn.Module, Any, str], Schedule] | None = None


def every_rank(sides: Sequence[tuple[int, int]]) -> Sequence[int]:
    """All ranks that the narrowest of these weights (out, in) has room for."""
    return range(1, min(min(side) for side in sides) + 1)


@dataclass(frozen=True)
class Method:
    """One way to parametrise ΔW of a weight (out, in).

    Attributes:
        name: what a person types after ``--method``.
        summary: one sentence, with its source.
        shapes: ``(out, in, rank)`` to the shapes of its trainable parameters.
        factors: its parameters and the frozen tensors it is built on to ``up (out, k), down (k, in)``.
        builds_on: what those tensors are: ``columns`` (U, S, V of the slot's columns), ``full_svd`` (U, S, V of all
            columns), ``weight`` (W itself), ``random`` (what ``init_frozen`` makes from sizes alone), or ``nothing``.
        slot: ``columns`` of the spectrum or ``rows`` of a shared basis that a concept has for itself, or None.
        slot_policy: what ``slot=next`` means for it.
        init_frozen: ``(out, in, rank, slot)`` to random frozen tensors.
        initial: the parameters to begin with; all zero by default. ΔW is zero there.
        sandwich: the same ΔW as left · middle · right with frozen outer parts, where only the middle is trained.
        prepare: parameters, and the frozen tensors that ``prepared_on`` names, to what ``factors`` and ``sandwich``
            take, over leading dimensions, so that all layers go at once.
        map_input: the same ΔW as a map of the input, ΔW = W (map(I) − I), where that is cheaper.
        continue_from: an adapter's parameters and frozen tensors to the frozen tensors of one that starts from it,
            where that needs no new decomposition.
        normalizable: whether its columns can be scaled to equal weight (``normalize``).
        penalty: a layer's contribution to the loss, averaged over layers.
        low_rank: whether k is small, so that a LoRA file holds the adapter exactly.
        frozen_up: whether the second half of ``up``'s columns is the band's own U, which needs no gradient.
        lr_scale: how many times the learning rate of spectral-additive suits the method, since what it trains has
            another scale. Training multiplies rates that are not set for the method itself by it.
        neutral: parameters whose neutral value is not zero, so that weight decay must not touch them.
        ranks: the ranks that weights of these sizes allow.
        peft: how PEFT trains it, if it does.
        revision: raised when the same parameters give another ΔW than before; adapters of an earlier one are refused.
    """

    name: str
    summary: str
    shapes: Callable[[int, int, int], Shapes]
    factors: Callable[[Tensors, Tensors], Factors]
    builds_on: Literal["columns", "full_svd", "weight", "random", "nothing"] = "nothing"
    slot: Literal["columns", "rows"] | None = None
    slot_policy: str = "next"
    init_frozen: Callable[[int, int, int, Slot | None], dict[str, Tensor]] | None = None
    initial: Callable[[Shapes, torch.Generator], dict[str, Tensor]] | None = None
    sandwich: Callable[[Tensors, Tensors], SandwichFactors] | None = None
    prepare: Callable[[Tensors, Tensors], Tensors] | None = None
    prepared_on: tuple[str, ...] = ()
    map_input: Callable[[Tensor, Tensors], Tensor] | None = None
    continue_from: Callable[[Tensors, Tensors], dict[str, Tensor]] | None = None
    normalizable: bool = False
    penalty: Callable[[Tensors], Tensor] | None = None
    low_rank: bool = True
    frozen_up: bool = False
    lr_scale: float = 1.0
    neutral: frozenset[str] = field(default_factory=frozenset)
    ranks: Callable[[Sequence[tuple[int, int]]], Sequence[int]] = every_rank
    peft: Peft | None = None
    revision: int = 1

    def count(self, out_features: int, in_features: int, rank: int) -> int:
        """Trainable numbers for one weight."""
        return sum(math.prod(shape) for shape in self.shapes(out_features, in_features, rank).values())

    def total(self, sides: Iterable[tuple[int, int]], rank: int) -> int:
        """Trainable numbers for weights of these sizes (out, in)."""
        return sum(self.count(out, inside, rank) for out, inside in sides)

    def delta(self, parameters: Tensors, frozen: Tensors) -> Factors:
        """ΔW from the parameters as they are trained and stored."""
        return self.factors(self.prepare(parameters, frozen) if self.prepare else parameters, frozen)


METHODS: Registry[Method] = Registry("method", __package__)


@overload
def register_method(method: Method) -> Method: ...


@overload
def register_method(
    *, name: str, summary: str, shapes: Callable[[int, int, int], Shapes], **attributes: Any
) -> Any: ...


def register_method(method: Method | None = None, **attributes: Any) -> Any:
    """Add a method under its name; without one, decorate its ``factors`` function with the other attributes::

    @register_method(name="half-lora", summary="…", shapes=shapes)
    def factors(parameters, frozen): ...
    """
    if method is not None:
        return METHODS.add(method.name, method)

    def decorate(factors: Callable[[Tensors, Tensors], Factors]) -> Callable[[Tensors, Tensors], Factors]:
        METHODS.add(attributes["name"], Method(factors=factors, **attributes))
        return factors

    return decorate


def all_methods() -> dict[str, Method]:
    """Every method by name."""
    return METHODS.all()


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none.
    """
    return METHODS.get(name)
