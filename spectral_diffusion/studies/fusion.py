"""How much identity does a fused concept keep? Adapters of several families, every merge, two to eight concepts."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.apply import put_adapters
from ..config.evaluate import GENERIC_SUBJECTS
from ..config.fuse import FuseConfig
from ..config.train import generic_subject
from ..core.errors import NotFiniteError
from ..core.hooks import Hooks
from ..data.image_grid import image_grid, labelled_grid
from ..merging.fuse import fuse_adapters
from ..metrics.statistics import difference_text, leading, mean_text, share_text
from ..models.base import Base
from .registry import Findings, Row, Table, study
from .runner import MANY, RATES, SEEDS, TEST_CONCEPTS, Figures, NotMeasured, StudyRunner, TimeOver, best_rate, scaled

NOTHING = "Nothing was measured yet."
GAP = "fused minus own slots summed"  # paired by concept and seed
RANK = 8  # the studies' default; others are written into the settings
NARROW = 2  # about the same share of the pocket base's 64 columns as 8 of Stable Diffusion's 320
# Family: settings of training. {k} is the concept's number; the same rank, so the same number of trained factors
# but for `orthogonal`, which trains one of two. ``sampled`` slots are sampled from the top columns independently.
FAMILIES: dict[str, dict[str, Any]] = {
    "spectral, own slots": {"method": "spectral-additive", "slot": "{k}"},
    "spectral, same slot": {"method": "spectral-additive", "slot": "0"},
    "lora": {"method": "lora"},
    "orthogonal": {"method": "orthogonal", "slot": "{k}"},
    "spectral, sampled slots": {"method": "spectral-additive", "slot": "sampled"},
    "rotation, own slots": {"method": "spectral-rotation", "slot": "{k}"},
    "rotation, same slot": {"method": "spectral-rotation", "slot": "0"},
    # Training that knows the others: the penalty needs the earlier concepts' adapters, which changes_for names.
    "lora, overlap penalty": {"method": "lora", "interference": {"overlap_weight": 0.1}},
    "lora, output erasure": {"method": "lora", "interference": {"erasure_prob": 0.25}},
    "spectral, overlap penalty": {
        "method": "spectral-additive", "slot": "{k}", "interference": {"overlap_weight": 0.1},
    },
    "spectral, output erasure": {
        "method": "spectral-additive", "slot": "{k}", "interference": {"erasure_prob": 0.25},
    },
}  # fmt: skip
# These differ from another family in one thing, and take its learning rate.
RATE_OF = {
    "spectral, sampled slots": "spectral, own slots",
    "lora, overlap penalty": "lora",
    "lora, output erasure": "lora",
    "spectral, overlap penalty": "spectral, own slots",
    "spectral, output erasure": "spectral, own slots",
}
JOINT = "joint"  # no merge: one adapter trained on all concepts, with as many numbers and steps as theirs together
# Beside the paper's own comparison; trainings of these cost as much as everything else, so they get the first seed.
ONE_SEED = {name for name in RATE_OF if "penalty" in name or "erasure" in name}
MERGES: dict[str, dict[str, Any]] = {
    "sum": {"merge": "spectral"},
    "fedavg": {"merge": "fedavg"},
    "paper": {"merge": "spectral", "options": {"form": "paper"}},
    "gradient": {"merge": "gradient", "calibration": {"prior_weight": 0.0}},
    "gradient, prior term": {"merge": "gradient"},
    "ssr": {"merge": "ssr"},
    "ties": {"merge": "ties"},
    "orthogonal": {"merge": "orthogonal"},
    "knots": {"merge": "knots"},
    "contrastive": {"merge": "contrastive"},
    "orthofuse": {"merge": "orthofuse"},
}
# Merged by gradient, then the whole U-Net is distilled from each adapter alone.
MERGES |= {
    f"distilled, {steps:,} steps": {
        "merge": "gradient",
        "calibration": {"prior_weight": 16.0, "guidance_scale": 1.0},
        "distill": {
            "steps": steps, "guidance_scale": 2.0, "learning_rate": 1e-4, "prior_share": 0.5, "num_images": 48,
            "num_prior_images": 480, "target_modules": r"re:unet\..*",
        },
    }
    for steps in (900, 1800, 2700)
}  # fmt: skip
TRIED = {
    "spectral, own slots": (
        "sum", "fedavg", "paper", "gradient", "gradient, prior term", "ssr", "ties", "knots", "contrastive",
    ),
    "spectral, same slot": ("sum", "fedavg", "gradient, prior term"),
    "lora": ("sum", "fedavg", "gradient", "gradient, prior term", "ties", "knots", "contrastive"),
    "orthogonal": ("orthogonal", "gradient, prior term"),
}  # fmt: skip


@dataclass(frozen=True)
class FusionCell:
    """One row to measure: a family of adapters of a rank, a merge, how many concepts."""

    family: str
    merge: str
    size: int
    rank: int = RANK

    def __str__(self) -> str:
        rank = "" if self.rank == RANK else f", rank {self.rank}"
        return f"{self.family} by {self.merge} at K = {self.size}{rank}"


def change_for(family: str, number: int, rank: int = RANK, seed: int = 0) -> dict[str, Any]:
    """The family's settings for concept ``number``; a slot is written as columns, a sampled one as its seed."""
    change = dict(FAMILIES[family])
    if change.get("slot") == "sampled":
        change["slot_seed"] = 100 * seed + number
    elif "slot" in change:
        k = int(change["slot"].format(k=number))
        change["slot"] = f"{rank * k}:{rank * k + rank}"
    return change if rank == RANK else {**change, "rank": rank}


