"""Our methods as one tuner that PEFT and diffusers know, under the type ``SPECTRAL_DIFFUSION``.

Importing this file registers it, so that PEFT's and diffusers' operations (weights, disable, merge, state dict,
checkpointing) work on it as on any other.
"""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from ..linalg import Factors, truncate
from ..methods.registry import Method, get_method
from ..slots.ledger import Slot, read_columns
from .frozen import frozen_tensors, hollow_tensors
from .layer import BASE, AdaptedLayer, BatchedPreparation, TunerError, adapted_layer, hooks_of, refuse_layer
from .peft_card import add_usage

PEFT_TYPE = "SPECTRAL_DIFFUSION"
PREFIX = "spectral_"
BIASES = ("none", "all", "spectral_only")
ATTENTION = {"to_q", "to_k", "to_v", "to_out.0"}  # what is adapted in a diffusers network if nothing is said


@dataclass
class SpectralConfig(PeftConfig):
    """One of our methods for PEFT: ``get_peft_model(model, SpectralConfig(r=8))`` is all there is to do.

    There is no alpha: ΔW has the strength 1, and ``set_scale`` or diffusers' adapter weights change it.
    """

    r: int = field(default=8, metadata={"help": "Columns that are trained (the rank; the number of blocks of oft)."})
    method: str = field(default="spectral-additive", metadata={"help": "As `spectral-diffusion methods` lists them."})
    slot: str | None = field(
        default=None,
        metadata={
            "help": "Columns of the spectrum, 0:8 or 1,5,9, as many as the largest rank. Default: the first that no "
            "other adapter of this model has."
        },
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the modules to adapt, a regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names of modules to leave alone, or a regular expression."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Module names or regular expressions to their own ranks, as {'k_proj': 4}."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; needs a list of target_modules."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in, as 'layers'."}
    )
    bias: str = field(
        default="none", metadata={"help": "Biases to train too: none, all, or spectral_only (of adapted layers)."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full and save with the adapter, as a classifier's head."}
    )
    find_frozen: bool = field(
        default=True,
        metadata={"help": "Decompose the weights here. False: the caller sets every layer's frozen tensors."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.target_modules = as_set(self.target_modules)
        self.exclude_modules = as_set(self.exclude_modules)
        self._check_layers()
        method = get_method(self.method)
        if method.peft and not method.initial:
            flags = [f"{name}=True" for name, value in method.peft.options(self.r, 0).items() if value is True]
            theirs = f"{PEFT_TYPE_TO_CONFIG_MAPPING[method.peft.kind].__name__}({', '.join(flags)})"
            raise TunerError(f"{method.name} is PEFT's own method; use peft.{theirs} instead of SpectralConfig.")
        if self.slot:
            self._check_slot(method, self.slot)

    def _check_layers(self) -> None:
        if any(rank < 1 for rank in (self.r, *self.rank_pattern.values())):
            raise TunerError("r and every rank of rank_pattern must be at least 1.")
        if self.bias not in BIASES:
            raise TunerError(f"bias cannot be '{self.bias}'; use {', '.join(BIASES[:-1])} or {BIASES[-1]}.")
        if isinstance(self.target_modules, str) and not (self.layers_to_transform is self.layers_pattern is None):
            raise TunerError("layers_to_transform and layers_pattern need target_modules as a list of names.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise TunerError("layers_pattern needs layers_to_transform; name the layers' indices there.")

    def _check_slot(self, method: Method, text: str) -> None:
        if not method.slot:
            raise TunerError(f"{method.name} has no slots; leave slot out.")
        try:
            slot = read_columns(text)
        except ValueError as error:
            raise TunerError(
                f"slot '{text}' is not understood; use columns such as 16:24 or 1,5,9, or leave it out for the first "
                "free ones."
            ) from error
        if slot.rank != self.columns:
            raise TunerError(f"slot {text} has {slot.rank} columns but the rank is {self.columns}; make them equal.")

    @property
    def columns(self) -> int:
        """How many columns the layer of the largest rank has."""
        return max(self.r, *self.rank_pattern.values(), 1)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and into the folder's README.md how the adapter is loaded."""
        super().save_pretrained(save_directory, **kwargs)
        add_usage(save_directory, str(self.base_model_name_or_path or "the base model"), self.task_type)


def as_set(names: Any) -> Any:
    """A list of module names as the set that PEFT works with."""
    return set(names) if isinstance(names, list | tuple) else names


class SpectralModel(BaseTuner):
    """The PEFT tuner that swaps target layers for :class:`AdaptedLayer`."""

    prefix = PREFIX
    tuner_layer_cls = AdaptedLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *arguments: Any, **options: Any) -> None:
        """Add an adapter; merged ones are unmerged before, and after an error the model is as it was."""
        unmerge_all(model)
        # What is settled here (slot, modules) stays this adapter's, so that one config can serve several.
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        try:
            super().inject_adapter(model, adapter_name, *arguments, **options)
        except Exception:
            withdraw(model, adapter_name)
            self.peft_config.pop(adapter_name, None)
            raise
        method = get_method(self.peft_config[adapter_name].method)
        if (earlier := hooks_of(model).pop(adapter_name, None)) is not None:
            earlier.remove()
        if method.prepare:
            layers = list(layers_with(model, adapter_name))
            hook = BatchedPreparation(adapter_name, method, layers)
            hooks_of(model)[adapter_name] = model.register_forward_pre_hook(hook)

    def _prepare_adapter_config(self, peft_config: SpectralConfig, model_config: dict[str, Any]) -> SpectralConfig:
        """Settle what the config leaves open: the target modules, and the slot."""
        if peft_config.target_modules is None:
            modules = self.target_module_mapping.get(model_config.get("model_type", ""))
            if modules is None and any(name.endswith(".to_q") for name, _ in self.model.named_modules()):
                modules = list(ATTENTION)
            if modules is None:
                raise TunerError(
                    "The layers of this model are not known; name them with target_modules=['q_proj', 'v_proj'] or "
                    "take 'all-linear'."
                )
            peft_config.target_modules = as_set(modules)
        if peft_config.find_frozen and not peft_config.slot and get_method(peft_config.method).slot:
            peft_config.slot = str(self._free_slot(peft_config))
        return peft_config

    def _free_slot(self, config: SpectralConfig) -> Slot:
        """The first columns in a row that no other adapter of the model has, from the end that the method takes."""
        kind = get_method(config.method).slot
        taken: set[int] = set()
        for name, other in self.peft_config.items():
            if other is config or not getattr(other, "slot", None) or get_method(other.method).slot != kind:
                continue
            slot = read_columns(other.slot)
            taken |= set(slot.columns)
            for layer in layers_with(self.model, name):
                taken |= slot.from_top(room_of(layer, kind))
        if get_method(config.method).slot_policy == "bottom":
            last = next(s for s in itertools.count(1) if taken.isdisjoint(range(-s - config.columns + 1, -s + 1)))
            return Slot(tuple(range(-last - config.columns + 1, -last + 1)))
        start = next(s for s in itertools.count() if taken.isdisjoint(range(s, s + config.columns)))
        return Slot.interval(start, start + config.columns)

    def _create_and_replace(
        self,
        config: SpectralConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        method = get_method(config.method)
        inner = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        refuse_layer(inner, current_key, config.find_frozen or method.builds_on == "weight")
        layer = target if isinstance(target, AdaptedLayer) else adapted_layer(target)
        if layer is not target:
            layer._active_adapter = [adapter_name]
        rank = rank_of(config, method, layer, current_key)
        layer.update_layer(adapter_name, method, rank)
        if config.find_frozen:
            freeze(layer, adapter_name, rank, read_columns(config.slot) if config.slot else None, current_key)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)  # all of it is on the weight's device already

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` of a model's forward or generate to its layers, as PEFT's LoRA does."""
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise TunerError("adapter_names cannot be used while the model trains; call model.eval() first.")
        if unknown := sorted(set(names) - set(self.peft_config) - {BASE}):
            raise TunerError(f"There is no adapter {', '.join(unknown)}; known: {', '.join(self.peft_config)}.")
        beams = kwargs.get("num_beams")
        repeated = [name for name in names for _ in range(beams if isinstance(beams, int) else 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        inside = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        handles = [
            # An encoder runs before the beams exist.
            module.register_forward_pre_hook(
                partial(with_names, names=names if module in inside else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, AdaptedLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
    ) -> None:
        """Add the weighted sum of adapters' ΔW as a new adapter, which is a LoRA whatever the methods are.

        Args:
            combination_type: ``cat`` is exact, and the rank the sum of all; ``svd`` is the best approximation of
                ``svd_rank`` or the largest of the adapters' ranks.

        Raises:
            TunerError: an unknown adapter or combination, or one that cannot be summed up.
        """
        if adapter_name in self.peft_config:
            raise TunerError(f"There is an adapter '{adapter_name}' already; choose another name.")
        configs = self._summands(adapters, weights, combination_type)
        max_rank = (svd_rank or max(config.columns for config in configs)) if combination_type == "svd" else None
        unmerge_all(self.model)
        sums = {
            name: sum_of(module, list(zip(adapters, weights, strict=True)), max_rank)
            for name, module in self.model.named_modules()
            if isinstance(module, AdaptedLayer) and any(adapter in module.spectral_delta for adapter in adapters)
        }
        ranks = {name: max(1, factors.up.shape[1]) for name, factors in sums.items()}
        largest = max(ranks.values())
        self.peft_config[adapter_name] = replace(
            configs[0], method="lora", slot=None, r=largest, target_modules=set(sums), exclude_modules=None,
            bias="none", layers_to_transform=None, layers_pattern=None,
            rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest},
        )  # fmt: skip
        self.inject_adapter(self.model, adapter_name)
        for name, factors in sums.items():
            layer = cast(AdaptedLayer, self.model.get_submodule(name))
            for parameter, value in zip(("B", "A"), factors, strict=True):
                layer.parameters_of(adapter_name)[parameter].data.copy_(value)

    def _summands(self, adapters: list[str], weights: list[float], combination: str) -> list[SpectralConfig]:
        """The configs of the adapters to sum up."""
        if combination not in {"cat", "svd"}:
            raise TunerError(
                f"combination_type '{combination}' is not offered here; use cat or svd, or fuse the adapters' "
                "files, for which there are more merges."
            )
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise TunerError(f"There is no adapter {', '.join(unknown)}; known: {', '.join(self.peft_config)}.")
        if not adapters or len(adapters) != len(weights):
            raise TunerError("add_weighted_adapter needs one weight for each of at least one adapter.")
        configs = [self.peft_config[name] for name in adapters]
        for name, config in zip(adapters, configs, strict=True):
            if config.modules_to_save or config.bias != "none":
                raise TunerError(f"The adapter '{name}' has modules or biases of its own, which cannot be summed up.")
            if combination == "cat" and not get_method(config.method).low_rank:
                raise TunerError(
                    f"{config.method} ('{name}') changes weights in full rank; use combination_type='svd'."
                )
        return configs


def with_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    """A pre-hook that adds ``adapter_names`` to what a layer is given."""
    return args, {**kwargs, "adapter_names": names}


def layers_with(model: nn.Module, adapter: str) -> Iterator[AdaptedLayer]:
    """The layers of a model that have the adapter."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer) and adapter in module.spectral_delta:
            yield module


def unmerge_all(model: nn.Module) -> None:
    """Unmerge whatever is merged: a new adapter's columns are those of the base's own weights."""
    merged: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and m.merged]
    if merged:
        warnings.warn("Adapters are unmerged, since another one is added to the base's own weights.", stacklevel=3)
    for module in merged:
        module.unmerge()


def withdraw(model: nn.Module, adapter: str) -> None:
    """Take an adapter off again that could not be added to every layer."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLayer) and adapter in module.spectral_delta:
            if len(module.spectral_delta) > 1:
                module.delete_adapter(adapter)
            else:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base_layer)


def room_of(layer: AdaptedLayer, kind: str | None) -> int:
    """How many columns, or rows of the shared basis, a layer has."""
    return layer.in_features if kind == "rows" else min(layer.out_features, layer.in_features)


def rank_of(config: SpectralConfig, method: Method, layer: AdaptedLayer, name: str) -> int:
    """The rank of one layer: ``rank_pattern``'s, else ``r``, if the method allows it there.

    Raises:
        TunerError: it does not.
    """
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
    allowed = method.ranks([(layer.out_features, layer.in_features)])
    if len(allowed) == 1:
        return allowed[0]  # a method without a rank
    if rank not in allowed:
        near = sorted(sorted(allowed, key=lambda other: abs(other - rank))[:3])
        raise TunerError(
            f"{method.name} cannot have rank {rank} on {name} ({layer.out_features}×{layer.in_features}); near it are "
            f"{', '.join(map(str, near))}: set r, or rank_pattern for this layer."
        )
    return rank


def freeze(layer: AdaptedLayer, adapter: str, rank: int, slot: Slot | None, name: str) -> None:
    """Give a layer the frozen tensors of its adapter; those of a layer on the meta device hold nothing yet.

    A layer of a smaller rank than the slot takes the slot's columns nearest to its end of the spectrum.

    Raises:
        TunerError: the weight has not the slot's columns.
    """
    method = layer.spectral_method[adapter]
    if slot:
        slot = Slot(slot.columns[-rank:] if slot.bottom else slot.columns[:rank])
        room = room_of(layer, method.slot)
        if max(slot.top, slot.bottom) > room:
            raise TunerError(f"The columns {slot} do not fit: {name} has {room}; choose another slot or a smaller r.")
    if layer.is_hollow(adapter):
        layer.set_frozen(adapter, hollow_tensors(method, (layer.out_features, layer.in_features), rank, slot))
        return
    frozen = frozen_tensors(method, {"": layer.base_weight.detach()}, rank, slot, cached=False)
    layer.set_frozen(adapter, frozen[""])


@torch.no_grad()
def sum_of(layer: AdaptedLayer, summands: list[tuple[str, float]], max_rank: int | None) -> Factors:
    """The weighted sum of a layer's adapters as float32 factors, of at most ``max_rank`` and the layer's columns."""
    parts = [(layer.factors(name), weight) for name, weight in summands if name in layer.spectral_delta]
    up = torch.cat([factors.up * weight for factors, weight in parts], 1)
    down = torch.cat([factors.down for factors, _ in parts], 0)
    room = min(layer.out_features, layer.in_features)
    max_rank = room if max_rank is None else min(max_rank, room)
    if up.shape[1] <= max_rank:
        return Factors(up, down)
    exact = Factors(up.cpu().double(), down.cpu().double())
    return Factors(*(part.to(up) for part in truncate(exact, max_rank)))


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SpectralConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SpectralModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX
