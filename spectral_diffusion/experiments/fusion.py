"""Does a fused concept stay itself? Adapters of several families, every merge, two to eight concepts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..adapted import put_on
from ..adapter import Adapter
from ..config import FuseConfig
from ..evaluation.identity import embed
from ..fusion.recipe import fuse_adapters
from ..generation.pictures import grid
from .lab import REPORTED, TUNED, Figures, Lab, TimeOver, best_rate, scaled
from .registry import Findings, Row, Table, study
from .statistics import share, told

RATES = (0.4, 1.0, 2.5, 6.25)  # trials of the learning rate, on concepts that are not reported
SEEDS = (0, 1, 2)
# Family: settings of training. {k} is the concept's number; the same rank, so the same number of trained factors
# but for `orthogonal`, which trains one of two.
FAMILIES: dict[str, dict[str, Any]] = {
    "spectral, own slots": {"method": "spectral-additive", "slot": "{k}"},
    "spectral, same slot": {"method": "spectral-additive", "slot": "0"},
    "lora": {"method": "lora"},
    "orthogonal": {"method": "orthogonal", "slot": "{k}"},
}
MERGES: dict[str, dict[str, Any]] = {
    "sum": {"merge": "spectral", "form": "sum"},
    "fedavg": {"merge": "fedavg"},
    "paper": {"merge": "spectral", "form": "paper"},
    "gradient": {"merge": "gradient", "gradient": {"anchor": 0.0}},
    "gradient, anchored": {"merge": "gradient"},
    "ssr": {"merge": "ssr"},
    "ties": {"merge": "ties"},
    "orthogonal": {"merge": "orthogonal"},
}
TRIED = {
    "spectral, own slots": ("sum", "fedavg", "paper", "gradient", "gradient, anchored", "ssr", "ties"),
    "spectral, same slot": ("sum", "fedavg", "gradient, anchored"),
    "lora": ("sum", "fedavg", "gradient", "gradient, anchored", "ties"),
    "orthogonal": ("orthogonal", "gradient, anchored"),
}


def change_for(family: str, number: int) -> dict[str, Any]:
    """The family's settings for its concept of that number; a slot is written as columns."""
    change = dict(FAMILIES[family])
    if "slot" in change:
        k = int(change["slot"].format(k=number))
        change["slot"] = f"{8 * k}:{8 * k + 8}"
    return change


def family_rate(lab: Lab, family: str, quick: bool) -> tuple[float, list[Figures]]:
    """The family's learning rate, chosen on the concepts that are not reported."""
    if quick:
        return 1.0, []
    return best_rate(lab, RATES, TUNED[:2], **change_for(family, 0))


def adapters_of(lab: Lab, family: str, rate: float, names: Sequence[str], seed: int) -> list[tuple[Adapter, Figures]]:
    """Trained adapters with what each is alone."""
    out = []
    for number, name in enumerate(names):
        change = {**change_for(family, number), **scaled(lab, rate), "seed": seed}
        out.append((lab.trained(name, **change)[0], lab.alone(name, **change)))
    return out


def fused_cell(
    lab: Lab, family: str, merge: str, rate: float, names: Sequence[str], seed: int, strength: float = 1.0
) -> Figures:
    """One fusion: per concept the identity and the text match, and how far ordinary prompts drift."""

    def compute() -> Figures:
        held = adapters_of(lab, family, rate, names, seed)
        adapters = [adapter for adapter, _ in held]
        base = lab.fresh()
        before = lab.ordinary(base, seed)
        files = [Path(f"{name}.safetensors") for name in names]
        strengths = {} if strength == 1.0 else dict.fromkeys(names, strength)
        config = FuseConfig(adapters=files, output=Path("fused"), strength=strengths, seed=seed, **MERGES[merge])
        begun = time.monotonic()
        fuse_adapters(base, adapters, config, lab.progress)
        seconds = time.monotonic() - begun
        concepts: Figures = {}
        for adapter in adapters:
            pictures = lab.portraits(base, adapter.token, seed)
            concepts[adapter.name] = {
                "identity": lab.identity(pictures, adapter.name),
                "text": lab.text_match(pictures),
            }
        return {"concepts": concepts, "drift": drift(lab, before, lab.ordinary(base, seed)), "seconds": seconds}

    key = {"family": family, "change": FAMILIES[family], "merge": MERGES[merge], "rate": rate, "names": list(names)}
    return lab.cell("fused", {**key, "seed": seed, "strength": strength}, compute)


