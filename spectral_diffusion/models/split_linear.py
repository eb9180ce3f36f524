"""One linear layer that holds several projections, as its parts.

FLUX.2 computes queries, keys, values and both halves of the feed-forward layer by one matrix. Its singular vectors
would mix five jobs, so adapters see five layers, each a block of rows; the network computes as before. Of a
quantized layer, which cannot be cut, the parts hold no weights: adapters add to its rows of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantization import is_quantized
from .targets import FUSED


class FusedLinear(nn.Module):
    """A linear layer (out, in) whose parts, blocks of its rows, adapters see as layers of their own."""

    in_features: int
    out_features: int

    def named_parts(self) -> dict[str, nn.Module]:
        """The parts with their adapters, in order."""
        return {name: child for name, child in self.named_children() if name != FUSED}

    def parts(self) -> list[nn.Linear]:
        """The parts without their adapters, in order."""
        found = []
        for child in self.named_parts().values():
            layer: Any = child
            while hasattr(layer, "base_layer"):
                layer = layer.base_layer
            found.append(layer)
        return found

    def rows(self) -> dict[str, int]:
        """The parts' names and numbers of rows."""
        return {name: part.out_features for name, part in zip(self.named_parts(), self.parts(), strict=True)}

    def joined(self) -> nn.Module:
        """The layer as it was."""
        raise NotImplementedError


class SplitLinear(FusedLinear):
    """A linear layer (out, in) whose children are its blocks of rows; their weights are views of one tensor.

    Its ``state_dict`` is the whole layer's. While no part is adapted it computes with the whole matrix, bit for bit as
    before.

    Args:
        layer: the layer to split; it has no bias.
        rows: the parts' names and numbers of rows, in order.
    """

    _whole: Tensor

    def __init__(self, layer: nn.Linear, rows: Mapping[str, int]) -> None:
        super().__init__()
        assert layer.bias is None and sum(rows.values()) == layer.out_features
        self.in_features, self.out_features = layer.in_features, layer.out_features
        for name, count in rows.items():
            self.add_module(name, nn.Linear(layer.in_features, count, bias=False, device="meta"))
        self._whole = layer.weight.detach()
        self._share(layer.weight.requires_grad)
        self._register_state_dict_hook(_joined_state)
        self.register_load_state_dict_pre_hook(_split_state)

    def forward(self, x: Tensor) -> Tensor:
        if all(_is_untouched(child) for child in self.children()):
            return F.linear(x, self.whole)
        return torch.cat([child(x) for child in self.children()], -1)

    def joined(self) -> nn.Linear:
        """The layer as it was, with the parts' weights as they are now."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.whole, requires_grad=False)
        return layer

    @property
    def whole(self) -> Tensor:
        """The weight (out, in) with the parts' weights as they are now."""
        if not torch.compiler.is_compiling() and not self._is_joined():
            self._rejoin()
        return self._whole

    def _is_joined(self) -> bool:
        """Whether the parts' weights still are views of the whole, which new weights of a part would not be."""
        storage, start = self._whole.untyped_storage()._cdata, self._whole.storage_offset()
        for part in self.parts():
            if part.weight.untyped_storage()._cdata != storage or part.weight.storage_offset() != start:
                return False
            start += part.weight.numel()
        return True

    def _share(self, trainable: bool = False) -> None:
        """Make the parts' weights views of the whole. Parameters stay the same objects, which optimizers hold."""
        start = 0
        for part in self.parts():
            view = self._whole[start : start + part.out_features]
            if part.weight.device == view.device and part.weight.dtype == view.dtype and not view.is_meta:
                part.weight.data = view
            else:
                part.weight = nn.Parameter(view, requires_grad=trainable)
            start += part.out_features

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_whole"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rejoin()  # a copy's parts are copied one by one

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SplitLinear:
        super()._apply(fn, recurse)
        if not self._is_joined():
            self._rejoin()
        return self

    def _rejoin(self) -> None:
        """Make one tensor of the parts' weights again."""
        self._whole = torch.cat([part.weight.detach() for part in self.parts()])
        self._share(self.parts()[0].weight.requires_grad)


