"""Prompts and boxes for adapters that the page was given: a prompt that names them, and a box for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config.train import in_style
from ..core.errors import UserError
from ..core.names import with_article

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter

PLACE = " on the grass"
SIDE = re.compile(r"^\s+(on|to) the (left|right)\b")  # where the last thing is, which its box says
MOST = 6  # boxes side by side


def prompt_naming(adapters: Sequence[Adapter], others: Iterable[str], prompt: str) -> str:
    """A prompt that names these adapters; the given one stays if it names all of them and nobody else.

    Args:
        others: tokens of adapters that are not among them.
    """
    words = prompt.lower()
    mine = {token for adapter in adapters for token in adapter.tokens}
    if all(token in words for token in mine) and not any(token in words for token in set(others) - mine - {""}):
        return prompt
    shown = [in_style("a dog", one.token) if one.is_style else called(one) for one in adapters]
    return f"a photo of {' and '.join(shown)} on the beach"


def called(adapter: Adapter) -> str:
    """What a prompt calls its thing: its token, or its noun if it was imported without one."""
    return adapter.token or with_article(adapter.noun)


def side_by_side(adapters: Mapping[str, Adapter], prompt: str) -> tuple[str, list[dict[str, Any]]]:
    """A box for each adapter's thing from left to right, as the prompt names them, and a prompt.

    The prompt's words after its last token go into every box; one that does not name all of them is replaced.

    Raises:
        UserError: there are fewer than two, or too many.
    """
    if not 2 <= len(adapters) <= MOST:
        raise UserError(f"Choose two to {MOST} concepts, then each gets a box of its own.")
    words, calls = prompt.lower(), {name: called(adapter) for name, adapter in adapters.items()}
    concepts, place = list(adapters), PLACE
    if all(call in words for call in calls.values()):
        concepts.sort(key=lambda name: words.find(calls[name]))
        end = max(words.rfind(call) + len(call) for call in calls.values())
        place = SIDE.sub("", prompt[end:].rstrip()) or place
    else:
        prompt = f"a photo of {' and '.join(calls.values())}{place}"
    sides = [round(index / len(adapters), 2) for index in range(len(adapters) + 1)]
    boxes = [
        {"box": [left, 0.0, right, 1.0], "prompt": f"a photo of {calls[name]}{place}", "concept": name}
        for name, left, right in zip(concepts, sides, sides[1:], strict=False)
    ]
    return prompt, boxes
