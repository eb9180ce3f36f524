"""Words of the prompts that are measured."""

from __future__ import annotations

from ..config.evaluate import PLACES


def backdrop_of(prompt: str) -> str | None:
    """The backdrop that a prompt asks for, if it is one of the places."""
    return next((backdrop for words, backdrop in PLACES.items() if prompt.endswith(words)), None)


def with_article(noun: str) -> str:
    """``a dog``, ``an octopus``."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
