"""A picture of who sits in which slot: columns of the spectrum from left to right, one row a concept."""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .ledger import Slot

CELL, ROW, LABEL, GAP = 12, 26, 132, 10
FREE, LINE, INK, CLASH = (244, 244, 242), (214, 214, 210), (40, 40, 44), (200, 30, 30)


def color_of(index: int) -> tuple[int, int, int]:
    """A color for the n-th concept, far from its neighbours'."""
    red, green, blue = colorsys.hls_to_rgb((0.58 + index * 0.618034) % 1, 0.55, 0.55)
    return round(red * 255), round(green * 255), round(blue * 255)


def slot_map(slots: Mapping[str, Slot | None], norms: Mapping[str, float | None], capacity: int) -> Image.Image:
    """The slot map of these concepts; columns that two of them share are outlined in red.

    Args:
        slots: concept to its columns, None for a method without them.
        norms: concept to |ΔW|, drawn as a bar at the right.
        capacity: columns of the narrowest adapted weight.
    """
    names = list(slots)
    shown = min(max([capacity, *(slot.top for slot in slots.values() if slot)]), 128)
    width = LABEL + shown * CELL + 2 * GAP + 150
    image = Image.new("RGB", (width, GAP * 2 + ROW * (len(names) + 1)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    shared = clashes([columns_of(slot, capacity) for slot in slots.values()])
    for column in range(0, shown, 8):
        draw.text((LABEL + column * CELL, GAP), str(column), fill=INK, font=font)
    draw.text((LABEL + shown * CELL + GAP, GAP), "norm", fill=INK, font=font)
    largest = max([norm for norm in norms.values() if norm] or [1.0])
    for row, name in enumerate(names):
        top = GAP + (row + 1) * ROW
        draw.text((GAP, top + 4), name[:18], fill=INK, font=font)
        columns = columns_of(slots[name], capacity)
        for column in range(shown):
            left = LABEL + column * CELL
            fill = color_of(row) if column in columns else FREE
            clash = column in columns and column in shared
            draw.rectangle(
                (left, top, left + CELL - 2, top + ROW - 6), fill, CLASH if clash else LINE, 2 if clash else 1
            )
        if beyond := sum(column >= shown for column in columns):
            draw.text((LABEL + shown * CELL - 96, top + 4), f"+{beyond} to the right", fill=INK, font=font)
        norm = norms.get(name)
        left = LABEL + shown * CELL + GAP
        if slots[name] is None:
            draw.text((LABEL + 4, top + 4), "no slot: acts on every column", fill=INK, font=font)
        if norm is not None:
            draw.rectangle((left, top + 3, left + 80 * norm / largest, top + ROW - 9), fill=color_of(row))
            draw.text((left + 86, top + 4), f"{norm:.2f}", fill=INK, font=font)
    return image


def columns_of(slot: Slot | None, capacity: int) -> set[int]:
    """A slot's columns counted from the top."""
    return {column % capacity if column < 0 else column for column in slot.columns} if slot else set()


def clashes(slots: Sequence[set[int]]) -> set[int]:
    """Columns that more than one slot holds."""
    used: set[int] = set()
    twice: set[int] = set()
    for columns in slots:
        twice |= used & columns
        used |= columns
    return twice


@dataclass(frozen=True)
class Stretch:
    """Neighbouring columns ``start … stop − 1`` with the same owners: none, one, or several that clash."""

    start: int
    stop: int
    owners: tuple[str, ...]


def stretches(slots: Mapping[str, Slot | None], capacity: int) -> list[Stretch]:
    """All columns 0 … ``capacity`` − 1 from left to right, as one strip with their owners."""
    columns_by_name = {name: columns_of(slot, capacity) for name, slot in slots.items()}
    owners = [tuple(name for name, own in columns_by_name.items() if column in own) for column in range(capacity)]
    strip = []
    for names, run in itertools.groupby(range(capacity), key=owners.__getitem__):
        columns = list(run)
        strip.append(Stretch(columns[0], columns[-1] + 1, names))
    return strip
