"""What of a fused base learns when it is distilled: whole weights, or a low-rank correction of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.attach import AdapterSpec, InjectedAdapter, inject_adapter, unloading
from ..linalg import Factors
from ..methods import get_method
from ..models.base import Base
from ..models.targets import EVERYTHING
from ..models.tokens import trainable_rows

CORRECTION = "correction"  # the adapter's name on the models


@dataclass(frozen=True)
class Learning:
    """The trainable numbers of a student while it learns.

    Attributes:
        weights: whole weights, or the correction's factors.
        rows: the vectors of the tokens, by text encoder.
    """

    weights: Sequence[Tensor]
    rows: list[nn.Parameter]
    correction: InjectedAdapter | None = None

    @torch.no_grad()
    def factors(self) -> dict[str, Factors] | None:
        """The correction by layer, on the CPU; None where whole weights learn and have changed in place."""
        if self.correction is None:
            return None
        out = {}
        for layer in self.correction.layers:
            parameters = {name: value.detach().cpu() for name, value in self.correction.parameters(layer).items()}
            out[layer] = self.correction.method.delta(parameters, {})
        return out


@dataclass(frozen=True)
class Student:
    """A fused base, and what of it learns: layers by name, and the vectors of some tokens.

    Attributes:
        rank: of the correction that every layer learns as a LoRA; 0: the layers' whole weights learn.
        seed: of the correction's initial values.
    """

    base: Base
    layers: Mapping[str, nn.Linear | nn.Conv2d]
    tokens: Sequence[str]
    rank: int = 0
    seed: int = 0

    @contextmanager
    def trainable(self) -> Iterator[Learning]:
        """Make the layers and the tokens' vectors trainable while the context is open."""
        for model in self.base.models.values():
            model.requires_grad_(False)
        with ExitStack() as stack:
            rows = [
                stack.enter_context(trainable_rows(tokenizer, self.base.models[encoder], self.tokens))
                for encoder, tokenizer in self.base.tokenizers.items()
            ]
            if self.rank:
                stack.enter_context(unloading(self.base.models))
                correction = inject_adapter(self.base.models, correction_spec(self.rank, self.layers, self.seed))
                yield Learning([p for _, p in correction.named_parameters()], rows, correction)
            else:
                yield Learning(stack.enter_context(_trainable_weights(list(self.layers.values()))), rows)


def correction_spec(rank: int, layers: Mapping[str, nn.Module], seed: int = 0) -> AdapterSpec:
    """The correction of these layers as an adapter."""
    return AdapterSpec(get_method("lora"), rank, EVERYTHING, seed, only=set(layers))


@contextmanager
def _trainable_weights(layers: Sequence[nn.Linear | nn.Conv2d]) -> Iterator[list[Tensor]]:
    """Let whole weights learn while the context is open."""
    weights = [layer.weight for layer in layers]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
