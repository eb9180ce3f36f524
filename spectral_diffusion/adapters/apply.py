"""Let adapters act on a base without changing its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..methods import get_method
from ..models.base import Base
from ..models.per_layer_tokens import install_per_layer
from .adapter import Adapter, check_base
from .attach import AdapterSpec, inject_adapter, set_adapters, unloading

Strength = float | Mapping[Any, float]  # λ, or one per component (unet, text_encoder, …)


def component_scale(strength: Strength, component: str) -> float:
    """λ of one component; 1 for a component that a mapping leaves out."""
    return float(strength.get(component, 1.0)) if isinstance(strength, Mapping) else float(strength)


def put_adapters(base: Base, adapters: Sequence[tuple[Adapter, Strength]], allow_base: bool = False) -> list[str]:
    """Let adapters act on a base at the given strengths, tokens included, without fusing; returns warnings.

    Raises:
        UserError: an adapter does not belong on this base, or two share a token.
    """
    notes = []
    for index, (adapter, strength) in enumerate(adapters):
        if warning := check_base(adapter, base, allow_base):
            notes.append(warning)
        add_deltas(base, adapter, strength, f"concept_{index}")
        install_tokens(base, adapter)
    if adapters:
        set_adapters(base.models, [f"concept_{index}" for index in range(len(adapters))])
    return notes


@contextmanager
def enabled_adapters(
    base: Base, adapters: Sequence[tuple[Adapter, Strength]], only: set[str] | None = None
) -> Iterator[None]:
    """Let adapters act on a base that knows their tokens while the context is open; ``only`` restricts the layers."""
    with unloading(base.models):
        for index, (adapter, strength) in enumerate(adapters):
            add_deltas(base, adapter, strength, f"concept_{index}", only)
        set_adapters(base.models, [f"concept_{index}" for index in range(len(adapters))])
        yield


def install_tokens(base: Base, adapter: Adapter) -> None:
    """Put every token that an adapter brings on a base, layer-wise if it is that.

    Raises:
        UserError: a token exists already, or has vectors for other layers.
    """
    add_words(base, adapter)
    if adapter.per_layer_vectors:
        install_per_layer(base, adapter.token, adapter.per_layer_vectors)


def add_words(base: Base, adapter: Adapter) -> None:
    """Put the tokens that an adapter brings on a base, or the words that stand for it where a base learns none.

    Raises:
        UserError: a token is there already.
    """
    for token, vectors in adapter.tokens.items():
        base.add_token(token, vectors)
    if adapter.trigger and not base.tokenizers:
        base.triggers[adapter.token] = adapter.trigger


def add_deltas(
    base: Base, adapter: Adapter, strength: Strength = 1.0, name: str = "concept", only: set[str] | None = None
) -> None:
    """Attach an adapter's ΔW as one LoRA of exactly its rank, whatever its method; one of full rank as a wide LoRA.

    ``only`` restricts to some layers.
    """
    weights = base.weights(adapter.targets) if adapter.needs_base else {}
    layers = [layer for layer in adapter.layers if only is None or layer in only]
    factors = {layer: adapter.factors(layer, weights.get(layer)) for layer in layers}
    if not factors:
        return
    ranks = {layer: up.shape[1] for layer, (up, _) in factors.items()}
    rank, mixed = max(ranks.values()), len(set(ranks.values())) > 1
    spec = AdapterSpec(get_method("lora"), rank, adapter.targets, only=set(factors), ranks=ranks if mixed else None)
    on = inject_adapter(base.models, spec, name)
    tensors: dict[str, torch.Tensor] = {}
    for layer, (up, down) in factors.items():
        tensors |= {f"{layer}.B": up, f"{layer}.A": down}
        on.layers[layer].set_scale(name, component_scale(strength, layer.split(".", 1)[0]))
    on.load_state_dict(tensors)
