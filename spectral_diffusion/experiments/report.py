"""Write what a study found: JSON for machines, a Markdown page for people, its pictures beside them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..evaluation.tables import markdown
from ..files import atomic, write_json, write_text
from ..formats.native import versions
from .lab import Lab
from .registry import Findings, Study


def page(study: Study, findings: Findings, lab: Lab, quick: bool) -> str:
    """The study's page."""
    parts = [
        f"# {study.name}",
        f"**The paper ({study.paper}):** {study.claim}",
        f"**We see:** {findings.verdict}",
    ]
    if findings.missing:
        parts.append(f"**Not measured yet:** {'; '.join(findings.missing)}.")
    for table in findings.tables:
        parts += [f"## {table.title}", markdown(table.rows)]
    parts += [f"![{name}]({study.name}-{name}.png)" for name in findings.pictures]
    how = f"spectral-diffusion experiment {study.name} --base {lab.base_name}" + (" --quick" if quick else "")
    parts.append(f"Made by `{how}`." + (" The quick form shows that it runs; it proves nothing." if quick else ""))
    return "\n\n".join(parts) + "\n"


def write_findings(study: Study, findings: Findings, lab: Lab, folder: Path, quick: bool) -> Path:
    """Write ``NAME.json``, ``NAME.md`` and pictures into a folder; returns the page."""
    for name, picture in findings.pictures.items():
        with atomic(folder / f"{study.name}-{name}.png") as temporary:
            small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)  # a third of the bytes
            small.save(temporary, format="PNG", optimize=True)
    tables = {table.title: [dict(row) for row in table.rows] for table in findings.tables}
    found = {
        "study": study.name,
        "quick": quick,
        "base": lab.fingerprint,
        "recipe": lab.recipe,
        "versions": versions(),
        "verdict": findings.verdict,
        "missing": list(findings.missing),
        "tables": tables,
    }
    write_json(folder / f"{study.name}.json", found)
    path = folder / f"{study.name}.md"
    write_text(path, page(study, findings, lab, quick))
    return path
