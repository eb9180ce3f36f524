"""Merge adapters layer by layer into the weights of a base, with what every layer sees where a merge needs that."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.apply import enabled_adapters
from ..config.fuse import MergeConfig
from ..core.errors import NotFiniteError, UserError
from ..core.hooks import Event, Hooks
from ..core.machine import CPU
from ..linalg import Factors, matrix_shape, to_float64
from ..models.base import Base
from ..training.memory import gib
from .activations import GramAccumulator
from .calibration import KEPT, cached_seen, calibrate
from .memory import calibration_memory
from .merges.registry import Accumulator, Contribution, Merge, MergeContext, get_merge
from .placement import Homes, placed, rooms
from .scales import scale_of

Seen = dict[str, GramAccumulator]
Targets = Mapping[str, nn.Linear | nn.Conv2d]


def merge_layers(
    base: Base, adapters: list[Adapter], targets: Targets, config: MergeConfig, hooks: Hooks
) -> dict[str, Factors] | None:
    """Merge layer by layer into the weights; returns the changes, or None where one is dense."""
    merge, layers = get_merge(config.merge), list(targets)
    merged: dict[str, Factors] = {}
    done = 0
    for stage in stages(layers, merge, config):
        for layer, change in stage_changes(
            base, adapters, {name: targets[name] for name in stage}, layers, config, hooks
        ):
            add_change(targets[layer].weight, change, layer)
            if isinstance(change, Factors):
                merged[layer] = Factors(*(part.cpu() for part in change))
            done += 1
            hooks.raise_if_stopped()
            hooks.progress(Event("fuse", done, len(layers), {"layer": layer}))
    return merged if len(merged) == len(layers) else None


def stage_changes(
    base: Base, adapters: list[Adapter], stage: Targets, layers: list[str], config: MergeConfig, hooks: Hooks
) -> Iterator[tuple[str, Factors | Tensor]]:
    """The merged change of every layer of a stage, each to be added before the next one is asked for.

    With activations all of the stage is recorded before any of it changes.
    """
    merge = get_merge(config.merge)
    if not merge.needs_activations:
        context = MergeContext(merge.settings(config.options), config.seed)
        homes = dense_homes(base, adapters, stage)
        for layer, module in stage.items():
            yield layer, merge.combine(contribute(adapters, layer, module.weight, config, homes[layer]), context)
        return
    changes: dict[str, Factors | Tensor] = {}
    for homes in groups(base, list(stage), adapters, config, hooks):
        calibration = Calibration(base, adapters, {name: stage[name] for name in homes}, layers, homes, config, hooks)
        changes |= group_changes(adapters, calibration, merge, config)
    yield from changes.items()


def group_changes(
    adapters: list[Adapter], calibration: Calibration, merge: Merge, config: MergeConfig
) -> Iterator[tuple[str, Factors | Tensor]]:
    """The merged change of every layer of a group; what layers see is there of one adapter at a time."""
    context, layers = MergeContext(merge.settings(config.options), config.seed), calibration.layers
    prior = calibration.see_prior()
    merging: dict[str, Accumulator] = {}
    for layer, module in layers.items():
        own = replace(context, prior=prior.get(layer), prior_weight=config.calibration.prior_weight)
        contributions = contribute(adapters, layer, module.weight, config, calibration.homes[layer])
        merging[layer] = merge.accumulate(contributions, own)
    for index, adapter in enumerate(adapters):
        seen = calibration.see(adapter)
        for layer in layers:
            merging[layer].add(index, seen.pop(layer))
    for layer in layers:
        yield layer, merging.pop(layer).result()


@torch.no_grad()
def add_change(weight: Tensor, change: Factors | Tensor, layer: str) -> None:
    """Add a ΔW to a layer's weight in place, rounded once.

    Raises:
        NotFiniteError: the weight is NaN or infinite afterwards.
    """
    before = to_float64(weight)
    delta = Factors(*(part.to(before.device) for part in change)).delta() if isinstance(change, Factors) else change
    weight.copy_((before + delta.view(weight.shape).to(before.device)).to(weight.dtype))
    if not torch.isfinite(weight).all():
        raise NotFiniteError(f"{layer} is NaN or infinite once fused; lower the strengths of its adapters.")


def contribute(
    adapters: list[Adapter], layer: str, weight: Tensor, config: MergeConfig, home: torch.device = CPU
) -> list[Contribution]:
    """Every adapter's contribution to one layer, on ``home``; that of an adapter without the layer is no change."""
    contributions = []
    for adapter in adapters:
        has_layer = layer in adapter.sizes
        parameters = adapter.parameters_of(layer) if has_layer else {}
        frozen = adapter.frozen_of(layer, weight.detach().cpu()) if has_layer else {}
        contributions.append(
            Contribution(
                adapter.name,
                adapter.method,
                {name: tensor.to(home) for name, tensor in parameters.items()},
                {name: tensor.to(home) for name, tensor in frozen.items()},
                adapter.slot,
                scale_of(config.scales, adapter.name, layer),
                absent=None if has_layer else matrix_shape(weight),
                layer=layer,
                is_style=adapter.is_style,
                device=home,
            )
        )
    return contributions


