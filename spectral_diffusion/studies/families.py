"""Rotations, training that knows the other concepts, and joint training, beside the families of ``fusion``."""

from __future__ import annotations

from collections.abc import Sequence

from ..metrics.statistics import leading
from .fusion import JOINT, NOTHING, FusionCell, fusion_tables
from .registry import Findings, Row, study
from .runner import SEEDS, StudyRunner

SIZES = (2, 4, 8)
BOTH = ("sum", "gradient, prior term")
# The first two are those of ``fusion``, for the comparison.
TRIED: dict[str, tuple[str, ...]] = {
    "spectral, own slots": (*BOTH, JOINT),
    "lora": (*BOTH, JOINT),
    "rotation, own slots": BOTH,
    "rotation, same slot": ("sum", "orthofuse"),
    "lora, overlap penalty": BOTH,
    "lora, output erasure": BOTH,
    "spectral, overlap penalty": BOTH,
    "spectral, output erasure": BOTH,
}


def family_jobs(quick: bool) -> list[FusionCell]:
    """Every row, one family after the other."""
    if quick:
        return [FusionCell(family, merge, 2) for family in ("spectral, own slots", "lora") for merge in ("sum", JOINT)]
    return [FusionCell(family, merge, size) for family, merges in TRIED.items() for size in SIZES for merge in merges]


@study(
    "families",
    "sec. 4.2",
    "Rotated columns fuse like added ones; slots alone keep concepts apart, without training that knows the others.",
    (150, 0.25),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Identity alone and fused, text match and drift, of families that cost a training of their own each."""
    rows, tables, missing = fusion_tables(lab, family_jobs(quick), (0,) if quick else SEEDS, quick)
    return Findings(tables, verdict(rows), missing=missing)


def verdict(rows: Sequence[Row]) -> str:
    """What every family keeps by its best merge, and trained jointly."""
    sentences = []
    for size in sorted({row["K"] for row in rows}):
        of_size = [row for row in rows if row["K"] == size]
        best: dict[str, Row] = {}
        for row in of_size:
            name = f"{row['family']}, trained jointly" if row["merge"] == JOINT else str(row["family"])
            if name not in best or leading(row["of alone"]) > leading(best[name]["of alone"]):
                best[name] = row
        kept = ", ".join(
            f"{name} {row['of alone'].split()[0]} ({row['merge']}, drift {row['drift'].split()[0]})"
            for name, row in best.items()
        )
        sentences.append(f"K = {size}, of what they are alone keep {kept}.")
    return " ".join(sentences) or NOTHING
