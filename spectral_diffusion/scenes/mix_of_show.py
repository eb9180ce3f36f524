"""Mix-of-Show's free-text region files as scenes.

Such a file is shell text: ``char1='<rex1> <rex2>'`` names a region's prompt, ``box1='[top, left, bottom, right]'`` its
box in pixels; names may repeat, and a value's form decides what it means. Some files also give negative prompts and
weights of the condition, or put everything into one ``prompt_rewrite="[prompt]-*-[negative]-*-[box]|…"``. Two or more
empty lines begin another layout of the same picture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_text
from ..data.folder import open_photo
from .png_metadata import read_settings

ASSIGNMENT = re.compile(r"""([A-Za-z_]\w*)=(?:'([^'\n]*)'|"([^"\n]*)")""")
NUMBERS = re.compile(r"\[\s*(-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?)*)\s*\]")
GROUP = re.compile(r"<([A-Za-z]+)(\d*)>(?:\s+<\1\d*>)*")
EVERY = ("<token>", "*")  # keys of a mapping for every token without one of its own
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class MixOfShowRegion:
    """One region as written: prompt, pixels (left, top, right, bottom), negative prompt, condition weights."""

    prompt: str
    box: tuple[float, float, float, float] | None = None
    negative: str = ""
    weights: tuple[float, ...] = field(default=())


def read_layouts(path: Path) -> list[list[MixOfShowRegion]]:
    """Every layout of a region file.

    Raises:
        UserError: not such a file, a region without a box, or a box that is none.
    """
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise UserError(f"No such file: {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a UTF-8 text file.") from error
    layouts = []
    for part in re.split(r"\n[ \t]*\n[ \t]*\n\s*", text.replace("\r\n", "\n")):
        spots = spots_of(part, path)
        if spots:
            layouts.append(spots)
    if not layouts:
        raise UserError(f"{path} is no region file: it holds no prompt='…' with a box='[top, left, bottom, right]'.")
    return layouts


def spots_of(text: str, path: Path) -> list[MixOfShowRegion]:
    """The regions of one layout, in their order."""
    spots: list[MixOfShowRegion] = []
    for match in ASSIGNMENT.finditer(text):
        name, value = match[1], (match[2] if match[2] is not None else match[3]).strip()
        numbers = NUMBERS.fullmatch(value)
        if "-*-" in value:
            spots += [rewritten(piece, path) for piece in value.split("|")]
        elif "weight" in name:
            if spots and numbers:
                spots[-1].weights = tuple(float(number) for number in numbers[1].split(","))
        elif numbers:
            if not spots or spots[-1].box is not None:
                raise UserError(f"{path}: the box {value} belongs to no prompt; write the prompt before it.")
            spots[-1].box = box_of(numbers[1], value, path)
        elif "neg" in name:
            if spots:
                spots[-1].negative = unwrapped(value)
        else:
            spots.append(MixOfShowRegion(unwrapped(value)))
    for spot in spots:
        if spot.box is None:
            raise UserError(f"{path}: the region '{spot.prompt[:40]}' has no box='[top, left, bottom, right]'.")
    return spots


def rewritten(text: str, path: Path) -> MixOfShowRegion:
    """One ``[prompt]-*-[negative]-*-[box]``."""
    parts = [part.strip() for part in text.split("-*-")]
    numbers = NUMBERS.fullmatch(parts[-1])
    if len(parts) != 3 or not numbers:
        raise UserError(f"{path}: '{text[:60]}' is not [prompt]-*-[negative]-*-[top, left, bottom, right].")
    return MixOfShowRegion(unwrapped(parts[0]), box_of(numbers[1], parts[-1], path), unwrapped(parts[1]))


def box_of(text: str, shown: str, path: Path) -> tuple[float, float, float, float]:
    """``top, left, bottom, right`` as left, top, right, bottom."""
    sides = [float(side) for side in text.split(",")]
    if len(sides) != 4 or not (0 <= sides[0] < sides[2] and 0 <= sides[1] < sides[3]):
        raise UserError(f"{path}: {shown} is no box; it is [top, left, bottom, right] in pixels.")
    top, left, bottom, right = sides
    return left, top, right, bottom


