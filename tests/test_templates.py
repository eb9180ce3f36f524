"""The HTML templates: whatever a file is called, it adds no element and no attribute to a page."""

from __future__ import annotations

from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest

import spectral_diffusion
from spectral_diffusion.app.adapter_headers import AdapterInfo
from spectral_diffusion.app.overview import Card, Strip
from spectral_diffusion.core.templates import render
from spectral_diffusion.slots.ledger import Slot
from spectral_diffusion.slots.picture import Stretch

PACKAGE = Path(spectral_diffusion.__file__).parent
HOSTILE = "\"'><script>alert('1')</script><i title=\"&lt;"


def cards(name: str) -> dict[str, Any]:
    label = AdapterInfo(Path(name), name, name, name, name, name, Slot.interval(0, 2), name, name, 32)
    group = [Card(name, name, name, 1, True, [b"photo"], [label], name), Card(name, name, name, 0, True, [], [], "")]
    colors = {name: "#123456"}
    return {"groups": {name: group}, "chosen": name, "colors": colors, "pale": "#fff", "image_url": lambda _: name}


def slot_map(name: str) -> dict[str, Any]:
    runs = [Stretch(0, 2, (name,)), Stretch(2, 3, (name, "rex")), Stretch(3, 8, ())]
    strip = Strip(name, "columns", runs, {name: Slot.interval(0, 3), "rex": Slot.interval(2, 3)}, 5, 4, {"rex"})
    colors, kinds = {name: "#123456"}, {"columns": name}
    return {"strips": [strip], "colors": colors, "notes": [name], "kinds": kinds, "pale": "#fff"}


def report(name: str) -> dict[str, Any]:
    thumbnail = {"source": "data:,", "title": name, "link": name, "wrong": True}
    return {
        "title": name,
        "sentences": [name],
        "tables": {name: [{"concept": name, name: name}, {"concept": "all", name: name}]},
        "all_concepts": "all",
        "matrices_title": name,
        "matrices": [(name, {"columns": [name, "rex"], "rows": [name], "shares": [[0.25, 0.75]]})],
        "pictures": {name: {name: [thumbnail, {**thumbnail, "link": "", "wrong": False}]}},
        "made_of": name,
    }


VALUES: dict[str, Callable[[str], dict[str, Any]]] = {
    "app/templates/adapter_table.html.jinja": lambda name: {"columns": [name], "rows": [[name]]},
    "app/templates/concept_cards.html.jinja": cards,
    "app/templates/fusion_table.html.jinja": lambda name: {
        "columns": {name: name, "Size": "how large"},
        "rows": [{name: name, "Size": name}],
        "sentences": [(name, name)],
    },
    "app/templates/slot_map.html.jinja": slot_map,
    "app/templates/train_figures.html.jinja": lambda name: {"tiles": {name: name}, "note": name},
    "app/templates/train_progress.html.jinja": lambda name: {
        "concept": name, "line": name, "look": name, "share": 12.5, "notes": [name],
    },
    "app/templates/train_strip.html.jinja": lambda name: {"mark": name, "concept": name, "line": name},
    "evaluation/report.html.jinja": report,
}  # fmt: skip


class Outline(HTMLParser):
    """The elements of a page with the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, [name for name, _ in attrs]))


def test_every_template_is_tested() -> None:
    assert {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.html.jinja")} == VALUES.keys()


@pytest.mark.parametrize("template", VALUES)
def test_names_stay_text(template: str) -> None:
    page = render(template, **VALUES[template](HOSTILE))
    assert HOSTILE not in page and HOSTILE in unescape(page) and "<script" not in page
    assert Outline(page).elements == Outline(render(template, **VALUES[template]("rex2"))).elements


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="note"):
        render("app/templates/train_figures.html.jinja", tiles={})


def test_the_report_loads_nothing() -> None:
    page = render("evaluation/report.html.jinja", **report("rex"))
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in page
