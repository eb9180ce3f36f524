"""The same concepts on both pocket bases: a U-Net with cross-attention, and a transformer with joint attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from ..adapters.apply import put_adapters
from ..config.presets import preset_settings
from ..data.image_grid import image_grid
from .fusion import FusionCell, adapters_of, family_rate, measured_cells, sheet_of
from .registry import Findings, Row, Table, study
from .runner import SEEDS, TEST_CONCEPTS, NotMeasured, StudyRunner, study_settings
from .scenes import GROUPS, VARIANTS, SceneGroup, pictures_of, scene_cell, scene_row

U_NET, TRANSFORMER = "pocket", "pocket-transformer"
SIZES = (2, 4)  # of the fusions
FAMILIES = ("spectral, own slots", "lora")
MERGES = ("sum", "fedavg", "ssr", "gradient, prior term")
REGIONS = ("bound to regions", "fused by sum, regions", "fused by sum, no regions")
SHOWN = {
    "train": ("target_modules", "rank", "steps", "batch_size", "learning_rate", "timestep_power", "mixed_precision"),
    "generate": ("num_inference_steps", "guidance_scale", "region_isolation"),
}


def runners_of(lab: StudyRunner, quick: bool) -> dict[str, StudyRunner]:
    """A runner on each pocket base by the base's name; a base of one's own takes the transformer's place."""
    bases = [U_NET, lab.base_name if lab.base_name != U_NET else TRANSFORMER]
    return {base: lab.on(base, study_settings(lab.recipe, quick, base)) for base in bases}


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
    pictures: dict[str, Image.Image] = {}
    runners = runners_of(lab, quick)
    jobs = [
        FusionCell(family, merge, size)
        for family in (FAMILIES[:1] if quick else FAMILIES)
        for size in (SIZES[:1] if quick else SIZES)
        for merge in (MERGES[:1] if quick else MERGES)
    ]
    for base, runner in runners.items():
        fused, tried, late = measured_cells(runner, jobs, (0,) if quick else SEEDS, quick)
        bound, not_bound = region_rows(runner, quick)
        rows += [{"base": base, **row} for row in fused]
        sweeps += [{"base": base, **row} for row in tried]
        regions += [{"base": base, **row} for row in bound]
        try:
            pictures |= {} if quick else {base: base_sheet(runner)}
        except NotMeasured:
            not_bound.append("the sheet")
        missing += [f"{base}: {text}" for text in (*late, *not_bound)]
        if runner is not lab:
            lab.edges += [f"{base}: {text}" for text in runner.edges]
    tables = [
        Table("Alone and fused", rows),
        Table("Which concept regions show, without sketches", regions),
        Table("Settings", [{"base": base, **shown_settings(runner)} for base, runner in runners.items()]),
    ]
    if sweeps:
        tables.append(Table("The sweep of the learning rate, on concepts that are not reported", sweeps))
    return Findings(tables, verdict(rows, regions), pictures, missing)


def shown_settings(lab: StudyRunner) -> Row:
    """The settings in which bases may differ."""
    found = {name: lab.settings.get(part, {}).get(name) for part, names in SHOWN.items() for name in names}
    return found | {"region_isolation": isolation_of(lab)}


def isolation_of(lab: StudyRunner) -> float:
    """The isolation of regions by the base's preset; the pocket U-Net's group norms need it."""
    return float(preset_settings(lab.base_name, "generate").get("region_isolation", 0.0))


def scenes_of(lab: StudyRunner, quick: bool) -> dict[str, SceneGroup]:
    """Scenes without sketches, which the transformer cannot take: the prompts alone say where things are."""
    if quick:
        pair = GROUPS["2"].scenes[:1]
        return {"2": SceneGroup(pair, 1, sketched=False, isolation=isolation_of(lab))}
    return {
        number: replace(GROUPS[number], pictures=pictures, sketched=False, isolation=isolation_of(lab))
        for number, pictures in (("2", 36), ("3", 24))
    }


def region_rows(lab: StudyRunner, quick: bool) -> tuple[list[Row], list[str]]:
    """One row per number of subjects and variant, and what the time limit left out."""
    rows: list[Row] = []
    missing: list[str] = []
    for number, group in scenes_of(lab, quick).items():
        for variant in REGIONS[:1] if quick else REGIONS:
            count = group.pictures // len(group.scenes)
            try:
                cells = [scene_cell(lab, variant, names, count, group) for names in group.scenes]
            except NotMeasured:
                missing.append(f"{number} by {variant}")
                continue
            rows.append({"subjects": number, "variant": variant, **scene_row(cells, group)})
            lab.note(f"{lab.base_name}: {number}, {variant}: {rows[-1]['right concept']} of regions are right")
    return rows, missing


def verdict(rows: Sequence[Row], regions: Sequence[Row]) -> str:
    """What each base keeps of alone, by family and number, and how often its regions are right."""
    sentences = []
    for base in dict.fromkeys(row["base"] for row in (*rows, *regions)):
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
    group = scenes_of(lab, False)["2"]
    scenes = [pictures_of(lab, VARIANTS[REGIONS[0]], n, range(3), group) for n in group.scenes]
    return image_grid([sheet_of(columns, names), image_grid([p for row in scenes for p in row], 3)], 1, gap=12)
