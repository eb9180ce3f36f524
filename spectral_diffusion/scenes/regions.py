"""Regions: a prompt of its own for every part of the picture (regionally controllable sampling of Mix-of-Show,
Gu et al. 2023, sec. 4.2), and adapters that act only there.

In cross-attention queries inside a region read the region's prompt, outside all regions the global one; where regions
overlap the results are averaged. Isolated regions keep self-attention and group norms to themselves. Every query
attends by itself, so only a region's own queries are computed for it. A region's adapters change its prompt's encoding,
its keys and values, and every other layer at its own cells alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.low_rank import low_rank_conv
from ..core.errors import UserError
from ..linalg import Factors
from .region_mask import cells_in

Layer = nn.Linear | nn.Conv2d
FEWEST = 8  # cells of an area that has a mean and a deviation of its own


@dataclass
class EncodedRegion:
    """A region ready for a U-Net.

    Attributes:
        area: a box (left, top, right, bottom) in fractions, or a mask (h, w) in 0…1 of the picture's pixels.
        positive, negative: its encoded prompts (length, width).
        deltas: U-Net layer to the change that acts in here only.
    """

    area: tuple[float, float, float, float] | Tensor
    positive: Tensor
    negative: Tensor
    deltas: Mapping[str, Factors] = field(default_factory=dict)

    def cells(self, height: int, width: int) -> Tensor:
        """(height · width,) bool: the cells whose middle is in the box, or that the mask covers by half."""
        return cells_in(self.area, height, width)


def grid_of(cells: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width) of a feature map with that many cells, from the latents' size.

    Raises:
        ValueError: no halving of the latents has as many.
    """
    while height * width > cells and max(height, width) > 1:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != cells:
        raise ValueError(f"{cells} cells are no halving of the latents")
    return height, width


@dataclass
class RegionalPrompts:
    """The shared state of one sampling's processors and hooks.

    Attributes:
        size: height and width of the latents.
        pictures: how many are denoised together; a batch twice as long holds the unconditional half first.
        share: of the global prompt inside the regions; ``isolation``: how far their self-attention and group norms keep
            to themselves.
        window: the steps [first, last) in which regions act; ``step`` is the present one.
        current: the area that attention is computed for just now.
    """

    areas: Sequence[EncodedRegion]
    size: tuple[int, int]
    pictures: int
    share: float = 0.0
    isolation: float = 0.0
    window: tuple[int, int] = (0, 1 << 30)
    step: int = 0
    current: int | None = None
    _cells: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def acting(self) -> bool:
        return self.window[0] <= self.step < self.window[1]

    def cells_of(self, count: int, device: torch.device) -> list[Tensor]:
        """Per area the indices of its cells among ``count``."""
        if count not in self._cells:
            grid = grid_of(count, *self.size)
            self._cells[count] = [area.cells(*grid).nonzero()[:, 0].to(device) for area in self.areas]
        return self._cells[count]

    def mean_inside(self, out: Tensor, compute: Callable[[int, Tensor], Tensor], share: float) -> Tensor:
        """``out`` (n, cells, width) with every area's own result put in, averaged where areas overlap."""
        total, counts = torch.zeros_like(out), out.new_zeros(out.shape[1])
        for index, cells in enumerate(self.cells_of(out.shape[1], out.device)):
            if not len(cells):
                continue  # a region narrower than this level's cells
            self.current = index
            try:
                total[:, cells] += compute(index, cells)
            finally:
                self.current = None
            counts[cells] += 1
        mean = total / counts.clamp_min(1)[None, :, None]
        return torch.where((counts > 0)[None, :, None], mean + share * (out - mean) if share else mean, out)


class RegionalAttention:
    """A diffusers attention processor over another one: regions read their own prompts, or keep to themselves."""

    def __init__(self, inner: Any, state: RegionalPrompts) -> None:
        self.inner, self.state = inner, state

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        state = self.state
        if not state.acting:
            return out
        if encoder_hidden_states is None:
            if not state.isolation:
                return out
            return state.mean_inside(
                out, lambda index, cells: self.inner(attn, hidden_states[:, cells], None, None, temb),
                1 - state.isolation,
            )  # fmt: skip
        guided = len(hidden_states) == 2 * state.pictures

        def read(index: int, cells: Tensor) -> Tensor:
            area = state.areas[index]
            text = area.positive.expand(state.pictures, -1, -1)
            if guided:
                text = torch.cat([area.negative.expand(state.pictures, -1, -1), text])
            attended: Tensor = self.inner(attn, hidden_states[:, cells], text.to(hidden_states.dtype), None, temb)
            return attended

        return state.mean_inside(out, read, state.share)


