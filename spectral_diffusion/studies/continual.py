"""One concept after another in the same columns: five rotations composed without a new decomposition (Lemma 4.1)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters.adapter import Adapter
from ..adapters.apply import put_adapters
from ..config.fuse import FuseConfig
from ..merging.fuse import fuse_to_folder
from ..methods import get_method
from ..metrics.statistics import mean_text, share_text
from .fusion import FusionCell, family_rate, fused_cell
from .fusion import change_for as family_change
from .registry import Findings, Row, Table, study
from .runner import SEEDS, TEST_CONCEPTS, Figures, NotMeasured, StudyRunner, cell_key, scaled
from .speed import swept

NAMES = TEST_CONCEPTS[:5]
ROTATION, NEW, SUMMED = "rotation, same columns", "rotation, a new SVD each time", "additive, same slot, summed"
CHANGE = {"method": "spectral-rotation", "slot": "0:8"}


def rotation_rate(lab: StudyRunner, quick: bool) -> float:
    """The rate that the study ``speed`` chose for the rotation, on a concept that is not reported."""
    return get_method("spectral-rotation").lr_scale if quick else swept(lab, "spectral-rotation")[0]


def unevenness(adapter: Adapter) -> float:
    """The largest entry of |RᵀR − I| over all layers and both sides, R the whole rotation since the decomposition."""
    worst = 0.0
    assert adapter.method.continue_from is not None
    for layer in adapter.layers:
        parameters = adapter.method.continue_from(adapter.parameters_of(layer), adapter.frozen_of(layer))
        for change in (parameters["D_U"].double(), parameters["D_V"].double()):
            R = change + torch.eye(len(change), dtype=torch.float64)
            worst = max(worst, float((R.mT @ R - torch.eye(len(R), dtype=torch.float64)).abs().max()))
    return worst


def trained(
    lab: StudyRunner, variant: str, names: Sequence[str], rate: float, seed: int
) -> tuple[StudyRunner, Adapter, Path]:
    """The last concept's adapter after the others were learnt, its file, and the runner whose base it fits."""
    change = {**CHANGE, **scaled(lab, rate), "seed": seed}
    if variant == ROTATION:
        if len(names) > 1:
            change["init_from_adapter"] = trained(lab, variant, names[:-1], rate, seed)[2]
    elif len(names) > 1:
        under, _, file = trained(lab, variant, names[:-1], rate, seed)
        folder = lab.folder / "bases" / cell_key([lab.fingerprint, lab.settings, change, list(names[:-1])])
        if not folder.is_dir():
            fuse_to_folder(FuseConfig(adapters=[file], output=folder, base=under.base_name))
        lab = replace(lab, base_name=str(folder))
    adapter, _ = lab.trained(names[-1], **change)
    return lab, adapter, lab.adapter_path(names[-1], **change)


def chain_cell(lab: StudyRunner, variant: str, names: Sequence[str], rate: float, seed: int) -> Figures:
    """After the last of these concepts: how orthonormal its columns are, and the identity of every concept."""

    def compute() -> Figures:
        under, adapter, _ = trained(lab, variant, names, rate, seed)
        base = under.fresh()
        put_adapters(base, [(adapter, 1.0)])
        identity = {n: lab.identity(lab.portraits(base, lab.concept(n).token, seed), n) for n in names}
        return {"identity": identity, "unevenness": unevenness(adapter) if variant == ROTATION else None}

    return lab.cell(
        "chain", {"variant": variant, "change": CHANGE, "names": list(names), "rate": rate, "seed": seed}, compute
    )


def summed_cell(lab: StudyRunner, names: Sequence[str], seed: int) -> Figures:
    """The baseline: additive adapters, each trained on the untouched base in the same slot, summed."""
    family = "spectral, same slot"
    rate, _ = family_rate(lab, family, lab.settings["train"]["steps"] < 100)
    if len(names) == 1:
        change = {**family_change(family, 0), **scaled(lab, rate), "seed": seed}
        return {"identity": {names[0]: lab.alone(names[0], **change)["identity"]}, "unevenness": None}
    concepts = fused_cell(lab, FusionCell(family, "sum", len(names)), rate, names, seed)["concepts"]
    return {"identity": {name: concepts[name]["identity"] for name in names}, "unevenness": None}


