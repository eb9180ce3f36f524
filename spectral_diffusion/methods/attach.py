"""Put adapters on models. The only file that knows PEFT.

Our own methods run as one PEFT tuner, registered under the type ``SPECTRAL_DIFFUSION``; LoRA runs through
PEFT's own. Either way :class:`Attachment` is what the rest of the library sees.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..linalg import Band, Factors, sides
from .low_rank import low_rank_conv, low_rank_linear
from .registry import Method, get_method
from .targets import find_targets

PEFT_TYPE = "SPECTRAL_DIFFUSION"
PREFIX = "spectral_"
BAND = ("U", "S", "V")


@dataclass
class SpectralConfig(PeftConfig):
    """PEFT's view of one of our adapters."""

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    r: int = field(default=8)
    method: str = field(default="spectral-additive")
    bias: str = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class BandBuffers(nn.Module):
    """The frozen columns that one adapter of one layer lives on; empty for methods without a band."""

    U: Tensor
    S: Tensor
    V: Tensor

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, device=device))


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A frozen Linear or Conv2d with any number of our adapters. Parameters and bands are kept in float32."""

    adapter_layer_names = ("spectral_delta",)
    other_param_names = ("spectral_band", "spectral_scale", "spectral_method", "spectral_columns")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = sides(self.base_weight)
        self.spectral_delta = nn.ModuleDict()
        self.spectral_band = nn.ModuleDict()
        self.spectral_scale: dict[str, float] = {}
        self.spectral_method: dict[str, Method] = {}
        self.spectral_columns: dict[str, Tensor] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter: str, method: Method, rank: int) -> None:
        device = self.base_weight.device
        shapes = method.shapes(self.out_features, self.in_features, rank)
        self.spectral_delta[adapter] = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape, device=device)) for name, shape in shapes.items()}
        )
        sides = {"U": (self.out_features, rank), "S": (rank,), "V": (self.in_features, rank)} if method.banded else {}
        self.spectral_band[adapter] = BandBuffers(sides, device)
        self.spectral_scale[adapter] = 1.0
        self.spectral_method[adapter] = method
        self.set_adapter(self.active_adapters)

    if TYPE_CHECKING:  # nn.Module's __getattr__ would hide what BaseTunerLayer gives
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        _active_adapter: list[str]

        def get_base_layer(self) -> nn.Module: ...

        def set_adapter(self, adapter_names: list[str], inference_mode: bool = False) -> None: ...

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight underneath: (out, in), or (out, in, kh, kw) of a convolution."""
        return cast(nn.Linear, self.get_base_layer()).weight

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """One adapter's trainable parameters under its method's names."""
        return dict(cast(nn.ParameterDict, self.spectral_delta[adapter]).items())

    def effective(self, adapter: str) -> dict[str, Tensor]:
        """The parameters as the method takes them: trained columns times their scales, where they have some."""
        parameters: dict[str, Tensor] = dict(self.parameters_of(adapter))
        scales = self.spectral_columns.get(adapter)
        if scales is None:
            return parameters
        return {name: value * scales if value.dim() == 2 else value for name, value in parameters.items()}

    def set_band(self, adapter: str, band: Band) -> None:
        """Copy a band into the adapter's buffers."""
        for name, value in zip(BAND, band, strict=True):
            getattr(self.spectral_band[adapter], name).copy_(value)

    def factors(self, adapter: str) -> Factors:
        """The adapter's ΔW as float32 factors, its scale included."""
        held = cast(BandBuffers, self.spectral_band[adapter])
        method = self.spectral_method[adapter]
        band = Band(held.U, held.S, held.V) if method.banded else None
        up, down = method.factors(self.effective(adapter), band)
        scale = self.spectral_scale[adapter]
        return Factors(up, down if scale == 1.0 else down * scale)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense ΔW in float32, of the weight's own shape."""
        return self.factors(adapter).delta().view(self.base_weight.shape)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [a for a in self.active_adapters if a in self.spectral_delta]
        if self.disable_adapters or self.merged or not active:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        parts = [self.factors(adapter) for adapter in active]
        up = parts[0].up if len(parts) == 1 else torch.cat([p.up for p in parts], 1)
        down = parts[0].down if len(parts) == 1 else torch.cat([p.down for p in parts], 0)
        if type(self.base_layer) is nn.Linear:
            single = self.spectral_method[active[0]] if len(parts) == 1 else None
            frozen = up.shape[1] // 2 if single and single.frozen_up else 0
            return low_rank_linear(x, self.base_layer.weight, self.base_layer.bias, up, down, frozen)
        y = cast(Tensor, self.base_layer(x, *args, **kwargs))
        layer = self.get_base_layer()
        if isinstance(layer, nn.Conv2d):
            return y + low_rank_conv(x, layer, up, down).to(y.dtype)
        return y + ((x @ down.mT.to(x.dtype)) @ up.mT.to(x.dtype)).to(y.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the base weight, in float32 and rounded once."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.spectral_delta:
                weight = self.base_weight
                merged = weight.float() + self.get_delta_weight(adapter)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"Adapter {adapter} holds NaN or infinity.")
                weight.data.copy_(merged)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract what was merged; floating point makes this inexact (``unfuse`` re-fuses instead)."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            weight = self.base_weight
            weight.data.copy_(weight.float() - self.get_delta_weight(adapter))

    def set_scale(self, adapter: str, scale: float) -> None:
        """The strength λ of one adapter: multiplies its ΔW."""
        if adapter in self.spectral_scale:
            self.spectral_scale[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        for adapter in self.active_adapters:
            self.set_scale(adapter, self.spectral_scale.get(adapter, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        for adapter in self.active_adapters:
            self.set_scale(adapter, 1.0 if scale is None else self.spectral_scale.get(adapter, 1.0) / scale)


class SpectralModel(BaseTuner):
    """The PEFT tuner that swaps target layers for :class:`AdaptedLayer`."""

    prefix = PREFIX
    tuner_layer_cls = AdaptedLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

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
        if isinstance(target, AdaptedLayer):
            target.update_layer(adapter_name, method, config.r)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear | nn.Conv2d):
            raise TypeError(f"{current_key} is a {type(base).__name__}; only Linear and Conv2d can be adapted.")
        layer = AdaptedLayer(target)
        layer._active_adapter = [adapter_name]
        layer.update_layer(adapter_name, method, config.r)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SpectralConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SpectralModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX


@dataclass
class Attachment:
    """One adapter on the models of a base.

    ``layers`` maps ``component.module.path`` to the tuner layer that holds it.
    """

    name: str
    method: Method
    rank: int
    layers: dict[str, BaseTunerLayer]

    def parameters(self, layer: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of one layer under the method's names."""
        module = self.layers[layer]
        if isinstance(module, AdaptedLayer):
            return module.parameters_of(self.name)
        assert isinstance(module, LoraLayer)
        return {"A": module.lora_A[self.name].weight, "B": module.lora_B[self.name].weight}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``layer.parameter`` names in a fixed order."""
        for layer in self.layers:
            for name, parameter in self.parameters(layer).items():
                yield f"{layer}.{name}", parameter

    @torch.no_grad()
    def trained(self) -> dict[str, Tensor]:
        """What goes into a file: copies of the parameters as the method takes them, by ``layer.parameter``."""
        out: dict[str, Tensor] = {}
        for layer, module in self.layers.items():
            held = module.effective(self.name) if isinstance(module, AdaptedLayer) else self.parameters(layer)
            out |= {f"{layer}.{name}": value.detach().cpu().clone() for name, value in held.items()}
        return out

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy parameters by ``layer.parameter`` name into place."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name].reshape(parameter.shape))  # PEFT keeps a convolution's factors 4-D

    def set_scale(self, scale: float) -> None:
        """Multiply this adapter's ΔW by λ."""
        for layer in self.layers.values():
            layer.set_scale(self.name, scale)


def attach(
    models: dict[str, nn.Module],
    method: Method,
    rank: int,
    name: str = "default",
    targets: str = "attention",
    bands: Mapping[str, Band] | None = None,
    seed: int = 0,
    only: set[str] | None = None,
    columns: Mapping[str, Tensor] | None = None,
) -> Attachment:
    """Attach a fresh adapter (ΔW exactly zero) to the target layers and leave only it trainable there.

    Args:
        bands: each layer's band for banded methods.
        only: restricts to some layer names.
        columns: per layer a scale (r,) of the trained columns; what is trained is A / scale.
    """
    wanted = [layer for layer in find_targets(models, targets) if only is None or layer in only]
    layers: dict[str, BaseTunerLayer] = {}
    for component in dict.fromkeys(layer.split(".", 1)[0] for layer in wanted):
        model = models[component]
        paths = [layer.split(".", 1)[1] for layer in wanted if layer.startswith(f"{component}.")]
        pattern = "|".join(re.escape(path) for path in paths)
        config: PeftConfig
        if method.name == "lora":
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern, init_lora_weights=True)
        else:
            config = SpectralConfig(r=rank, method=method.name, target_modules=pattern)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, name)
        for path in paths:
            layers[f"{component}.{path}"] = model.get_submodule(path)
    attachment = Attachment(name, method, rank, layers)
    if method.name == "lora":
        for _, parameter in attachment.named_parameters():
            parameter.data = parameter.data.float()
    if method.banded:
        assert bands is not None
        for layer, module in layers.items():
            assert isinstance(module, AdaptedLayer)
            module.set_band(name, bands[layer])
            if columns is not None:
                module.spectral_columns[name] = columns[layer].to(module.base_weight.device)
    return attachment


def activate(models: dict[str, nn.Module], names: list[str]) -> None:
    """Let exactly these adapters act, frozen, on all models."""
    for model in models.values():
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(names, inference_mode=True)


def detach(models: dict[str, nn.Module]) -> None:
    """Take every adapter off again; the models are the base's own modules afterwards."""
    for model in models.values():
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config


@contextmanager
def detaching(models: dict[str, nn.Module]) -> Iterator[None]:
    """Take every adapter off when the context ends, whatever happens in it."""
    try:
        yield
    finally:
        detach(models)


@contextmanager
def disabled(models: dict[str, nn.Module]) -> Iterator[None]:
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
