"""Measures of images: identity, confusion between concepts, prompt match, drift; each with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.hooks import QUIET, Event, Hooks
from ..data.folder import Concept
from ..metrics.binding import binding_counts, binding_of, collapse_rate, collapsed_pictures
from ..metrics.encoders import Encoder
from ..metrics.statistics import spread
from ..metrics.text import text_match
from ..metrics.views import View, embed_references, embed_views

PHOTOS = "photos"  # the setting of the references themselves
ALL = "all"  # in place of a concept: the images of all of them
Figure = dict[str, float]  # mean, low and high of the 95 % bootstrap interval, n


@dataclass
class Scored:
    """A view and its scores: by encoder the mean cosine with each concept's photos; the match with its prompt."""

    view: View
    own: int  # index of its concept
    scores: dict[str, list[float]] = field(default_factory=dict)
    text: dict[str, float] = field(default_factory=dict)

    def identity(self, encoder: str) -> float:
        """Mean cosine with its own concept's photos."""
        return self.scores[encoder][self.own]

    def other(self, encoder: str) -> float | None:
        """Mean cosine with the photos of the nearest other concept; None without another."""
        rest = [score for index, score in enumerate(self.scores[encoder]) if index != self.own]
        return max(rest, default=None)

    def right(self, encoder: str) -> float | None:
        """1 if its own concept is the nearest, else 0; None without another."""
        other = self.other(encoder)
        return None if other is None else float(self.identity(encoder) > other)


def figure(values: Sequence[float | None], clusters: Sequence[str] | None = None) -> Figure | None:
    """The mean of the values that are not None, with its interval; ``clusters`` is the concept of each.

    Of few concepts it is the range of their means instead, and ``range`` is true.
    """
    present = [index for index, value in enumerate(values) if value is not None]
    numbers = [float(values[index] or 0.0) for index in present]
    if not numbers:
        return None
    low, high, is_range = spread(numbers, [clusters[index] for index in present] if clusters else None)
    return {"mean": float(np.mean(numbers)), "low": low, "high": high, "n": len(numbers), "range": is_range}


def with_interval(figure: Figure | None, digits: int = 2) -> str | None:
    """``0.71 [0.65, 0.77]``; a range ``0.71 (0.65 to 0.77)``."""
    if figure is None:
        return None
    mean, low, high = (f"{figure[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})" if figure["range"] else f"{mean} [{low}, {high}]"


def with_photos(shown: Mapping[str, Sequence[View]], concepts: Mapping[str, Concept]) -> dict[str, list[View]]:
    """The settings, preceded by the photos themselves, which are the upper bound."""
    photos = [View(name, p.path) for name, c in concepts.items() if len(c.photos) > 1 for p in c.photos]
    return {setting: list(views) for setting, views in {PHOTOS: photos, **shown}.items() if views}


def score(
    shown: Mapping[str, Sequence[View]],
    concepts: Mapping[str, Concept],
    encoders: Sequence[Encoder],
    hooks: Hooks = QUIET,
) -> dict[str, list[Scored]]:
    """Score every view with every encoder."""
    names = list(concepts)
    out = {setting: [Scored(view, names.index(view.concept)) for view in views] for setting, views in shown.items()}
    for number, encoder in enumerate(encoders, 1):
        references = embed_references(encoder, concepts)
        for setting, results in out.items():
            for result, vector in zip(results, embed_views(encoder, shown[setting]), strict=True):
                result.scores[encoder.name] = references.scores(result.view.concept, vector, setting == PHOTOS)
        hooks.progress(Event("measure", number, len(encoders)))
    for setting, results in out.items():
        for kind, values in text_match(shown[setting], encoders).items():
            for result, value in zip(results, values, strict=True):
                if value is not None:
                    result.text[kind] = value
    return out


def measurement_rows(setting: str, scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """One row per concept, and one of all: figures of identity by encoder, and of the text."""
    names = list(dict.fromkeys(result.view.concept for result in scored))
    rows = []
    for name in [*names, *([ALL] if len(names) > 1 else [])]:
        mine = [result for result in scored if name in (ALL, result.view.concept)]
        concepts = [result.view.concept for result in mine]
        by_encoder = {
            encoder: {
                "identity": figure([result.identity(encoder) for result in mine], concepts),
                "nearest other": figure([result.other(encoder) for result in mine], concepts),
                "right concept": figure([result.right(encoder) for result in mine], concepts),
            }
            for encoder in mine[0].scores
        }
        kinds = dict.fromkeys(kind for result in mine for kind in result.text)
        text = {kind: figure([result.text.get(kind) for result in mine], concepts) for kind in kinds}
        rows.append({"way": setting, "concept": name, "pictures": len(mine), "encoders": by_encoder, "text": text})
    return rows


def confusion_of(setting: str, scored: Sequence[Scored], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Per encoder the shares of each shown concept's pictures (rows) that are nearest to each concept (columns)."""
    rows = list(dict.fromkeys(result.view.concept for result in scored))
    out = []
    for encoder in scored[0].scores:
        shares = []
        for name in rows:
            nearest = [int(np.argmax(result.scores[encoder])) for result in scored if result.view.concept == name]
            shares.append([nearest.count(index) / len(nearest) for index in range(len(columns))])
        out.append({"way": setting, "encoder": encoder, "rows": rows, "columns": list(columns), "shares": shares})
    return out


def binding_rows(
    setting: str, scored: Sequence[Scored], photos: Sequence[Scored], concepts: Sequence[str]
) -> list[dict[str, Any]]:
    """Per encoder what became of the subjects of pictures that show several, in MultiBind's words.

    Args:
        photos: the concepts' own photos, scored; subjects with a single one are left out.
        concepts: whose scores there are, in order.
    """
    pictures: dict[Path, list[Scored]] = {}
    known = {result.view.concept for result in photos}
    for result in scored:
        if result.view.concept in known:
            pictures.setdefault(result.view.path, []).append(result)
    shared = [found for found in pictures.values() if len({result.own for result in found}) == len(found) > 1]
    out = []
    for encoder in scored[0].scores if shared else ():
        truth = torch.zeros(len(concepts), len(concepts))
        for index, name in enumerate(concepts):
            if name in known:
                own = [photo.scores[encoder] for photo in photos if photo.view.concept == name]
                truth[index] = torch.tensor(own).mean(0)
        kinds = []
        for found in shared:
            here = [result.own for result in found]
            similarity = torch.tensor([[result.scores[encoder][index] for index in here] for result in found])
            kinds.append(binding_of(similarity, truth[here][:, here]))
        counts = binding_counts(kinds)
        total = sum(counts.values())
        shares = {kind: count / total for kind, count in counts.items()}
        rates = {"collapse rate": collapse_rate(counts), "pictures with a collapse": collapsed_pictures(kinds)}
        out.append({"way": setting, "encoder": encoder, "pictures": len(shared), "subjects": total, **rates, **shares})
    return out


def image_drift(encoder: Encoder, before: Sequence[Path], after: Sequence[Path]) -> Figure | None:
    """1 − cosine of the same prompt and seed before and after; 0 means unchanged."""
    first, second = (embed_views(encoder, [View("", path) for path in paths]) for paths in (before, after))
    return figure((1 - (first * second).sum(1)).tolist())