@study(
    "continual",
    "Lemma 4.1",
    "Rotated columns are orthonormal again, so one concept after another is learnt without a new decomposition.",
    (40, 0.15),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """After each of five concepts: the columns' orthonormality, and the identity of every earlier concept."""
    count, seeds = (2, (0,)) if quick else (len(NAMES), SEEDS)
    variants = (ROTATION, NEW) if quick else (ROTATION, NEW, SUMMED)
    cells_of: dict[tuple[str, int], list[Figures]] = {}
    missing: list[str] = []
    for seed, variant, length in itertools.product(seeds, variants, range(1, count + 1)):
        try:
            names = NAMES[:length]
            if variant == SUMMED:
                cell = summed_cell(lab, names, seed)
            else:
                cell = chain_cell(lab, variant, names, rotation_rate(lab, quick), seed)
            floor = {name: lab.noun_baseline(name, seed)["identity"] for name in names}
        except NotMeasured:
            missing.append(f"{variant}, {length} concepts, seed {seed}")
            continue
        cells_of.setdefault((variant, length), []).append({**cell, "floor": floor, "seed": seed})
        lab.note(f"{variant}, seed {seed}: {', '.join(f'{n} {v:.2f}' for n, v in cell['identity'].items())}")
    rows = [
        continual_row(variant, length, cells_of)
        for variant in variants
        for length in range(1, count + 1)
        if (variant, length) in cells_of
    ]
    last: list[Row] = [
        {
            "variant": variant,
            "concept": name,
            "untouched base": mean([c["floor"][name] for c in cells]),
            "when learnt": mean([c["identity"][name] for c in cells_of.get((variant, NAMES.index(name) + 1), [])]),
            f"after {length}": mean([c["identity"][name] for c in cells]),
        }
        for (variant, length), cells in cells_of.items()
        if length == count
        for name in NAMES[:count]
    ]
    tables = [Table("After each concept", rows), Table("What is left of each at the end: identity", last)]
    return Findings(tables, verdict(rows), missing=missing)


def mean(values: Sequence[float]) -> float | None:
    """Their mean; None of none."""
    return sum(values) / len(values) if values else None


def continual_row(variant: str, length: int, cells_of: Mapping[tuple[str, int], Sequence[Figures]]) -> Row:
    """One variant after ``length`` concepts; retention is of an earlier concept's gain over the untouched base."""
    cells, new, old, kept, learnt = cells_of[variant, length], [], [], [], []
    older: list[str] = []  # the concepts of ``old`` and, as all are known then, of ``kept``
    for cell in cells:
        *before, last = cell["identity"]
        new.append(cell["identity"][last])
        for index, name in enumerate(before, 1):
            then = [c for c in cells_of.get((variant, index), []) if c["seed"] == cell["seed"]]
            old.append(cell["identity"][name])
            older.append(name)
            if then:
                kept.append(cell["identity"][name] - cell["floor"][name])
                learnt.append(then[0]["identity"][name] - cell["floor"][name])
    uneven = [cell["unevenness"] for cell in cells if cell["unevenness"] is not None]
    return {
        "variant": variant,
        "concepts": length,
        "seeds": len(cells),
        "off orthonormal": f"{max(uneven):.0e}" if uneven else None,
        "the new one": mean_text(new),
        "the earlier ones": mean_text(old, older) if old else None,
        "gain kept": share_text(kept, learnt, older if len(older) == len(kept) else None) if kept else None,
    }


def verdict(rows: Sequence[Row]) -> str:
    """How orthonormal the columns stay, and how much gain the earlier concepts keep."""
    uneven = [float(row["off orthonormal"]) for row in rows if row["off orthonormal"]]
    text = f"Composed frames stay orthonormal to {max(uneven):.0e}. " if uneven else ""
    most = max((row["concepts"] for row in rows), default=0)
    ends = [f"{row['variant']} {row['gain kept']}" for row in rows if row["concepts"] == most and row["gain kept"]]
    return f"{text}After {most} concepts the earlier ones keep of their gain in identity: {'; '.join(ends)}."
