"""A concept in a learned style: how much of both is kept when their adapters are fused?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.apply import put_adapters
from ..config.evaluate import PLACES
from ..config.fuse import FuseConfig
from ..config.train import in_style
from ..core.names import with_article
from ..data.image_grid import labelled_grid
from ..merging.fuse import fuse_adapters
from ..metrics.encoders import Encoder, load_encoder
from ..metrics.statistics import leading, mean_text, share_text
from ..models.base import Base
from ..scenes.sampling import sample
from .fusion import MERGES, change_for, family_rate
from .registry import Findings, Row, Table, study
from .runner import RATES, SEEDS, Figures, NotMeasured, StudyRunner, scaled, swept_rate

CONTENTS = ("rex", "brew", "inky", "zippy")
STYLES = ("poster", "bands")
TUNING_STYLE = "beads"  # a style's rate is chosen on it, with the base's own nouns, and it is never reported
FAMILIES = ("spectral, own slots", "lora")
NUMBER = {"content": 0, "style": 1}  # of the adapter, which says its slot
STYLE_MERGES: dict[str, dict[str, Any]] = {
    **{name: MERGES[name] for name in ("sum", "fedavg", "ties", "ssr", "gradient, prior term", "knots")},
    "np-lora, mu 0.25": {"merge": "np-lora", "options": {"mu": 0.25}},
    "np-lora, mu 1": {"merge": "np-lora"},
    "np-lora, mu 4": {"merge": "np-lora", "options": {"mu": 4.0}},
}
GOAL = 0.9  # of alone, for both


@cache
def encoders() -> tuple[Encoder, Encoder]:
    """The encoder of identity in any style, and that of styles."""
    return load_encoder("pocket-any-style"), load_encoder("pocket-style")


def mean_cosine(encoder: Encoder, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """Of every picture with every reference."""
    return float((encoder.embed(pictures) @ encoder.embed(references).mT).mean())


def figures_of(lab: StudyRunner, pictures: Sequence[Image.Image], content: str, style: str) -> Figures:
    """Identity of the content in any style, and how near the style's own pictures are."""
    identity, looks = encoders()
    return {
        "identity": mean_cosine(identity, pictures, lab.references(content)),
        "style": mean_cosine(looks, pictures, lab.references(style)),
    }


def pictures_of(lab: StudyRunner, base: Base, subject: str, style: str, seed: int) -> list[Image.Image]:
    """A subject in every location, in a style if its token is given."""
    prompts = [f"a photo of {subject} {location}" for location in PLACES]
    if style:
        prompts = [in_style(f"{prompt},", style) for prompt in prompts]
    return sample(base, prompts, [1000 * seed + index for index in range(len(prompts))], lab.pictures_config)


def style_rate(lab: StudyRunner, family: str, quick: bool) -> tuple[float, list[Figures]]:
    """The rate of a style's training by which the tuning style shows best on the base's own things."""
    if quick:
        return 1.0, []

    def match(rate: float) -> float:
        found = [
            alone_cell(lab, family, {"style": rate}, content, TUNING_STYLE, seed)
            for content in CONTENTS
            for seed in SEEDS
        ]
        return sum(cell["style alone"]["style"] for cell in found) / len(found)

    best, values = swept_rate(lab, f"{family}, {TUNING_STYLE}", match, RATES)
    return best, [{"rate": rate, "style": value} for rate, value in values.items()]


def adapter_of(lab: StudyRunner, family: str, kind: str, name: str, rate: float, seed: int) -> Adapter:
    """A trained adapter of a content or a style."""
    change = {**change_for(family, NUMBER[kind]), **scaled(lab, rate), "seed": seed}
    return lab.trained(name, **change)[0]


def key_of(family: str, rates: dict[str, float], content: str, style: str, seed: int) -> dict[str, Any]:
    return {"family": family, "rates": rates, "content": content, "style": style, "seed": seed}


def alone_cell(lab: StudyRunner, family: str, rates: dict[str, float], content: str, style: str, seed: int) -> Figures:
    """Figures of each adapter alone and of the untouched base; without a content's rate those of the style only."""

    def compute() -> Figures:
        noun = with_article(lab.concept(content).noun)
        base = lab.fresh()
        found = {"base": figures_of(lab, pictures_of(lab, base, noun, "", seed), content, style)}
        trained = adapter_of(lab, family, "style", style, rates["style"], seed)
        put_adapters(base, [(trained, 1.0)])
        found["style alone"] = figures_of(lab, pictures_of(lab, base, noun, trained.token, seed), content, style)
        if "content" in rates:
            base = lab.fresh()
            trained = adapter_of(lab, family, "content", content, rates["content"], seed)
            put_adapters(base, [(trained, 1.0)])
            found["content alone"] = figures_of(lab, pictures_of(lab, base, trained.token, "", seed), content, style)
        return found

    return lab.cell("style-alone", key_of(family, rates, content, style, seed), compute)


def both_pictures(
    lab: StudyRunner, family: str, rates: dict[str, float], content: str, style: str, seed: int, merge: dict[str, Any]
) -> list[Image.Image]:
    """The content in the style after their adapters were fused."""
    adapters = [
        adapter_of(lab, family, kind, name, rates[kind], seed)
        for kind, name in (("content", content), ("style", style))
    ]
    base, files = lab.fresh(), [Path(f"{adapter.name}.safetensors") for adapter in adapters]
    fuse_adapters(base, adapters, FuseConfig(adapters=files, output=Path("fused"), seed=seed, **merge))
    return pictures_of(lab, base, adapters[0].token, adapters[1].token, seed)


