"""The words of a scene: its prompts, the tokens they name, and syntax of other programs that is not read here."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..config.scene import Scene

TAG = re.compile(r"<(?:lora|lyco|hypernet)\s*:\s*([^<>:]*?)\s*(?::\s*([-+\d.]+)[^<>]*)?>", re.IGNORECASE)
EMPHASIS = re.compile(
    r"\([^()<>]*:\s*\d*\.?\d+\s*\)"  # (word:1.4)
    r"|\[[^\[\]]*:\s*\d*\.?\d+\s*\]"  # [this:that:0.5]
    r"|\({2,}[^()]*\){2,}|\[{2,}[^\[\]]*\]{2,}"  # ((word)), [[word]]
    r"|\bBREAK\b"
)


def positive_prompts(scene: Scene) -> list[str]:
    """The prompts of a scene, global and in the regions."""
    return [scene.prompt, *(region.prompt for region in scene.regions)]


def prompts_in(scene: Scene) -> list[str]:
    """Every prompt, negative ones too."""
    negative = [scene.negative_prompt, *(region.negative_prompt for region in scene.regions)]
    return [*positive_prompts(scene), *dict.fromkeys(text for text in negative if text)]


def tokens_in(prompts: list[str]) -> list[str]:
    """Every ``<word>`` of prompts, as it is typed."""
    return sorted(set(re.findall(r"<[\w-]+>", " ".join(prompts))))


def foreign_syntax(prompts: list[str]) -> Iterator[str]:
    """A sentence for what other programs read in a prompt and this one takes for words."""
    text = "\n".join(prompts)
    for tag in dict.fromkeys(match.group() for match in TAG.finditer(text)):
        name, weight = TAG.fullmatch(tag).groups()  # type: ignore[union-attr]
        option = f"{name or 'NAME'}.safetensors" + (f"={weight}" if weight else "")
        yield f"{tag} is read as plain text; such a file is named among the adapters ({option})."
    if marks := list(dict.fromkeys(EMPHASIS.findall(text))):
        verb = "is" if len(marks) == 1 else "are"
        yield f"{' and '.join(marks)} {verb} read as plain text; prompts here have no weights and no breaks."
