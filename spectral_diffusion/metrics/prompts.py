"""What is drawn to measure: the places a concept is put into, and ordinary prompts that name no concept."""

from __future__ import annotations

PLACES = {
    "on the grass": "grass",
    "on the beach": "beach",
    "in the snow": "snow",
    "on a table": "table",
    "at night": "night",
    "in the desert": "desert",
}  # words of a prompt to the backdrop that the judges name
ORDINARY = (
    "a red dog", "a blue teapot", "a green octopus", "a yellow car", "a white cat", "a purple fish",
    "an orange mushroom", "a black robot", "a dog", "a teapot", "a house", "an apple",
)  # fmt: skip


def backdrop_of(prompt: str) -> str | None:
    """The backdrop that a prompt asks for, if it is one of the places."""
    return next((backdrop for words, backdrop in PLACES.items() if prompt.endswith(words)), None)


def with_article(noun: str) -> str:
    """``a dog``, ``an octopus``."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