def both_cell(
    lab: StudyRunner, family: str, rates: dict[str, float], content: str, style: str, seed: int, merge: str
) -> Figures:
    """Figures of the content in the style by one merge."""

    def compute() -> Figures:
        pictures = both_pictures(lab, family, rates, content, style, seed, STYLE_MERGES[merge])
        return figures_of(lab, pictures, content, style)

    key = key_of(family, rates, content, style, seed)
    return lab.cell("style-both", {**key, "merge": STYLE_MERGES[merge]}, compute)


@study(
    "styles",
    "none: NP-LoRA's task",
    "A concept and a style that were trained apart show together when their adapters are fused.",
    (90, 0.1),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Identity and style of every merge, as shares of each adapter alone."""
    contents, styles, seeds = (CONTENTS[:1], STYLES[:1], (0,)) if quick else (CONTENTS, STYLES, SEEDS)
    merges = ("sum", "np-lora, mu 1") if quick else tuple(STYLE_MERGES)
    rows: list[Row] = []
    sweeps: list[Row] = []
    missing: list[str] = []
    chosen: dict[str, dict[str, float]] = {}
    for family in FAMILIES[:1] if quick else FAMILIES:
        try:
            content_rate, _ = family_rate(lab, family, quick)
            rate, trials = style_rate(lab, family, quick)
            chosen[family] = {"content": content_rate, "style": rate}
            sweeps += [
                {"family": family, "rate": t["rate"], f"style match, {TUNING_STYLE}": t["style"]} for t in trials
            ]
            pairs = list(itertools.product(seeds, contents, styles))
            alone = [alone_cell(lab, family, chosen[family], c, s, seed) for seed, c, s in pairs]
        except NotMeasured:
            missing.append(family)
            continue
        for merge in merges:
            try:
                both = [both_cell(lab, family, chosen[family], c, s, seed, merge) for seed, c, s in pairs]
            except NotMeasured:
                missing.append(f"{family}: {merge}")
                continue
            rows.append({"family": family, "merge": merge, **style_row(alone, both, [f"{c}+{s}" for _, c, s in pairs])})
            lab.note(f"{family}, {merge}: identity {rows[-1]['identity of alone']}, style {rows[-1]['style of alone']}")
    tables = [Table("A content and a style fused: shares of each alone", rows)]
    if sweeps:
        tables.append(Table("The sweep of a style's learning rate", sweeps))
    pictures: dict[str, Image.Image] = {}
    if rows and not quick:
        try:
            pictures = {"sheet": styles_sheet(lab, chosen)}
        except NotMeasured:
            missing.append("the sheet")
    return Findings(tables, verdict(rows), pictures, missing)


def style_row(alone: Sequence[Figures], both: Sequence[Figures], pairs: Sequence[str]) -> Row:
    """Means over contents, styles and seeds with their intervals; clusters are the pairs."""
    identity = [cell["content alone"]["identity"] for cell in alone]
    style = [cell["style alone"]["style"] for cell in alone]
    kept, shown = [cell["identity"] for cell in both], [cell["style"] for cell in both]
    floors = [cell["base"]["identity"] for cell in alone], [cell["content alone"]["style"] for cell in alone]
    return {
        "pairs": len(pairs),
        "identity alone": mean_text(identity, pairs),
        "identity": mean_text(kept, pairs),
        "identity of alone": share_text(kept, identity, pairs),
        "identity, base": mean_text(floors[0], pairs),
        "style alone": mean_text(style, pairs),
        "style": mean_text(shown, pairs),
        "style of alone": share_text(shown, style, pairs),
        "style, content alone": mean_text(floors[1], pairs),
    }


def worse_share(row: Row) -> float:
    """The smaller of the two shares of alone."""
    return min(leading(row[f"{part} of alone"]) for part in ("identity", "style"))


def verdict(rows: Sequence[Row]) -> str:
    """By rule: the merge whose worse share is the highest, and whether both reach the goal."""
    if not rows:
        return "Nothing was measured yet."
    best = max(rows, key=worse_share)
    reached = "both reach" if worse_share(best) >= GOAL else "they do not both reach"
    return (
        f"Best is {best['merge']} of {best['family']}: identity {best['identity of alone']} and style "
        f"{best['style of alone']} of alone; {reached} {GOAL:.2f}."
    )


def styles_sheet(lab: StudyRunner, chosen: dict[str, dict[str, float]]) -> Image.Image:
    """Rows: the contents in each style. Columns: each alone, then some merges."""
    family, seed = next(iter(chosen)), 0
    rates, rows = chosen[family], []
    shown = ("sum", "ssr", "gradient, prior term", "np-lora, mu 1")
    for content, style in itertools.product(CONTENTS, STYLES):
        row = []
        for kind, name in (("content", content), ("style", style)):
            base, trained = lab.fresh(), adapter_of(lab, family, kind, name, rates[kind], seed)
            put_adapters(base, [(trained, 1.0)])
            noun = with_article(lab.concept(content).noun)
            what = (trained.token, "") if kind == "content" else (noun, trained.token)
            row.append(pictures_of(lab, base, *what, seed)[0])
        row += [both_pictures(lab, family, rates, content, style, seed, STYLE_MERGES[merge])[0] for merge in shown]
        rows.append(row)
    return labelled_grid(rows, column_labels=["content alone", "style alone", *shown], gap=4)