def drift(lab: Lab, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """Mean 1 − cosine of the identity encoder's vectors of the same prompt and seed before and after."""
    cosines = (embed(lab.encoder, before) * embed(lab.encoder, after)).sum(1)
    return float((1 - cosines).mean())


@study(
    "fusion",
    "Figs. 5, 12, 13",
    "Adapters in disjoint slots fuse by addition and keep every concept's identity better than averaging LoRAs.",
    (240, 2.0),
)
def run(lab: Lab, quick: bool) -> Findings:
    """Identity alone and fused, text match, drift and seconds, for every family and merge."""
    sizes, seeds = ((2,), (0,)) if quick else ((2, 4, 8), SEEDS)
    families = ("spectral, own slots", "lora") if quick else tuple(FAMILIES)
    rows: list[Row] = []
    sweeps: list[Row] = []
    missing: list[str] = []
    for family in families:
        try:
            rate, trials = family_rate(lab, family, quick)
        except TimeOver:
            missing.append(family)
            continue
        sweeps += [{"family": family, "rate": t["rate"], "identity, tuning concepts": t["identity"]} for t in trials]
        for size, merge in itertools.product(sizes, ("sum", "gradient, anchored") if quick else TRIED[family]):
            try:
                found = row(lab, family, merge, rate, REPORTED[:size], seeds)
            except TimeOver:
                missing.append(f"{family} by {merge} at K = {size}")
                continue
            rows.append({"family": family, "merge": merge, "K": size, **found})
            lab.note(f"{family}, {merge}, K = {size}: {found['of alone']} of alone")
    tables = [Table("Every family and merge", rows)]
    if sweeps:
        tables.append(Table("The sweep of the learning rate, on concepts that are not reported", sweeps))
    return Findings(tables, verdict(rows), {} if quick else {"sheet": sheet(lab)}, missing)


def row(lab: Lab, family: str, merge: str, rate: float, names: Sequence[str], seeds: Sequence[int]) -> Row:
    """One row of the table: means over concepts and seeds with their 95 % bootstrap intervals.

    Raises:
        TimeOver: not one seed was measured; a row of fewer seeds than asked for says how many they are.
    """
    alone, fused, floor, text, drifts, seconds = [], [], [], [], [], []
    for seed in seeds:
        try:
            cell = fused_cell(lab, family, merge, rate, names, seed)
            each = {a.name: figures["identity"] for a, figures in adapters_of(lab, family, rate, names, seed)}
        except TimeOver:
            continue
        alone += [each[name] for name in names]
        fused += [cell["concepts"][name]["identity"] for name in names]
        floor += [lab.generic(name, seed)["identity"] for name in names]
        text += [cell["concepts"][name]["text"] for name in names]
        drifts.append(cell["drift"])
        seconds.append(cell["seconds"])
    if not seconds:
        raise TimeOver(f"{family} by {merge} was not measured.")
    return {
        "seeds": len(seconds),
        "identity alone": told(alone),
        "fused": told(fused),
        "of alone": share(fused, alone),
        "of the way": share([f - g for f, g in zip(fused, floor)], [a - g for a, g in zip(alone, floor)]),
        "text match": told(text),
        "drift": told(drifts),
        "seconds": sum(seconds) / len(seconds),
    }


def verdict(rows: Sequence[Row]) -> str:
    """What the table says of the claim, by rule: the share kept by sums of slots against averaged LoRAs."""

    def mean(family: str, merge: str, size: int) -> float | None:
        found = [r for r in rows if (r["family"], r["merge"], r["K"]) == (family, merge, size)]
        return float(found[0]["of alone"].split()[0]) if found else None

    sentences = []
    for size in sorted({r["K"] for r in rows}):
        best = max((r for r in rows if r["K"] == size), key=lambda r: float(r["of alone"].split()[0]))
        ours, theirs = mean("spectral, own slots", "sum", size), mean("lora", "fedavg", size)
        same = mean("spectral, same slot", "sum", size)
        text = f"K = {size}: own slots summed keep {ours:.2f} of what they are alone"
        text += f", averaged LoRAs {theirs:.2f}" if theirs is not None else ""
        text += f", adapters in one same slot {same:.2f}" if same is not None else ""
        sentences.append(f"{text}; the best is {best['merge']} of {best['family']} with {best['of alone'].split()[0]}.")
    return " ".join(sentences)


def sheet(lab: Lab, seed: int = 0, size: int = 4) -> Image.Image:
    """References, each concept alone, and after the main merges: one row a concept."""
    rate, _ = family_rate(lab, "spectral, own slots", False)
    names = REPORTED[:size]
    adapters = [adapter for adapter, _ in adapters_of(lab, "spectral, own slots", rate, names, seed)]
    columns: dict[str, dict[str, list[Image.Image]]] = {
        "photos": {n: lab.references(n)[:4] for n in names},
        "alone": {},
    }
    for adapter in adapters:
        base = lab.fresh()
        put_on(base, [(adapter, 1.0)])
        columns["alone"][adapter.name] = lab.portraits(base, adapter.token, seed)[:4]
    for merge in ("sum", "fedavg", "gradient, anchored"):
        base = lab.fresh()
        config = FuseConfig(adapters=[Path(n) for n in names], output=Path("fused"), seed=seed, **MERGES[merge])
        fuse_adapters(base, adapters, config)
        columns[merge] = {a.name: lab.portraits(base, a.token, seed)[:4] for a in adapters}
    tiles = {title: [grid([i.resize((64, 64)) for i in row[n]], 2) for n in names] for title, row in columns.items()}
    side, gap, top = tiles["photos"][0].width, 10, 16
    out = Image.new("RGB", ((side + gap) * len(tiles) + gap, (side + gap) * len(names) + top + gap), "white")
    draw = ImageDraw.Draw(out)
    for column, (title, images) in enumerate(tiles.items()):
        draw.text((gap + column * (side + gap), 3), title, fill="black")
        for index, image in enumerate(images):
            out.paste(image, (gap + column * (side + gap), top + index * (side + gap)))
    return out
