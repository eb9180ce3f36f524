"""Regions on transformers whose text and image tokens attend to each other (joint attention).

Every region has text tokens of its own behind the global prompt's. An image token inside a region sees that region's
text, one outside all regions the global text; a text sees itself and the image tokens that see it; image tokens see
each other. A region's adapters change each linear layer at its image tokens and at its text alone. One region over
everything is therefore that prompt alone, and what a prompt says reaches other regions through the picture only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..linalg import Factors
from ..models.base import Base
from .regions import EncodedRegion


class TokenRegions:
    """The regions of one batch: masks of attention, and the tokens at which each region's adapters act.

    Args:
        grid: height and width of the picture in tokens.
        share: how much image tokens inside a region also see the global text, 0…1; ``isolation``: how far they keep
            away from image tokens of other regions, 1 sees none.
        window: the steps [first, last) in which regions act.

    Raises:
        UserError: a region covers no token.
    """

    def __init__(
        self,
        base: Base,
        regions: Sequence[EncodedRegion],
        grid: tuple[int, int],
        share: float = 0.0,
        isolation: float = 0.0,
        window: tuple[int, int] = (0, 1 << 30),
    ) -> None:
        self.base, self.regions, self.window = base, regions, window
        self.cells = torch.stack([region.cells(*grid) for region in regions])  # (regions, image tokens)
        for number, cells in enumerate(self.cells, 1):
            if not cells.any():
                raise UserError(f"Region {number} is too small for this picture: it covers no token; enlarge it.")
        self.length = len(regions[0].positive)  # of each text in tokens
        like = torch.empty(0, device=base.device, dtype=base.dtype)
        self._masks = {acting: self._mask(acting, share, isolation).to(like) for acting in (True, False)}
        self.attention: dict[str, Any] = {}
        self.step = 0

    @property
    def step(self) -> int:
        """The present step of the sampler; it decides whether the regions act."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        self.attention["attention_mask"] = self._masks[self.acting]

    @property
    def acting(self) -> bool:
        return self.window[0] <= self._step < self.window[1]

    def _mask(self, acting: bool, share: float, isolation: float) -> Tensor:
        """What is added to the scores (1, 1, tokens, tokens): 0 where a token sees another, −∞ where not."""
        texts, image = 1 + len(self.regions), self.cells.shape[1]
        sees = torch.zeros(texts, image)  # how much image tokens see each text, and it sees them
        if acting:
            sees[1:] = self.cells.float()
            sees[0] = torch.where(self.cells.any(0), share, 1.0)
        else:
            sees[0] = 1.0
        near = torch.ones(image, image)
        if acting and isolation:
            same = (self.cells[:, :, None] & self.cells[:, None]).any(0)
            outside = ~self.cells.any(0)
            near = torch.where(same | (outside[:, None] & outside[None]), 1.0, 1.0 - isolation)
        text = torch.block_diag(*[torch.ones(self.length, self.length)] * texts)
        across = sees.repeat_interleave(self.length, 0)  # (text tokens, image tokens)
        weights = torch.cat([torch.cat([text, across], 1), torch.cat([across.T, near], 1)], 0)
        return weights.log()[None, None]  # log 0 is −∞, and log of a share weighs by it

    def prompt_options(self, options: Mapping[str, Tensor]) -> dict[str, Any]:
        """The pipeline's arguments: the prompts of every picture with the regions' behind them, and the mask."""
        count = len(options["prompt_embeds"])
        positive = [region.positive for region in self.regions]
        negative = [region.negative for region in self.regions]
        return {
            "prompt_embeds": _behind(options["prompt_embeds"], positive, count),
            "negative_prompt_embeds": _behind(options["negative_prompt_embeds"], negative, count),
            "attention_kwargs": self.attention,
        }

    @contextmanager
    def applied(self, pipeline: Any, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Let every region's text have positions of its own, and its adapters act, while the context is open."""
        names = dict.fromkeys(name for region in self.regions for name in region.deltas)
        ids = pipeline._prepare_text_ids
        with ExitStack() as stack:
            pipeline._prepare_text_ids = lambda x, t_coord=None: ids(x[:, : self.length]).repeat(
                1, x.shape[1] // self.length, 1
            )
            stack.callback(delattr, pipeline, "_prepare_text_ids")
            for name in names:
                stack.callback(layers[name].register_forward_hook(self._hook(name)).remove)
            yield

    def _hook(self, name: str) -> Any:
        """Adds a layer's changes, each at its region's tokens; averaged where regions overlap."""
        kind = self.base.denoiser.token_kind(name)
        image = self.cells.float() / self.cells.sum(0).clamp_min(1)
        text = torch.zeros(len(self.regions), 1 + len(self.regions))
        text[:, 1:] = torch.eye(len(self.regions))
        weights = {"image": image, "text": text.repeat_interleave(self.length, 1)}
        weights["both"] = torch.cat([weights["text"], weights["image"]], 1)
        at = weights[kind].to(self.base.device)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.acting:
                return None
            for weight, region in zip(at, self.regions, strict=True):
                if (change := region.deltas.get(name)) is not None:
                    output = output + weight[None, :, None].to(output.dtype) * change_at(inputs[0], change)
            return output

        return hook


def change_at(x: Tensor, change: Factors) -> Tensor:
    """A linear layer's change of its outputs for inputs (n, tokens, in)."""
    return (x.to(change.down.dtype) @ change.down.T @ change.up.T).to(x.dtype)


def _behind(prompts: Tensor, regions: Sequence[Tensor], count: int) -> Tensor:
    """Prompts (n, length, width) with the regions' (length, width) behind each."""
    rows = [region.to(prompts).expand(count, -1, -1) for region in regions]
    return torch.cat([prompts, *rows], 1)


def window_of(start: float, end: float, steps: int) -> tuple[int, int]:
    """The steps [first, last) between two shares of all steps."""
    return math.floor(round(start * steps, 6)), math.ceil(round(end * steps, 6))
