"""The report: Markdown, and one self-contained HTML file."""

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
MOST = 12  # thumbnails of a concept in one setting
MATRICES = "Whose photos are nearest (columns) to what should show a concept (rows)"


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """Write ``evaluation.json``, ``.md``, ``.html`` and ``.png`` into a folder; returns the HTML file.

    Raises:
        UserError: the folder cannot be written.
    """
    views = {setting: [result.view for result in scored] for setting, scored in evaluation.scored.items()}
    with atomic(folder / f"{NAME}.png") as temporary:
        draw_sheet(views, evaluation.concepts).save(temporary, format="PNG", optimize=True)
    names = {encoder: short(encoder, evaluation.encoders) for encoder in evaluation.encoders}
    write_json(folder / f"{NAME}.json", without_folders(evaluation.json(), names))
    write_text(folder / f"{NAME}.md", as_markdown(evaluation))
    path = folder / f"{NAME}.html"
    write_text(path, as_html(evaluation, folder))
    return path


def as_markdown(evaluation: Evaluation) -> str:
    """The report as Markdown, the contact sheet last."""
    parts = [f"# {TITLE}", " ".join(sentences(evaluation))]
    for title, rows in tables(evaluation).items():
        parts += [f"## {title}", markdown([_escaped_row(row) for row in rows])]
    if matrices := evaluation.confusion():
        parts.append(f"## {MATRICES}")
    for matrix in matrices:
        parts += [
            f"### {matrix_title(matrix, evaluation.encoders)}",
            markdown([_escaped_row(row) for row in matrix_rows(matrix)]),
        ]
    parts += [f"![contact sheet]({NAME}.png)", made_of(evaluation)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _escaped_row(row: Row) -> Row:
    """A row with texts escaped for a Markdown table."""
    return {_cell(key): _cell(value) if isinstance(value, str) else value for key, value in row.items()}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


INTERVALS = (
    "In brackets 95 % intervals of the mean, a bootstrap over concepts (of a single concept over its pictures); in "
    "parentheses the range of fewer than five."
)


def made_of(evaluation: Evaluation) -> str:
    """Base, encoders and intervals in sentences."""
    base = evaluation.about.get("base") or {}
    base_text = f" Base: {base['name']}, fingerprint {base['fingerprint'][:12]}." if base else ""
    encoders = ", ".join(short(result, evaluation.encoders) for result in evaluation.encoders)
    return f"Encoders: {encoders}. {INTERVALS}{base_text}"


def as_html(evaluation: Evaluation, folder: Path) -> str:
    """The report as one file with its images inside; the template escapes every text."""
    return render(
        "evaluation/report.html.jinja",
        title=TITLE,
        sentences=sentences(evaluation),
        tables={
            title: [{column: cell_text(value) for column, value in row.items()} for row in rows]
            for title, rows in tables(evaluation).items()
        },
        all_concepts=ALL,
        matrices_title=MATRICES,
        matrices=[(matrix_title(matrix, evaluation.encoders), matrix) for matrix in evaluation.confusion()],
        pictures={name: _pictures(evaluation, name, folder) for name in evaluation.concepts},
        made_of=made_of(evaluation),
    )


def _pictures(evaluation: Evaluation, concept: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The thumbnails of a concept by setting; settings without it are left out."""
    mine = {
        setting: [result for result in scored if result.view.concept == concept]
        for setting, scored in evaluation.scored.items()
    }
    return {setting: _thumbnails(scored, evaluation.encoders[0], folder) for setting, scored in mine.items() if scored}


def _thumbnails(scored: Sequence[Scored], encoder: str, folder: Path) -> list[dict[str, Any]]:
    """Thumbnails with prompt and identity as title; files below the report's folder are linked."""
    by_view, folder, out = {result.view: result for result in scored}, folder.resolve(), []
    for view in evenly_chosen(list(by_view), MOST):
        result, path = by_view[view], view.path.resolve()
        out.append(
            {
                "source": data_url(view),
                "title": f"{view.prompt or view.path.name} · {result.identity(encoder):.2f}",
                "link": quote(path.relative_to(folder).as_posix()) if path.is_relative_to(folder) else "",
                "wrong": result.right(encoder) == 0,
            }
        )
    return out


def data_url(view: View) -> str:
    """A small copy of a view: PNG if it is small already, else JPEG."""
    image = view.open()
    buffer, kind = io.BytesIO(), "png" if max(image.size) <= THUMBNAIL else "jpeg"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, format=kind, **({} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
