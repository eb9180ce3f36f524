"""The report: Markdown, and one HTML file that holds its pictures and asks nobody for anything."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..core.files import atomic, write_json, write_text
from ..core.paths import without_folders
from ..core.templates import render
from ..metrics.views import View
from .measure import ALL, Scored
from .sheet import draw_sheet, evenly_chosen
from .summary import Evaluation, matrix_rows, matrix_title, sentences, short, tables
from .tables import Row, cell_text, markdown

NAME = "evaluation"  # of the files, before .json, .md, .html and .png
TITLE = "Evaluation"
THUMBNAIL = 160  # pixels of the longer side at most
MOST = 12  # thumbnails of a concept in one way
MATRICES = "Whose photos are nearest (columns) to what should show a concept (rows)"


def write_report(found: Evaluation, folder: Path) -> Path:
    """Write ``evaluation.json``, ``.md``, ``.html`` and ``.png`` into a folder; returns the HTML file.

    Raises:
        UserError: the folder cannot be written.
    """
    views = {way: [one.view for one in scored] for way, scored in found.scored.items()}
    with atomic(folder / f"{NAME}.png") as temporary:
        draw_sheet(views, found.concepts).save(temporary, format="PNG", optimize=True)
    names = {encoder: short(encoder, found.encoders) for encoder in found.encoders}
    write_json(folder / f"{NAME}.json", without_folders(found.json(), names))
    write_text(folder / f"{NAME}.md", as_markdown(found))
    path = folder / f"{NAME}.html"
    write_text(path, as_html(found, folder))
    return path


def as_markdown(found: Evaluation) -> str:
    """The tables as a page, the contact sheet below."""
    parts = [f"# {TITLE}", " ".join(sentences(found))]
    for title, rows in tables(found).items():
        parts += [f"## {title}", markdown([_plain(row) for row in rows])]
    if matrices := found.confusion():
        parts.append(f"## {MATRICES}")
    for matrix in matrices:
        parts += [
            f"### {matrix_title(matrix, found.encoders)}",
            markdown([_plain(row) for row in matrix_rows(matrix)]),
        ]
    parts += [f"![contact sheet]({NAME}.png)", made_of(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(row: Row) -> Row:
    """A row whose texts cannot break a Markdown table."""
    return {_cell(key): _cell(value) if isinstance(value, str) else value for key, value in row.items()}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def made_of(found: Evaluation) -> str:
    """Base, encoders and intervals in a sentence."""
    base = found.about.get("base") or {}
    drawn = f" Base: {base['name']}, fingerprint {base['fingerprint'][:12]}." if base else ""
    encoders = ", ".join(short(one, found.encoders) for one in found.encoders)
    return f"Encoders: {encoders}. In brackets 95 % intervals of the mean, a bootstrap over concepts.{drawn}"


def as_html(found: Evaluation, folder: Path) -> str:
    """The whole report as one file; the template escapes every text, and every picture is inside."""
    return render(
        "evaluation/report.html.jinja",
        title=TITLE,
        sentences=sentences(found),
        tables={
            title: [{column: cell_text(value) for column, value in row.items()} for row in rows]
            for title, rows in tables(found).items()
        },
        all_concepts=ALL,
        matrices_title=MATRICES,
        matrices=[(matrix_title(matrix, found.encoders), matrix) for matrix in found.confusion()],
        pictures={name: _pictures(found, name, folder) for name in found.concepts},
        made_of=made_of(found),
    )


def _pictures(found: Evaluation, concept: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The thumbnails of a concept by way; a way that does not show it is left out."""
    mine = {way: [one for one in scored if one.view.concept == concept] for way, scored in found.scored.items()}
    return {way: _thumbnails(scored, found.encoders[0], folder) for way, scored in mine.items() if scored}


def _thumbnails(scored: Sequence[Scored], encoder: str, folder: Path) -> list[dict[str, Any]]:
    """Thumbnails with prompt and identity as title, those beside the report as links to their files."""
    by_view, folder, out = {one.view: one for one in scored}, folder.resolve(), []
    for view in evenly_chosen(list(by_view), MOST):
        one, path = by_view[view], view.path.resolve()
        out.append(
            {
                "source": data_url(view),
                "told": f"{view.prompt or view.path.name} · {one.identity(encoder):.2f}",
                "link": quote(path.relative_to(folder).as_posix()) if path.is_relative_to(folder) else "",
                "wrong": one.right(encoder) == 0,
            }
        )
    return out


def data_url(view: View) -> str:
    """A small copy of what is seen: PNG where it is small already, else JPEG."""
    image = view.open()
    held, kind = io.BytesIO(), "png" if max(image.size) <= THUMBNAIL else "jpeg"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(held, format=kind, **({} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}"
