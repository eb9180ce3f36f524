"""The model card of an export: what it is, how to call it, what it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.hub import is_repository
from ...core.names import with_article

WORDS = "The words need their embedding files: `pipe.load_textual_inversion(…)`, or your program's `embeddings` folder."
TERMS = {  # of what is published, by the beginnings of their lines
    "**License.": "**License.** {}; the base model's license applies too.",
    "**Consent.": "**Consent.** Whoever published this said that they may share what it shows.",
}
MARK = "spectral-adapter"  # in every card, by which an earlier one is known


def model_card(
    title: str,
    base: str,
    tokens: Mapping[str, str],
    settings: Mapping[str, Any],
    files: Sequence[str],
    picture: str = "",
    license: str = "",
    library: str = "diffusers",
    words: str = WORDS,
) -> str:
    """A Markdown card with the hub's front matter.

    Args:
        tokens: trigger word to class noun.
        settings: method or merge and its settings, shown as they are.
        picture: a sample picture's file name, if there is one.
        license: the hub's name of the license under which it is published, if it is.
        library: the hub's name of the program that loads it.
        words: what the trigger words need.
    """
    trigger_words = (
        ", ".join(f"`{token}` ({with_article(noun)})" if noun else f"`{token}`" for token, noun in tokens.items())
        or "none"
    )
    front = ["---", *([f"base_model: {base}"] if is_repository(base) or not license else [])]  # the hub checks it
    front += [f"library_name: {library}", f"tags: [text-to-image, lora, {MARK}]"]
    if license:
        front.append(f"license: {license}")
    if tokens:
        first = next(iter(tokens))
        front.append(f'instance_prompt: "a photo of {first}"')
    lines = [
        *front, "---", "", f"# {title}", "",
        *([f"![sample]({picture})", ""] if picture else []),
        f"Trigger words: {trigger_words}.", "",
        "| | |", "| --- | --- |",
        f"| base model | {base} |",
        *(f"| {key} | {value} |" for key, value in settings.items() if value not in (None, "", {})),
        f"| files | {', '.join(files)} |", "",
        words if tokens else "",
        "",
        TERMS["**License."].format(license) if license else
        "**License.** The base model's license applies; add your own for what is yours.", "",
        TERMS["**Consent."] if license else
        "**Consent.** If this shows a person, or a thing somebody else made, publish it only with their consent.", "",
    ]  # fmt: skip
    return "\n".join(line for line in lines if line is not None)
