"""Which columns are worth tuning? Top, bottom or random ones, LoRA and Orthogonal: identity over training steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..metrics.statistics import difference_text, mean_text
from .charts import WANTED, curves
from .registry import Findings, Row, Table, not_allowed, study
from .runner import RATES, SEEDS, TEST_CONCEPTS, NotMeasured, StudyRunner, best_rate, scaled, seeded
from .speed import PLAIN, STEPS

NAMES = (TEST_CONCEPTS[0], TEST_CONCEPTS[2], TEST_CONCEPTS[6])
CHANGES: dict[str, dict[str, Any]] = {
    "top": {"method": "spectral-additive", "slot": "0:8"},
    "bottom": {"method": "spectral-additive", "slot": "bottom"},
    "random": {"method": "spectral-additive", "slot": "random"},
    "lora": {"method": "lora"},
    "orthogonal": {"method": "orthogonal", "slot": "0:8"},
}


def column_change(name: str, seed: int) -> dict[str, Any]:
    """The settings of these columns; random ones are sampled with the seed."""
    change = {**CHANGES[name], **PLAIN}
    if change.get("slot") == "random":
        change["slot_seed"] = seed
    return seeded(change, seed)


@study(
    "top-bottom",
    "Figs. 9 right, 10, 11",
    "Tuning the top columns learns a concept sooner and better than tuning bottom or random ones, LoRA or Orthogonal.",
    (35, 0.1),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Gain in identity over the untouched base, by steps, for all columns; the rate is chosen on another concept."""
    steps, names, seeds = ((2, 4), NAMES[:1], (0,)) if quick else (STEPS, NAMES, SEEDS)
    chosen = ("top", "bottom", "lora") if quick else tuple(CHANGES)
    rates: dict[str, float] = {}
    sweeps: list[Row] = []
    late: dict[str, list[str]] = {}
    gains: dict[tuple[str, int], list[float]] = {}
    trained: dict[str, int] = {}
    for seed, columns in itertools.product(seeds, chosen):
        new: dict[int, list[float]] = {}
        try:
            if columns not in rates:
                rates[columns], trials = (1.0, []) if quick else sweep(lab, columns)
                sweeps += [{"columns": columns, **trial} for trial in trials]
            for name, length in itertools.product(names, steps):
                change = {**column_change(columns, seed), **scaled(lab, rates[columns]), "steps": length}
                measured = lab.alone(name, **change)
                trained[columns] = measured["trained"]
                new.setdefault(length, []).append(measured["identity"] - lab.noun_baseline(name, seed)["identity"])
        except NotMeasured:
            late.setdefault(f"seed {seed}", []).append(columns)
            continue
        for length, values in new.items():
            gains.setdefault((columns, length), []).extend(values)
        lab.note(
            f"{columns}, seed {seed}: gains {', '.join(mean_text(v, names) for v in new.values())} at {steps} steps"
        )
    rows: list[Row] = [
        {
            "columns": columns,
            "trained": trained[columns],
            "pairs": len(gains[columns, steps[-1]]),
            **{f"gain at {s}": mean_text(gains[columns, s], names) for s in steps},
            **{f"minus top at {s}": gains_against_top(gains, columns, s, names) for s in (steps[0], steps[-1])},
        }
        for columns in chosen
        if (columns, steps[-1]) in gains
    ]
    tables = [Table("Gain in identity over the untouched base, over concepts and seeds", rows)]
    if sweeps:
        title = "The sweep of the learning rate: three concepts that are not reported, two seeds, 120 steps"
        tables.append(Table(title, sweeps))
    lines = {
        columns: [(s, sum(gains[columns, s]) / len(gains[columns, s])) for s in steps]
        for columns in chosen
        if (columns, steps[-1]) in gains
    }
    picture = curves(lines, "training step", "gain in identity")
    missing = not_allowed(late, len(chosen)) + ([] if picture else [WANTED])
    return Findings(tables, verdict(gains, steps), {"curves": picture} if picture else {}, missing)


def sweep(lab: StudyRunner, columns: str) -> tuple[float, list[dict[str, Any]]]:
    """The best factor on the learning rates and its trials."""
    rate, trials = best_rate(lab, RATES, **column_change(columns, 0), steps=120)
    return rate, [{"rate": trial["rate"], "identity": trial["identity"]} for trial in trials]


def gains_against_top(
    gains: Mapping[tuple[str, int], Sequence[float]], columns: str, steps: int, names: Sequence[str]
) -> str | None:
    """A gain minus that of the top columns, paired by concept and seed."""
    own, top = gains[columns, steps], gains.get(("top", steps), [])
    return difference_text(own, top, names) if columns != "top" and len(own) == len(top) else None


def verdict(gains: dict[tuple[str, int], list[float]], steps: Sequence[int]) -> str:
    """The order of the columns early and at the end."""

    def order(at: int) -> str:
        means = {columns: sum(values) / len(values) for (columns, length), values in gains.items() if length == at}
        return ", ".join(f"{columns} {mean:.2f}" for columns, mean in sorted(means.items(), key=lambda item: -item[1]))

    early, late = steps[0], steps[-1]
    return f"Gain in identity after {early} steps: {order(early)}; after {late}: {order(late)}."
