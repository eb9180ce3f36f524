"""The layer that carries our own adapters, as a tuner that PEFT and diffusers know.

It is registered with PEFT under the type ``SPECTRAL_DIFFUSION``, so that PEFT's and diffusers' operations (weights,
disable, fuse, state dict, checkpointing) work on it as on any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ..errors import UserError
from ..linalg import Factors, exact, flatten, sides
from ..slots import read_columns
from .frozen import frozen_tensors
from .low_rank import core_linear, low_rank_conv, low_rank_linear
from .registry import Method, get_method

PEFT_TYPE = "SPECTRAL_DIFFUSION"
PREFIX = "spectral_"


@dataclass
class SpectralConfig(PeftConfig):
    """PEFT's view of one of our adapters.

    With ``slot`` given (``0:8``, ``1,5,9``) the layers find their frozen tensors themselves, so that
    ``get_peft_model(any_transformers_model, SpectralConfig(r=8, slot="0:8"))`` is all there is to do.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    r: int = field(default=8)
    method: str = field(default="spectral-additive")
    slot: str | None = field(default=None)
    bias: str = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class Buffers(nn.Module):
    """The frozen tensors that one adapter of one layer is built on.

    Tall matrices are held turned, under ``NAME_T``: thin products along a column that lies in one piece are up to
    three times as fast on a CPU.
    """

    def put(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Hold float32 copies of these."""
        for name, value in tensors.items():
            tall = value.dim() == 2 and value.shape[0] > value.shape[1]
            held = (value.mT if tall else value).detach().to(device, torch.float32).contiguous()
            self.register_buffer(f"{name}_T" if tall else name, held)

    def named(self) -> dict[str, Tensor]:
        """The tensors by name, as they were put."""
        held = cast(dict[str, Tensor], self._buffers)
        return {n.removesuffix("_T"): value.mT if n.endswith("_T") else value for n, value in held.items()}


@dataclass
class Prepared:
    """What ``Method.prepare`` gave for the parameters as they were."""

    tensors: Mapping[str, Tensor]
    versions: list[int]
    grad: bool


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A frozen Linear or Conv2d with any number of our adapters. Parameters and frozen tensors are kept in float32."""

    adapter_layer_names = ("spectral_delta",)
    other_param_names = ("spectral_frozen", "spectral_scale", "spectral_method", "spectral_columns", "prepared")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = sides(self.base_weight)
        self.spectral_delta = nn.ModuleDict()
        self.spectral_frozen = nn.ModuleDict()
        self.spectral_scale: dict[str, float] = {}
        self.spectral_method: dict[str, Method] = {}
        self.spectral_columns: dict[str, Tensor] = {}
        self.prepared: dict[str, Prepared] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter: str, method: Method, rank: int) -> None:
        device = self.base_weight.device
        shapes = method.shapes(self.out_features, self.in_features, rank)
        if method.initial:
            # Drawn on the CPU by the global generator, which the caller seeds: the same on every device.
            generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
            first = method.initial(shapes, generator)
        else:
            first = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self.spectral_delta[adapter] = nn.ParameterDict(
            {name: nn.Parameter(value.to(device)) for name, value in first.items()}
        )
        self.spectral_frozen[adapter] = Buffers()
        self.prepared.pop(adapter, None)
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

    def frozen_of(self, adapter: str) -> dict[str, Tensor]:
        """The frozen tensors under the method's names; the weight itself is read where it lies, never copied."""
        frozen = self.held(adapter)
        if self.spectral_method[adapter].frozen == "weight":
            weight = flatten(self.base_weight.detach())
            frozen["W"] = weight if weight.dtype == torch.float64 else weight.float()
        return frozen

    def held(self, adapter: str) -> dict[str, Tensor]:
        """The frozen tensors that were put in, which are never empty where the method needs some.

        Raises:
            UserError: they are, since the config named no slot.
        """
        frozen = cast(Buffers, self.spectral_frozen[adapter]).named()
        if not frozen and self.spectral_method[adapter].frozen in {"band", "drawn", "spectrum"}:
            raise UserError(
                f"The adapter '{adapter}' has no columns to act on; give SpectralConfig a slot of r columns, such as "
                "slot='0:8' for r=8."
            )
        return frozen

    def set_frozen(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Hold copies of the frozen tensors."""
        self.prepared.pop(adapter, None)
        cast(Buffers, self.spectral_frozen[adapter]).put(tensors, self.base_weight.device)

    def prepare(self, adapter: str, cached: bool = False) -> Mapping[str, Tensor]:
        """The parameters as ``factors`` takes them; ``cached``: from the model's batched preparation if it holds."""
        method, parameters = self.spectral_method[adapter], self.effective(adapter)
        if method.prepare is None:
            return parameters
        held = self.prepared.get(adapter) if cached else None
        versions = [value._version for value in parameters.values()]
        if held and held.versions == versions and held.grad == torch.is_grad_enabled():
            return held.tensors
        return method.prepare(parameters, self.frozen_of(adapter))

    def factors(self, adapter: str, cached: bool = False) -> Factors:
        """The adapter's ΔW as float32 factors, its scale included; ``cached`` inside a forward of the model."""
        method, scale = self.spectral_method[adapter], self.spectral_scale[adapter]
        up, down = method.factors(self.prepare(adapter, cached), self.frozen_of(adapter))
        return Factors(up, down) if scale == 1.0 else Factors(up * scale, down)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense ΔW in float32, of the weight's own shape."""
        return self.factors(adapter).delta().view(self.base_weight.shape)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [a for a in self.active_adapters if a in self.spectral_delta]
        if self.disable_adapters or self.merged or not active:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        single = self.spectral_method[active[0]] if len(active) == 1 else None
        linear = type(self.base_layer) is nn.Linear
        if single and single.map_input and linear and self.spectral_scale[active[0]] == 1.0:
            return cast(Tensor, self.base_layer(single.map_input(x, self.prepare(active[0], True)), *args, **kwargs))
        if single and single.core and linear and self.spectral_scale[active[0]] == 1.0:
            base = cast(nn.Linear, self.base_layer)
            core = single.core(self.prepare(active[0], True), self.frozen_of(active[0]))
            return core_linear(x, base.weight, base.bias, core)
        parts = [self.factors(adapter, True) for adapter in active]
        up = parts[0].up if len(parts) == 1 else torch.cat([p.up for p in parts], 1)
        down = parts[0].down if len(parts) == 1 else torch.cat([p.down for p in parts], 0)
        if linear:
            frozen = up.shape[1] // 2 if single and single.frozen_up else 0
            base = cast(nn.Linear, self.base_layer)
            return low_rank_linear(x, base.weight, base.bias, up, down, frozen)
        y = cast(Tensor, self.base_layer(x, *args, **kwargs))
        layer = self.get_base_layer()
        if isinstance(layer, nn.Conv2d):
            return y + low_rank_conv(x, layer, up, down).to(y.dtype)
        return y + ((x @ down.mT.to(x.dtype)) @ up.mT.to(x.dtype)).to(y.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the base weight, in float64 and rounded once, however many adapters there are."""
        chosen = [a for a in check_adapters_to_merge(self, adapter_names) if a in self.spectral_delta]
        deltas = {adapter: self.get_delta_weight(adapter) for adapter in chosen}  # all of the weight as it was
        for adapter, delta in deltas.items():
            if safe_merge and not torch.isfinite(delta).all():
                raise ValueError(f"Adapter {adapter} holds NaN or infinity.")
        if deltas:
            weight = self.base_weight
            weight.data.copy_(exact(weight) + sum(exact(delta) for delta in deltas.values()))
            self.merged_adapters += chosen

    def unmerge(self) -> None:
        """Subtract what was merged; floating point makes this inexact (``unfuse`` re-fuses instead).

        Raises:
            ValueError: the change depends on the weight, which is no longer what it was.
        """
        for adapter in self.merged_adapters:
            if self.spectral_method[adapter].frozen == "weight":
                raise ValueError(f"{self.spectral_method[adapter].name} cannot be unmerged; load the base again.")
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
    target_module_mapping: ClassVar[dict[str, list[str]]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *arguments: Any, **options: Any) -> None:
        super().inject_adapter(model, adapter_name, *arguments, **options)
        method = get_method(self.peft_config[adapter_name].method)
        if method.prepare:
            layers = [m for m in model.modules() if isinstance(m, AdaptedLayer) and adapter_name in m.spectral_delta]
            handle = model.register_forward_pre_hook(BatchedPreparation(adapter_name, method, layers))
            hooks_of(model).append(handle)

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
            self._freeze(target, adapter_name, method, config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear | nn.Conv2d):
            raise TypeError(f"{current_key} is a {type(base).__name__}; only Linear and Conv2d can be adapted.")
        if isinstance(base, nn.Conv2d) and base.groups > 1:
            raise TypeError(f"{current_key} is a convolution in {base.groups} groups; only whole ones can be adapted.")
        layer = AdaptedLayer(target)
        layer._active_adapter = [adapter_name]
        layer.update_layer(adapter_name, method, config.r)
        self._freeze(layer, adapter_name, method, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _freeze(self, layer: AdaptedLayer, adapter_name: str, method: Method, config: SpectralConfig) -> None:
        if config.slot is not None or (method.slot is None and method.frozen in {"drawn", "spectrum"}):
            slot = read_columns(config.slot or "") if method.slot else None
            if slot and slot.rank != config.r:
                raise ValueError(f"slot {config.slot} has {slot.rank} columns but r is {config.r}; make them equal")
            found = frozen_tensors(method, {"": layer.base_weight.detach()}, config.r, slot, cached=False)
            layer.set_frozen(adapter_name, found[""])


def hooks_of(model: nn.Module) -> list[Any]:
    """The handles of the hooks that the tuner put on a model, kept on it."""
    held: list[Any] = model.__dict__.setdefault("_spectral_hooks", [])
    return held


class BatchedPreparation:
    """A pre-hook that prepares the parameters of all of a model's layers at once before every forward.

    The result is kept until the parameters change, so that gradient checkpointing (the non-reentrant kind) finds the
    same tensors when it runs a layer again.
    """

    def __init__(self, adapter: str, method: Method, layers: list[AdaptedLayer]) -> None:
        self.adapter, self.method, self.layers = adapter, method, layers

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        layers = [
            layer
            for layer in self.layers
            if self.adapter in layer.active_adapters and layer.spectral_method.get(self.adapter) is self.method
        ]
        if not layers or layers[0].disable_adapters or self.method.prepare is None:
            return
        each = [layer.effective(self.adapter) for layer in layers]
        built_on = [self._built_on(layer) for layer in layers]
        grouped: dict[tuple[Any, ...], list[int]] = {}
        for index, (parameters, frozen) in enumerate(zip(each, built_on, strict=True)):
            kind = (tuple(tuple(value.shape) for value in parameters.values()), tuple(frozen))
            grouped.setdefault(kind, []).append(index)
        for indices in grouped.values():
            first = indices[0]
            stacked = {name: torch.stack([each[index][name] for index in indices]) for name in each[first]}
            frozen = {name: torch.stack([built_on[index][name] for index in indices]) for name in built_on[first]}
            prepared = {name: value.unbind(0) for name, value in self.method.prepare(stacked, frozen).items()}
            for place, index in enumerate(indices):
                layers[index].prepared[self.adapter] = Prepared(
                    {name: values[place] for name, values in prepared.items()},
                    [value._version for value in each[index].values()],
                    torch.is_grad_enabled(),
                )

    def _built_on(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        """The frozen tensors that the preparation asks for."""
        held = layer.held(self.adapter)
        return {name: held[name] for name in self.method.prepared_on if name in held}


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SpectralConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SpectralModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX
