"""The report: Markdown, and one HTML file that holds its pictures and asks nobody for anything."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..core.files import atomic, write_json, write_text
from ..core.paths import without_folders
from ..metrics.views import View
from .measure import ALL, Scored
from .sheet import draw_sheet, evenly_chosen
from .summary import Evaluation, matrix_rows, matrix_title, sentences, short, tables
from .tables import Row, cell_text, markdown

NAME = "evaluation"  # of the files, before .json, .md, .html and .png
TITLE = "Evaluation"
THUMBNAIL = 160  # pixels of the longer side at most
MOST = 12  # thumbnails of a concept in one way
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --mark: 38, 132, 255; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; white-space: nowrap; }
th { font-weight: 600; }
.matrices { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.strip { display: flex; flex-wrap: wrap; gap: 6px; }
.strip img { display: block; height: 96px; image-rendering: pixelated; border-radius: 4px; }
.strip .wrong img { outline: 3px solid #d33; outline-offset: -3px; }
.made { color: GrayText; font-size: .85rem; }
"""


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
        parts.append("## Whose photos are nearest (columns) to what should show a concept (rows)")
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
    """The whole report as one file; every text is escaped, every picture inside."""
    parts = [f"<h1>{TITLE}</h1>", *(f"<p>{escape(sentence)}</p>" for sentence in sentences(found))]
    for title, rows in tables(found).items():
        parts += [f"<h2>{escape(title)}</h2>", html_table(rows)]
    if matrices := found.confusion():
        parts.append("<h2>Whose photos are nearest (columns) to what should show a concept (rows)</h2>")
    drawn = (html_matrix(matrix, matrix_title(matrix, found.encoders)) for matrix in matrices)
    parts.append(f'<div class="matrices">{"".join(drawn)}</div>')
    for name in found.concepts:
        parts.append(f"<h2>{escape(name)}</h2>")
        for way, scored in found.scored.items():
            mine = [one for one in scored if one.view.concept == name]
            if mine:
                parts += [f"<h3>{escape(way)}</h3>", html_strip(mine, found.encoders[0], folder)]
    parts.append(f'<p class="made">{escape(made_of(found))} A red frame: another concept is nearer.</p>')
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{TITLE}</title>'
        f"<style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def html_table(rows: Sequence[Row]) -> str:
    """Rows as an HTML table; the row of all concepts stands out."""
    lines = ["<tr>" + "".join(f"<th>{escape(column)}</th>" for column in rows[0]) + "</tr>"]
    for row in rows:
        kind = "th" if row.get("concept") == ALL else "td"
        lines.append(
            "<tr>" + "".join(f"<{kind}>{escape(cell_text(value))}</{kind}>" for value in row.values()) + "</tr>"
        )
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def html_matrix(matrix: Mapping[str, Any], title: str) -> str:
    """A confusion matrix under its title, the cells the darker the more there is in them."""
    lines = ["<tr><th></th>" + "".join(f"<th>{escape(name)}</th>" for name in matrix["columns"]) + "</tr>"]
    for name, shares in zip(matrix["rows"], matrix["shares"], strict=True):
        cells = (f'<td style="background: rgba(var(--mark), {value * 0.6:.2f})">{value:.2f}</td>' for value in shares)
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return f'<div class="wide"><h3>{escape(title)}</h3><table>{"".join(lines)}</table></div>'


def html_strip(scored: Sequence[Scored], encoder: str, folder: Path) -> str:
    """Thumbnails with prompt and identity as title, those beside the report as links to their files."""
    by_view = {one.view: one for one in scored}
    links = []
    for view in evenly_chosen(list(by_view), MOST):
        one = by_view[view]
        told = f"{view.prompt or view.path.name} · {one.identity(encoder):.2f}"
        path = view.path.resolve()
        beside = path.is_relative_to(folder.resolve())
        where = f' href="{escape(quote(path.relative_to(folder.resolve()).as_posix()))}"' if beside else ""
        mark = ' class="wrong"' if one.right(encoder) == 0 else ""
        image = f'<img src="{data_url(view)}" alt="{escape(told)}" title="{escape(told)}">'
        links.append(f"<a{where}{mark}>{image}</a>")
    return f'<div class="strip">{"".join(links)}</div>'


def data_url(view: View) -> str:
    """A small copy of what is seen: PNG where it is small already, else JPEG."""
    image = view.open()
    held, kind = io.BytesIO(), "png" if max(image.size) <= THUMBNAIL else "jpeg"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(held, format=kind, **({} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}"
