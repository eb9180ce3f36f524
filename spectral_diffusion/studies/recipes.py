"""The project's question: which recipe keeps eight concepts themselves, or sixteen, and ordinary prompts as they were?

Every recipe is tuned on concepts that are not reported; the best settings of the best kinds are then told for others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.apply import put_adapters
from ..config.evaluate import GENERIC_SUBJECTS
from ..config.fuse import DistillConfig
from ..config.train import generic_subject
from ..metrics.statistics import mean_text, share_text
from ..models.base import Base
from .fusion import NARROW, NOTHING, RANK, change_for, drift_between, family_rate
from .fusion import sheet_of as tiles
from .registry import Findings, Row, Table, study
from .runner import MANY, TEST_CONCEPTS, TUNING_CONCEPTS, Figures, StudyRunner, TimeOver, scaled

SEEDS = (0, 1, 2)
FAMILY = "spectral, own slots"
KEPT = {8: 0.95, 16: 0.90}  # what is wanted: at least so much of single-concept identity, by the number of concepts
DRIFT = 0.05  # and at most so much drift


@dataclass(frozen=True)
class Recipe:
    """One way from adapters to one model.

    Attributes:
        kind: what is tried; the best setting of a kind is reported.
        setting: what tells it from others of its kind.
        merge: settings of the fusion; ``strength`` is every concept's.
        train: what is changed in training the adapters.
        factors: ``projected`` takes what A_U and A_V have in the other concepts' bands away; ``levelled`` gives every
            concept's change the same norm.
        taught: settings of teaching the fused base what the adapters draw alone, if it is taught.
        routed: nothing is fused; a prompt is drawn with the adapter whose token it holds.
    """

    kind: str
    setting: str
    merge: Mapping[str, Any] = field(default_factory=lambda: {"merge": "spectral"})
    strength: float = 1.0
    train: Mapping[str, Any] = field(default_factory=dict)
    factors: str = ""
    taught: Mapping[str, Any] | None = None
    routed: bool = False


def watched(merge: str = "gradient", **settings: Any) -> dict[str, Any]:
    """A merge that watches activations, with settings of what it watches."""
    return {"merge": merge, "calibration": settings}


def lessons(steps: int, **settings: Any) -> dict[str, Any]:
    """Settings of teaching; pictures are drawn with the studies' guidance."""
    usual = {"guidance_scale": 2.0, "learning_rate": 1e-4, "prior_share": 0.75, "token_learning_rate": 1e-3}
    return {"steps": steps, **usual, **settings}


# No activations of the empty prompt, whose answer every adapter changes in its own way.
OWN_WORDS: dict[str, Any] = {"guidance_scale": 1.0}
CAREFUL = {"prior": {"loss_weight": 4.0}}
WORDS_ONLY = {"target_modules": "key-value"}  # what reads words: nothing else of the network changes
MORE_LESSONS = {"num_images": 48, "num_prior_images": 480}
ALL_OF_IT = {"target_modules": r"re:unet\..*"}
FROM_16 = watched(prior_weight=16.0, **OWN_WORDS)
FROM_4 = watched(prior_weight=4.0, **OWN_WORDS)
TRIALS: tuple[Recipe, ...] = (
    Recipe("sum", "λ = 1.0"),
    *(Recipe("gradient, anchored", f"μ = {m}", watched(prior_weight=m)) for m in (1.0, 2.0, 4.0, 8.0)),
    *(Recipe("gradient, own words", f"μ = {m}", watched(prior_weight=m, **OWN_WORDS)) for m in (1.0, 4.0, 16.0)),
    *(
        Recipe("taught for 300 steps", f"rate {rate:g}", FROM_16, taught=lessons(300, learning_rate=rate))
        for rate in (1e-4, 3e-4)
    ),
    *(
        Recipe("taught for 900 steps", setting, FROM_16, taught=lessons(900, learning_rate=3e-4, **more))
        for setting, more in (("", {}), ("more lessons", MORE_LESSONS))
    ),
    *(
        Recipe(
            f"taught for {n:,} steps, half ordinary",
            "more lessons" + (f", from μ = {m}" if m != 16.0 else ""),
            watched(prior_weight=m, **OWN_WORDS),
            taught=lessons(n, learning_rate=3e-4, prior_share=0.5, **MORE_LESSONS),
        )
        for n, m in ((900, 16.0), (900, 64.0), (1800, 16.0))
    ),
    *(
        Recipe(
            f"all of the U-Net taught for {n:,} steps",
            "half ordinary, more lessons",
            FROM_16,
            taught=lessons(n, prior_share=0.5, **ALL_OF_IT, **MORE_LESSONS),
        )
        for n in (900, 1800)
    ),
    Recipe("taught for 300 steps", "half ordinary", FROM_16, taught=lessons(300, prior_share=0.5)),
    Recipe("taught for 300 steps", "words left alone", FROM_16, taught=lessons(300, token_learning_rate=0.0)),
    Recipe("taught for 300 steps", "from μ = 1", watched(prior_weight=1.0, **OWN_WORDS), taught=lessons(300)),
    *(
        Recipe("words only, gradient", f"μ = {m}", watched(prior_weight=m, **OWN_WORDS), train=WORDS_ONLY)
        for m in (1.0, 4.0, 16.0)
    ),
    Recipe("words only, taught", "300 steps", FROM_4, train=WORDS_ONLY, taught=lessons(300)),
    Recipe("words only, sum", "λ = 1.0", train=WORDS_ONLY),
    *(Recipe("sum", f"λ = {s}", strength=s) for s in (0.3, 0.5, 0.7)),
    *(Recipe("sum, norms levelled", f"λ = {s}", strength=s, factors="levelled") for s in (0.5, 1.0)),
    *(Recipe("sum, off the other bands", f"λ = {s}", strength=s, factors="projected") for s in (0.5, 1.0)),
    *(Recipe("ssr", f"μ = {m}", watched("ssr", prior_weight=m, **OWN_WORDS)) for m in (1.0, 4.0)),
    *(
        Recipe("gradient, more watched", f"24 pictures, μ = {m}", watched(prior_weight=m, num_images=24, **OWN_WORDS))
        for m in (4.0, 16.0)
    ),
    Recipe(
        "gradient, ridge to the mean",
        "μ = 4",
        {**watched(prior_weight=4.0, **OWN_WORDS), "options": {"ridge": 1e-3, "ridge_to": "mean"}},
    ),
    Recipe("gradient, stage by stage", "μ = 4", watched(prior_weight=4.0, calibrate_on="previous_stages", **OWN_WORDS)),
    Recipe("routed by prompt, not fused", "", routed=True),
    *(
        Recipe("held to the base, gradient", f"weight 4, μ = {m}", watched(prior_weight=m, **OWN_WORDS), train=CAREFUL)
        for m in (1.0, 4.0)
    ),
    Recipe("held to the base, taught", "300 steps", FROM_4, train=CAREFUL, taught=lessons(300)),
    *(Recipe("S-normalised, sum", f"λ = {s}", strength=s, train={"normalize": True}) for s in (0.5, 1.0)),
    Recipe("S-normalised, gradient", "μ = 4", FROM_4, train={"normalize": True}),
)
MOST = 7  # kinds that are reported, the best ones
QUICK = (
    Recipe("sum, off the other bands", "λ = 1", factors="projected"),
    Recipe(
        "taught",
        "2 steps",
        watched(num_images=2, num_inference_steps=2),
        taught=lessons(2, num_images=4, noises_per_image=2, num_prior_images=4, batch_size=4),
    ),
)


def rank_for(size: int) -> int:
    """The rank of so many concepts' slots."""
    return RANK if size <= len(TEST_CONCEPTS) else NARROW


def recipe_changes(lab: StudyRunner, names: Sequence[str], seed: int, quick: bool) -> list[dict[str, Any]]:
    """Settings of every concept's ordinary training."""
    rank = rank_for(len(names))
    rate, _ = family_rate(lab, FAMILY, quick, rank)
    return [{**change_for(FAMILY, n, rank), **scaled(lab, rate), "seed": seed} for n in range(len(names))]


def adapters_for(lab: StudyRunner, recipe: Recipe, names: Sequence[str], seed: int, quick: bool) -> list[Adapter]:
    """The adapters that a recipe starts from, their factors changed as it says."""
    changes = recipe_changes(lab, names, seed, quick)
    found = [lab.trained(name, **{**change, **recipe.train})[0] for name, change in zip(names, changes, strict=True)]
    return projected(found) if recipe.factors == "projected" else found


