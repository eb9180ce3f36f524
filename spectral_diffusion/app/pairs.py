"""Two ways to generate one scene beside each other: the same prompt, canvas and seeds, one or two things changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.errors import UserError
from ..core.files import write_bytes
from ..core.hooks import QUIET, Hooks
from ..data.image_grid import labelled_grid
from .base_cache import BaseCache
from .canvas import png_of
from .generation import GeneratedPictures, GenerateRequest, generate
from .workspace import Workspace

SHEETS = "sheets"  # a folder inside that of the pictures


@dataclass(frozen=True)
class Pair:
    """Pictures of the same seeds, the sheet of all of them, and a message."""

    pictures: list[tuple[Path, Path]]
    labels: tuple[str, str]
    sheet: Path | None
    message: str


def other_request(
    request: GenerateRequest, base: str | None, adapters: Sequence[str] | None, strength: str | None
) -> GenerateRequest:
    """The request with what is filled in changed.

    Boxes keep their prompts; where other concepts are chosen, those bound to boxes give way to them.

    Raises:
        UserError: nothing is filled in.
    """
    if not (base or adapters or (strength or "").strip()):
        raise UserError("Say what is different in the second picture: its base, its concepts, or their strength.")
    changed = replace(
        request,
        base=base or request.base,
        adapters=list(adapters or request.adapters),
        strength=(strength or "").strip() or request.strength,
    )
    if not adapters:
        return changed
    free = tuple(replace(region, concept="") for region in request.canvas.regions)
    return replace(changed, canvas=replace(request.canvas, regions=free))


def labels_of(first: GenerateRequest, second: GenerateRequest) -> tuple[str, str]:
    """What tells the two apart, in a few words each."""
    parts: list[tuple[str, str]] = []
    if first.base != second.base:
        parts.append((first.base or "pocket", second.base or "pocket"))
    shown = _concepts(first), _concepts(second)
    if shown[0] != shown[1]:
        parts.append((", ".join(shown[0]) or "no concept", ", ".join(shown[1]) or "no concept"))
    if first.strength != second.strength:
        parts.append((f"strength {first.strength or 1}", f"strength {second.strength}"))
    return ", ".join(one for one, _ in parts) or "first", ", ".join(two for _, two in parts) or "second"


def _concepts(request: GenerateRequest) -> list[str]:
    """The concepts of a picture: those that act everywhere, and those bound to boxes."""
    bound = [region.concept for region in request.canvas.regions if region.concept]
    return list(dict.fromkeys([*request.adapters, *bound]))


def generate_both(
    workspace: Workspace,
    first: GenerateRequest,
    second: GenerateRequest,
    hooks: Hooks = QUIET,
    preview: Callable[[list[Image.Image]], None] | None = None,
    keeper: BaseCache | None = None,
    **scene: Any,
) -> Pair:
    """Draw both, and a sheet of all seeds: one row a seed, one column each.

    Raises:
        UserError: anything the user can fix.
    """
    drawn: list[GeneratedPictures] = []
    for request in (first, second):
        drawn.append(generate(workspace, request, hooks, preview, keeper, **scene))
        if hooks.should_stop():
            break
    labels = labels_of(first, second)
    pairs = list(zip(drawn[0].pictures, drawn[1].pictures, strict=False)) if len(drawn) == 2 else []
    if not pairs:
        return Pair([], labels, None, drawn[-1].message)
    rows = []
    for files in pairs:
        row = []
        for file in files:
            with Image.open(file) as image:
                row.append(image.convert("RGB"))
        rows.append(row)
    sheet = workspace.pictures / SHEETS / f"{pairs[0][0].stem}.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(sheet, png_of(labelled_grid(rows, column_labels=labels, gap=6)))
    count = f"{len(pairs)} pair{'' if len(pairs) == 1 else 's'}"
    return Pair(pairs, labels, sheet, f"Generated {count}: {labels[0]} on the left, {labels[1]} on the right.")
