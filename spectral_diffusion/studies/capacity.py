"""How many slots hold? From one concept to thirty-two, at ranks from 1 to 8: where does a slot of one's own help?"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from PIL import Image

from ..core.errors import NotFiniteError
from ..metrics.statistics import leading
from .charts import WANTED, curves
from .fusion import FusionCell, family_rate, fusion_row
from .registry import Findings, Row, Table, study
from .runner import EVERY, StudyRunner, TimeOver

SIZES = (1, 2, 4, 8, 16, 32)
RANKS = (1, 2, 4, 8)
FAMILIES = ("spectral, own slots", "spectral, same slot", "spectral, sampled slots", "lora")
UNBOUND = ("spectral, same slot", "lora")  # what is measured for more concepts than have columns of their own
SUM, FUSED = "sum", "gradient, prior term"
DISTILLED = {8: "distilled, 900 steps", 16: "distilled, 1,800 steps", 32: "distilled, 2,700 steps"}
DISTILLED_FAMILIES = ("spectral, own slots", "lora")
DISTILLED_RANK = 2
RATE_RANK = {1: 2, 4: 8}  # a rank takes the learning rate that another has chosen
SEED = (0,)  # one: intervals come from the concepts


def jobs(columns: int) -> list[FusionCell]:
    """Every row on a base whose narrowest adapted layer has ``columns``; those that show most come first."""
    out = []
    for rank in (2, 8, 4, 1):
        for size in SIZES:
            for family in FAMILIES if rank * size <= columns else UNBOUND:
                out += [FusionCell(family, merge, size, rank) for merge in ((SUM, FUSED) if size > 1 else (SUM,))]
    out += [FusionCell(f, merge, k, DISTILLED_RANK) for k, merge in DISTILLED.items() for f in DISTILLED_FAMILIES]
    return out


@study(
    "capacity",
    "the claim of sec. 4.2 and Fig. 5",
    "Disjoint slots let adapters that were trained apart be added without overwriting each other.",
    (330, 0.2),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Identity kept and drift by number of concepts, rank and where the slots are."""
    rows: list[Row] = []
    missing: list[str] = []
    rates: dict[tuple[str, int], float] = {}
    small = [FusionCell("spectral, own slots", SUM, 2, 1), FusionCell("lora", SUM, 2, 1)]
    chosen = small if quick else jobs(min(map(min, lab.sides)))
    for job in chosen:
        try:
            kind = job.family, job.rank
            if kind not in rates:
                rates[kind], _ = family_rate(lab, job.family, quick, RATE_RANK.get(job.rank, job.rank))
            row = fusion_row(lab, job, rates[kind], EVERY[: job.size], SEED)
        except TimeOver:
            missing.append(str(job))
            continue
        except NotFiniteError as error:  # a rank's rate may be too high for another
            lab.note(f"{job}: {error}")
            missing.append(f"{job}, which met NaN or infinity")
            continue
        rows.append({"family": job.family, "merge": job.merge, "K": job.size, "rank": job.rank, **row})
        lab.note(f"{job}: {row['of alone']} of alone at drift {row['drift']}")
    pictures: dict[str, Image.Image] = {}
    if not quick and rows:
        picture = capacity_curves(rows)
        pictures = {"curves": picture} if picture else {}
        missing += [] if picture else [WANTED]
    return Findings([Table("What every number of concepts keeps", rows)], verdict(rows), pictures, missing)


def share(row: Row) -> float:
    """The share of the identity alone, without its interval."""
    return leading(row["of alone"])


def capacity_curves(rows: Sequence[Row]) -> Image.Image | None:
    """The share kept by number of concepts: sums at two ranks, and the better merges at every one."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if isfinite(share(row)) and (row["rank"] in (DISTILLED_RANK, max(RANKS)) or row["merge"] != SUM):
            name = f"{row['family']}, r = {row['rank']}, {str(row['merge']).partition(',')[0]}"
            lines.setdefault(name, []).append((row["K"], share(row)))
    ordered = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    return curves(ordered, "concepts", "identity kept of alone", "Where slots help", log=True)


def verdict(rows: Sequence[Row]) -> str:
    """By rule: at every number and rank, own slots minus the same slot, minus LoRA, all of them sums."""
    sentences = []
    for size in sorted({row["K"] for row in rows if row["K"] > 1}):
        gaps = []
        for rank in sorted({row["rank"] for row in rows}):
            found = {
                row["family"]: share(row)
                for row in rows
                if (row["K"], row["rank"], row["merge"]) == (size, rank, SUM) and isfinite(share(row))
            }
            if (own := found.get("spectral, own slots")) is None:
                continue
            others = [(name, found[name]) for name in FAMILIES[1:] if name in found]
            if others:
                gaps.append(f"r = {rank}: " + ", ".join(f"{own - value:+.2f} on {name}" for name, value in others))
        if gaps:
            sentences.append(f"K = {size}, own slots summed keep more by {'; '.join(gaps)}.")
    return " ".join(sentences) or "Nothing was measured yet."