def dense_homes(base: Base, adapters: list[Adapter], stage: Targets) -> Homes:
    """Where each layer is merged without activations: the GPUs in turn, as far as every change fits there densely."""
    room = rooms(base)
    devices = [device for device in room if device != CPU]
    homes = {}
    for index, (layer, module) in enumerate(stage.items()):
        need = 8 * module.weight.numel() * (len(adapters) + 2)  # all changes, their sum and what it is added to
        home = devices[index % len(devices)] if devices else CPU
        homes[layer] = home if need <= (room[home] or 0) else CPU
    return homes


def stages(layers: list[str], merge: Merge, config: MergeConfig) -> list[list[str]]:
    """The layers in the order in which they are fused: all at once, or as Mix-of-Show does."""
    if not merge.needs_activations or config.calibration.calibrate_on == "adapter":
        return [layers]
    return [list(stage) for _, stage in itertools.groupby(sorted(layers, key=stage_of), stage_of)]


def stage_of(layer: str) -> int:
    """Mix-of-Show's order: text encoders, then the keys and values that read them, then the rest."""
    if layer.startswith("text_encoder"):
        return 0
    return 1 if ".attn2.to_k" in layer or ".attn2.to_v" in layer else 2


def groups(base: Base, stage: list[str], adapters: list[Adapter], config: MergeConfig, hooks: Hooks) -> list[Homes]:
    """The layers of a stage in groups that are calibrated one after the other, so that each fits into memory.

    Every group generates the same images again. A layer's inputs depend on no other layer, so neither does the result.
    What the layers see is summed up where they are merged, on GPUs that have room for it.

    Raises:
        UserError: a single layer does not fit.
    """
    sizes = {layer: next(adapter.sizes[layer] for adapter in adapters if layer in adapter.sizes) for layer in stage}
    # One adapter's, the sum of those before, and the generic prompts'; a merge without sums keeps all. An adapter
    # generates with each of its tokens.
    tokens = [max(1, len(adapter.tokens)) for adapter in adapters]
    kept = max(tokens) + 1 if get_merge(config.merge).accumulator else sum(tokens)
    needs = {
        layer: calibration_memory({layer: size}, kept + 1, config.calibration) + factor_bytes(size, adapters)
        for layer, size in sizes.items()
    }
    room = rooms(base)
    out = placed(needs, room)
    if out is None:
        layer = max(needs, key=needs.__getitem__)
        raise UserError(
            f"Calibrating the layer {layer} needs {gib(needs[layer])} of memory and {gib(room[CPU] or 0)} are free; "
            "fuse fewer adapters at once, or take a merge without calibration, such as spectral."
        )
    most = max(sum(needs[layer] for layer in group) for group in out)
    passes = f" in {len(out)} passes, as memory is short" if len(out) > 1 else ""
    hooks.notify(f"Calibrating {len(stage)} layers{passes} needs up to {most / 2**20:.0f} MiB.")
    return out


def factor_bytes(size: tuple[int, int], adapters: list[Adapter]) -> int:
    """The bytes of the factors of every adapter's change of a weight (out, in), at most, in float64."""
    full = {"full_svd", "weight"}  # methods that build on these change every direction
    ranks = (min(size) if adapter.method.builds_on in full else 2 * adapter.rank for adapter in adapters)
    return 8 * sum(size) * sum(ranks)


@dataclass
class Calibration:
    """Records what a group of layers sees.

    In a staged fusion the earlier stages are fused already and the adapter acts on this one and the later ones.

    Attributes:
        layers: the group, by name; ``every``: the names of all layers that are fused.
        homes: where each layer of the group is merged.
        max_bytes: of the cache; 0 for no limit.
    """

    base: Base
    adapters: list[Adapter]
    layers: Targets
    every: list[str]
    homes: Homes
    config: MergeConfig
    hooks: Hooks
    max_bytes: int = KEPT

    def see_prior(self) -> Seen:
        """The inputs on generic prompts; none where they do not count."""
        for name in (adapter.name for adapter in self.adapters if not adapter.token):
            self.hooks.notify(
                f"'{name}' has no token of its own, so it is calibrated on generic prompts, as the prior is."
            )
        return self.see(None) if self.config.calibration.prior_weight > 0 else {}

    def see(self, adapter: Adapter | None) -> Seen:
        """The inputs while this adapter (None: none) generates, by layer."""
        settings, layers = self.config.calibration, dict(self.layers)
        own = settings.calibrate_on == "adapter"
        first = stage_of(next(iter(layers)))
        acting = None if own else {layer for layer in self.every if stage_of(layer) >= first}

        tokens = tuple(adapter.tokens) if adapter else ()  # also those it was trained on top of

        def make() -> Seen:
            with enabled_adapters(self.base, [(adapter, 1.0)] if adapter else [], acting):
                return calibrate(
                    self.base, tokens, layers, settings, self.config.seed, self.hooks, self.homes,
                    adapter.styles if adapter else (),
                )  # fmt: skip

        if own and settings.cache:
            return cached_seen(self.base, adapter, self.homes, settings, self.config.seed, make, self.max_bytes)
        return make()
