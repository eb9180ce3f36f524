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

from ..linalg import Factors
from .regions import FEWEST, Layer, change_of, grid_of, innermost


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
        isolation: how far self-attention and group norms in a mask keep to it, 0…1.
        step: the present step of the sampler, which callbacks set.
    """

    concepts: Sequence[FoundConcept]
    masks: Tensor
    isolation: float = 0.0
    step: int = 0
    _kept: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def inside(self, rows: int, cells: int, like: Tensor) -> Tensor:
        """(rows, concepts, cells): 1 in a concept's mask at the layer's size, else 0; a batch's halves are alike."""
        return self._keep("inside", rows, cells, lambda: self._inside(rows, cells).to(like))

    def outside(self, rows: int, cells: int, like: Tensor) -> Tensor:
        """(rows, 1, cells): 1 where no concept is."""
        return self._keep("outside", rows, cells, lambda: 1 - self.inside(rows, cells, like).amax(1, keepdim=True))

    def text_scores(self, rows: int, cells: int, words: int, like: Tensor) -> Tensor:
        """What is added to the scores of cross-attention (rows, cells, (1 + concepts) · words): 0 or −∞."""

        def make() -> Tensor:
            inside = self.inside(rows, cells, like)
            seen = torch.cat([self.outside(rows, cells, like), inside], 1).mT  # (rows, cells, 1 + concepts)
            return seen.log().repeat_interleave(words, 2)

        return self._keep(f"text {words}", rows, cells, make)

    def self_scores(self, rows: int, cells: int, like: Tensor) -> Tensor:
        """What is added to the scores of isolated self-attention (rows, cells, cells): −∞ from a mask to elsewhere."""

        def make() -> Tensor:
            inside = self.inside(rows, cells, like)
            return (inside.mT @ inside + self.outside(rows, cells, like).mT).log()

        return self._keep("self", rows, cells, make)

    def _inside(self, rows: int, cells: int) -> Tensor:
        height, width = self.masks.shape[2:]
        grid = grid_of(cells, height, width)
        share = F.adaptive_avg_pool2d(self.masks.float(), grid).flatten(2)
        most = share.amax(1, keepdim=True)
        owned = (share == most) & (share >= 0.5)
        owned &= owned.cumsum(1) == 1  # a cell that two share equally is the first one's
        return owned.float().repeat(rows // len(owned), 1, 1)

    def _keep(self, what: str, rows: int, cells: int, make: Callable[[], Tensor]) -> Tensor:
        key = (what, rows, cells)
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
        """The forward hook of a layer: each concept's change at its own text or in its own masks."""
        reads_text = ".attn2.to_k" in name or ".attn2.to_v" in name

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
            x = inputs[0]
            if x.dim() < 3:
                return None  # a layer without cells, such as the time embedding's
            convolution = isinstance(innermost(module), nn.Conv2d)
            if reads_text:
                words = x.shape[1] // (1 + len(self.concepts))
            else:
                cells = output.shape[2] * output.shape[3] if convolution else output.shape[1]
                inside = self.inside(len(x), cells, output)
            for index, concept in enumerate(self.concepts):
                if (factors := concept.deltas.get(name)) is None:
                    continue
                if reads_text:
                    own = slice(words * (index + 1), words * (index + 2))
                    output[:, own] += change_of(module, x[:, own], factors)
                    continue
                weight = inside[:, index]
                weight = weight.view(len(x), 1, *output.shape[2:]) if convolution else weight[..., None]
                output = torch.addcmul(output, change_of(module, x, factors), weight)
            return output

        return hook

    def _norm_hook(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        """The cells of every mask are normalized by their own mean and deviation; a tiny one keeps the picture's."""
        x = inputs[0].flatten(2).float()
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
        apart = torch.addcmul(module.bias[:, None], normal, module.weight[:, None]).view_as(output).to(output)
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
        maps = hidden_states.dim() == 4
        cells = hidden_states.shape[2] * hidden_states.shape[3] if maps else hidden_states.shape[1]
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