def family_rate(lab: StudyRunner, family: str, quick: bool, rank: int = RANK) -> tuple[float, list[Figures]]:
    """The family's learning rate, or that of the family that it differs from in one thing.

    It is chosen on the concepts that are not reported.
    """
    if quick:
        return 1.0, []
    return best_rate(lab, RATES, **change_for(RATE_OF.get(family, family), 0, rank))


def adapters_of(
    lab: StudyRunner, family: str, rate: float, names: Sequence[str], seed: int, rank: int = RANK
) -> list[tuple[Adapter, Figures]]:
    """Trained adapters, each with its figures alone."""
    changes = changes_for(lab, family, rate, names, seed, rank)
    return [
        (lab.trained(name, **change)[0], lab.alone(name, **change)) for name, change in zip(names, changes, strict=True)
    ]


def changes_for(
    lab: StudyRunner, family: str, rate: float, names: Sequence[str], seed: int, rank: int = RANK
) -> list[dict[str, Any]]:
    """Every concept's changes of the training settings; with an overlap penalty the files of those before it."""
    changes: list[dict[str, Any]] = []
    earlier: list[str] = []
    for number, name in enumerate(names):
        change = trained_with(lab, family, rate, number, seed, rank)
        if change.get("interference", {}).get("overlap_weight"):
            if earlier:
                change["interference"] = {**change["interference"], "earlier_adapters": list(earlier)}
            else:
                del change["interference"]
            earlier.append(str(lab.adapter_path(name, **change)))
        changes.append(change)
    return changes


def joint_rate(cell: FusionCell, rate: float) -> float:
    """The factor on the learning rates of a joint training, whose rank is K times a single one's.

    What a LoRA adds grows with the root of its rank (rsLoRA, arXiv 2312.03732): at the rate of single ones a joint LoRA
    of eight concepts diverges. Columns of a spectral adapter are orthonormal, however many there are.
    """
    return rate / math.sqrt(cell.size) if FAMILIES[cell.family]["method"] == "lora" else rate


def joint_adapter(lab: StudyRunner, cell: FusionCell, rate: float, names: Sequence[str], seed: int) -> Adapter:
    """One adapter of all concepts: the rank and the steps of single ones times their number."""
    change = trained_with(lab, cell.family, joint_rate(cell, rate), 0, seed, cell.rank * len(names))
    train = lab.train_config(names[0], change, Path("adapter.safetensors"))
    further = [str(lab.concepts / name) for name in names[1:]]
    return lab.trained(names[0], **change, joint_concepts=further, steps=train.steps * len(names))[0]


def trained_with(
    lab: StudyRunner, family: str, rate: float, number: int, seed: int, rank: int = RANK
) -> dict[str, Any]:
    """All changes of the training settings for a family's concept ``number``."""
    return {**change_for(family, number, rank, seed), **scaled(lab, rate), "seed": seed}


