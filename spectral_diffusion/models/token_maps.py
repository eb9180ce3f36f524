"""What a picture's tokens attend to in the prompt, on transformers whose text and image tokens attend to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from ..core.errors import UserError
from .attention_maps import AttentionMaps
from .denoiser import Denoiser


class TokenWatcher:
    """Makes one layer's map of its normalized queries and keys.

    Rotary positions are left out: they say how far a word is from a place, and nothing of what it means.
    """

    def __init__(self, maps: AttentionMaps, denoiser: Denoiser, cells: int, words: int) -> None:
        """``cells``: the picture's tokens, without those that pad it; ``words``: the prompt's."""
        self.maps, self.text_first, self.words, self.picture = maps, denoiser.text_first, words, cells
        self.cells = cells + -cells % denoiser.token_multiple  # padding is behind the picture
        self.query: Tensor | None = None
        self.keys: Tensor | None = None  # of the prompt; some networks compute them in the first step alone

    def hook(self, kind: str) -> Callable[[Any, Any, Tensor], None]:
        """The forward hook of a norm of queries or keys (n, tokens, heads, width)."""

        def keep(module: Any, inputs: Any, output: Tensor) -> None:
            if id(self) in self.maps.found:
                return  # of a step only the prompt's pass counts, which comes before the negative one's
            row = output[0].detach().float()
            if kind == "q":
                self.query = (row[-self.cells :] if self.text_first else row)[: self.picture]
            elif len(row) > self.cells:
                keys = row[: -self.cells] if self.text_first else row[self.cells :]
                self.keys = keys[: self.words]
            if kind == "k" and self.query is not None and self.keys is not None:
                self.maps.found[id(self)] = attended(self.query, self.keys)[None]

        return keep


def attended(query: Tensor, keys: Tensor) -> Tensor:
    """Softmax over the words of q · k / √width, the mean over heads: (cells, words).

    Args:
        query: (cells, heads, width).
        keys: (words, heads or fewer, width); heads may share keys.
    """
    heads, width = query.shape[1:]
    keys = keys.repeat_interleave(heads // keys.shape[1], 1)
    total = query.new_zeros(len(query), len(keys))
    for head in range(heads):  # one at a time: all of a large picture would fill a small card
        total += (query[:, head] @ keys[:, head].mT / width**0.5).softmax(1)
    return total / heads


@contextmanager
def capture_token_maps(denoiser: Denoiser, cells: int, words: int) -> Iterator[AttentionMaps]:
    """Capture the layers in which both kinds of tokens attend to each other, for the first picture of a batch.

    Args:
        cells: the picture's tokens.
        words: the tokens of its prompt, as :meth:`.denoiser.Denoiser.prompt_rows` has it.
    """
    maps = AttentionMaps()
    with ExitStack() as stack:
        for name, module in denoiser.network.named_modules():
            if not (hasattr(module, "norm_q") and hasattr(module, "norm_k") and reads_both(denoiser, name)):
                continue
            watcher = TokenWatcher(maps, denoiser, cells, words)
            for kind in ("q", "k"):
                norm: Any = getattr(module, f"norm_{kind}")
                stack.callback(norm.register_forward_hook(watcher.hook(kind)).remove)
        yield maps


def reads_both(denoiser: Denoiser, attention: str) -> bool:
    """Whether an attention module of the network reads text and image tokens as one sequence."""
    try:
        return denoiser.token_kind(f"transformer.{attention}.to_q") == "both"
    except UserError:
        return False
