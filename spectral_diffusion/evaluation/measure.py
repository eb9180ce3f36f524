"""Measures of pictures: identity, who is taken for whom, the match with the prompt, drift; each with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.hooks import QUIET, Event, Hooks
from ..data.folder import Concept
from ..metrics.encoders import Encoder
from ..metrics.statistics import interval
from ..metrics.text import text_match
from ..metrics.views import View, embed_references, embed_views

PHOTOS = "photos"  # the way of being shown that is the references themselves
ALL = "all"  # in the place of a concept: the pictures of all of them
Figure = dict[str, float]  # mean, low and high of the 95 % bootstrap interval, n


@dataclass
class Scored:
    """A view with what was found: by encoder the mean cosine with each concept's photos; how it fits its prompt."""

    view: View
    own: int  # place of its concept among the concepts
    scores: dict[str, list[float]] = field(default_factory=dict)
    text: dict[str, float] = field(default_factory=dict)

    def identity(self, encoder: str) -> float:
        """Mean cosine with its own concept's photos."""
        return self.scores[encoder][self.own]

    def other(self, encoder: str) -> float | None:
        """Mean cosine with the photos of the nearest other concept, if there is another."""
        rest = [score for index, score in enumerate(self.scores[encoder]) if index != self.own]
        return max(rest, default=None)

    def right(self, encoder: str) -> float | None:
        """1 if its own concept is the nearest, else 0; None if there is no other."""
        other = self.other(encoder)
        return None if other is None else float(self.identity(encoder) > other)


def figure(values: Sequence[float | None], clusters: Sequence[str] | None = None) -> Figure | None:
    """The mean with its interval, of those values that are there; ``clusters`` says which concept each is of."""
    present = [index for index, value in enumerate(values) if value is not None]
    there = [float(values[index] or 0.0) for index in present]
    if not there:
        return None
    low, high = interval(there, [clusters[index] for index in present] if clusters else None)
    return {"mean": float(np.mean(there)), "low": low, "high": high, "n": len(there)}


def with_interval(found: Figure | None, digits: int = 2) -> str | None:
    """``0.71 [0.65, 0.77]``."""
    if found is None:
        return None
    return f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def with_photos(shown: Mapping[str, Sequence[View]], concepts: Mapping[str, Concept]) -> dict[str, list[View]]:
    """The ways of being shown, before them the photos themselves: the most that a picture can reach."""
    photos = [View(name, p.path) for name, c in concepts.items() if len(c.photos) > 1 for p in c.photos]
    return {way: list(views) for way, views in {PHOTOS: photos, **shown}.items() if views}


def score(
    ways: Mapping[str, Sequence[View]],
    concepts: Mapping[str, Concept],
    encoders: Sequence[Encoder],
    hooks: Hooks = QUIET,
) -> dict[str, list[Scored]]:
    """Look at every view with every encoder."""
    names = list(concepts)
    out = {way: [Scored(view, names.index(view.concept)) for view in views] for way, views in ways.items()}
    for number, encoder in enumerate(encoders, 1):
        references = embed_references(encoder, concepts)
        for way, found in out.items():
            for one, vector in zip(found, embed_views(encoder, ways[way]), strict=True):
                one.scores[encoder.name] = references.scores(one.view.concept, vector, way == PHOTOS)
        hooks.progress(Event("measure", number, len(encoders)))
    for way, found in out.items():
        for kind, values in text_match(ways[way], encoders).items():
            for one, value in zip(found, values, strict=True):
                if value is not None:
                    one.text[kind] = value
    return out


def measurement_rows(way: str, found: Sequence[Scored]) -> list[dict[str, Any]]:
    """One row a concept, and one of all: figures of identity by encoder, and of the text."""
    names = list(dict.fromkeys(one.view.concept for one in found))
    rows = []
    for name in [*names, *([ALL] if len(names) > 1 else [])]:
        mine = [one for one in found if name in (ALL, one.view.concept)]
        concepts = [one.view.concept for one in mine]
        by_encoder = {
            encoder: {
                "identity": figure([one.identity(encoder) for one in mine], concepts),
                "nearest other": figure([one.other(encoder) for one in mine], concepts),
                "right concept": figure([one.right(encoder) for one in mine], concepts),
            }
            for encoder in mine[0].scores
        }
        kinds = dict.fromkeys(kind for one in mine for kind in one.text)
        text = {kind: figure([one.text.get(kind) for one in mine], concepts) for kind in kinds}
        rows.append({"way": way, "concept": name, "pictures": len(mine), "encoders": by_encoder, "text": text})
    return rows


def confusion_of(way: str, found: Sequence[Scored], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Per encoder the shares of each shown concept's pictures (rows) that are nearest to each concept (columns)."""
    rows = list(dict.fromkeys(one.view.concept for one in found))
    out = []
    for encoder in found[0].scores:
        shares = []
        for name in rows:
            nearest = [int(np.argmax(one.scores[encoder])) for one in found if one.view.concept == name]
            shares.append([nearest.count(index) / len(nearest) for index in range(len(columns))])
        out.append({"way": way, "encoder": encoder, "rows": rows, "columns": list(columns), "shares": shares})
    return out


def image_drift(encoder: Encoder, before: Sequence[Path], after: Sequence[Path]) -> Figure | None:
    """1 − cosine of the same prompt and seed before and after; 0 is untouched."""
    first, second = (embed_views(encoder, [View("", path) for path in paths]) for paths in (before, after))
    return figure((1 - (first * second).sum(1)).tolist())