def fused_cell(lab: StudyRunner, cell: FusionCell, rate: float, names: Sequence[str], seed: int) -> Figures:
    """One fusion: per concept the identity and the text match, and the drift of generic prompts."""
    settings = merge_settings(lab, cell.merge)

    def compute() -> Figures:
        lab.untouched_images(seed)  # before another base is loaded: there may be room for one
        base = lab.fresh()
        if cell.merge == JOINT:
            joint = joint_adapter(lab, cell, rate, names, seed)
            begun = time.monotonic()
            put_adapters(base, [(joint, 1.0)])
        else:
            adapters = [adapter for adapter, _ in adapters_of(lab, cell.family, rate, names, seed, cell.rank)]
            files = [Path(f"{name}.safetensors") for name in names]
            precision = lab.settings["train"]["mixed_precision"]
            config = FuseConfig(adapters=files, output=Path("fused"), seed=seed, mixed_precision=precision, **settings)
            begun = time.monotonic()
            fuse_adapters(base, adapters, config, Hooks(progress=lab.progress))
        seconds = time.monotonic() - begun
        concepts: Figures = {}
        for name in names:
            pictures = lab.portraits(base, lab.concept(name).token, seed)
            concepts[name] = {"identity": lab.identity(pictures, name), "text": lab.text_match(pictures)}
        return {
            "concepts": concepts,
            "drift": drift_of(lab, base, seed),
            "seconds": seconds,  # the first merge of these adapters also records what layers see: for no table
        }

    key: dict[str, Any] = {"family": cell.family, "change": FAMILIES[cell.family]}
    key |= {"merge": settings}
    key |= {"rate": rate, "names": list(names)}
    key |= {} if cell.rank == RANK else {"rank": cell.rank}
    if cell.merge == JOINT and joint_rate(cell, rate) != rate:
        key["joint_rate"] = joint_rate(cell, rate)
    # The strength stays in the key, so that cells of earlier runs are found again.
    return lab.cell("fused", {**key, "seed": seed, "scales": 1.0}, compute)


def merge_settings(lab: StudyRunner, merge: str) -> dict[str, Any]:
    """The settings of a merge by its label; a distillation learns no prompt that drift is measured on."""
    settings = dict(MERGES.get(merge, {"merge": merge}))
    if "distill" in settings:
        settings["distill"] = {**settings["distill"], "prior_subjects": prior_subjects(lab)}
    return settings


def prior_subjects(lab: StudyRunner) -> list[str]:
    """The settings' nouns in their colors, without the subjects of the prompts that drift is measured on."""
    prior = lab.settings["train"]["prior"]
    subjects = [generic_subject(color, noun) for color in prior["adjectives"] for noun in prior["nouns"]]
    return [subject for subject in subjects if subject not in GENERIC_SUBJECTS]


def drift_of(lab: StudyRunner, base: Base, seed: int) -> float:
    """Mean 1 − cosine of the identity encoder's vectors of generic images of the untouched base and of this one."""
    before, after = lab.untouched_images(seed), lab.generic_images(base, seed)
    cosines = (lab.encoder.embed(before) * lab.encoder.embed(after)).sum(1)
    return float((1 - cosines).mean())


