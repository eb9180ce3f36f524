"""One adapted layer: a frozen Linear, Conv1D or Conv2d with any number of our adapters, as PEFT's tuner layers are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import UserError
from ..linalg import Factors, flatten, matrix_shape, to_float64
from ..methods.registry import Method
from ..models.quantization import is_quantized
from ..models.targets import layer_shape
from .low_rank import core_linear, low_rank_conv, low_rank_linear

BASE = "__base__"  # PEFT's name for "no adapter" in ``adapter_names``


class TunerError(UserError, ValueError):
    """A :class:`UserError` of the PEFT tuner; PEFT's callers expect a ``ValueError``."""


class Buffers(nn.Module):
    """The frozen tensors that one adapter of one layer is built on.

    Tall matrices are stored transposed, under ``NAME_T``: thin products along contiguous columns are up to
    three times as fast on a CPU.
    """

    def put(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Store float32 copies of these; tensors on the meta device stay there."""
        for name, value in tensors.items():
            tall = value.dim() == 2 and value.shape[0] > value.shape[1]
            where = value.device if value.is_meta else device
            stored = (value.mT if tall else value).detach().to(where, torch.float32).contiguous()
            self.register_buffer(f"{name}_T" if tall else name, stored)

    def named(self) -> dict[str, Tensor]:
        """The tensors by name, as they were put."""
        buffers = cast(dict[str, Tensor], self._buffers)
        return {n.removesuffix("_T"): value.mT if n.endswith("_T") else value for n, value in buffers.items()}


@dataclass
class Prepared:
    """The result of ``Method.prepare`` for a version of the parameters."""

    tensors: Mapping[str, Tensor]
    versions: list[int]
    grad: bool


class PreparedByName(dict[str, Prepared]):
    """The results of the batched preparation, by adapter. A copy begins without it, since graphs cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedByName:
        return PreparedByName()

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedByName, ()


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A frozen layer with any number of our adapters. Parameters and frozen tensors are kept in float32."""

    adapter_layer_names = ("spectral_delta",)
    other_param_names = ("spectral_frozen", "spectral_scale", "spectral_method", "spectral_columns", "prepared")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        inner = self.get_base_layer()
        self.out_features, self.in_features = (
            matrix_shape(self.base_weight) if isinstance(inner, Conv1D) else layer_shape(inner)
        )
        self.spectral_delta = nn.ModuleDict()
        self.spectral_frozen = nn.ModuleDict()
        self.spectral_scale: dict[str, float] = {}
        self.spectral_method: dict[str, Method] = {}
        self.spectral_columns: dict[str, Tensor] = {}
        self.prepared: dict[str, Prepared] = PreparedByName()
        self.unmerged_weight: Tensor | None = None  # kept while an adapter is merged whose ΔW depends on the weight
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter: str, method: Method, rank: int) -> None:
        """Add an adapter with fresh parameters, or replace the one of that name."""
        device = self.base_weight.device
        shapes = method.shapes(self.out_features, self.in_features, rank)
        if method.initial:
            # Sampled on the CPU by the global generator, which the caller seeds: the same on every device.
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

        def delete_adapter(self, adapter_name: str) -> None: ...

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight underneath: (out, in), or (out, in, kh, kw) of a convolution. Conv1D's is a turned view."""
        layer = self.get_base_layer()
        weight = cast(nn.Linear, layer).weight
        return weight.mT if isinstance(layer, Conv1D) else weight

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

    def versions(self, adapter: str) -> list[int]:
        """How often each of an adapter's parameters was written in place."""
        return [value._version for value in self.parameters_of(adapter).values()]

    def frozen_of(self, adapter: str) -> dict[str, Tensor]:
        """The frozen tensors under the method's names; the weight itself is read in place, never copied."""
        frozen = cast(Buffers, self.spectral_frozen[adapter]).named()
        if self.spectral_method[adapter].builds_on == "weight":
            base_weight = self.base_weight if self.unmerged_weight is None else self.unmerged_weight
            weight = flatten(base_weight.detach())
            frozen["W"] = weight if weight.dtype == torch.float64 else weight.float()
        return frozen

    def set_frozen(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Hold copies of the frozen tensors."""
        self.prepared.pop(adapter, None)
        device = next(iter(self.parameters_of(adapter).values())).device  # an offloaded weight may be elsewhere
        cast(Buffers, self.spectral_frozen[adapter]).put(tensors, device)

    def is_hollow(self, adapter: str) -> bool:
        """Whether an adapter's numbers, or the weight, are on the meta device and a file's are yet to come."""
        return any(tensor.is_meta for tensor in (self.base_weight, *self.parameters_of(adapter).values()))

    def prepare(self, adapter: str, cached: bool = False) -> Mapping[str, Tensor]:
        """The parameters as ``factors`` takes them; ``cached``: from the model's batched preparation if it holds."""
        method, parameters = self.spectral_method[adapter], self.effective(adapter)
        if method.prepare is None:
            return parameters
        prepared = self.prepared.get(adapter) if cached and not torch.compiler.is_compiling() else None
        if prepared and prepared.grad and not torch.is_grad_enabled():
            # Re-entrant checkpointing: this layer runs again during the backward pass, when the graph of the batched
            # preparation may be freed already. It prepares its own then.
            del self.prepared[adapter]
            prepared = None
        if prepared and prepared.versions == self.versions(adapter) and prepared.grad == torch.is_grad_enabled():
            return prepared.tensors
        return method.prepare(parameters, self.frozen_of(adapter))

    def factors(self, adapter: str, cached: bool = False) -> Factors:
        """The adapter's ΔW as float32 factors, its scale included; ``cached`` inside a forward of the model."""
        method, scale = self.spectral_method[adapter], self.spectral_scale[adapter]
        up, down = method.factors(self.prepare(adapter, cached), self.frozen_of(adapter))
        return Factors(up, down) if scale == 1.0 else Factors(up * scale, down)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense ΔW in float32, of the shape in which the layer holds its weight."""
        delta = self.factors(adapter).delta().view(self.base_weight.shape)
        return delta.mT if isinstance(self.get_base_layer(), Conv1D) else delta

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The layer's output with its active adapters; with ``adapter_names`` every row has its own."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed(x, adapter_names, *args, **kwargs)
        active = [a for a in self.active_adapters if a in self.spectral_delta]
        if self.disable_adapters or self.merged or not active:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        return self._adapted(x, active, *args, **kwargs)

    def _mixed(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Every row of x through the adapter that ``names`` has for it."""
        if len(x) != len(names):
            raise TunerError(f"adapter_names has {len(names)} names for a batch of {len(x)}; give one for every row.")
        if self.merged:
            raise TunerError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first.")
        y: Tensor | None = None
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            if name in self.spectral_delta:
                part = self._adapted(x[rows], [name], *args, **kwargs)
            else:
                part = self.base_layer(x[rows], *args, **kwargs)
            y = part.new_empty(len(x), *part.shape[1:]) if y is None else y
            y[rows] = part
        assert y is not None
        return y

    def _adapted(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The base's output and what these adapters add to it, in the cheapest form that they have."""
        single = self.spectral_method[active[0]] if len(active) == 1 else None
        linear = is_plain(self.base_layer)
        if single and single.map_input and linear and self.spectral_scale[active[0]] == 1.0:
            return cast(Tensor, self.base_layer(single.map_input(x, self.prepare(active[0], True)), *args, **kwargs))
        if single and single.sandwich and linear and self.spectral_scale[active[0]] == 1.0:
            core = single.sandwich(self.prepare(active[0], True), self.frozen_of(active[0]))
            return core_linear(x, self.base_weight, cast(nn.Linear, self.base_layer).bias, core)
        parts = [self.factors(adapter, True) for adapter in active]
        up = parts[0].up if len(parts) == 1 else torch.cat([p.up for p in parts], 1)
        down = parts[0].down if len(parts) == 1 else torch.cat([p.down for p in parts], 0)
        if linear:
            # Leaving out the frozen half of its gradient saves work on a CPU, and costs a kernel on a GPU.
            frozen = up.shape[1] // 2 if single and single.frozen_up and x.device.type == "cpu" else 0
            return low_rank_linear(x, self.base_weight, cast(nn.Linear, self.base_layer).bias, up, down, frozen)
        y = cast(Tensor, self.base_layer(x, *args, **kwargs))
        layer = self.get_base_layer()
        if isinstance(layer, nn.Conv2d):
            return y + low_rank_conv(x, layer, up, down).to(y.dtype)
        return y + ((x @ down.mT.to(x.dtype)) @ up.mT.to(x.dtype)).to(y.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the base weight, in float64 and rounded once, however many adapters there are.

        Raises:
            TunerError: an adapter holds NaN or infinity and ``safe_merge`` is on, or the weight is quantized; nothing
                is merged then.
        """
        chosen = [a for a in check_adapters_to_merge(self, adapter_names) if a in self.spectral_delta]
        if not chosen:
            return
        if is_quantized(self.get_base_layer()):
            raise TunerError("An adapter cannot be merged into a quantized weight; load the model in bfloat16.")
        if self.unmerged_weight is None and any(self.spectral_method[a].builds_on == "weight" for a in chosen):
            self.unmerged_weight = self._without_merged()
        deltas = {adapter: self.get_delta_weight(adapter) for adapter in chosen}  # all of the weight as it was
        for adapter, delta in deltas.items():
            if safe_merge and not torch.isfinite(delta).all():
                self.unmerged_weight = self.unmerged_weight if self.merged else None
                raise TunerError(f"The adapter '{adapter}' holds NaN or infinity; nothing was merged.")
        weight = cast(nn.Linear, self.get_base_layer()).weight
        weight.data.copy_(to_float64(weight) + sum(to_float64(delta) for delta in deltas.values()))
        self.merged_adapters += chosen

    def unmerge(self) -> None:
        """Take everything that was merged out of the weight again.

        ΔW is subtracted, which is inexact in floating point (``unfuse`` re-fuses instead). Where ΔW depends on the
        weight, the weight of before was kept and is put back.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_weight.data.copy_(self._without_merged())
        self.unmerged_weight = None
        self.merged_adapters.clear()

    def _without_merged(self) -> Tensor:
        """The weight (out, in, …) as it is without the merged adapters."""
        if self.unmerged_weight is not None:
            return self.unmerged_weight
        weight = cast(nn.Linear, self.get_base_layer()).weight.detach()
        unmerged = weight.clone()
        if self.merged:
            unmerged.copy_(
                to_float64(weight) - sum(to_float64(self.get_delta_weight(adapter)) for adapter in self.merged_adapters)
            )
        return unmerged.mT if isinstance(self.get_base_layer(), Conv1D) else unmerged

    def set_scale(self, adapter: str, scale: float) -> None:
        """The strength λ of one adapter: multiplies its ΔW."""
        if adapter in self.spectral_scale:
            self.spectral_scale[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strengths of the active adapters, as PEFT and diffusers require."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, self.spectral_scale.get(adapter, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strengths of the active adapters again; without a scale they become 1."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, 1.0 if scale is None else self.spectral_scale.get(adapter, 1.0) / scale)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's ``convert_to_lora`` works: every method of ours adds a ΔW."""
        return True

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter to the base layer's device; PEFT's own would round it to the base's precision too."""
        for modules in (self.spectral_delta, self.spectral_frozen):
            if adapter_name in modules:
                part = modules[adapter_name]
                if not any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers())):
                    part.to(device or self.base_weight.device)


class AdaptedLinear(AdaptedLayer):
    """Of a Linear or Conv1D; PEFT's ``all-linear`` knows an adapted one by this class's name."""


class AdaptedConv2d(AdaptedLayer):
    """Of a convolution."""


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes x Wᵀ + b with the weight that it holds: nothing quantizes, wraps or moves it."""
    # Asked in every forward pass, in words that torch.compile follows.
    plain = type(layer) in (nn.Linear, Conv1D) and "forward" not in layer.__dict__
    return plain and type(layer.weight) in (nn.Parameter, Tensor)


def refuse_layer(layer: nn.Module, name: str, needs_weight: bool = True) -> None:
    """Nothing for a layer that can be adapted.

    Args:
        needs_weight: whether the weight's values are used, which a quantized layer has not.

    Raises:
        TunerError: it is of another kind, in groups or quantized.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d | Conv1D):
        raise TunerError(
            f"{name} is a {type(layer).__name__}; only Linear, Conv1D of transformers and Conv2d can be adapted."
        )
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise TunerError(f"{name} is a convolution in {layer.groups} groups; only whole ones can be adapted.")
    if needs_weight and is_quantized(layer):
        raise TunerError(f"{name} is quantized; load the model in bfloat16, float16 or float32.")


def adapted_layer(layer: nn.Module) -> AdaptedLayer:
    """A layer that can be adapted, or another tuner's around one, with room for adapters."""
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return AdaptedConv2d(layer) if isinstance(base, nn.Conv2d) else AdaptedLinear(layer)


def hooks_of(model: nn.Module) -> dict[str, Any]:
    """The handles of the tuner's hooks on a model, stored on it, by adapter."""
    handles: dict[str, Any] = model.__dict__.setdefault("_spectral_hooks", {})
    return handles


class BatchedPreparation:
    """A pre-hook that prepares the parameters of all of a model's layers at once before every forward.

    The result is kept until the parameters change, so that gradient checkpointing (the non-reentrant kind) finds the
    same tensors when it runs a layer again. Layers whose parameters are sharded outside their own forward (FSDP2,
    ZeRO-3) prepare their own. It takes itself off a model that no longer has the adapter.
    """

    def __init__(self, adapter: str, method: Method, layers: list[AdaptedLayer]) -> None:
        self.adapter, self.method, self.layers = adapter, method, layers
        self._stacks: dict[Any, tuple[list[tuple[int, int, int]], list[Tensor], Tensor]] = {}

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if self.adapter not in getattr(module, "peft_config", {}):
            hooks_of(module).pop(self.adapter).remove()
            return
        layers = [
            layer
            for layer in self.layers
            if self.adapter in layer.active_adapters and layer.spectral_method.get(self.adapter) is self.method
        ]
        if not layers or layers[0].disable_adapters or self.method.prepare is None:
            return
        if torch.compiler.is_compiling():  # versions of parameters would have it compiled anew at every step
            return
        layers = [layer for layer in layers if self._whole(layer)]
        each = [layer.effective(self.adapter) for layer in layers]
        built_on = [self._built_on(layer) for layer in layers]
        grouped: dict[tuple[Any, ...], list[int]] = {}
        for index, (parameters, frozen) in enumerate(zip(each, built_on, strict=True)):
            shapes = tuple(tuple(value.shape) for value in parameters.values())
            kind = (shapes, tuple(frozen), working_dtype(layers[index], next(iter(parameters.values())).device.type))
            grouped.setdefault(kind, []).append(index)
        for kind, indices in grouped.items():
            first = indices[0]
            stacked = {name: torch.stack([each[index][name] for index in indices]) for name in each[first]}
            frozen = {
                name: self._stack((kind, name), [built_on[index][name] for index in indices])
                for name in built_on[first]
            }
            made = self.method.prepare(stacked, frozen)
            if self.method.sandwich is None and kind[-1] is not None:  # the factors meet the inputs as they are
                made = {name: value.to(kind[-1]) for name, value in made.items()}
            prepared = {name: value.unbind(0) for name, value in made.items()}
            for position, index in enumerate(indices):
                layers[index].prepared[self.adapter] = Prepared(
                    {name: values[position] for name, values in prepared.items()},
                    layers[index].versions(self.adapter),
                    torch.is_grad_enabled(),
                )

    def _stack(self, key: Any, tensors: list[Tensor]) -> Tensor:
        """Frozen tensors of several layers as one, which is made anew only when they are others."""
        are = [(t.untyped_storage()._cdata, int(t.storage_offset()), t._version) for t in tensors]
        kept = self._stacks.get(key)
        if kept is not None and kept[0] == are:
            return kept[2]
        with torch.inference_mode(False):  # or no later training could use it
            stacked = torch.stack(tensors)
        # With the tensors themselves, so that no other takes their place in memory unseen.
        self._stacks[key] = are, tensors, stacked
        return stacked

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stacks": {}}

    def _whole(self, layer: AdaptedLayer) -> bool:
        """Whether a layer's parameters are all here; what was prepared of a sharded layer before is dropped."""
        whole = not any(is_sharded(value) for value in layer.parameters_of(self.adapter).values())
        if not whole:
            layer.prepared.pop(self.adapter, None)
        return whole

    def _built_on(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        """The frozen tensors that the preparation needs."""
        frozen = cast(Buffers, layer.spectral_frozen[self.adapter]).named()
        return {name: frozen[name] for name in self.method.prepared_on if name in frozen}


def working_dtype(layer: AdaptedLayer, kind: str) -> torch.dtype | None:
    """The precision in which a layer computes now on a kind of device; None where its weight does not say."""
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return layer.base_weight.dtype if layer.base_weight.is_floating_point() else None


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a shard now: a DTensor (FSDP2), or emptied until its layer runs (ZeRO-3)."""
    if type(parameter) is not nn.Parameter and torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(parameter, DTensor):
            return True
    return parameter.numel() == 0
