"""The same concepts on both pocket bases: a U-Net with cross-attention, and a transformer with joint attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from PIL import Image

from .. import pocket
from ..adapters.apply import put_adapters
from ..data.image_grid import image_grid
from .fusion import FusionCell, adapters_of, family_rate, measured_cells, sheet_of
from .registry import Findings, Row, Table, study
from .runner import SEEDS, TEST_CONCEPTS, StudyRunner, TimeOver, study_settings
from .scenes import GROUPS, VARIANTS, SceneGroup, pictures_of, scene_cell, scene_row

BASES = ("pocket", "pocket-transformer")
SIZES = (2, 4)  # of the fusions
FAMILIES = ("spectral, own slots", "lora")
MERGES = ("sum", "fedavg", "ssr", "gradient, anchored")
REGIONS = ("bound to regions", "fused by sum, regions", "fused by sum, no regions")
# There are no sketches for the transformer, so neither base gets them: the prompts alone say where things are.
SCENES = {
    number: dataclasses.replace(GROUPS[number], pictures=pictures, sketched=False)
    for number, pictures in (("2", 24), ("3", 24))
}


def on_base(lab: StudyRunner, base: str, quick: bool) -> StudyRunner:
    """The same runner on a base that ships with the package, with its settings."""
    if base == lab.base_name:
        return lab
    return dataclasses.replace(lab, base_name=base, settings=study_settings(quick=quick, base=base))


@study(
    "transformer",
    "none: a transformer of today",
    "Slots keep adapters apart on a transformer as they do on a U-Net.",
    (240, 0.5),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Identity alone and fused, and which concept regions show, on each base."""
    rows: list[Row] = []
    regions: list[Row] = []
    sweeps: list[Row] = []
    missing: list[str] = []
    runners = {base: on_base(lab, base, quick) for base in BASES if pocket.is_pocket(base)}
    for base, runner in runners.items():
        jobs = [
            FusionCell(family, merge, size)
            for family in (FAMILIES[:1] if quick else FAMILIES)
            for size in (SIZES[:1] if quick else SIZES)
            for merge in (MERGES[:1] if quick else MERGES)
        ]
        found, tried, late = measured_cells(runner, jobs, (0,) if quick else SEEDS, quick)
        rows += [{"base": base, **row} for row in found]
        sweeps += [{"base": base, **row} for row in tried]
        missing += [f"{base}: {text}" for text in late]
        found, late = region_rows(runner, quick)
        regions += [{"base": base, **row} for row in found]
        missing += [f"{base}: {text}" for text in late]
    tables = [
        Table("Alone and fused", rows),
        Table("Which concept regions show, without sketches", regions),
    ]
    if sweeps:
        tables.append(Table("The sweep of the learning rate, on concepts that are not reported", sweeps))
    pictures: dict[str, Image.Image] = {}
    for base, runner in runners.items():
        try:
            pictures |= {} if quick else {base: base_sheet(runner)}
        except TimeOver:
            missing.append(f"the sheet of {base}")
    return Findings(tables, verdict(rows, regions), pictures, missing)


def region_rows(lab: StudyRunner, quick: bool) -> tuple[list[Row], list[str]]:
    """One row per number of subjects and variant, and what the time limit left out."""
    rows: list[Row] = []
    missing: list[str] = []
    scenes: dict[str, SceneGroup] = SCENES
    if quick:
        scenes = {"2": dataclasses.replace(SCENES["2"], scenes=SCENES["2"].scenes[:1], pictures=1)}
    for number, group in scenes.items():
        for variant in REGIONS[:1] if quick else REGIONS:
            count = group.pictures // len(group.scenes)
            try:
                cells = [scene_cell(lab, variant, names, count, group) for names in group.scenes]
            except TimeOver:
                missing.append(f"{number} by {variant}")
                continue
            rows.append({"subjects": number, "variant": variant, **scene_row(cells, group)})
            lab.note(f"{lab.base_name}: {number}, {variant}: {rows[-1]['right concept']} of regions are right")
    return rows, missing


def verdict(rows: Sequence[Row], regions: Sequence[Row]) -> str:
    """What each base keeps of alone, by family and number, and how often its regions are right."""
    sentences = []
    for base in BASES:
        kept = [
            f"{row['family']} by {row['merge']} {str(row['of alone']).split()[0]}"
            for row in rows
            if row["base"] == base and row["K"] == SIZES[-1] and row["merge"] in MERGES[:2]
        ]
        if kept:
            sentences.append(f"{base}, K = {SIZES[-1]}, of alone: {', '.join(kept)}.")
        right = [
            f"{row['subjects']} subjects {row['right concept']}"
            for row in regions
            if row["base"] == base and row["variant"] == REGIONS[0]
        ]
        if right:
            sentences.append(f"{base}, right concept in bound regions: {', '.join(right)}.")
    return " ".join(sentences) or "Nothing was measured yet."


def base_sheet(lab: StudyRunner, seed: int = 0) -> Image.Image:
    """Photos, each concept alone and in the sum of four; below them scenes with bound regions."""
    family, names = FAMILIES[0], TEST_CONCEPTS[: SIZES[-1]]
    rate, _ = family_rate(lab, family, False)
    adapters = [adapter for adapter, _ in adapters_of(lab, family, rate, names, seed)]
    columns: dict[str, dict[str, list[Image.Image]]] = {"photos": {n: lab.references(n)[:4] for n in names}}
    columns["alone"] = {}
    for name, adapter in zip(names, adapters, strict=True):
        base = lab.fresh()
        put_adapters(base, [(adapter, 1.0)])
        columns["alone"][name] = lab.portraits(base, adapter.token, seed)[:4]
    base = lab.fused(adapters, seed=seed, merge="spectral")
    columns["sum"] = {n: lab.portraits(base, a.token, seed)[:4] for n, a in zip(names, adapters, strict=True)}
    scenes = [pictures_of(lab, VARIANTS[REGIONS[0]], n, range(3), SCENES["2"]) for n in SCENES["2"].scenes]
    return image_grid([sheet_of(columns, names), image_grid([p for row in scenes for p in row], 3)], 1, gap=12)