@study(
    "fusion",
    "Figs. 5, 12, 13",
    "Adapters in disjoint slots fuse by addition and keep every concept's identity better than averaging LoRAs.",
    (160, 0.25),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Identity alone and fused, text match and drift, for every family and merge."""
    sizes, seeds = ((2,), (0,)) if quick else ((2, 4, 8), SEEDS)
    families = ("spectral, own slots", "lora") if quick else tuple(TRIED)
    merges = {family: ("sum", "fedavg") if quick else TRIED[family] for family in families}
    jobs = [FusionCell(family, merge, size) for family in families for size in sizes for merge in merges[family]]
    rows, tables, missing = fusion_tables(lab, jobs, seeds, quick)
    pictures: dict[str, Image.Image] = {}
    try:
        pictures = {} if quick else {"sheet": fusion_sheet(lab)}
    except NotMeasured:
        missing.append("the sheet")
    return Findings(tables, verdict(rows), pictures, missing)


def fusion_tables(
    lab: StudyRunner, jobs: Sequence[FusionCell], seeds: Sequence[int], quick: bool
) -> tuple[list[Row], list[Table], list[str]]:
    """The rows of these jobs, the tables that show them and their sweeps, and what is missing."""
    rows, sweeps, missing = measured_cells(lab, jobs, seeds, quick)
    tables = [Table("Every family and merge", rows)]
    if sweeps:
        tables.append(Table("The sweep of the learning rate, on concepts that are not reported", sweeps))
    return rows, tables, missing


def measured_cells(
    lab: StudyRunner, jobs: Sequence[FusionCell], seeds: Sequence[int], quick: bool
) -> tuple[list[Row], list[Row], list[str]]:
    """The rows of these jobs, their sweeps, and what the time limit left out; one seed after the other.

    A row needs all of its seeds measured.
    """
    rates: dict[tuple[str, int], float] = {}
    sweeps: list[Row] = []
    late: dict[FusionCell, list[int]] = {}
    # A joint training that did, or family, rank and seed of single ones, without which there is nothing to merge.
    diverged: dict[tuple[FusionCell | str, int, int], str] = {}
    for seed, job in itertools.product(seeds, jobs):
        if seed not in seeds_of(job, seeds):
            continue
        kind = job.family, job.rank
        if (*kind, seed) in diverged and job.merge != JOINT:
            late.setdefault(job, []).append(seed)
            continue
        try:
            if kind not in rates:
                rates[kind], trials = family_rate(lab, job.family, quick, job.rank)
                here = {"family": job.family, "rank": job.rank}
                sweeps += [{**here, "rate": t["rate"], "identity, tuning concepts": t["identity"]} for t in trials]
            fusion_row(lab, job, rates[kind], MANY[: job.size], [seed])  # measures what it needs
        except TimeOver:
            late.setdefault(job, []).append(seed)
            continue
        except NotFiniteError as error:  # a rate that others do best at may be too high for one of these
            lab.note(f"{job}, seed {seed}: {error}")
            of_joint = job.merge == JOINT
            what = str(job) if of_joint else f"{job.family}, rank {job.rank}"
            diverged[(job if of_joint else job.family, job.rank, seed)] = f"{what}, seed {seed}, met NaN or infinity"
            late.setdefault(job, []).append(seed)
            continue
        lab.note(f"{job}, seed {seed}")
    rows: list[Row] = []
    for job in jobs:
        if job not in late:
            own_seeds = seeds_of(job, seeds)
            measured = fusion_row(lab, job, rates[job.family, job.rank], MANY[: job.size], own_seeds)
            gap = minus_sum(lab, job, jobs, late, rates, own_seeds)
            rows.append(
                {"family": job.family, "merge": job.merge, "K": job.size, "rank": job.rank, **measured, GAP: gap}
            )
    return rows, sweeps, [*not_measured(late), *diverged.values()]


def seeds_of(job: FusionCell, seeds: Sequence[int]) -> Sequence[int]:
    """The seeds that a row is measured with."""
    return seeds[:1] if job.merge == JOINT or job.family in ONE_SEED else seeds


def minus_sum(
    lab: StudyRunner,
    job: FusionCell,
    jobs: Sequence[FusionCell],
    late: Collection[FusionCell],
    rates: Mapping[tuple[str, int], float],
    seeds: Sequence[int],
) -> str | None:
    """The fused identity minus that of the sum of own slots, paired by concept and seed."""
    reference = FusionCell("spectral, own slots", "sum", job.size, job.rank)
    if job == reference or reference not in jobs or reference in late:
        return None
    names = MANY[: job.size]

    def identities(cell: FusionCell) -> list[float]:
        rate = rates[cell.family, cell.rank]
        found = [fused_cell(lab, cell, rate, names, seed)["concepts"] for seed in seeds]
        return [concepts[name]["identity"] for concepts in found for name in names]

    return difference_text(identities(job), identities(reference), names)


def not_measured(late: Mapping[FusionCell, Sequence[int]]) -> list[str]:
    """What the time limit left out, the merges of the same adapters in one line."""
    merges: dict[tuple[str, int, int, tuple[int, ...]], list[str]] = {}
    for job, seeds in late.items():
        merges.setdefault((job.family, job.size, job.rank, tuple(seeds)), []).append(job.merge)
    return [
        f"{family}, K = {size}, rank {rank}, seed {', '.join(map(str, seeds))}: {' and '.join(names)}"
        for (family, size, rank, seeds), names in merges.items()
    ]


def fusion_row(lab: StudyRunner, cell: FusionCell, rate: float, names: Sequence[str], seeds: Sequence[int]) -> Row:
    """One row of the table: means over concepts and seeds with their 95 % intervals, a bootstrap over concepts."""
    alone, fused, floor, text, drifts = [], [], [], [], []
    for seed in seeds:
        measured = fused_cell(lab, cell, rate, names, seed)
        changes = changes_for(lab, cell.family, rate, names, seed, cell.rank)
        alone += [lab.alone(name, **change)["identity"] for name, change in zip(names, changes, strict=True)]
        fused += [measured["concepts"][name]["identity"] for name in names]
        floor += [lab.noun_baseline(name, seed)["identity"] for name in names]
        text += [measured["concepts"][name]["text"] for name in names]
        drifts.append(measured["drift"])
    return {
        "seeds": len(seeds),
        "identity alone": mean_text(alone, names),
        "fused": mean_text(fused, names),
        "of alone": share_text(fused, alone, names),
        "single minus merged": difference_text(alone, fused, names),
        "of the gain": share_text([f - g for f, g in zip(fused, floor)], [a - g for a, g in zip(alone, floor)], names),
        "text match": mean_text(text, names),
        "drift": mean_text(drifts),
    }


def verdict(rows: Sequence[Row]) -> str:
    """The verdict on the claim, by rule: the share kept by sums of slots against averaged LoRAs."""

    def mean(family: str, merge: str, size: int) -> str | None:
        matching = [r for r in rows if (r["family"], r["merge"], r["K"]) == (family, merge, size)]
        return str(matching[0]["of alone"]).split()[0] if matching else None

    sentences = []
    for size in sorted({r["K"] for r in rows}):
        merged = [r for r in rows if r["K"] == size]
        best = max(merged, key=lambda r: leading(r["of alone"]), default=None)
        shares = {
            "own slots summed": mean("spectral, own slots", "sum", size),
            "averaged LoRAs": mean("lora", "fedavg", size),
            "adapters in one same slot": mean("spectral, same slot", "sum", size),
        }
        text = ", ".join(f"{what} {value}" for what, value in shares.items() if value)
        ahead = (
            f"the best is {best['merge']} of {best['family']} with {best['of alone'].split()[0]}"
            if best
            else "no merge was measured"
        )
        sentences.append(f"K = {size}, of what they are alone keep: {text}; {ahead}.")
    return " ".join(sentences) or NOTHING


def fusion_sheet(lab: StudyRunner, seed: int = 0, size: int = 4) -> Image.Image:
    """References, each concept alone, and after the main merges: one row per concept."""
    rate, _ = family_rate(lab, "spectral, own slots", False)
    names = TEST_CONCEPTS[:size]
    adapters = [adapter for adapter, _ in adapters_of(lab, "spectral, own slots", rate, names, seed)]
    columns: dict[str, dict[str, list[Image.Image]]] = {
        "photos": {n: lab.references(n)[:4] for n in names},
        "alone": {},
    }
    for adapter in adapters:
        base = lab.fresh()
        put_adapters(base, [(adapter, 1.0)])
        columns["alone"][adapter.name] = lab.portraits(base, adapter.token, seed)[:4]
    for merge in ("sum", "fedavg", "gradient, prior term"):
        base = lab.fused(adapters, seed=seed, **MERGES[merge])
        columns[merge] = {a.name: lab.portraits(base, a.token, seed)[:4] for a in adapters}
    return sheet_of(columns, names)


def sheet_of(
    columns: Mapping[str, Mapping[str, Sequence[Image.Image]]], names: Sequence[str], side: int = 128
) -> Image.Image:
    """Pictures by column and concept, two abreast, each ``side`` pixels; one row per concept, titles above."""
    rows = [[image_grid([i.resize((side, side)) for i in row[n]], 2) for row in columns.values()] for n in names]
    return labelled_grid(rows, column_labels=list(columns), gap=10)
