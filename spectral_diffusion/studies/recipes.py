"""Which fusion keeps eight or sixteen concepts, and leaves generic prompts unchanged?

Every variant is tuned on concepts that are not reported; the best settings of the best kinds are reported on others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.apply import put_adapters
from ..config.fuse import DistillConfig
from ..metrics.statistics import leading, mean_text, share_text
from ..models.base import Base
from .fusion import NARROW, NOTHING, RANK, change_for, drift_of, family_rate, prior_subjects
from .fusion import sheet_of as tiles
from .registry import Findings, Row, Table, study
from .runner import MANY, SEEDS, TEST_CONCEPTS, TUNING_CONCEPTS, Figures, NotMeasured, StudyRunner, scaled

FAMILY = "spectral, own slots"
KEPT = {8: 0.95, 16: 0.90}  # the goal: the least share of single-concept identity, by the number of concepts
DRIFT = 0.05  # the goal: the most drift


@dataclass(frozen=True)
class FusionVariant:
    """One procedure that makes one model of several adapters.

    Attributes:
        kind: the procedure; the best setting of a kind is reported.
        setting: what distinguishes it from others of its kind.
        merge: settings of the fusion.
        scale: of every concept.
        train: changed settings of the adapters' training.
        factors: ``projected`` removes the components of A_U and A_V in the other concepts' bands; ``equalized`` gives
            every concept's change the same norm.
        distill: settings of the distillation after the merge, if there is one.
        routed: nothing is fused; each prompt is generated with the adapter whose token it names.
    """

    kind: str
    setting: str
    merge: Mapping[str, Any] = field(default_factory=lambda: {"merge": "spectral"})
    scale: float = 1.0
    train: Mapping[str, Any] = field(default_factory=dict)
    factors: str = ""
    distill: Mapping[str, Any] | None = None
    routed: bool = False


def calibrated(merge: str = "gradient", **settings: Any) -> dict[str, Any]:
    """A merge with calibration, and its calibration settings."""
    return {"merge": merge, "calibration": settings}


def distilled(steps: int, **settings: Any) -> dict[str, Any]:
    """Distillation settings; images are generated with the studies' guidance."""
    defaults = {"guidance_scale": 2.0, "learning_rate": 1e-4, "prior_share": 0.75, "token_learning_rate": 1e-3}
    return {"steps": steps, **defaults, **settings}


# No activations of the empty prompt, whose prediction every adapter changes differently.
OWN_PROMPTS: dict[str, Any] = {"guidance_scale": 1.0}
CAREFUL = {"prior": {"loss_weight": 4.0}}
KEY_VALUE_ONLY = {"target_modules": "key-value"}  # only the layers that read the text
MORE_IMAGES = {"num_images": 48, "num_prior_images": 480}
WHOLE_UNET = {"target_modules": r"re:unet\..*"}
FROM_16 = calibrated(prior_weight=16.0, **OWN_PROMPTS)
SSR_16 = calibrated("ssr", prior_weight=16.0, **OWN_PROMPTS)
FROM_4 = calibrated(prior_weight=4.0, **OWN_PROMPTS)
TRIALS: tuple[FusionVariant, ...] = (
    *(FusionVariant("sum", f"λ = {s}", scale=s) for s in (0.5, 1.0)),
    FusionVariant("sum, equal norms", "λ = 1.0", factors="equalized"),
    FusionVariant("sum, off the other bands", "λ = 1.0", factors="projected"),
    FusionVariant("S-normalized, sum", "λ = 1.0", train={"normalize": True}),
    FusionVariant("S-normalized, gradient", "μ = 4", FROM_4, train={"normalize": True}),
    *(FusionVariant("gradient, prior term", f"μ = {m}", calibrated(prior_weight=m)) for m in (1.0, 4.0)),
    *(
        FusionVariant("gradient, own prompts", f"μ = {m}", calibrated(prior_weight=m, **OWN_PROMPTS))
        for m in (4.0, 16.0)
    ),
    FusionVariant(
        "gradient, ridge to the mean",
        "μ = 4",
        {**calibrated(prior_weight=4.0, **OWN_PROMPTS), "options": {"ridge": 1e-3, "ridge_to": "mean"}},
    ),
    FusionVariant(
        "gradient, stage by stage", "μ = 4", calibrated(prior_weight=4.0, calibrate_on="previous_stages", **OWN_PROMPTS)
    ),
    FusionVariant("ssr", "μ = 4", calibrated("ssr", prior_weight=4.0, **OWN_PROMPTS)),
    FusionVariant("key and value layers only, gradient", "μ = 4", FROM_4, train=KEY_VALUE_ONLY),
    FusionVariant("near the base, gradient", "weight 4, μ = 4", FROM_4, train=CAREFUL),
    *(
        FusionVariant("distilled, 300 steps", setting, FROM_16, distill=distilled(300, **more))
        for setting, more in (("", {}), ("half prior images", {"prior_share": 0.5}))
    ),
    FusionVariant(
        "distilled, 900 steps",
        "half prior images, more images",
        FROM_16,
        distill=distilled(900, learning_rate=3e-4, prior_share=0.5, **MORE_IMAGES),
    ),
    *(
        FusionVariant(
            f"whole U-Net distilled, {n:,} steps",
            "half prior images, more images",
            FROM_16,
            distill=distilled(n, prior_share=0.5, **WHOLE_UNET, **MORE_IMAGES),
        )
        for n in (900, 1800)
    ),
    # SSR changes generic prompts less than gradient fusion, and what it loses of the concepts can be distilled.
    *(
        FusionVariant(
            f"whole U-Net distilled from SSR, {n:,} steps",
            f"more images, learning rate {rate:g}",
            SSR_16,
            distill=distilled(n, learning_rate=rate, **WHOLE_UNET, **MORE_IMAGES),
        )
        for n, rate in ((900, 1e-4), (900, 2e-4), (900, 4e-4), (2700, 2e-4))
    ),
    FusionVariant("routed by prompt, not fused", "", routed=True),
)
MOST = 5  # the best kinds are reported, this many
QUICK = (
    FusionVariant("sum, off the other bands", "λ = 1", factors="projected"),
    FusionVariant(
        "distilled",
        "2 steps",
        calibrated(num_images=2, num_inference_steps=2),
        distill=distilled(2, num_images=4, noises_per_image=2, num_prior_images=4, batch_size=4),
    ),
)


def rank_for(size: int) -> int:
    """The rank of the slots of ``size`` concepts."""
    return RANK if size <= len(TEST_CONCEPTS) else NARROW


def train_changes(lab: StudyRunner, names: Sequence[str], seed: int, quick: bool) -> list[dict[str, Any]]:
    """Settings of every concept's training, without a variant's changes."""
    rank = rank_for(len(names))
    rate, _ = family_rate(lab, FAMILY, quick, rank)
    return [{**change_for(FAMILY, n, rank), **scaled(lab, rate), "seed": seed} for n in range(len(names))]


def adapters_for(
    lab: StudyRunner, variant: FusionVariant, names: Sequence[str], seed: int, quick: bool
) -> list[Adapter]:
    """The adapters that a variant starts from, with its changes to their factors."""
    changes = train_changes(lab, names, seed, quick)
    adapters = [
        lab.trained(name, **{**change, **variant.train})[0] for name, change in zip(names, changes, strict=True)
    ]
    return projected(adapters) if variant.factors == "projected" else adapters


def projected(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Every adapter's A_U and A_V without their components in the others' bands: A − B Bᵀ A.

    The bands are columns of one decomposition, so B is orthonormal where slots are disjoint.
    """
    out = []
    for adapter in adapters:
        parameters = dict(adapter.parameters)
        for layer, other in itertools.product(adapter.layers, adapters):
            if other is adapter:
                continue
            for name, band in (("A_U", other.bands[layer].U), ("A_V", other.bands[layer].V)):
                value = parameters[f"{layer}.{name}"]
                parameters[f"{layer}.{name}"] = value - band @ (band.mT @ value)
        out.append(replace(adapter, parameters=parameters))
    return out


def variant_scales(variant: FusionVariant, adapters: Sequence[Adapter]) -> dict[str, float]:
    """Every concept's λ; ``equalized`` brings each change's norm to the mean."""
    norms = {adapter.name: adapter.norm() or 1.0 for adapter in adapters}
    middle = sum(norms.values()) / len(norms)
    level = variant.factors == "equalized"
    return {name: variant.scale * (middle / norm if level else 1.0) for name, norm in norms.items()}


def fused_by(lab: StudyRunner, variant: FusionVariant, adapters: Sequence[Adapter], seed: int) -> Base:
    """The one model that a variant makes of the adapters."""
    more = {"scales": variant_scales(variant, adapters), "seed": seed, **variant.merge}
    if variant.distill:
        more["distill"] = DistillConfig(prior_subjects=prior_subjects(lab), **variant.distill)
    return lab.fused(adapters, **more)


def variant_cell(lab: StudyRunner, variant: FusionVariant, names: Sequence[str], seed: int, quick: bool) -> Figures:
    """Identity and text match of every concept in the one model, drift, and the seconds to make it."""

    def compute() -> Figures:
        lab.untouched_images(seed)  # before another base is loaded: there may be room for one
        adapters = adapters_for(lab, variant, names, seed, quick)
        begun = time.monotonic()  # distillation takes nearly all of it
        base = lab.fresh() if variant.routed else fused_by(lab, variant, adapters, seed)
        seconds = time.monotonic() - begun
        moved = 0.0 if variant.routed else drift_of(lab, base, seed)
        concepts: Figures = {}
        for adapter in adapters:
            if variant.routed:
                base = lab.fresh()
                put_adapters(base, [(adapter, 1.0)])
            pictures = lab.portraits(base, adapter.token, seed)
            concepts[adapter.name] = {
                "identity": lab.identity(pictures, adapter.name),
                "text": lab.text_match(pictures),
            }
        return {"concepts": concepts, "drift": moved, "seconds": 0.0 if variant.routed else seconds}

    key = {
        "rate": train_changes(lab, names, seed, quick)[0]["learning_rate"],
        "merge": variant.merge,
        "scale": variant.scale,
        "train": variant.train,
        "factors": variant.factors,
        "distill": variant.distill,
        "routed": variant.routed,
    }
    return lab.cell("recipe", {"recipe": key, "family": FAMILY, "names": list(names), "seed": seed}, compute)


def alone(lab: StudyRunner, names: Sequence[str], seed: int, quick: bool) -> dict[str, float]:
    """Identity of every concept's adapter alone, trained without a variant's changes: the reference of all variants."""
    changes = train_changes(lab, names, seed, quick)
    return {name: float(lab.alone(name, **change)["identity"]) for name, change in zip(names, changes, strict=True)}


@study(
    "recipes",
    "sec. 4.2 and the project's question",
    "Concepts fused into one model stay themselves.",
    (180, 0.3),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """The trials on concepts that are not reported; the best of the best kinds on eight and sixteen that are."""
    trials, names = (QUICK, TUNING_CONCEPTS[:2]) if quick else (TRIALS, TUNING_CONCEPTS)
    reported, seeds = ((TEST_CONCEPTS[:2],), (0,)) if quick else ((TEST_CONCEPTS, MANY), SEEDS)
    rows: list[Row] = []
    missing: list[str] = []
    best: dict[str, tuple[float, FusionVariant]] = {}
    for variant in trials:
        try:
            cell = variant_cell(lab, variant, names, 0, quick)
            whole = alone(lab, names, 0, quick)
        except NotMeasured:
            missing.append(f"the trial of {variant.kind}, {variant.setting}")
            continue
        share_kept = sum(cell["concepts"][name]["identity"] for name in names) / sum(whole.values())
        rows.append({"kind": variant.kind, "setting": variant.setting, "of alone": share_kept, "drift": cell["drift"]})
        lab.note(f"{variant.kind}, {variant.setting}: {share_kept:.3f} of alone, drift {cell['drift']:.3f}")
        if variant.kind not in best or share_kept - cell["drift"] > best[variant.kind][0]:
            best[variant.kind] = share_kept - cell["drift"], variant
    chosen = worth_reporting(list(best.values()))
    reported_rows = [row for some in reported for row in report(lab, chosen, some, seeds, quick, missing)]
    tables = [
        Table("The best setting of each of the best kinds, on the reported concepts", reported_rows),
        Table(f"Every trial, K = {len(names)}, on concepts that are not reported", rows),
    ]
    pictures: dict[str, Image.Image] = {}
    shown = [row for row in reported_rows if row["K"] == len(TEST_CONCEPTS)]
    try:
        pictures = {} if quick else {"sheet": variants_sheet(lab, worth_showing(chosen, shown))}
    except NotMeasured:
        missing.append("the sheet")
    return Findings(tables, verdict(reported_rows), pictures, missing)


def worth_reporting(best: Sequence[tuple[float, FusionVariant]]) -> list[FusionVariant]:
    """The best kinds by identity kept minus drift, and the best that only merges.

    Variants that train other adapters are reported only where they are ahead of the rest.
    """
    ahead = max((score for score, variant in best if not (variant.train or variant.routed)), default=0.0)
    ranked = [r for score, r in sorted(best, key=lambda pair: -pair[0]) if not r.train or score > ahead]
    merged = [variant for variant in ranked[MOST:] if not (variant.distill or variant.routed)]
    return ranked[:MOST] + (merged[:1] if all(r.distill or r.routed for r in ranked[:MOST]) else [])


def worth_showing(variants: Sequence[FusionVariant], rows: Sequence[Row]) -> list[FusionVariant]:
    """The best fused variant and the best that only merges, by their rows."""
    score = {row["kind"]: retention(row) - moved(row) for row in rows}
    fused = sorted((r for r in variants if not r.routed and r.kind in score), key=lambda r: -score[r.kind])
    merged = [variant for variant in fused if not variant.distill]
    return fused[:1] if fused[:1] == merged[:1] else [*fused[:1], *merged[:1]]


def report(
    lab: StudyRunner,
    variants: Sequence[FusionVariant],
    names: Sequence[str],
    seeds: Sequence[int],
    quick: bool,
    missing: list[str],
) -> list[Row]:
    """One row per variant that was measured with every seed, over concepts and seeds; seeds run one after the other."""
    cells: dict[str, list[tuple[int, Figures, dict[str, float]]]] = {}
    if len(names) > len(TEST_CONCEPTS):
        variants = [variant for variant in variants if not (variant.train or variant.routed)]
    for seed, variant in itertools.product(seeds, variants):
        try:
            cell = variant_cell(lab, variant, names, seed, quick)
            cells.setdefault(variant.kind, []).append((seed, cell, alone(lab, names, seed, quick)))
        except NotMeasured:
            missing.append(f"{variant.kind} at K = {len(names)}, seed {seed}")
            continue
        row = variant_row(variant, cells[variant.kind][-1:], names)
        both = f"{retention(row):.2f} of alone, drift {moved(row):.3f}"
        lab.note(f"reported, K = {len(names)}, seed {seed}: {variant.kind}: {both}")
    whole = [variant for variant in variants if len(cells.get(variant.kind, [])) == len(seeds)]
    return [variant_row(variant, cells[variant.kind], names) for variant in whole]


def variant_row(
    variant: FusionVariant, cells: Sequence[tuple[int, Figures, dict[str, float]]], names: Sequence[str]
) -> Row:
    """Means over concepts and seeds with their 95 % intervals, a bootstrap over concepts."""
    fused = [cell["concepts"][name]["identity"] for _, cell, _ in cells for name in names]
    text = [cell["concepts"][name]["text"] for _, cell, _ in cells for name in names]
    return {
        "kind": variant.kind,
        "setting": variant.setting,
        "K": len(names),
        "rank": rank_for(len(names)),
        "seeds": len(cells),
        "identity": mean_text(fused, names),
        "of alone": share_text(fused, [whole[name] for _, _, whole in cells for name in names], names),
        "text match": mean_text(text, names),
        "drift": mean_text([cell["drift"] for _, cell, _ in cells], digits=3),
        "seconds": sum(cell["seconds"] for _, cell, _ in cells) / len(cells),
    }


def verdict(rows: Sequence[Row]) -> str:
    """Which variant reaches the goal, by the number of concepts; else how far the best is."""
    sentences = []
    for size in sorted({row["K"] for row in rows}):
        fused = [row for row in rows if row["K"] == size and not row["kind"].startswith("routed")]
        if not fused:
            continue
        wanted = KEPT.get(size, max(KEPT.values()))
        enough = [r for r in fused if retention(r) >= wanted and moved(r) <= DRIFT]
        best = max(enough or fused, key=lambda r: retention(r) - moved(r))
        share_text = f"{best['kind']} ({best['setting']}) keeps {retention(best):.2f} of single-concept identity"
        both = f"at least {wanted} at a drift of at most {DRIFT}"
        end = f"wanted was {both}." if enough else f"no fused model has {both}."
        sentences.append(f"K = {size}: {share_text} at a drift of {moved(best):.3f}; {end}")
    return " ".join(sentences) or NOTHING


def retention(row: Row) -> float:
    """The share of single-concept identity in a row."""
    return leading(row["of alone"])


def moved(row: Row) -> float:
    """The drift of generic prompts in a row."""
    return leading(row["drift"])


def variants_sheet(lab: StudyRunner, variants: Sequence[FusionVariant], seed: int = 0) -> Image.Image:
    """Photos, each concept alone, and fused with and without distillation: one row per concept."""
    lab.check_time()
    columns: dict[str, dict[str, list[Image.Image]]] = {"photos": {n: lab.references(n)[:4] for n in TEST_CONCEPTS}}
    unchanged = FusionVariant("", "", routed=True)
    own = adapters_for(lab, unchanged, TEST_CONCEPTS, seed, False)
    columns["alone"] = {}
    for adapter in own:
        base = lab.fresh()
        put_adapters(base, [(adapter, 1.0)])
        columns["alone"][adapter.name] = lab.portraits(base, adapter.token, seed)[:4]
    for variant in variants:
        adapters = adapters_for(lab, variant, TEST_CONCEPTS, seed, False)
        base = fused_by(lab, variant, adapters, seed)
        columns["distilled" if variant.distill else "merged"] = {
            a.name: lab.portraits(base, a.token, seed)[:4] for a in adapters
        }
    return tiles(columns, TEST_CONCEPTS, 48)