def projected(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Every adapter's A_U and A_V without what lies in the bands of the others: A − B Bᵀ A.

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


def recipe_scales(recipe: Recipe, adapters: Sequence[Adapter]) -> dict[str, float]:
    """Every concept's λ; levelled ones bring each change's norm to the mean."""
    norms = {adapter.name: adapter.norm() or 1.0 for adapter in adapters}
    middle = sum(norms.values()) / len(norms)
    level = recipe.factors == "levelled"
    return {name: recipe.strength * (middle / norm if level else 1.0) for name, norm in norms.items()}


def fused_by(lab: StudyRunner, recipe: Recipe, adapters: Sequence[Adapter], seed: int) -> Base:
    """The one model that a recipe makes of the adapters."""
    more = {"scales": recipe_scales(recipe, adapters), "seed": seed, **recipe.merge}
    if recipe.taught:
        more["distill"] = DistillConfig(prior_subjects=things(lab), **recipe.taught)
    return lab.fused(adapters, **more)


def things(lab: StudyRunner) -> list[str]:
    """What ordinary prompts speak of: the recipe's nouns and colours but for the prompts that drift is told on."""
    words = lab.recipe["train"]["prior"]
    found = [generic_subject(colour, noun) for colour in words["adjectives"] for noun in words["nouns"]]
    return [thing for thing in found if thing not in GENERIC_SUBJECTS]


def recipe_cell(lab: StudyRunner, recipe: Recipe, names: Sequence[str], seed: int, quick: bool) -> Figures:
    """Identity and text match of every concept from the one model, drift, and the seconds to make it."""

    def compute() -> Figures:
        adapters = adapters_for(lab, recipe, names, seed, quick)
        begun = time.monotonic()
        base = lab.fresh() if recipe.routed else fused_by(lab, recipe, adapters, seed)
        seconds = time.monotonic() - begun
        moved = 0.0 if recipe.routed else drift_between(lab, lab.ordinary(lab.fresh(), seed), lab.ordinary(base, seed))
        concepts: Figures = {}
        for adapter in adapters:
            if recipe.routed:
                base = lab.fresh()
                put_adapters(base, [(adapter, 1.0)])
            pictures = lab.portraits(base, adapter.token, seed)
            concepts[adapter.name] = {
                "identity": lab.identity(pictures, adapter.name),
                "text": lab.text_match(pictures),
            }
        return {"concepts": concepts, "drift": moved, "seconds": 0.0 if recipe.routed else seconds}

    decides = {key: value for key, value in asdict(recipe).items() if key not in {"kind", "setting"}}
    return lab.cell("recipe", {"recipe": decides, "family": FAMILY, "names": list(names), "seed": seed}, compute)


def alone(lab: StudyRunner, names: Sequence[str], seed: int, quick: bool) -> dict[str, float]:
    """What every concept's ordinary adapter is alone: the whole that recipes are measured by, whatever they train."""
    changes = recipe_changes(lab, names, seed, quick)
    return {name: float(lab.alone(name, **change)["identity"]) for name, change in zip(names, changes, strict=True)}


@study(
    "recipes",
    "sec. 4.2 and the project's question",
    "Concepts fused into one model stay themselves.",
    (480, 0.7),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """The trials on concepts that are not reported; the best of the best kinds on eight and sixteen that are."""
    trials, names = (QUICK, TUNING_CONCEPTS[:2]) if quick else (TRIALS, TUNING_CONCEPTS)
    reported, seeds = ((TEST_CONCEPTS[:2],), (0,)) if quick else ((TEST_CONCEPTS, MANY), SEEDS)
    rows: list[Row] = []
    missing: list[str] = []
    best: dict[str, tuple[float, Recipe]] = {}
    for recipe in trials:
        try:
            cell = recipe_cell(lab, recipe, names, 0, quick)
            whole = alone(lab, names, 0, quick)
        except TimeOver:
            missing.append(f"the trial of {recipe.kind}, {recipe.setting}")
            continue
        share_kept = sum(cell["concepts"][name]["identity"] for name in names) / sum(whole.values())
        rows.append({"kind": recipe.kind, "setting": recipe.setting, "of alone": share_kept, "drift": cell["drift"]})
        lab.note(f"{recipe.kind}, {recipe.setting}: {share_kept:.3f} of alone, drift {cell['drift']:.3f}")
        if recipe.kind not in best or share_kept - cell["drift"] > best[recipe.kind][0]:
            best[recipe.kind] = share_kept - cell["drift"], recipe
    chosen = worth_reporting(list(best.values()))
    told_rows = [row for some in reported for row in report(lab, chosen, some, seeds, quick, missing)]
    tables = [
        Table("The best setting of each of the best kinds, on the reported concepts", told_rows),
        Table(f"Every trial, K = {len(names)}, on concepts that are not reported", rows),
    ]
    pictures: dict[str, Image.Image] = {}
    shown = [row for row in told_rows if row["K"] == len(TEST_CONCEPTS)]
    try:
        pictures = {} if quick else {"sheet": recipe_sheet(lab, worth_showing(chosen, shown))}
    except TimeOver:
        missing.append("the sheet")
    return Findings(tables, verdict(told_rows), pictures, missing)


def worth_reporting(best: Sequence[tuple[float, Recipe]]) -> list[Recipe]:
    """The best kinds by what they keep without drift, and the best that only merges.

    Those that train adapters anew are told only where they are ahead of the rest.
    """
    ahead = max((score for score, recipe in best if not (recipe.train or recipe.routed)), default=0.0)
    ranked = [r for score, r in sorted(best, key=lambda pair: -pair[0]) if not r.train or score > ahead]
    merged = [recipe for recipe in ranked[MOST:] if not (recipe.taught or recipe.routed)]
    return ranked[:MOST] + (merged[:1] if all(r.taught or r.routed for r in ranked[:MOST]) else [])


def worth_showing(recipes: Sequence[Recipe], rows: Sequence[Row]) -> list[Recipe]:
    """The best that fuses and the best that only merges, by the rows that tell of them."""
    score = {row["kind"]: retention(row) - moved(row) for row in rows}
    fused = sorted((r for r in recipes if not r.routed and r.kind in score), key=lambda r: -score[r.kind])
    merged = [recipe for recipe in fused if not recipe.taught]
    return fused[:1] if fused[:1] == merged[:1] else [*fused[:1], *merged[:1]]


def report(
    lab: StudyRunner,
    recipes: Sequence[Recipe],
    names: Sequence[str],
    seeds: Sequence[int],
    quick: bool,
    missing: list[str],
) -> list[Row]:
    """One row a recipe that every seed was measured of, over concepts and seeds; one seed after the other."""
    cells: dict[str, list[tuple[int, Figures, dict[str, float]]]] = {}
    if len(names) > len(TEST_CONCEPTS):
        recipes = [recipe for recipe in recipes if not (recipe.train or recipe.routed)]
    for seed, recipe in itertools.product(seeds, recipes):
        try:
            cell = recipe_cell(lab, recipe, names, seed, quick)
            cells.setdefault(recipe.kind, []).append((seed, cell, alone(lab, names, seed, quick)))
        except TimeOver:
            missing.append(f"{recipe.kind} at K = {len(names)}, seed {seed}")
            continue
        told_of = recipe_row(recipe, cells[recipe.kind][-1:], names)
        both = f"{retention(told_of):.2f} of alone, drift {moved(told_of):.3f}"
        lab.note(f"reported, K = {len(names)}, seed {seed}: {recipe.kind}: {both}")
    whole = [recipe for recipe in recipes if len(cells.get(recipe.kind, [])) == len(seeds)]
    return [recipe_row(recipe, cells[recipe.kind], names) for recipe in whole]


def recipe_row(recipe: Recipe, cells: Sequence[tuple[int, Figures, dict[str, float]]], names: Sequence[str]) -> Row:
    """Means over concepts and seeds with their 95 % intervals, a bootstrap over concepts."""
    fused = [cell["concepts"][name]["identity"] for _, cell, _ in cells for name in names]
    text = [cell["concepts"][name]["text"] for _, cell, _ in cells for name in names]
    return {
        "kind": recipe.kind,
        "setting": recipe.setting,
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
    """Which recipe does what is wanted, by the number of concepts; else how far the best is."""
    sentences = []
    for size in sorted({row["K"] for row in rows}):
        fused = [row for row in rows if row["K"] == size and not row["kind"].startswith("routed")]
        if not fused:
            continue
        wanted = KEPT.get(size, max(KEPT.values()))
        enough = [r for r in fused if retention(r) >= wanted and moved(r) <= DRIFT]
        best = max(enough or fused, key=lambda r: retention(r) - moved(r))
        told_of = f"{best['kind']} ({best['setting']}) keeps {retention(best):.2f} of single-concept identity"
        both = f"at least {wanted} at a drift of at most {DRIFT}"
        end = f"wanted was {both}." if enough else f"no fused model has {both}."
        sentences.append(f"K = {size}: {told_of} at a drift of {moved(best):.3f}; {end}")
    return " ".join(sentences) or NOTHING


def retention(row: Row) -> float:
    """The share of single-concept identity in a row."""
    return float(row["of alone"].split()[0])


def moved(row: Row) -> float:
    """The drift of ordinary prompts in a row."""
    return float(row["drift"].split()[0])


def recipe_sheet(lab: StudyRunner, recipes: Sequence[Recipe], seed: int = 0) -> Image.Image:
    """Photos, each concept alone, and from one model by recipes of which one is taught and one not: a row a concept."""
    lab.check_time()
    columns: dict[str, dict[str, list[Image.Image]]] = {"photos": {n: lab.references(n)[:4] for n in TEST_CONCEPTS}}
    plain = Recipe("", "", routed=True)
    own = adapters_for(lab, plain, TEST_CONCEPTS, seed, False)
    columns["alone"] = {}
    for adapter in own:
        base = lab.fresh()
        put_adapters(base, [(adapter, 1.0)])
        columns["alone"][adapter.name] = lab.portraits(base, adapter.token, seed)[:4]
    for recipe in recipes:
        adapters = adapters_for(lab, recipe, TEST_CONCEPTS, seed, False)
        base = fused_by(lab, recipe, adapters, seed)
        columns["taught" if recipe.taught else "merged"] = {
            a.name: lab.portraits(base, a.token, seed)[:4] for a in adapters
        }
    return tiles(columns, TEST_CONCEPTS, 48)
