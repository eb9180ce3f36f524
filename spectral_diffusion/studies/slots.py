"""Do disjoint slots help? Disjoint and same slots and LoRA, with equal budgets and equal sweeps."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.apply import put_adapters
from ..methods import get_method
from ..metrics.statistics import mean_text
from .fusion import NOTHING, FusionCell, adapters_of, change_for, drift_of, family_rate, measured_cells
from .registry import Findings, Row, Table, study
from .runner import SEEDS, TEST_CONCEPTS, Figures, NotMeasured, StudyRunner

FAMILIES = ("spectral, own slots", "spectral, same slot", "lora")  # sampled ones: at rank 2, in the study ``narrow``
MERGES = ("sum", "fedavg", "gradient, prior term")
# What may differ between compared families: how they change a weight, and what a sweep chooses.
FREE = {"method", "slot", "slot_seed", "learning_rate", "text_encoder_learning_rate", "output"}
TOLERANCE = 0.01  # of the trained numbers


def check_equal(
    lab: StudyRunner, changes: Mapping[str, Mapping[str, Any]], concept: str = TEST_CONCEPTS[0]
) -> dict[str, int]:
    """The trained numbers of trainings to compare; all other settings are equal.

    Seed, steps, batch and photos determine a step's data, so with these equal the data come in the same order.

    Raises:
        ValueError: two differ in another setting, or by more than a hundredth in what they train.
    """
    configs = {n: lab.train_config(concept, change, Path("adapter.safetensors")) for n, change in changes.items()}
    counts = {n: get_method(config.method).total(lab.sides, config.rank) for n, config in configs.items()}
    (first, reference), *others = ((n, config.model_dump(exclude=FREE)) for n, config in configs.items())
    for name, settings in others:
        differing = sorted(key for key in reference if reference[key] != settings[key])
        if differing:
            raise ValueError(f"'{name}' and '{first}' are not trained alike: {', '.join(differing)} differ.")
        if abs(counts[name] - counts[first]) > TOLERANCE * counts[first]:
            raise ValueError(f"'{name}' trains {counts[name]:,} numbers, '{first}' {counts[first]:,}.")
    return counts


def slot_jobs(quick: bool) -> list[FusionCell]:
    """Every family and merge, for two to eight concepts of the recipe's rank."""
    if quick:
        return [FusionCell(family, "sum", 2) for family in FAMILIES[::2]]
    return [FusionCell(family, merge, size) for size in (8, 4, 2) for family in FAMILIES for merge in MERGES]


@study(
    "slots",
    "sec. 4.2",
    "Adapters in disjoint slots of the spectrum fuse without disturbing each other.",
    (90, 0.2),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Identity alone and fused by the position of the columns, for every merge; what drift is to be compared with."""
    jobs = slot_jobs(quick)
    findings = compared(lab, jobs, quick, {job.family for job in jobs}, [jobs[0].size])
    try:
        scale = Table("What a drift is to be compared with", drift_scale(lab, quick))
    except NotMeasured:
        return replace(findings, missing=[*findings.missing, "the drift of single adapters"])
    return replace(findings, tables=[*findings.tables, scale])


def drift_scale(lab: StudyRunner, quick: bool, seed: int = 0) -> list[Row]:
    """The drift between two seeds of the untouched base, and that of single adapters.

    Raises:
        TimeOver: the time limit is reached.
    """
    names = TEST_CONCEPTS[:2] if quick else TEST_CONCEPTS

    def between_seeds() -> Figures:
        first, second = (lab.encoder.embed(lab.untouched_images(one)) for one in (seed, seed + 1))
        return {"drift": float((1 - (first * second).sum(1)).mean())}

    rows: list[Row] = [
        {
            "pictures of generic prompts": "of the untouched base, with another seed",
            "drift": mean_text([lab.cell("seed-drift", {"seed": seed}, between_seeds)["drift"]]),
        }
    ]
    for family in (FAMILIES[0], FAMILIES[-1]):
        rate, _ = family_rate(lab, family, quick)

        def of_each(family: str = family, rate: float = rate) -> Figures:
            drifts = {}
            for adapter, _ in adapters_of(lab, family, rate, names, seed):
                base = lab.fresh()
                put_adapters(base, [(adapter, 1.0)])
                drifts[adapter.name] = drift_of(lab, base, seed)
            return {"drifts": drifts}

        key = {"family": family, "rate": rate, "names": list(names), "seed": seed}
        drifts = lab.cell("alone-drift", key, of_each)["drifts"]
        what = f"with a single adapter ({family})"
        rows.append({"pictures of generic prompts": what, "drift": mean_text(list(drifts.values()), list(drifts))})
    return rows


def compared(
    lab: StudyRunner, jobs: Sequence[FusionCell], quick: bool, alike: Collection[str], sizes: Sequence[int]
) -> Findings:
    """The rows of jobs of one rank, after checking that these families train alike; the verdict is on ``sizes``."""
    counts = check_equal(lab, {job.family: change_for(job.family, 0, job.rank) for job in jobs if job.family in alike})
    lab.note(", ".join(f"{name} trains {count:,}" for name, count in counts.items()))
    rows, sweeps, missing = measured_cells(lab, jobs, (0,) if quick else SEEDS, quick)
    tables = [Table("Where the columns lie, and how adapters are merged", rows)]
    if sweeps:
        tables.append(Table("The sweep of the learning rate, on concepts that are not reported", sweeps))
    return Findings(tables, verdict(rows, sizes), missing=missing)


def verdict(rows: Sequence[Row], sizes: Sequence[int]) -> str:
    """The identity that every family keeps, by number of concepts and merge."""
    sentences = []
    for size, merge in itertools.product(sizes, dict.fromkeys(row["merge"] for row in rows)):
        matching = [row for row in rows if (row["K"], row["merge"]) == (size, merge)]
        kept = ", ".join(f"{row['family']} {row['of alone']}" for row in matching)
        if kept:
            sentences.append(f"K = {size}, {merge}: of what they are alone keep {kept}.")
    return " ".join(sentences) or NOTHING
