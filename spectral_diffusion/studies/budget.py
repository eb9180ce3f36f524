"""How few numbers does each method need? Identity over trained numbers; a dash where a budget is out of reach."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.apply import put_adapters
from ..core.errors import UserError
from ..data.image_grid import labelled_grid, write
from ..methods import get_method
from ..metrics.statistics import leading, mean_text
from ..training.slot_choice import with_rank
from .charts import WANTED, curves
from .registry import Findings, Row, Table, not_allowed, study
from .runner import SEEDS, TEST_CONCEPTS, NotMeasured, StudyRunner, scaled, seeded
from .speed import METHODS, PLAIN, swept

# Those that the paper compares, and its nearest relatives.
COMPARED = (
    "spectral-additive", "spectral-rotation", "lora", "dora", "adalora", "orthogonal", "oft", "svdiff", "lidb", "vera",
)  # fmt: skip
BUDGETS = (500, 2_000, 6_000, 20_000, 60_000, 200_000)  # half a decade apart
NAMES = (TEST_CONCEPTS[0], TEST_CONCEPTS[2])
SIDE = 48  # of a picture in the grid


def change_within(
    lab: StudyRunner, method: str, budget: int, shapes: Sequence[tuple[int, int]]
) -> dict[str, Any] | None:
    """The method's settings at the largest rank within a budget; None where even the smallest exceeds it."""
    config = lab.train_config(NAMES[0], {"method": method, "param_budget": budget}, Path("adapter.safetensors"))
    try:
        rank = with_rank(config, shapes).rank
    except UserError:
        return None
    change: dict[str, Any] = {"method": method, "rank": rank, **PLAIN}
    if not get_method(method).slot:
        return change
    return {**change, "slot": "bottom" if METHODS[method].get("slot") == "bottom" else f"0:{rank}"}


def smallest(method: str, shapes: Sequence[tuple[int, int]]) -> int:
    """The fewest numbers that the method can train in these weights."""
    spectral_method = get_method(method)
    return min(spectral_method.total(shapes, rank) for rank in spectral_method.ranks(shapes))


@study(
    "budget",
    "Figs. 6, 14, 15, Table 3",
    "The rotation reaches an identity with far fewer trained numbers than any other method, in finer steps.",
    (80, 0.1),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Gain in identity over the untouched base, for every method and budget, with the rate that ``speed`` chose."""
    methods = ("spectral-rotation", "lora") if quick else COMPARED
    budgets, names, seeds = ((2_000, 20_000), NAMES[:1], (0,)) if quick else (BUDGETS, NAMES, SEEDS)
    shapes = lab.sides
    changes = {(m, b): change_within(lab, m, b, shapes) for m in methods for b in budgets}
    found_gains: dict[tuple[str, int], dict[int, list[float]]] = {}  # by seed
    trained: dict[tuple[str, int], int] = {}
    late: dict[str, list[str]] = {}
    for seed, name, budget, method in itertools.product(seeds, names, budgets, methods):
        change = changes[method, budget]
        if change is None:
            continue
        try:
            rate = get_method(method).lr_scale if quick else swept(lab, method)[0]
            measured = lab.alone(name, **seeded(change, seed), **scaled(lab, rate))
            gain = measured["identity"] - lab.noun_baseline(name, seed)["identity"]
        except NotMeasured:
            late.setdefault(f"{name} at seed {seed}", []).append(f"{method} within {budget:,}")
            continue
        found_gains.setdefault((method, budget), {}).setdefault(seed, []).append(gain)
        trained[method, budget] = measured["trained"]
        lab.note(f"{name}, seed {seed}: {method} within {budget:,} trains {measured['trained']:,}: gain {gain:.2f}")
    # A seed counts when it was measured for every concept.
    whole = {at: [g for g in by_seed.values() if len(g) == len(names)] for at, by_seed in found_gains.items()}
    gains = {at: [gain for seed_gains in of_seeds for gain in seed_gains] for at, of_seeds in whole.items() if of_seeds}
    rows: list[Row] = [
        {
            "method": method,
            "seeds": min((len(of_seeds) for (m, _), of_seeds in whole.items() if m == method), default=0),
            "fewest": smallest(method, shapes),
            **{f"{b:,}": mean_text(gains[method, b], names) if (method, b) in gains else None for b in budgets},
        }
        for method in methods
    ]
    counts: list[Row] = [
        {"method": method, **{f"{b:,}": trained.get((method, b)) for b in budgets}} for method in methods
    ]
    lines = {
        method: sorted({(trained[method, b], sum(g) / len(g)) for (m, b), g in gains.items() if m == method})
        for method in methods
    }
    tables = [
        Table("Gain in identity by budget; a dash where the method cannot train so few", rows),
        Table("Numbers really trained within each budget", counts),
    ]
    missing = not_allowed(late, sum(change is not None for change in changes.values()))
    picture = curves(lines, "trained numbers", "gain in identity", log=True)
    pictures = {"curves": picture} if picture else {}
    missing += [] if picture else [WANTED]
    if not quick:
        try:
            pictures["grid"] = budget_grid(lab, methods, budgets, changes)
        except NotMeasured:
            missing.append("the grid of pictures")
    return Findings(tables, verdict(rows, budgets), pictures, missing)


def budget_grid(
    lab: StudyRunner,
    methods: Sequence[str],
    budgets: Sequence[int],
    changes: dict[tuple[str, int], dict[str, Any] | None],
) -> Image.Image:
    """One picture of the first concept by method (rows) and budget (columns); a dash where a budget is out of reach."""

    def cell(method: str, budget: int) -> Image.Image:
        change = changes[method, budget]
        if change is None:
            blank = Image.new("RGB", (SIDE, SIDE), "white")
            write(blank, (SIDE // 2, SIDE // 2 - 6), "-", SIDE)
            return blank
        adapter, _ = lab.trained(NAMES[0], **change, **scaled(lab, swept(lab, method)[0]))
        base = lab.fresh()
        put_adapters(base, [(adapter, 1.0)])
        return lab.portraits(base, adapter.token)[0].resize((SIDE, SIDE))

    rows = [[cell(method, budget) for budget in budgets] for method in methods]
    return labelled_grid(rows, methods, [f"{budget:,}" for budget in budgets])


def verdict(rows: Sequence[Row], budgets: Sequence[int]) -> str:
    """The best method within each budget, and how many methods can meet it."""
    sentences = []
    for budget in budgets:
        able = [row for row in rows if row[f"{budget:,}"]]
        if able:
            best = max(able, key=lambda row: leading(row[f"{budget:,}"]))
            sentences.append(
                f"Within {budget:,} numbers: best {best['method']}, a gain of {best[f'{budget:,}'].split()[0]}; "
                f"{len(able)} of {len(rows)} methods can."
            )
    return " ".join(sentences)
