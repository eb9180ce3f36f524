"""Put adapters on models. With ``layer.py`` and ``tuner.py`` the only file that knows PEFT.

Our own methods run as one PEFT tuner, the others through PEFT's own. Either way :class:`Attachment` is what the
rest of the library sees.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..linalg import Factors, flatten
from ..methods.registry import Method, Schedule
from ..models.targets import find_targets
from .layer import AdaptedLayer, hooks_of
from .tuner import SpectralConfig

Frozen = Mapping[str, Mapping[str, Tensor]]


@dataclass
class InjectedAdapter:
    """One adapter on the models of a base.

    ``layers`` maps ``component.module.path`` to the tuner layer that holds it; ``schedules`` are the method's, by
    component.
    """

    name: str
    method: Method
    rank: int
    layers: dict[str, BaseTunerLayer]
    schedules: dict[str, Schedule] = field(default_factory=dict)

    def parameters(self, layer: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of one layer under the method's names."""
        module = self.layers[layer]
        if isinstance(module, AdaptedLayer):
            return module.parameters_of(self.name)
        assert self.method.peft is not None
        modules = {name: getattr(module, where)[self.name] for name, where in self.method.peft.parameters.items()}
        return {name: cast(nn.Parameter, getattr(value, "weight", value)) for name, value in modules.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``layer.parameter`` names in a fixed order."""
        for layer in self.layers:
            for name, parameter in self.parameters(layer).items():
                yield f"{layer}.{name}", parameter

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors for a file: copies of the parameters as the method takes them, by ``layer.parameter``."""
        out: dict[str, Tensor] = {}
        for layer, module in self.layers.items():
            parameters = module.effective(self.name) if isinstance(module, AdaptedLayer) else self.parameters(layer)
            out |= {f"{layer}.{name}": value.detach().cpu().clone() for name, value in parameters.items()}
        return out

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy parameters by ``layer.parameter`` name into place."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name].reshape(parameter.shape))  # PEFT keeps a convolution's factors 4-D

    def set_scale(self, scale: float) -> None:
        """Multiply this adapter's ΔW by λ."""
        for layer in self.layers.values():
            layer.set_scale(self.name, scale)

    def factors(self, layer: str) -> Factors:
        """The layer's ΔW as it is now; gradients flow into the parameters."""
        module = self.layers[layer]
        if isinstance(module, AdaptedLayer):
            return module.factors(self.name)
        weight = cast(nn.Linear, module.get_base_layer()).weight.detach()
        frozen = {"W": flatten(weight).float()} if self.method.builds_on == "weight" else {}
        return self.method.delta(self.parameters(layer), frozen)

    def penalty(self) -> Tensor | None:
        """The method's own part of the loss, averaged over layers; None if it has none."""
        if self.method.penalty is None:
            return None
        return torch.stack([self.method.penalty(self.parameters(layer)) for layer in self.layers]).mean()

    def on_step(self, step: int) -> None:
        """The method's action after the optimizer's step ``step``."""
        for schedule in self.schedules.values():
            schedule.after_step(step)

    def prune(self) -> None:
        """Remove again what a schedule has removed for good."""
        for schedule in self.schedules.values():
            schedule.prune()

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state that a resumed training needs besides parameters: tensors, and a JSON-able mapping."""
        tensors: dict[str, Tensor] = {}
        patterns: dict[str, Any] = {}
        for component, schedule in self.schedules.items():
            own, patterns[component] = schedule.state()
            tensors |= {f"{component}|{name}": tensor for name, tensor in own.items()}
        return tensors, patterns

    def load_extra_state(self, tensors: Mapping[str, Tensor], patterns: Mapping[str, Any]) -> None:
        """Take :meth:`extra_state` back."""
        for component, schedule in self.schedules.items():
            start = f"{component}|"
            own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
            schedule.load_state(own, patterns.get(component))


@dataclass(frozen=True)
class AdapterSpec:
    """The specification of a new adapter.

    Attributes:
        targets: the layers that it changes (see :func:`.targets.find_targets`); ``only`` restricts to some names.
        seed: of its initial values.
        ranks: ranks of single layers where they differ, for PEFT's methods.
        steps: how long training will be, for methods with a schedule.
    """

    method: Method
    rank: int
    targets: str = "attention"
    seed: int = 0
    only: Collection[str] | None = None
    ranks: Mapping[str, int] | None = None
    steps: int = 0

    def peft_config(self, component: str, paths: Sequence[str]) -> PeftConfig:
        """The config of PEFT for these modules of one component."""
        pattern, method = "|".join(re.escape(path) for path in paths), self.method
        if not method.peft:
            return SpectralConfig(r=self.rank, method=method.name, target_modules=pattern, find_frozen=False)
        options = method.peft.options(self.rank, self.steps)
        if self.ranks:
            own = {f"^{re.escape(path)}$": self.ranks[f"{component}.{path}"] for path in paths}
            options |= {"rank_pattern": own, "alpha_pattern": own}
        config: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[method.peft.kind](target_modules=pattern, **options)
        return config


def inject_adapter(
    models: dict[str, nn.Module],
    spec: AdapterSpec,
    name: str = "default",
    frozen: Frozen | None = None,
    columns: Mapping[str, Tensor] | None = None,
) -> InjectedAdapter:
    """Attach a fresh adapter (ΔW zero) to the target layers and leave only it trainable there.

    Args:
        name: of the adapter on the models.
        frozen: per layer the tensors that the method is built on (see :func:`.frozen.frozen_tensors`).
        columns: per layer a scale (r,) of the trained columns; what is trained is A / scale.
    """
    method = spec.method
    chosen = [layer for layer in find_targets(models, spec.targets) if spec.only is None or layer in spec.only]
    layers: dict[str, BaseTunerLayer] = {}
    schedules: dict[str, Schedule] = {}
    for component in dict.fromkeys(layer.split(".", 1)[0] for layer in chosen):
        model = models[component]
        paths = [layer.split(".", 1)[1] for layer in chosen if layer.startswith(f"{component}.")]
        config = spec.peft_config(component, paths)
        for earlier in getattr(model, "peft_config", {}).values():
            earlier.inference_mode = True  # only the new one is trained
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(spec.seed)
            inject_adapter_in_model(config, model, name)
        for path in paths:
            layers[f"{component}.{path}"] = cast(BaseTunerLayer, model.get_submodule(path))
        if method.peft and method.peft.schedule and spec.steps:
            schedules[component] = method.peft.schedule(model, config, name)
    injected = InjectedAdapter(name, method, spec.rank, layers, schedules)
    for component in dict.fromkeys(layer.split(".", 1)[0] for layer in chosen):
        _bring_to_work(injected, component, models[component])
    _initialize(injected, frozen or {}, columns)
    return injected


def _bring_to_work(injected: InjectedAdapter, component: str, model: nn.Module) -> None:
    """Move an adapter to the device that its network computes on, where offloaded weights are on another."""
    device = getattr(model, "device", None)
    for layer in injected.layers:
        if device is not None and layer.startswith(f"{component}."):
            for parameter in injected.parameters(layer).values():
                if not parameter.is_meta:
                    parameter.data = parameter.data.to(device)


def _initialize(injected: InjectedAdapter, frozen: Frozen, columns: Mapping[str, Tensor] | None) -> None:
    """Parameters in float32 as the method begins, and what it is built on."""
    method = injected.method
    if method.peft:
        for _, parameter in injected.named_parameters():
            parameter.data = parameter.data.float()
    for layer, module in injected.layers.items():
        if method.peft and method.peft.initialize:
            weight = cast(nn.Linear, module.get_base_layer()).weight.detach()
            method.peft.initialize(weight, injected.parameters(layer))
        if isinstance(module, AdaptedLayer):
            if layer in frozen:
                module.set_frozen(injected.name, frozen[layer])
            if columns is not None:
                device = next(iter(injected.parameters(layer).values())).device
                module.spectral_columns[injected.name] = columns[layer].to(device)


def set_adapters(models: dict[str, nn.Module], names: list[str]) -> None:
    """Let exactly these adapters act, frozen, on all models."""
    for model in models.values():
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(names, inference_mode=True)


def has_adapters(models: Mapping[str, nn.Module]) -> bool:
    """Whether any adapter, of this or another program, is on the models."""
    return any(isinstance(module, BaseTunerLayer) for model in models.values() for module in model.modules())


def remove_adapters(models: dict[str, nn.Module]) -> None:
    """Take every adapter off again; the models are the base's own modules afterwards."""
    for model in models.values():
        layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        for name, module in layers.items():
            parent, _, child = name.rpartition(".")
            if parent not in layers:  # of layers inside one another the outermost gives the base's own module
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        for handle in hooks_of(model).values():
            handle.remove()
        hooks_of(model).clear()
        if hasattr(model, "peft_config"):
            del model.peft_config


@contextmanager
def unloading(models: dict[str, nn.Module]) -> Iterator[None]:
    """Take every adapter off when the context ends, whatever happens in it."""
    try:
        yield
    finally:
        remove_adapters(models)


@contextmanager
def disabled_adapters(models: dict[str, nn.Module]) -> Iterator[None]:
    """Run the base as if nothing were attached."""
    layers = [m for model in models.values() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    states = [[(p, p.requires_grad) for p in layer.parameters()] for layer in layers]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer.enable_adapters(True)
            for parameter, trainable in state:
                parameter.requires_grad_(trainable)
