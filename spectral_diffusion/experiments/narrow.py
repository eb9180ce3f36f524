"""Two columns a concept: two to sixteen concepts in narrow slots, own, same and sampled, and as LoRAs."""

from __future__ import annotations

from .fusion import NARROW, Job, change_for, measured
from .lab import MANY, Lab
from .registry import Findings, Table, study
from .slots import check_equal, verdict

SEEDS = (0, 1, 2)
SIZES = (2, 4, 8, 16)
MERGES = ("sum", "fedavg", "gradient, anchored")
# Sampled slots of sixteen concepts clash almost surely, and Orthogonal Adaptation trains one factor of two.
FAMILIES = {
    "spectral, own slots": (MERGES, SIZES),
    "spectral, same slot": (MERGES, SIZES),
    "spectral, sampled slots": (MERGES, SIZES[:-1]),
    "lora": (MERGES, SIZES),
    "orthogonal": (("orthogonal", "gradient, anchored"), SIZES[-1:]),
}


def jobs_of(quick: bool) -> list[Job]:
    """Every family's rows, the most concepts last: their adapters are those of fewer and some more."""
    if quick:
        return [Job(family, "sum", 2, NARROW) for family in ("spectral, own slots", "lora")]
    return [
        Job(family, merge, size, NARROW)
        for size in SIZES
        for family, (merges, sizes) in FAMILIES.items()
        if size in sizes
        for merge in merges
    ]


@study(
    "narrow",
    "sec. 4.2",
    "Slots of two columns hold a concept each, so that sixteen fit side by side and fuse undisturbed.",
    (180, 0.5),
)
def run(lab: Lab, quick: bool) -> Findings:
    """Identity alone and fused at rank 2, by where the columns lie, for every merge."""
    jobs = jobs_of(quick)
    alike = {job.family: change_for(job.family, 0, NARROW) for job in jobs if job.family != "orthogonal"}
    counts = check_equal(lab, alike)
    lab.note(f"Rank {NARROW}: {', '.join(f'{name} trains {count:,}' for name, count in counts.items())}")
    rows, sweeps, missing = measured(lab, jobs, (0,) if quick else SEEDS, quick)
    tables = [Table(f"Where the columns lie, and how adapters are merged; up to {len(MANY)} concepts", rows)]
    if sweeps:
        tables.append(Table("The sweep of the learning rate, on concepts that are not reported", sweeps))
    return Findings(tables, verdict(rows, sorted({job.size for job in jobs})[-2:]), missing=missing)
