"""The registry of merges: how several adapters' changes of one weight become one change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...config.fuse import MergeConfig
from ...config.settings import Settings, build
from ...core.machine import CPU
from ...core.registry import Registry
from ...linalg import Factors, to_float64
from ...methods import Method
from ...slots.ledger import Slot
from ..activations import GramAccumulator
from ..scales import scales_of


@dataclass(frozen=True)
class Contribution:
    """One adapter's contribution to one weight."""

    name: str
    method: Method
    parameters: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    slot: Slot | None
    scale: float = 1.0
    inputs: GramAccumulator | None = None  # the layer's inputs while this adapter acted, for merges that need them
    absent: tuple[int, int] | None = None  # the weight's sides, where the adapter leaves it as it is
    layer: str = ""  # the weight's name
    is_style: bool = False  # whether the adapter is one of a style
    device: torch.device = CPU  # where the weight is merged; it has float64

    def factors(self) -> Factors:
        """The adapter's ΔW at strength 1, in float64; of rank 0 where it has none."""
        if self.absent:
            rows, columns = self.absent
            given: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
            return Factors(torch.zeros(rows, 0, **given), torch.zeros(0, columns, **given))
        return Factors(*(to_float64(part) for part in self.method.delta(self.parameters, self.frozen)))


class NoOptions(Settings):
    """A merge without settings of its own."""


Options = TypeVar("Options", bound=Settings)


@dataclass(frozen=True)
class MergeContext:
    """A merge's inputs besides the contributions to one weight.

    Attributes:
        options: the merge's own settings; read them with :meth:`get`.
        prior: what the layer saw on prompts without any concept, for merges that need activations.
        prior_weight: how much ``prior`` counts, in concepts.
    """

    options: Settings = field(default_factory=NoOptions)
    seed: int = 0
    prior: GramAccumulator | None = None
    prior_weight: float = 0.0

    def get(self, kind: type[Options]) -> Options:
        """The options, which are of this kind."""
        assert isinstance(self.options, kind)
        return self.options


Combine = Callable[[Sequence[Contribution], MergeContext], Factors | Tensor]


class Accumulator(ABC):
    """A merge of one weight that is given what the layer sees adapter by adapter.

    A merge that keeps sums only needs memory for one adapter's activations at a time, however many there are.

    Args:
        contributions: of all adapters, without their inputs.
        context: with what the layer saw on generic prompts.
    """

    @abstractmethod
    def __init__(self, contributions: Sequence[Contribution], context: MergeContext) -> None: ...

    @abstractmethod
    def add(self, index: int, inputs: GramAccumulator) -> None:
        """Take what the layer saw while adapter ``index`` acted; they come in order."""

    @abstractmethod
    def result(self) -> Factors | Tensor:
        """ΔW in float64."""


class KeptInputs(Accumulator):
    """Keeps everything for a merge that wants all inputs at once."""

    def __init__(self, contributions: Sequence[Contribution], context: MergeContext, combine: Combine) -> None:
        self.contributions, self.context, self.combine = list(contributions), context, combine

    def add(self, index: int, inputs: GramAccumulator) -> None:
        self.contributions[index] = replace(self.contributions[index], inputs=inputs)

    def result(self) -> Factors | Tensor:
        return self.combine(self.contributions, self.context)


def _no_check(adapters: Sequence[Adapter], config: MergeConfig) -> None:
    """Any adapters and settings will do."""


def scales_by_component(adapters: Sequence[Adapter], config: MergeConfig) -> list[list[float]]:
    """The adapters' λ in each component, such as the U-Net."""
    scales = list(scales_of(config, adapters).values())
    return [list(of_one) for of_one in zip(*(of_adapter.values() for of_adapter in scales), strict=True)]


def _no_sum(options: Settings) -> bool:
    """Concepts cannot be subtracted again."""
    return False


@dataclass(frozen=True)
class Merge:
    """One way to merge, and all that the library and the apps need to know about it.

    Attributes:
        combine: contributions and context to ΔW in float64: factors where it is low-rank, else dense.
        options: the model of its own settings, ``options.NAME`` in YAML and on the command line.
        needs_activations: whether it needs what layers see.
        accumulator: takes what layers see adapter by adapter, where the merge can; see :func:`register_accumulator`.
        check: what has to hold of the adapters and the settings of the fusion; asked before anything is generated or
            changed, it raises UserError.
        name_options: options that name adapters, which ``unfuse`` takes the removed ones out of.
        is_sum: whether, with these options, every concept is one summand, which can be subtracted again.
        advice: by the least number of adapters, what the studies recommend for that number.
        paper: where it is from.
    """

    name: str
    summary: str
    combine: Combine
    options: type[Settings] = NoOptions
    needs_activations: bool = False
    accumulator: type[Accumulator] | None = None
    check: Callable[[Sequence[Adapter], MergeConfig], None] = _no_check
    name_options: tuple[str, ...] = ()
    is_sum: Callable[[Settings], bool] = _no_sum
    advice: Mapping[int, str] = field(default_factory=dict)
    paper: str = ""

    def settings(self, given: Mapping[str, object]) -> Settings:
        """Its own settings, validated.

        Raises:
            UserError: an unknown one, or a value that it cannot have.
        """
        return build(self.options, dict(given), prefix="options.")

    def accept(self, adapters: Sequence[Adapter], config: MergeConfig) -> None:
        """Refuse a fusion that this merge cannot do, before any work.

        Raises:
            UserError: wrong settings of the merge's own, or adapters and settings that do not fit it.
        """
        self.settings(config.options)
        self.check(adapters, config)

    def accumulate(self, contributions: Sequence[Contribution], context: MergeContext) -> Accumulator:
        """Begin to merge one weight whose activations come adapter by adapter."""
        if self.accumulator:
            return self.accumulator(contributions, context)
        return KeptInputs(contributions, context, self.combine)

    def advise(self, count: int) -> str | None:
        """The advice for that number of adapters."""
        return next((self.advice[least] for least in sorted(self.advice, reverse=True) if count >= least), None)


MERGES: Registry[Merge] = Registry("merge", __package__)


def register_merge(name: str, summary: str, **attributes: Any) -> Callable[[Combine], Combine]:
    """Register a ``combine`` function under a name; the attributes are those of :class:`Merge`."""

    def decorate(function: Combine) -> Combine:
        MERGES.add(name, Merge(name, summary, function, **attributes))
        return function

    return decorate


def register_accumulator(
    name: str, summary: str, **attributes: Any
) -> Callable[[type[Accumulator]], type[Accumulator]]:
    """Register an :class:`Accumulator` under a name as a merge that needs activations."""

    def decorate(kind: type[Accumulator]) -> type[Accumulator]:
        def combine(contributions: Sequence[Contribution], context: MergeContext) -> Factors | Tensor:
            merging = kind(contributions, context)
            for index, contribution in enumerate(contributions):
                assert contribution.inputs is not None
                merging.add(index, contribution.inputs)
            return merging.result()

        MERGES.add(name, Merge(name, summary, combine, needs_activations=True, accumulator=kind, **attributes))
        return kind

    return decorate


def weighted_sum(contributions: Sequence[Contribution], weights: Sequence[float]) -> Factors:
    """Σ w_i ΔW_i as factors side by side: up (out, Σk), down (Σk, in)."""
    parts = [contribution.factors() for contribution in contributions]
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
