"""Two columns a concept: two to sixteen concepts in narrow slots, own, same and sampled, and as LoRAs."""

from __future__ import annotations

from .fusion import NARROW, FusionCell
from .registry import Findings, study
from .runner import StudyRunner
from .slots import compared

SIZES = (2, 4, 8, 16)
MERGES = ("sum", "fedavg", "gradient, prior term")
# Sampled slots of sixteen concepts clash almost surely, and Orthogonal Adaptation trains one factor of two.
FAMILIES = {
    "spectral, own slots": (MERGES, SIZES),
    "spectral, same slot": (MERGES, SIZES),
    "spectral, sampled slots": (MERGES, SIZES[:-1]),
    "lora": (MERGES, SIZES),
    "orthogonal": (("orthogonal", "gradient, prior term"), SIZES[-1:]),
}


def narrow_jobs(quick: bool) -> list[FusionCell]:
    """Every family's rows, the most concepts last: their adapters include those of fewer."""
    if quick:
        return [FusionCell(family, "sum", 2, NARROW) for family in ("spectral, own slots", "lora")]
    return [
        FusionCell(family, merge, size, NARROW)
        for size in SIZES
        for family, (merges, sizes) in FAMILIES.items()
        if size in sizes
        for merge in merges
    ]


@study(
    "narrow",
    "sec. 4.2",
    "Slots of two columns hold a concept each, so that sixteen fit side by side and fuse undisturbed.",
    (180, 0.2),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Identity alone and fused at rank 2, by the position of the columns, for every merge."""
    jobs = narrow_jobs(quick)
    alike = {job.family for job in jobs} - {"orthogonal"}
    return compared(lab, jobs, quick, alike, sorted({job.size for job in jobs})[-2:])
