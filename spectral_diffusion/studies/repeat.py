"""Some measured cells again on another machine: how far do figures move with the processor and the threads?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import parse_json, read_text, write_json, write_text
from ..core.machine import made_on, record_provenance
from ..evaluation.tables import markdown
from .report import read_record
from .runner import Figures, StudyRunner, cell_key

NAME = "machines"  # of the page and of its record
KIND = "alone-"  # cells of one training and its pictures


def cells_to_repeat(folder: Path, lab: StudyRunner, count: int) -> dict[str, Figures]:
    """Cells of single adapters in the records of a folder, of this base and these settings, evenly spread by name.

    Raises:
        UserError: there are none.
    """
    own = cell_key(lab.terms)
    found = {
        name: cell
        for path in sorted(folder.glob("*-cells.json"))
        for name, cell in read_record(path).items()
        if name.startswith(KIND) and cell["of"] == own and not _names_files(cell["key"])
    }
    if not found:
        raise UserError(f"{folder} has no records of single adapters for this base and these settings.")
    names = sorted(found)
    chosen = [names[index * len(names) // min(count, len(names))] for index in range(min(count, len(names)))]
    return {name: found[name] for name in chosen}


def _names_files(key: Mapping[str, Any]) -> bool:
    """Whether a cell was trained on top of other adapters, which a record does not hold."""
    change = key["change"]
    return bool(change.get("init_from_adapter") or change.get("interference", {}).get("earlier_adapters"))


def repeat(folder: Path, lab: StudyRunner, count: int) -> Path:
    """Measure cells anew, add them to the record of machines, and write the page with the spread."""
    lab = replace(lab, known={}, used={})
    machine = made_on(record_provenance())
    rows = _earlier(folder / f"{NAME}.json")
    rows = [row for row in rows if row["machine"] != machine]
    for name, cell in cells_to_repeat(folder, lab, count).items():
        key, there = cell["key"], cell["figures"]
        here = lab.alone(key["concept"], **key["change"])
        change = {k: v for k, v in key["change"].items() if not k.endswith("learning_rate")}
        rows.append(
            {
                "cell": name,
                "concept": key["concept"],
                "change": json.dumps(change, sort_keys=True),
                "machine": machine,
                "identity in the record": there["identity"],
                "identity here": here["identity"],
                "difference": here["identity"] - there["identity"],
            }
        )
        lab.note(f"{key['concept']}, {change}: {here['identity']:.4f} here, {there['identity']:.4f} in the record")
    write_json(folder / f"{NAME}.json", {"provenance": record_provenance(), "rows": rows})
    path = folder / f"{NAME}.md"
    write_text(path, f"# {NAME}\n\n{spread(rows)}\n\n{markdown([_without(row, 'cell') for row in rows])}\n")
    return path


def spread(rows: Sequence[Mapping[str, Any]]) -> str:
    """The spread between machines in a sentence."""
    gaps = [abs(float(row["difference"])) for row in rows]
    machines = len({row["machine"] for row in rows})
    return (
        f"{len(rows)} trainings measured again on {machines} other machine{'s' if machines > 1 else ''}: the identity "
        f"differs by {sum(gaps) / len(gaps):.3f} on average and by {max(gaps):.3f} at most."
    )


def _without(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != column}


def _earlier(path: Path) -> list[dict[str, Any]]:
    try:
        return [dict(row) for row in parse_json(read_text(path))["rows"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []
