"""The shelf of concepts and the slot map as HTML; every word in it that came from a file is escaped."""

from __future__ import annotations

import base64
from html import escape

from ..slots.picture import Stretch
from .adapter_headers import AdapterInfo
from .overview import Card, ConceptOverview, Strip

KINDS = {"columns": "directions of the spectrum", "rows": "rows of the shared basis"}
PALE = "#c9c9c4"  # kept in the ledger, nothing trained yet


def cards(shelf: ConceptOverview, chosen: str | None = None) -> str:
    """All cards as buttons that carry their folder's name in ``data-name``; the person's own come first."""
    own = [one for one in shelf.cards if one.own]
    ready = [one for one in shelf.cards if not one.own]
    groups = {"Yours": own, "Ready-made": ready}
    return "".join(
        f'<h4 class="concept-group">{title}</h4><div class="concept-cards" role="group" aria-label="{title}">'
        + "".join(concept_card(one, shelf, one.folder == chosen) for one in group)
        + "</div>"
        for title, group in groups.items()
        if group
    )


def concept_card(one: Card, shelf: ConceptOverview, chosen: bool) -> str:
    """One concept: its first photos, what it is, and what it has been trained into."""
    name = escape(one.folder)
    pictures = "".join(f'<img alt="" src="{image_url(photo)}">' for photo in one.photos)
    count = f"{one.count} photo{'' if one.count == 1 else 's'}"
    line = f"{escape(one.noun)} · {count}" if one.count else "cannot be read"
    trained = (
        "".join(adapter_line(label, shelf) for label in one.adapters) or '<span class="muted">not trained yet</span>'
    )
    problem = f'<span class="concept-problem">{escape(one.problem)}</span>' if one.problem else ""
    return (
        f'<button type="button" class="concept-card" data-name="{name}" aria-pressed="{str(chosen).lower()}">'
        f'<span class="concept-photos count-{len(one.photos)}">{pictures}</span>'
        f'<span class="concept-title"><b>{name}</b><code>{escape(one.token)}</code></span>'
        f'<span class="muted">{line}</span>'
        f'<span class="concept-trained">{trained}</span>{problem}</button>'
    )


def adapter_line(label: AdapterInfo, shelf: ConceptOverview) -> str:
    """An adapter in a line: its colour in the map, its columns, its method and its base."""
    colour = shelf.colours.get(label.name, PALE)
    place = f"{label.kind} {label.slot}" if label.slot else "no slot"
    return (
        f'<span><i class="slot-dot" style="background:{colour}"></i>'
        f"{place} · {escape(label.method)} · {escape(label.base)}</span>"
    )


def slot_map_html(shelf: ConceptOverview) -> str:
    """The slot map: a strip per base, then who is who."""
    if not shelf.strips:
        return '<p class="muted">Free from end to end: nothing has been trained here yet.</p>'
    notes = "".join(f"<li>{escape(note)}</li>" for note in shelf.notes)
    strips = "".join(strip(one, shelf.colours) for one in shelf.strips)
    return strips + (f'<ul class="slot-notes">{notes}</ul>' if notes else "")


def strip(one: Strip, colours: dict[str, str]) -> str:
    """One base's spectrum as a band of colours, white where it is free, striped red where two clash."""
    parts = "".join(_stretch(run, one, colours) for run in one.stretches)
    legend = "".join(
        f'<li><i class="slot-dot" style="background:{_colour(name, one, colours)}"></i>{escape(name)} '
        f'<span class="muted">{slot}{" · kept, not trained" if name in one.reserved else ""}</span></li>'
        for name, slot in sorted(one.slots.items(), key=lambda item: item[1])
    )
    beyond = f" ({one.beyond} of them further right)" if one.beyond else ""
    spoken = "; ".join(f"{name} in {slot}" for name, slot in one.slots.items())
    return (
        f'<figure class="slot-map"><figcaption>{escape(one.base)} <span class="muted">{one.free} free '
        f"{KINDS[one.kind]}{beyond}</span></figcaption>"
        f'<div class="slot-strip" role="img" aria-label="{escape(f"{one.kind} of {one.base}: {spoken}")}">{parts}</div>'
        f'<div class="slot-ends muted"><span>0 · strongest</span><span>{one.stretches[-1].stop}</span></div>'
        f'<ul class="slot-legend">{legend}</ul></figure>'
    )


def _stretch(run: Stretch, one: Strip, colours: dict[str, str]) -> str:
    who = " and ".join(run.owners) or "free"
    style = f"flex:{run.stop - run.start}"
    if len(run.owners) == 1:
        style += f";background:{_colour(run.owners[0], one, colours)}"
    kind = "free" if not run.owners else "clash" if len(run.owners) > 1 else "held"
    return f'<span class="slot-{kind}" style="{style}" title="{escape(f"{run.start}:{run.stop} {who}")}"></span>'


def _colour(name: str, one: Strip, colours: dict[str, str]) -> str:
    return PALE if name in one.reserved else colours.get(name, PALE)


def image_url(jpeg: bytes) -> str:
    """A picture within the page, so that nothing of the workspace needs to be served."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
