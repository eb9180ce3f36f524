"""Results of entries as files, and the page that compares them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.errors import UserError
from ..core.files import atomic, parse_json, read_text, write_json, write_text
from ..core.machine import made_on, record_provenance
from ..core.paths import without_folders
from ..evaluation.tables import markdown
from .entry import BoardEntry
from .measure import row_of
from .suite import BoardSuite

RESULTS = "results"


def result_file(folder: Path, entry: BoardEntry) -> Path:
    """Where an entry's results are."""
    return folder / RESULTS / f"{entry.slug}.json"


def read_result(path: Path) -> dict[str, Any]:
    """An entry's results.

    Raises:
        UserError: the file is not one.
    """
    try:
        result = parse_json(read_text(path))
        rows = {str(int(count)): row_of(figures) for count, figures in result["figures"].items()}
        return {
            **result,
            "entry": dict(result["entry"]),
            "suite": str(result["suite"]),
            "rows": rows,
            "file": path.stem,
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no result of a board; make it again with board run.") from error


def write_result(
    folder: Path, entry: BoardEntry, suite: BoardSuite, figures: Mapping[int, Any], sheet: Path | None
) -> Path:
    """Write an entry's results, beside those for other numbers of concepts that are there already."""
    path = result_file(folder, entry)
    before: dict[str, Any] = {}
    about = without_folders(entry.model_dump(mode="json", exclude_defaults=True))
    if path.is_file():
        result = read_result(path)
        if result["entry"] == about and result["suite"] == suite.name:
            before = result["figures"]
    every = {**before, **{str(count): found for count, found in figures.items()}}
    ordered = {count: every[count] for count in sorted(every, key=int)}
    write_json(path, {"entry": about, "suite": suite.name, "provenance": record_provenance(), "figures": ordered})
    if sheet is not None and sheet.is_file():
        with Image.open(sheet) as picture, atomic(path.with_suffix(".png")) as temporary:
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(temporary, format="PNG", optimize=True)
    return path


def write_page(folder: Path, suite: BoardSuite) -> Path:
    """``README.md`` of a folder of results: a table per number of concepts, the best first, and every sheet."""
    found = [read_result(path) for path in sorted((folder / RESULTS).glob("*.json"))]
    found = [result for result in found if result["suite"] == suite.name]
    if not found:
        raise UserError(f"{folder / RESULTS} has no results of the suite {suite.name}; make some with board run.")
    lines = [f"# Board: {suite.name}", "", explanation(suite), ""]
    for count in sorted({int(count) for result in found for count in result["rows"]}):
        rows = [
            {"entry": result["entry"]["name"], **result["rows"][str(count)]}
            for result in found
            if str(count) in result["rows"]
        ]
        rows.sort(key=lambda row: -float(str(row["identity"]).split()[0]))
        shown = [{key: value for key, value in row.items() if key != "concepts"} for row in rows]
        lines += [f"## {count} concepts", "", markdown(shown), ""]
    lines += ["## Entries", ""]
    for result in found:
        entry = result["entry"]
        who = " ".join(part for part in (entry.get("author", ""), entry.get("url", "")) if part)
        lines.append(f"- **{entry['name']}**{f' ({who})' if who else ''}: {described(entry)}")
        lines += [f"  {entry['notes']}"] if entry.get("notes") else []
    lines += ["", "## Pictures", ""]
    for result in found:
        name = str(result["file"])
        if (folder / RESULTS / f"{name}.png").is_file():
            lines += [f"**{result['entry']['name']}**", "", f"![{result['entry']['name']}]({RESULTS}/{name}.png)", ""]
    machines = sorted({made_on(result["provenance"]) for result in found})
    lines += ["", f"Made on {'; '.join(machines)}."]
    path = folder / "README.md"
    write_text(path, "\n".join(lines).replace("\n\n\n", "\n\n") + "\n")
    return path


def explanation(suite: BoardSuite) -> str:
    """What is measured, in a paragraph."""
    return (
        f"N concepts are the first N of {', '.join(suite.concepts)}. Identity is the mean cosine of "
        f"{len(suite.prompts)} pictures of each with its photos, by the encoder {suite.encoder}; kept is its share of "
        "the identity alone, and single minus merged the difference. Drift of others is 1 − cosine of "
        f"{len(suite.generic)} pictures without a concept before and after. Right concept: the share of pictures that "
        "are nearest to their own of the N. Collapse: of two neighbours in one picture, without regions, the share of "
        "subjects that are not themselves (Subject Collapse Rate, arXiv 2603.26078), and what became of them in "
        "MultiBind's words (arXiv 2603.21937). Intervals: 95 %, bootstrap over concepts, over pairs for collapse."
    )


def described(entry: Mapping[str, Any]) -> str:
    """Where an entry's results come from, in words."""
    if "command" in entry:
        return f"`{' '.join(entry['command'])}`"
    source = f"trained here ({json.dumps(entry['train'])})" if "train" in entry else "files"
    if entry.get("joint"):
        return f"{source}, jointly"
    if "fused" in entry:
        return "merged elsewhere"
    merge = entry.get("merge", "spectral")
    more = {key: entry[key] for key in ("options", "calibration", "distill", "scale", "mean") if key in entry}
    return f"{source}, merged by {merge}{f' {json.dumps(more)}' if more else ''}"
