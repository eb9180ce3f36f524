"""Regions that differ from picture to picture, for a whole batch at once on a U-Net.

Every concept has a mask per picture and texts of its own. Where the mask is, cross-attention reads the concept's text
and nothing else, and the concept's adapters change the layers; elsewhere the global prompt acts alone. All of it is
dense: the texts are one behind the other in one attention with a mask, and changes are weighed by the masks, so a batch
takes as many calls as without regions. Masks do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.low_rank import thin_conv
from ..linalg import Factors
from .regions import FEWEST, Layer, grid_of, innermost

LARGEST = 64 * 64  # cells whose isolated self-attention is masked: the mask has their square


@dataclass
class FoundConcept:
    """One concept of a batch.

    Attributes:
        positive, negative: its prompts, encoded per picture (n, length, width).
        deltas: U-Net layer to the change that acts in its masks.
    """

    positive: Tensor
    negative: Tensor
    deltas: Mapping[str, Factors] = field(default_factory=dict)


@dataclass
class FoundRegions:
    """The shared state of one batch's processors and hooks.

    Attributes:
        masks: (n, concepts, h, w) bool at the latents' size, disjoint.
        isolation: how far self-attention and group norms in a mask keep to it, 0…1. Self-attention over more than
            ``LARGEST`` cells sees all of the picture.
        share: how much the global prompt is read in masks, 0…1.
        window: the steps [first, last) in which the concepts act.
        step: the present step of the sampler, which callbacks set.
    """

    concepts: Sequence[FoundConcept]
    masks: Tensor
    isolation: float = 0.0
    share: float = 0.0
    window: tuple[int, int] = (0, 1 << 30)
    step: int = 0
    _kept: dict[tuple[str, int, int, torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def acting(self) -> bool:
        return self.window[0] <= self.step < self.window[1]

    def inside(self, rows: int, cells: int, like: Tensor) -> Tensor:
        """(rows, concepts, cells): 1 in a concept's mask at the layer's size, else 0; a batch's halves are alike."""
        return self._keep("inside", rows, cells, like, lambda: self._inside(rows, cells).to(like))

    def outside(self, rows: int, cells: int, like: Tensor) -> Tensor:
        """(rows, 1, cells): 1 where no concept is."""
        return self._keep(
            "outside", rows, cells, like, lambda: 1 - self.inside(rows, cells, like).amax(1, keepdim=True)
        )

    def text_scores(self, rows: int, cells: int, words: int, like: Tensor) -> Tensor:
        """What is added to the scores of cross-attention (rows, cells, (1 + concepts) · words): 0 or −∞."""

        def make() -> Tensor:
            inside = self.inside(rows, cells, like)
            outside = self.outside(rows, cells, like)
            read = torch.cat([outside + self.share * (1 - outside), inside], 1).mT  # (rows, cells, 1 + concepts)
            return read.log().repeat_interleave(words, 2)

        return self._keep(f"text {words}", rows, cells, like, make)

    def self_scores(self, rows: int, cells: int, like: Tensor) -> Tensor:
        """What is added to the scores of isolated self-attention (rows, cells, cells): −∞ from a mask to elsewhere."""

        def make() -> Tensor:
            inside = self.inside(rows, cells, like)
            return (inside.mT @ inside + self.outside(rows, cells, like).mT).log()

        return self._keep("self", rows, cells, like, make)

    def _inside(self, rows: int, cells: int) -> Tensor:
        height, width = self.masks.shape[2:]
        grid = grid_of(cells, height, width)
        share = F.adaptive_avg_pool2d(self.masks.float(), grid).flatten(2)
        most = share.amax(1, keepdim=True)
        owned = (share == most) & (share >= 0.5)
        owned &= owned.cumsum(1) == 1  # a cell that two share equally is the first one's
        return owned.float().repeat(rows // len(owned), 1, 1)

    def _keep(self, what: str, rows: int, cells: int, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        key = (what, rows, cells, like.dtype)
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @contextmanager
    def applied(self, unet: Any, layers: Mapping[str, Layer]) -> Iterator[None]:
        """Let every concept act in its masks while the context is open.

        Args:
            layers: the U-Net's layers that changes may name, as ``unet.path``.
        """
        before = unet.attn_processors
        unet.set_attn_processor(
            {
                name: FoundAttention(processor, self) if ".attn2." in name or self.isolation else processor
                for name, processor in before.items()
            }
        )
        names = dict.fromkeys(name for concept in self.concepts for name in concept.deltas)
        try:
            with ExitStack() as stack:
                for name in names:
                    stack.callback(layers[name].register_forward_hook(self._hook(name)).remove)
                for module in unet.modules() if self.isolation else ():
                    if isinstance(module, nn.GroupNorm):
                        stack.callback(module.register_forward_hook(self._norm_hook).remove)
                yield
        finally:
            unet.set_attn_processor(before)

    def _hook(self, name: str) -> Callable[[Any, Any, Tensor], Tensor | None]:
        """The forward hook of a layer: each concept's change at its own text or in its own masks.

        All changes are one: between ``down`` and ``up`` every concept's columns are weighed by where it acts.
        """
        reads_text = ".attn2.to_k" in name or ".attn2.to_v" in name
        acting = [
            (index, concept.deltas[name]) for index, concept in enumerate(self.concepts) if name in concept.deltas
        ]
        up = torch.cat([factors.up for _, factors in acting], 1)
        down = torch.cat([factors.down for _, factors in acting])
        owners = torch.tensor([index for index, factors in acting for _ in factors.down], device=down.device)

        def weights(rows: int, places: int, like: Tensor) -> Tensor:
            """(rows or 1, k, places)"""
            if not reads_text:
                return self.inside(rows, places, like)[:, owners]
            text = torch.arange(places, device=like.device) // (places // (1 + len(self.concepts))) - 1
            return (text == owners[:, None]).to(like)[None]

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
            x = inputs[0]
            if x.dim() < 3 or not self.acting:
                return None  # a layer without cells, such as the time embedding's
            layer = innermost(module)
            if isinstance(layer, nn.Conv2d):
                places = output.shape[2] * output.shape[3]
                inner = thin_conv(x, layer, down).flatten(2).to(output)
                inner = inner * self._keep(name, len(x), places, output, lambda: weights(len(x), places, output))
                return (output.flatten(2) + up.to(output) @ inner).view_as(output)
            places = output.shape[1]
            inner = F.linear(x, down.to(x)).to(output)
            inner = inner * self._keep(name, len(x), places, output, lambda: weights(len(x), places, output).mT)
            return output + F.linear(inner, up.to(output))

        return hook

    def _norm_hook(self, module: Any, inputs: Any, output: Tensor) -> Tensor | None:
        """The cells of every mask are normalized by their own mean and deviation; a tiny one keeps the picture's."""
        if not self.acting:
            return None
        with torch.autocast(output.device.type, enabled=False):  # squares need float32's range
            return self._normalized(module, inputs[0].flatten(2).float(), output)

    def _normalized(self, module: Any, x: Tensor, output: Tensor) -> Tensor:
        rows, channels, cells = x.shape
        inside = self.inside(rows, cells, x)
        inside = inside * (inside.sum(2, keepdim=True) >= FEWEST)
        groups = x.view(rows, module.num_groups, -1, cells)
        count = inside.sum(2)[:, None].clamp_min(1)
        # Moments around the group's own mean, which is near the masks' means: nothing cancels.
        groups = groups - groups.mean((2, 3), keepdim=True)
        mean = groups.mean(2) @ inside.mT / count  # (rows, groups, concepts)
        square = groups.square().mean(2) @ inside.mT / count
        scale = ((square - mean.square()).clamp_min(0) + module.eps).rsqrt()
        normal = ((groups - (mean @ inside)[:, :, None]) * (scale @ inside)[:, :, None]).reshape(rows, channels, cells)
        apart = normal * module.weight[:, None].float() + module.bias[:, None].float()
        apart = apart.view_as(output).to(output)
        weight = self.isolation * inside.amax(1).view(rows, 1, *output.shape[2:])
        return torch.lerp(output, apart, weight.to(output))


class FoundAttention:
    """A diffusers attention processor over another one: each cell reads its concept's text, or keeps to its mask."""

    def __init__(self, inner: Any, state: FoundRegions) -> None:
        self.inner, self.state = inner, state

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        state, rows = self.state, len(hidden_states)
        if not state.acting:
            unchanged: Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return unchanged
        maps = hidden_states.dim() == 4
        cells = hidden_states.shape[2] * hidden_states.shape[3] if maps else hidden_states.shape[1]
        if encoder_hidden_states is None and cells > LARGEST:
            whole: Tensor = self.inner(attn, hidden_states, None, attention_mask, temb)
            return whole
        if encoder_hidden_states is None:
            scores = state.self_scores(rows, cells, hidden_states)
            apart: Tensor = self.inner(attn, hidden_states, None, scores, temb)
            if state.isolation == 1:
                return apart
            return torch.lerp(self.inner(attn, hidden_states, None, attention_mask, temb), apart, state.isolation)
        guided = rows == 2 * len(state.masks)
        texts = [encoder_hidden_states]
        for concept in state.concepts:
            own = torch.cat([concept.negative, concept.positive]) if guided else concept.positive
            texts.append(own.to(encoder_hidden_states))
        scores = state.text_scores(rows, cells, encoder_hidden_states.shape[1], hidden_states)
        out: Tensor = self.inner(attn, hidden_states, torch.cat(texts, 1), scores, temb)
        return out