def unwrapped(text: str) -> str:
    """A prompt without its brackets; a shell variable of the caller's is nothing here."""
    inner = re.fullmatch(r"\[(.*)\]", text.strip())
    return re.sub(r"\$\{?\w+\}?", "", inner[1] if inner else text).strip()


def mapped(prompt: str, mapping: Mapping[str, str]) -> str:
    """A prompt with tokens replaced: ``<rex1> <rex2>`` by the values of ``<rex1>``, ``<rex>`` or ``<token>`` (any)."""

    def replaced(match: re.Match[str]) -> str:
        group, stem, first = match[0], match[1], match[0].split()[0]
        for key in (group, first, f"<{stem}>", stem, *EVERY):
            if key in mapping:
                return mapping[key]
        return group

    return re.sub(r"\ba a\b", "a", re.sub(r"\ban? (?=(?:an?|the) )", "", GROUP.sub(replaced, prompt)))


def control_images_beside(path: Path) -> list[dict[str, str]]:
    """Condition pictures of the same name: ``NAME_sketch.png``, ``NAME_pose.png`` or ``NAME.png``."""
    controls = []
    for ending, kind in (("_sketch", "sketch"), ("_pose", "keypose"), ("_keypose", "keypose"), ("", "")):
        for suffix in PICTURES:
            file = path.with_name(f"{path.stem}{ending}{suffix}")
            if file.is_file() and not made_here(file):
                controls.append({"file": str(file), "kind": kind or kind_of(file)})
    return controls


def made_here(file: Path) -> bool:
    """Whether a picture is one of this program's own."""
    try:
        return bool(read_settings(file))
    except UserError:
        return False


def kind_of(file: Path) -> str:
    """``keypose`` for a picture in colors, ``sketch`` for one without."""
    bands = open_photo(file).resize((64, 64)).split()
    spread = max(max(abs(a - b) for a, b in zip(bands[0].getdata(), other.getdata())) for other in bands[1:])
    return "keypose" if spread > 60 else "sketch"


def layout_size(controls: Sequence[Mapping[str, str]], spots: Sequence[MixOfShowRegion]) -> tuple[float, float]:
    """The size in the file's pixels: that of the control image, else 512 high and as wide as the boxes need."""
    if controls:
        return open_photo(Path(controls[0]["file"])).size
    boxes = [spot.box for spot in spots if spot.box]
    return (1024.0 if max(box[2] for box in boxes) > 512 else 512.0), 512.0


def scene_of(path: Path, base_size: int, mapping: Mapping[str, str], layout: int = 1) -> dict[str, Any]:
    """A region file's layout as a scene's settings at a base's size, with the control images beside it.

    Raises:
        UserError: not such a file, no such layout, or a mapping that names no token of it.
    """
    layouts = read_layouts(path)
    if not 1 <= layout <= len(layouts):
        raise UserError(f"{path} holds {len(layouts)} layouts; there is no layout {layout}.")
    spots = layouts[layout - 1]
    written = " ".join(spot.prompt for spot in spots)
    for key in mapping:
        stems = {match[1] for match in GROUP.finditer(written)}
        if key not in EVERY and key not in written and key.strip("<>") not in stems:
            raise UserError(f"The mapping names '{key}', but the file's tokens are {', '.join(sorted(stems))}.")
    controls = control_images_beside(path)
    width, height = layout_size(controls, spots)
    regions = []
    for spot in spots:
        assert spot.box is not None
        left, top, right, bottom = spot.box
        sides = (left / width, top / height, min(right / width, 1.0), min(bottom / height, 1.0))
        region: dict[str, Any] = {"box": [round(side, 6) for side in sides], "prompt": mapped(spot.prompt, mapping)}
        if spot.negative:  # most files name the context's there, which is the scene's
            region["negative_prompt"] = spot.negative
        if spot.weights and any(weight != 1 for weight in spot.weights):
            region["conditioning_scale"] = sum(spot.weights) / len(spot.weights)
        regions.append(region)
    factor = base_size / height
    return {
        "prompt": ", ".join(dict.fromkeys(region["prompt"] for region in regions)),
        "width": max(8, round(width * factor / 8) * 8),
        "height": max(8, round(height * factor / 8) * 8),
        "regions": regions,
        "controls": controls,
    }
