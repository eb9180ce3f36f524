"""Regions on transformers whose text and image tokens attend to each other.

Every region has text tokens of its own behind the global prompt's. An image token inside a region sees that region's
text, one outside all regions the global text; image tokens see each other. A text sees itself and the image tokens that
see it, or in families with causal texts its own earlier tokens alone. A region's adapters change each linear layer at
its image tokens and at its text alone. One region over everything is therefore that prompt alone, and what a prompt
says reaches other regions through the picture only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..linalg import Factors
from ..models.base import Base
from ..models.denoiser import Conditioning, TokenKind
from .regions import EncodedRegion

Texts = Sequence[Tensor]  # the texts of one prompt, each (length, width)
Layout = tuple[tuple[int, int], ...]  # per text of a row: its tokens, with and without those that only align it


class TokenRegions:
    """The regions of one batch: masks of attention, and the tokens at which each region's adapters act.

    Args:
        grid: height and width of the picture in tokens.
        share: how much image tokens inside a region also see the global text, 0…1; ``isolation``: how far they keep
            away from image tokens of other regions, 1 sees none.
        window: the steps [first, last) in which regions act.

    Attributes:
        cells: (regions, image tokens) bool: which image tokens are in each region. Tokens that only pad the picture
            are in the regions that cover all of it.
        step: the present step of the sampler; it decides whether the regions act.

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
        self.base, self.regions, self.window, self.step = base, regions, window, 0
        self.share, self.isolation = share, isolation
        cells = torch.stack([region.cells(*grid) for region in regions])
        for number, inside in enumerate(cells, 1):
            if not inside.any():
                raise UserError(f"Region {number} is too small for this picture: it covers no token; enlarge it.")
        padding = -cells.shape[1] % base.denoiser.token_multiple
        self.cells = torch.cat([cells, cells.all(1, keepdim=True).expand(-1, padding)], 1)
        self._tokens = cells.shape[1]  # of the picture, without padding
        self._layouts: list[Layout] = []
        self._first_row = 0  # of the present pass
        self._passed: int | None = None  # the step of the latest pass
        self._kept: dict[tuple[str, TokenKind, int, int, bool], Tensor] = {}

    @property
    def acting(self) -> bool:
        return self.window[0] <= self.step < self.window[1]

    def prompt_options(self, prompts: Sequence[str], negative: str | None) -> dict[str, Any]:
        """The pipeline's arguments: the prompts of every picture with the regions' behind them."""
        denoiser, count = self.base.denoiser, len(prompts)
        rows = []
        for texts, own in (
            (prompts, [region.positive for region in self.regions]),
            ([negative or ""] * count, [region.negative for region in self.regions]),
        ):
            encoded = denoiser.prompt_rows(denoiser.encode(texts))
            rows += [[row, *(text.to(row) for text in own)] for row in encoded]
        if denoiser.aligned_texts == "pass":
            padded_rows = [*aligned(rows[:count]), *aligned(rows[count:])]
        else:
            padded_rows = aligned(rows) if denoiser.aligned_texts == "all" else rows
        self._layouts = [
            tuple((len(whole), len(text)) for whole, text in zip(padded_row, row, strict=True))
            for padded_row, row in zip(padded_rows, rows, strict=True)
        ]
        joined = [denoiser.row_prompt(torch.cat(row)) for row in padded_rows]
        return denoiser.embedding_options(Conditioning.stack(joined[:count]), Conditioning.stack(joined[count:]))

    @contextmanager
    def applied(self, pipeline: Any, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Let the regions' texts and adapters act while the context is open."""
        names = dict.fromkeys(name for region in self.regions for name in region.deltas)
        with ExitStack() as stack:
            stack.enter_context(self.base.denoiser.several_texts(pipeline, self))
            for name in names:
                stack.callback(layers[name].register_forward_hook(self._hook(name)).remove)
            yield

    # ------------------------------------------------------------------ what a network asks for (SeveralTexts)

    def begin_pass(self) -> None:
        """The network starts to predict: a step's prompts first, then the negative ones, if it reads them apart."""
        again = self._passed == self.step
        self._first_row, self._passed = len(self._layouts) // 2 if again else 0, self.step

    def lengths(self, row: int) -> list[int]:
        """The tokens of each text in a row of the batch, the global one's first; positive prompts come first."""
        return [whole for whole, _ in self._layouts[self._first_row + row]]

    def leading(self) -> list[int]:
        """Which texts any image token sees now."""
        return self._sees(self.acting)[:, : self._tokens].any(1).nonzero()[:, 0].tolist()

    def mask(self, kind: TokenKind, rows: int) -> Tensor | None:
        """What is added to the scores of attention (rows or 1, 1, tokens, tokens): 0 where a token sees another."""
        acting = self.acting
        if kind == "image" and not (acting and self.isolation):
            return None

        def scores(layout: Layout) -> Tensor:
            return self._weights(kind, layout, acting).log()  # log 0 is −∞, and the log of a share weighs by it

        return self._stacked("mask", kind, rows, acting, scores)[:, None]

    # ------------------------------------------------------------------ what sees what, and what acts where

    def _sees(self, acting: bool) -> Tensor:
        """How much image tokens see each text, and it sees them (texts, image tokens)."""
        sees = torch.zeros(1 + len(self.regions), self.cells.shape[1])
        sees[0] = 1.0
        if acting:
            sees[1:] = self.cells.float()
            covered = self.cells.any(0)
            if covered[: self._tokens].all():
                covered[:] = True  # padding reads the global text no more than the picture does
            sees[0] = torch.where(covered, self.share, 1.0)
        return sees

    def _weights(self, kind: TokenKind, layout: Layout, acting: bool) -> Tensor:
        """How much every token of a kind sees every other (tokens, tokens)."""
        image = self.cells.shape[1]
        near = torch.ones(image, image)
        if acting and self.isolation:
            same = (self.cells[:, :, None] & self.cells[:, None]).any(0)
            outside = ~self.cells.any(0)
            near = torch.where(same | (outside[:, None] & outside[None]), 1.0, 1.0 - self.isolation)
        causal = self.base.denoiser.causal_text
        lengths = torch.tensor([whole for whole, _ in layout])
        own = torch.cat([torch.arange(whole) < text for whole, text in layout]).float()  # not what only aligns
        text = torch.block_diag(*[torch.ones(whole, whole) for whole, _ in layout])
        text = (text.tril() if causal else text) * own
        if kind != "both":
            return text if kind == "text" else near
        across = self._sees(acting).repeat_interleave(lengths, 0) * own[:, None]  # (text tokens, image tokens)
        back = torch.zeros_like(across) if causal else across
        if self.base.denoiser.text_first:
            return torch.cat([torch.cat([text, back], 1), torch.cat([across.T, near], 1)], 0)
        return torch.cat([torch.cat([near, across.T], 1), torch.cat([back, text], 1)], 0)

    def _shares(self, kind: TokenKind, layout: Layout) -> Tensor:
        """The weight of each region's adapters at the tokens of a kind (tokens, regions): a mean where they overlap."""
        count = len(self.regions)
        image = self.cells.float() / self.cells.sum(0).clamp_min(1)
        lengths = torch.tensor([whole for whole, _ in layout])
        text = torch.cat([torch.zeros(count, 1), torch.eye(count)], 1).repeat_interleave(lengths, 1)
        if kind != "both":
            return (text if kind == "text" else image).T
        return torch.cat([text, image] if self.base.denoiser.text_first else [image, text], 1).T

    def _stacked(self, what: str, kind: TokenKind, rows: int, acting: bool, of: Callable[[Layout], Tensor]) -> Tensor:
        """One matrix per row of the batch, or one for all if their texts are equally long."""
        key = (what, kind, rows, self._first_row, acting)
        if key not in self._kept:
            multiple = self.base.denoiser.token_multiple
            layouts = [
                # What fills a text up to the multiple is a token like others: these networks have learned it.
                tuple((whole + -whole % multiple, text + -text % multiple) for whole, text in layout)
                for layout in self._layouts[self._first_row : self._first_row + rows]
            ]
            if kind == "image" or len(set(layouts)) == 1:
                layouts = layouts[:1]
            # Each distinct matrix is made once and converted at once: of a large picture they are large.
            like = torch.empty(0, device=self.base.device, dtype=self.base.dtype)
            matrices = {layout: of(layout).to(like) for layout in set(layouts)}
            longest = max(len(matrix) for matrix in matrices.values())
            matrices = {layout: padded(matrix, longest, what == "mask") for layout, matrix in matrices.items()}
            self._kept[key] = torch.stack([matrices[layout] for layout in layouts])
        return self._kept[key]

    def _hook(self, name: str) -> Any:
        """Adds a layer's changes, each at its region's tokens."""
        kind = self.base.denoiser.token_kind(name)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.acting:
                return None
            at = self._stacked("share", kind, len(output), True, lambda layout: self._shares(kind, layout))
            for index, region in enumerate(self.regions):
                if (change := region.deltas.get(name)) is not None:
                    output = output + at[..., index : index + 1].to(output.dtype) * change_at(inputs[0], change)
            return output

        return hook


def aligned(rows: Sequence[Texts]) -> list[list[Tensor]]:
    """Every row's texts with zeros behind, so that each text is as long in all rows."""
    longest = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    return [
        [torch.cat([text, text.new_zeros(length - len(text), *text.shape[1:])]) for text, length in zip(row, longest)]
        for row in rows
    ]


def padded(matrix: Tensor, tokens: int, square: bool) -> Tensor:
    """A matrix for more tokens: they have no share of anything, or as scores (``square``) see themselves alone."""
    if len(matrix) == tokens:
        return matrix
    if not square:
        return torch.cat([matrix, matrix.new_zeros(tokens - len(matrix), matrix.shape[1])])
    larger = torch.eye(tokens).log().to(matrix)
    larger[: len(matrix), : len(matrix)] = matrix
    return larger


def change_at(x: Tensor, change: Factors) -> Tensor:
    """A linear layer's change of its outputs for inputs (n, tokens, in)."""
    return (x.to(change.down.dtype) @ change.down.T @ change.up.T).to(x.dtype)


def window_of(start: float, end: float, steps: int) -> tuple[int, int]:
    """The steps [first, last) between two shares of all steps."""
    return math.floor(round(start * steps, 6)), math.ceil(round(end * steps, 6))
