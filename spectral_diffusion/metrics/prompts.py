"""Words of the prompts that are measured."""

from __future__ import annotations

from ..config.evaluate import PLACES


def backdrop_of(prompt: str) -> str | None:
    """The backdrop that a prompt names, if it is a known one."""
    return next((backdrop for phrase, backdrop in PLACES.items() if prompt.endswith(phrase)), None)
