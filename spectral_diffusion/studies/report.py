"""Write a study's findings: a page, JSON, pictures, and the record of the cells behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ..core.errors import UserError
from ..core.files import atomic, parse_json, read_text, write_json, write_text
from ..core.machine import made_on, record_provenance
from ..core.outputs import refuse_overwriting_page
from ..evaluation.tables import markdown
from .registry import Findings, Study
from .runner import Figures, StudyRunner

MADE_BY = "Made by `"  # in every page, by which an earlier one is known


def heading(study: Study) -> str:
    """Whose the claim is: the paper's by its figure, or another one."""
    return "The claim" if study.paper.startswith("none") else f"The paper ({study.paper})"


def page(study: Study, findings: Findings, quick: bool, title: str, how: str) -> str:
    """The study's page; the names of its pictures begin with ``title``."""
    parts = [
        f"# {study.name}",
        f"**{heading(study)}:** {study.claim}",
        f"**We see:** {findings.verdict}",
    ]
    if findings.missing:
        parts.append(f"**Not measured yet:** {'; '.join(findings.missing)}.")
    if findings.notes:
        parts.append(f"**Note:** {'; '.join(findings.notes)}.")
    for table in findings.tables:
        parts += [f"## {table.title}", markdown(table.rows)]
    parts += [f"![{name}]({title}-{name}.png)" for name in findings.pictures]
    parts.append(f"{MADE_BY}{how}`." + (" The quick form shows that it runs; it proves nothing." if quick else ""))
    return "\n\n".join(parts) + "\n"


def record_path(folder: Path, study: str) -> Path:
    """The record of a page's cells, beside the page."""
    return folder / f"{study}-cells.json"


def read_record(path: Path) -> dict[str, Figures]:
    """The cells of one record by name; empty without a record.

    Raises:
        UserError: it cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        cells = parse_json(read_text(path))
        return {
            name: {part: cell[part] for part in ("of", "key", "figures")}
            | ({"made": cell["made"]} if "made" in cell else {})
            for name, cell in cells.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a record of measured cells; remove it to measure them again.") from error


def read_records(folder: Path) -> dict[str, Figures]:
    """Every cell behind the pages in a folder, so that it need not be measured again.

    Raises:
        UserError: a record cannot be read.
    """
    return {name: cell for path in sorted(folder.glob("*-cells.json")) for name, cell in read_record(path).items()}


def write_record(path: Path, used: Mapping[str, Figures], whole: bool) -> None:
    """Write the cells of a page, one per line, sorted by name.

    Earlier cells stay if they are of another base, settings or encoder, or if this run is not the ``whole`` study.
    """
    now = {cell["of"] for cell in used.values()} if whole else set()
    cells = {name: cell for name, cell in read_record(path).items() if cell["of"] not in now} | dict(used)
    lines = (f"{json.dumps(name)}: {json.dumps(cells[name], ensure_ascii=False)}" for name in sorted(cells))
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def measured_on(used: Mapping[str, Figures]) -> list[str]:
    """Where, when and at which commit the cells of a page were measured, as far as they say."""
    made = [cell["made"] for cell in used.values() if "made" in cell]
    return sorted({", ".join(filter(None, (made_on(one), one.get("date"), one.get("commit")))) for one in made})


def page_name(study: Study, findings: Findings, folder: Path, quick: bool) -> str:
    """A page's name: ``NAME``, unless it would replace a more complete page.

    A quick page is ``NAME-quick``, and an unfinished one ``NAME-unfinished`` where a page with less missing exists.
    """
    if quick:
        return f"{study.name}-quick"
    try:
        before = json.loads((folder / f"{study.name}.json").read_text(encoding="utf-8"))
        missing, was_quick = len(before.get("missing", ())), bool(before.get("quick"))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # no readable page
        return study.name
    more = not was_quick and missing < len(findings.missing)
    return f"{study.name}-unfinished" if more else study.name


def check_page(study: Study, folder: Path, quick: bool) -> None:
    """Refuse a folder in which a study's page would replace one that a person wrote; call before measuring.

    Raises:
        UserError: so it would.
    """
    for title in (f"{study.name}-quick",) if quick else (study.name, f"{study.name}-unfinished"):
        refuse_overwriting_page(folder / f"{title}.md", MADE_BY)


def write_findings(study: Study, findings: Findings, lab: StudyRunner, folder: Path, quick: bool, how: str) -> Path:
    """Write ``NAME.json``, ``NAME.md``, pictures and the record of cells into a folder; returns the page.

    :func:`page_name` chooses the name. An unfinished page's cells are added to the finished page's record.

    Args:
        how: the command that makes the page.
    """
    findings = replace(findings, notes=[*findings.notes, *dict.fromkeys(lab.edges)])
    title = page_name(study, findings, folder, quick)
    for name, picture in findings.pictures.items():
        with atomic(folder / f"{title}-{name}.png") as temporary:
            small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)  # a third of the bytes
            small.save(temporary, format="PNG", optimize=True)
    tables = {table.title: [dict(row) for row in table.rows] for table in findings.tables}
    record = {
        "study": study.name,
        "quick": quick,
        "base": lab.fingerprint,
        "recipe": lab.settings,
        "provenance": record_provenance(),
        "measured": measured_on(lab.used),
        "verdict": findings.verdict,
        "missing": list(findings.missing),
        "notes": list(findings.notes),
        "tables": tables,
    }
    write_json(folder / f"{title}.json", record)
    if lab.used:
        write_record(record_path(folder, title if quick else study.name), lab.used, whole=not findings.missing)
    path = folder / f"{title}.md"
    write_text(path, page(study, findings, quick, title, how))
    return path