class RowsOfQuantized(nn.Linear):
    """A part of a quantized layer. It adds nothing to the layer's output, and its adapters add their change alone.

    Its weight is zero and takes no memory.
    """

    def __init__(self, in_features: int, out_features: int, like: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("zero", torch.zeros(1, 1, dtype=like.dtype, device=like.device), persistent=False)
        self.zero: Tensor
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Zeros (out, in)."""
        return self.zero.expand(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], self.out_features)  # PEFT's layers add to it in place


class QuantizedFused(FusedLinear):
    """A quantized linear layer without bias, and its parts.

    Args:
        layer: the quantized layer.
        rows: the parts' names and numbers of rows, in order.
        dtype: of the computation.
    """

    def __init__(self, layer: nn.Linear, rows: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        assert layer.bias is None and sum(rows.values()) == layer.out_features
        self.in_features, self.out_features = layer.in_features, layer.out_features
        like = torch.empty(0, dtype=dtype, device=layer.weight.device)
        for name, count in rows.items():
            self.add_module(name, RowsOfQuantized(layer.in_features, count, like))
        self.add_module(FUSED, layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(FUSED)(x)
        parts = self.named_parts().values()
        if all(_is_untouched(part) for part in parts):
            return y
        blocks = y.split(list(self.rows().values()), -1)
        changed = [y if _is_untouched(part) else y + part(x) for y, part in zip(blocks, parts, strict=True)]
        return torch.cat(changed, -1)

    def joined(self) -> nn.Module:
        return self.get_submodule(FUSED)


def _is_untouched(part: nn.Module) -> bool:
    """Whether a part is neither adapted nor trained nor captured."""
    return (
        (type(part) is RowsOfQuantized or (type(part) is nn.Linear and "forward" not in vars(part)))  # hooks replace it
        and not part.weight.requires_grad
        and not part._forward_hooks
        and not part._forward_pre_hooks
    )


def _joined_state(module: SplitLinear, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Write the parts' weights as the one of the whole; those of adapters stay."""
    for name in [f"{prefix}{name}" for name, _ in module.named_parameters() if name.endswith("weight")]:
        if name.removeprefix(prefix).removesuffix(".weight").split(".")[1:] in ([], ["base_layer"]):
            state.pop(name, None)
    state[f"{prefix}weight"] = module.whole


def _split_state(module: SplitLinear, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Read the weight of the whole into the parts."""
    whole = state.pop(f"{prefix}weight", None)
    if whole is not None:
        names = [name for name, _ in module.named_children()]
        for name, block in zip(names, whole.split([part.out_features for part in module.parts()]), strict=True):
            state[f"{prefix}{name}.weight"] = block


def split_layers(model: nn.Module, rows_of: Callable[[nn.Module], Mapping[str, Mapping[str, int]]]) -> None:
    """Split every fused layer of a network in place.

    Args:
        rows_of: a module's fused layers by attribute, each with its parts' rows; empty for most modules.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for module in list(model.modules()):
        for attribute, rows in rows_of(module).items():
            layer = getattr(module, attribute)
            if not isinstance(layer, nn.Linear):
                continue
            if is_quantized(layer):
                setattr(module, attribute, QuantizedFused(layer, rows, dtype))
            else:
                setattr(module, attribute, SplitLinear(layer, rows))


def fused_layers(models: Mapping[str, nn.Module]) -> dict[str, dict[str, int]]:
    """The split layers of networks by ``component.path``, each with its parts' names and rows."""
    return {
        f"{component}.{path}": module.rows()
        for component, model in models.items()
        for path, module in model.named_modules()
        if isinstance(module, FusedLinear)
    }


def join_layers(model: nn.Module) -> None:
    """Undo :func:`split_layers`, except for layers that are adapted."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FusedLinear) and not any(
                hasattr(part, "base_layer") for part in child.named_parts().values()
            ):
                setattr(module, name, child.joined())
