"""Some measured cells again on another machine: how far do figures move with the processor and the threads?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import parse_json, read_text, write_json, write_text
from ..core.machine import machine_identity, made_on, record_provenance
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
    # Figures of this machine alone: neither those of the record nor those that the cache has of its making.
    lab = replace(lab, known={}, used={}, folder=lab.folder / "repeated" / machine_identity())
    machine, recorded = made_on(record_provenance()), recorded_on(folder)
    rows = _earlier(folder / f"{NAME}.json")
    rows = [row for row in rows if row["machine"] != machine]
    for name, cell in cells_to_repeat(folder, lab, count).items():
        key, there = cell["key"], cell["figures"]
        here = lab.alone(key["concept"], **key["change"])
        made = cell.get("made")
        change = {k: v for k, v in key["change"].items() if not k.endswith("learning_rate")}
        rows.append(
            {
                "cell": name,
                "concept": key["concept"],
                "change": json.dumps(change, sort_keys=True),
                "recorded on": made_on(made) if made else recorded,
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
    sentences = []
    for where, chosen in (
        ("on other machines", [row for row in rows if row["machine"] not in row["recorded on"]]),
        ("on a machine of the record", [row for row in rows if row["machine"] in row["recorded on"]]),
    ):
        if gaps := [abs(float(row["difference"])) for row in chosen]:
            count = len({row["machine"] for row in chosen})
            sentences.append(
                f"{len(gaps)} trainings measured again {where} ({count}): the identity differs by "
                f"{sum(gaps) / len(gaps):.3f} on average and by {max(gaps):.3f} at most."
            )
    return " ".join(sentences)


def recorded_on(folder: Path) -> str:
    """The machines that the records of a folder are of, as far as they say."""
    found = set()
    for path in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            if path.stem != NAME:
                found.add(made_on(dict(parse_json(read_text(path))["provenance"])))
    return "; ".join(sorted(found - {""})) or "unknown"


def _without(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != column}


def _earlier(path: Path) -> list[dict[str, Any]]:
    try:
        return [dict(row) for row in parse_json(read_text(path))["rows"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []
