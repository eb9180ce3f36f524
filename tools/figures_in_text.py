"""Put the figures of the records into README.md and the docs, between marks that say which.

python -m tools.figures_in_text

A mark is ``<!-- figure: NAME -->…<!-- end -->``; what is between is written again from docs/evidence/*.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "evidence"
PAGES = ("README.md", "docs/fusing.md")
MARK = re.compile(r"<!-- figure: (?P<name>[a-z-]+) -->(?P<text>.*?)<!-- end -->", re.DOTALL)
SIZES = (2, 4, 8)
FAMILY = "spectral, own slots"


def record(study: str) -> Mapping[str, Any]:
    """A study's record."""
    found: Mapping[str, Any] = json.loads((RECORDS / f"{study}.json").read_text(encoding="utf-8"))
    return found


def tables(study: str) -> Sequence[Sequence[Mapping[str, Any]]]:
    """The tables of a study's record."""
    return list(record(study)["tables"].values())


def mean(text: Any) -> str:
    """A figure without its interval."""
    return str(text).split()[0]


def kept(merge: str) -> list[str]:
    """The share of the identity alone that own slots keep by a merge, for every number of concepts."""
    found = {
        row["K"]: row["of alone"] for row in tables("fusion")[0] if (row["family"], row["merge"]) == (FAMILY, merge)
    }
    return [mean(found.get(size, "—")) for size in SIZES]


def merges_table() -> str:
    """README's table of merges."""
    found = [r for r in tables("recipes")[0] if r["K"] == 8 and "U-Net" in r["kind"]]
    if not found:
        raise SystemExit("The record of recipes has no U-Net distilled for eight concepts, which README's table shows.")
    distilled = found[0]
    minutes = {10: "ten"}.get(round(distilled["seconds"] / 60), str(round(distilled["seconds"] / 60)))
    other = "" if record("recipes")["base"] == record("fusion")["base"] else "; measured on an earlier pocket base"
    rows = [
        ("`spectral` (default: the sum)", kept("sum"), "exact, instant, exports as one LoRA"),
        ("`ties`", kept("ties"), "instant"),
        ("`gradient`", kept("gradient, prior term"), "uses the layers' activations; seconds to minutes"),
        (
            "`gradient`, then distilled",
            ["", "", mean(distilled["of alone"])],
            f"{minutes} minutes of one core; other prompts change little ([recipes](docs/evidence/recipes.md)){other}",
        ),
    ]
    head = ["| `fuse --merge` | 2 concepts | 4 | 8 | |", "| --- | ---: | ---: | ---: | --- |"]
    lines = [f"| {name} | {' | '.join(shares)} | {more} |" for name, shares, more in rows]
    return "\n" + "\n".join([*head, *(re.sub(r" {2,}", " ", line) for line in lines)]) + "\n"


def bound_to_regions() -> str:
    """The share of regions that hold the right one of two look-alikes."""
    [row] = [r for r in tables("scenes")[0] if list(r.values())[:2] == ["2", "bound to regions"]]
    return mean(row["right concept"])


def two_and_four(merge: str) -> str:
    """A merge's shares for two and for four concepts, in a sentence."""
    return " and ".join(kept(merge)[:2])


FIGURES: dict[str, Callable[[], str]] = {
    "merges": merges_table,
    "bound-to-regions": bound_to_regions,
    "ties": lambda: two_and_four("ties"),
    "sum": lambda: two_and_four("sum"),
}


def filled(text: str) -> str:
    """A page with its figures written again."""
    return MARK.sub(lambda mark: f"<!-- figure: {mark['name']} -->{FIGURES[mark['name']]()}<!-- end -->", text)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
