"""The concept cards and the slot map as HTML; the templates escape all texts from files."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from ..core.templates import render
from .overview import ConceptOverview, Strip

KINDS = {"columns": "directions of the spectrum", "rows": "rows of the shared basis"}
PALE = "#c9c9c4"  # reserved in the ledger, not trained yet


def cards(overview: ConceptOverview, chosen: str | None = None) -> str:
    """All cards as buttons with their folder's name in ``data-name``; the user's own come first."""
    groups = {
        "Yours": [item for item in overview.cards if item.own],
        "Ready-made": [item for item in overview.cards if not item.own],
    }
    for items in groups.values():
        items.sort(key=lambda item: not item.adapters)  # what is trained comes first
    return render(
        "app/templates/concept_cards.html.jinja",
        groups=groups,
        chosen=chosen,
        colors=overview.colors,
        pale=PALE,
        image_url=image_url,
    )


def slot_map_html(overview: ConceptOverview) -> str:
    """The slot map: a strip per base, then a legend."""
    return _slot_map(overview.strips, overview.colors, overview.notes)


def strip(band: Strip, colors: dict[str, str]) -> str:
    """One base's spectrum as a band of colors, white where it is free, striped red where two clash."""
    return _slot_map([band], colors, [])


def _slot_map(strips: Sequence[Strip], colors: dict[str, str], notes: Sequence[str]) -> str:
    return render(
        "app/templates/slot_map.html.jinja", strips=strips, colors=colors, notes=notes, kinds=KINDS, pale=PALE
    )


def image_url(jpeg: bytes) -> str:
    """A picture as a data URL, so that the workspace need not be served."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
