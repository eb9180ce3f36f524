"""Results of entries as files, and the page that compares them."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.errors import UserError
from ..core.files import atomic, parse_json, read_text, write_json, write_text
from ..core.machine import made_on, record_provenance
from ..core.names import slug
from ..core.outputs import refuse_overwriting_page
from ..core.paths import without_folders
from ..evaluation.tables import markdown
from ..metrics.statistics import leading
from ..studies.runner import cell_key
from .entry import BoardEntry
from .measure import ABOUT, row_of
from .suite import BoardSuite

RESULTS = "results"
PAGE = "README.md"
TITLE = "# Board: "  # of every page, by which an earlier one is known


def result_file(folder: Path, entry: BoardEntry, suite: BoardSuite) -> Path:
    """Where an entry's results on a suite are."""
    return folder / RESULTS / f"{slug(suite.name).lower()}-{entry.slug}.json"


def read_result(path: Path) -> dict[str, Any]:
    """An entry's results, with the page's rows by number of concepts.

    Raises:
        UserError: the file is not one.
    """
    try:
        result = parse_json(read_text(path))
        counts = {int(count): dict(found) for count, found in result["counts"].items()}
        return {
            "entry": {**dict(result["entry"]), "name": str(result["entry"]["name"])},
            "suite": str(result["suite"]),
            "counts": counts,
            "rows": {count: row_of(found["figures"]) for count, found in counts.items()},
            "machines": {made_on(dict(found["provenance"])) for found in counts.values()},
            "sheet": int(result["sheet"]),
            "file": path.stem,
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no result of a board; make it again with board run.") from error


def earlier_counts(path: Path, entry: BoardEntry) -> dict[int, Any]:
    """What an entry's file has already, by number of concepts.

    Raises:
        UserError: it has the results of an entry of another name.
    """
    if not path.is_file():
        return {}
    earlier = read_result(path)
    if earlier["entry"]["name"] != entry.name:
        raise UserError(f"{path} has the results of '{earlier['entry']['name']}'; give '{entry.name}' another name.")
    return dict(earlier["counts"])


def write_result(
    folder: Path,
    entry: BoardEntry,
    suite: BoardSuite,
    count: int,
    found: Mapping[str, Any],
    sheet: Path,
    files: Callable[[int], str],
) -> tuple[Path, list[int]]:
    """Write an entry's figures for a number of concepts beside those for other numbers, and the sheet of the largest.

    Args:
        found: ``figures``, the ``key`` that says on what tasks and of what entry they are, and ``tasks``, a hash of the
            former alone.
        files: a hash of what the entry's files are now, by number of concepts.

    Returns:
        The file, and the numbers whose earlier figures were of other tasks, files or another entry and are left out.

    Raises:
        UserError: the file has the results of an entry of another name.
    """
    path = result_file(folder, entry, suite)
    before = earlier_counts(path, entry)

    def same_files(number: int, old: Mapping[str, Any]) -> bool:
        with suppress(UserError):  # what is gone cannot be compared
            return bool(old.get("files") == files(number))
        return True

    kept = {n: old for n, old in before.items() if n != count and old.get("key") == found["key"] and same_files(n, old)}
    dropped = sorted(before.keys() - kept.keys() - {count})
    counts = {**kept, count: {**found, "files": files(count), "provenance": record_provenance()}}
    shown = max(counts)
    ordered = {str(n): counts[n] for n in sorted(counts)}
    write_json(path, {"entry": entry.shared(), "suite": suite.name, "counts": ordered, "sheet": shown})
    if count == shown and sheet.is_file():
        with Image.open(sheet) as picture, atomic(path.with_suffix(".png")) as temporary:
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(temporary, format="PNG", optimize=True)
    return path, dropped


def key_of(entry: BoardEntry, suite: BoardSuite, given: str) -> str:
    """A hash of what all figures of an entry on a suite have in common; ``given`` is that of base and photos."""
    tasks = suite.model_dump(mode="json", exclude={"hours", "counts", "folder", "base"})
    return cell_key([entry.model_dump(mode="json", exclude=ABOUT), tasks, given])


def tasks_key(suite: BoardSuite, given: str) -> str:
    """A hash of a suite's tasks, whatever the entry; ``given`` is that of base and photos."""
    return cell_key([suite.model_dump(mode="json", exclude={"hours", "counts", "folder", "base"}), given])


def comparable(found: Sequence[dict[str, Any]], tasks: str = "") -> tuple[list[dict[str, Any]], list[str]]:
    """The results on these tasks (default: those that most are on), and the names of entries with results on others."""
    count = Counter(str(of.get("tasks")) for result in found for of in result["counts"].values())
    chosen, others = tasks or count.most_common(1)[0][0], []
    kept = []
    for result in found:
        own = {n: of for n, of in result["counts"].items() if str(of.get("tasks")) == chosen}
        others += [result["entry"]["name"]] if len(own) < len(result["counts"]) else []
        if own:
            kept.append({**result, "rows": {n: row for n, row in result["rows"].items() if n in own}})
    return kept, others


def safe(text: object) -> str:
    """A text that somebody sent, for a page: no tags, no columns of its own."""
    return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")


def check_page(folder: Path) -> None:
    """Refuse a folder whose page a person wrote; call before measuring.

    Raises:
        UserError: it is one.
    """
    refuse_overwriting_page(folder / PAGE, TITLE)


def write_page(folder: Path, suite: BoardSuite, tasks: str = "") -> Path:
    """``README.md`` of a folder of results: a table per number of concepts, the best first, and every sheet.

    Args:
        tasks: the hash of the tasks whose results are shown; default: that of most results.

    Raises:
        UserError: there are none.
    """
    own = f"{slug(suite.name).lower()}-"
    found = [read_result(path) for path in sorted((folder / RESULTS).glob(f"{own}*.json"))]
    found = [result for result in found if result["suite"] == suite.name]
    if not found:
        raise UserError(f"{folder / RESULTS} has no results of the suite {suite.name}; make some with board run.")
    found, others = comparable(found, tasks)
    lines = [f"{TITLE}{suite.name}", "", explanation(suite), ""]
    if others:
        lines += [f"Left out, as measured on another base, photos or settings: {', '.join(map(safe, others))}.", ""]
    for count in sorted({count for result in found for count in result["rows"]}):
        rows = [
            {"entry": safe(result["entry"]["name"]), **result["rows"][count]}
            for result in found
            if count in result["rows"]
        ]
        rows.sort(key=lambda row: -leading(row["identity"]))
        shown = [{key: value for key, value in row.items() if key != "concepts"} for row in rows]
        lines += [f"## {count} concepts", "", markdown(shown), ""]
    lines += ["## Entries", ""]
    for result in found:
        entry = result["entry"]
        who = " ".join(safe(part) for part in (entry.get("author", ""), entry.get("url", "")) if part)
        lines.append(f"- **{safe(entry['name'])}**{f' ({who})' if who else ''}: {safe(described(entry))}")
        lines += [f"  {safe(entry['notes'])}"] if entry.get("notes") else []
    lines += ["", "## Pictures", ""]
    for result in found:
        if (folder / RESULTS / f"{result['file']}.png").is_file():
            name = safe(result["entry"]["name"])
            lines += [f"**{name}**, {result['sheet']} concepts", "", f"![{name}]({RESULTS}/{result['file']}.png)", ""]
    lines += ["", f"Made on {safe('; '.join(sorted(set().union(*(result['machines'] for result in found)))))}."]
    path = folder / PAGE
    check_page(folder)
    write_text(path, "\n".join(lines).replace("\n\n\n", "\n\n") + "\n")
    return path


def explanation(suite: BoardSuite) -> str:
    """What is measured, in a paragraph."""
    encoder = without_folders(suite.encoder)
    return (
        f"N concepts are the first N of {', '.join(suite.concepts)}. Identity is the mean cosine of "
        f"{len(suite.prompts)} pictures of each with its photos, by the encoder {encoder}; kept is its share of the "
        "identity alone, and single minus merged the difference. Drift of others is 1 − cosine of "
        f"{len(suite.generic)} pictures without a concept before and after. Right concept: the share of pictures that "
        "are nearest to their own of the N. Collapse: of two concepts in one picture, without regions, the share that "
        "are not themselves (Subject Collapse Rate, arXiv 2603.26078), and what became of them in MultiBind's words "
        "(arXiv 2603.21937); collapse alone is the same for pictures of each concept by its own adapter, the best that "
        "can be. In brackets: 95 % intervals, a bootstrap over concepts, over pairs for collapse; in parentheses: the "
        "range of fewer than five."
    )


def described(entry: Mapping[str, Any]) -> str:
    """Where an entry's results come from, in words."""
    if "command" in entry:
        return f"a program, {entry['command'][0]}"
    source = f"trained here ({json.dumps(entry['train'])})" if "train" in entry else "files"
    if entry.get("joint"):
        return f"{source}, jointly"
    if "fused" in entry:
        return "merged elsewhere"
    merge = entry.get("merge", "spectral")
    more = {key: entry[key] for key in ("options", "calibration", "distill", "scale", "mean") if key in entry}
    return f"{source}, merged by {merge}{f' {json.dumps(more)}' if more else ''}"