def innermost(layer: Any) -> Layer:
    """The base's own layer inside whatever adapters are around it."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def change_of(layer: Layer, x: Tensor, factors: Factors) -> Tensor:
    """The output that a low-rank change adds to a layer's."""
    up, down, layer = factors.up.to(x), factors.down.to(x), innermost(layer)
    return low_rank_conv(x, layer, up, down) if isinstance(layer, nn.Conv2d) else (x @ down.mT) @ up.mT


@contextmanager
def changed(layers: Mapping[str, Layer], deltas: Mapping[str, Factors]) -> Iterator[None]:
    """Let low-rank changes act on these layers while the context is open, in addition to others."""
    with ExitStack() as stack:
        for name, factors in deltas.items():

            def add(module: Any, inputs: Any, output: Tensor, factors: Factors = factors) -> Tensor:
                return output + change_of(module, inputs[0], factors)

            stack.callback(layers[name].register_forward_hook(add).remove)
        yield


def bound_hook(name: str, state: RegionalPrompts) -> Callable[[Any, Any, Tensor], Tensor | None]:
    """The forward hook of one U-Net layer that adds every area's change at its own cells."""
    cross = ".attn2." in name

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
        if not state.acting:
            return None
        x = inputs[0]
        if state.current is not None:  # attention computes one area's cells alone
            factors = state.areas[state.current].deltas.get(name)
            return None if factors is None else output + change_of(module, x, factors)
        if cross or x.dim() < 3:
            return None  # the global prompt; or a layer without cells, such as the time embedding's
        convolution = isinstance(innermost(module), nn.Conv2d)
        flat = output.flatten(2).mT if convolution else output
        counts = flat.new_zeros(flat.shape[1])
        total = torch.zeros_like(flat)
        for area, cells in zip(state.areas, state.cells_of(flat.shape[1], x.device), strict=True):
            counts[cells] += 1
            if name in area.deltas and len(cells):
                if convolution:
                    total[:, cells] += change_of(module, x, area.deltas[name]).flatten(2).mT[:, cells]
                else:
                    total[:, cells] += change_of(module, x[:, cells], area.deltas[name])
        mean = total / counts.clamp_min(1)[None, :, None]
        return output + (mean.mT.reshape(output.shape) if convolution else mean)

    return hook


def norm_hook(state: RegionalPrompts) -> Callable[[Any, Any, Tensor], Tensor | None]:
    """The forward hook of a group norm: every area's cells are normalized by their own mean and deviation.

    An adapter that acts in one area moves the statistics of the whole picture, and so the others' areas. Areas of fewer
    than ``FEWEST`` cells keep the picture's.
    """

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
        if not state.acting or state.current is not None:
            return None
        x, flat = inputs[0].flatten(2), output.flatten(2).mT  # (n, channels, cells), (n, cells, channels)

        def inside(index: int, cells: Tensor) -> Tensor:
            if len(cells) < FEWEST:
                return flat[:, cells]
            weights = module.weight, module.bias
            return F.group_norm(x[:, :, cells], module.num_groups, *weights, module.eps).mT

        return state.mean_inside(flat, inside, 1 - state.isolation).mT.reshape(output.shape)

    return hook


@contextmanager
def regional(unet: Any, state: RegionalPrompts, layers: Mapping[str, Layer]) -> Iterator[None]:
    """Let every area's prompt and adapters act on a U-Net while the context is open; without areas nothing is touched.

    Args:
        layers: the U-Net's layers that areas' changes may name, as ``unet.path``.

    Raises:
        UserError: an area covers no cell of the latents.
    """
    if not state.areas:
        yield
        return
    for number, area in enumerate(state.areas, 1):
        if not area.cells(*state.size).any():
            raise UserError(f"Region {number} is too small for this picture: it covers no cell; enlarge it.")
    before = unet.attn_processors
    unet.set_attn_processor(
        {
            name: RegionalAttention(processor, state) if ".attn2." in name or state.isolation else processor
            for name, processor in before.items()
        }
    )
    names = dict.fromkeys(name for area in state.areas for name in area.deltas)
    try:
        with ExitStack() as stack:
            for name in names:
                stack.callback(layers[name].register_forward_hook(bound_hook(name, state)).remove)
            for module in unet.modules() if state.isolation else ():
                if isinstance(module, nn.GroupNorm):
                    stack.callback(module.register_forward_hook(norm_hook(state)).remove)
            yield
    finally:
        unet.set_attn_processor(before)
