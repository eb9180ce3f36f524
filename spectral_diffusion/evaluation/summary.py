"""What was measured as tables and sentences, the same for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..metrics.statistics import share_text
from .measure import ALL, Figure, Scored, confusion_of, measurement_rows, with_interval
from .tables import Row

FLOOR, ALONE = "untouched base", "alone"


@dataclass
class Evaluation:
    """Everything that an evaluation found.

    Attributes:
        about: settings, versions, base and concepts, as they stand in the JSON.
        scored: way of being shown to what was seen.
        together: the way in which the concepts act together, if they do.
        drift: by encoder, of ordinary prompts.
        seconds: a picture, by way.
    """

    about: dict[str, Any]
    concepts: Sequence[str]
    encoders: Sequence[str]
    scored: Mapping[str, Sequence[Scored]]
    together: str | None = None
    drift: Mapping[str, Figure | None] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """All of it for machines."""
        return {
            **self.about,
            "measures": [row for way, found in self.scored.items() for row in measurement_rows(way, found)],
            "confusion": self.confusion(),
            "kept": kept_share(self),
            "drift": dict(self.drift),
            "seconds": dict(self.seconds),
        }

    def confusion(self) -> list[dict[str, Any]]:
        """The confusion matrices; none of a single concept."""
        if len(self.concepts) < 2:
            return []
        return [one for way, found in self.scored.items() for one in confusion_of(way, found, self.concepts)]


def short(encoder: str, others: Sequence[str] = ()) -> str:
    """An encoder's name without where it lies, unless another of these would be called the same."""
    name = Path(encoder).name
    return encoder if [Path(other).name for other in others].count(name) > 1 else name


def kept_share(found: Evaluation) -> list[dict[str, Any]]:
    """Per concept how much of its identity alone is left together, by the first encoder.

    ``of alone`` is the plain quotient, ``of the way`` that of what each gains over the untouched base.
    """
    if found.together is None or ALONE not in found.scored or found.together not in found.scored:
        return []
    encoder, rows = found.encoders[0], []

    def identities(way: str, name: str) -> list[float]:
        return [one.identity(encoder) for one in found.scored.get(way, ()) if name in (ALL, one.view.concept)]

    names = list(dict.fromkeys(one.view.concept for one in found.scored[ALONE]))
    for name in [*names, *([ALL] if len(names) > 1 else [])]:
        alone, together, floor = (identities(way, name) for way in (ALONE, found.together, FLOOR))
        concepts = [one.view.concept for one in found.scored[ALONE] if name in (ALL, one.view.concept)]
        row: dict[str, Any] = {"concept": name, "of alone": share_text(together, alone, concepts)}
        if floor:
            gained = [value - low for value, low in zip(together, floor, strict=True)]
            whole = [value - low for value, low in zip(alone, floor, strict=True)]
            row["of the way"] = share_text(gained, whole, concepts)
        rows.append(row)
    return rows


def identity_table(found: Evaluation, intervals: bool = True) -> list[Row]:
    """A row per way and concept."""

    def cell(figure: Figure | None) -> str | None:
        return with_interval(figure) if figure is None or intervals else f"{figure['mean']:.2f}"

    several = len(found.encoders) > 1
    rows: list[Row] = []
    for row in (row for way, scored in found.scored.items() for row in measurement_rows(way, scored)):
        cells: dict[str, Any] = {"shown": row["way"], "concept": row["concept"], "pictures": row["pictures"]}
        for encoder in found.encoders:
            mark = f", {short(encoder, found.encoders)}" if several else ""
            for kind, figure in row["encoders"][encoder].items():
                if len(found.concepts) > 1 or kind == "identity":
                    cells[kind + mark] = cell(figure)
        for kind in dict.fromkeys(kind for scored in found.scored.values() for one in scored for kind in one.text):
            cells["text match" if kind == "backdrop" else kind] = cell(row["text"].get(kind))
        rows.append(cells)
    return rows


def tables(found: Evaluation, intervals: bool = True) -> dict[str, list[Row]]:
    """All tables but the matrices, by title; what was not measured is left out. ``intervals`` is of the first table."""
    out: dict[str, list[Row]] = {"Identity: mean cosine with the concept's photos": identity_table(found, intervals)}
    if left := kept_share(found):
        out[f"What is kept of the identity alone ({found.together})"] = list(left)
    if found.drift:
        out["Drift of ordinary prompts (1 − cosine with the untouched base's pictures)"] = [
            {"encoder": short(encoder, found.encoders), "drift": with_interval(figure, 3)}
            for encoder, figure in found.drift.items()
        ]
    if found.seconds:
        out["Seconds a picture"] = [{"shown": way, "seconds": round(value, 2)} for way, value in found.seconds.items()]
    return out


def matrix_title(matrix: Mapping[str, Any], encoders: Sequence[str]) -> str:
    """What a confusion matrix is of, by which of the encoders."""
    return f"{matrix['way']}, by {short(matrix['encoder'], encoders)}" if len(encoders) > 1 else str(matrix["way"])


def matrix_rows(matrix: Mapping[str, Any]) -> list[Row]:
    """A confusion matrix as a table."""
    return [
        {"shown": name, **{column: f"{value:.2f}" for column, value in zip(matrix["columns"], shares, strict=True)}}
        for name, shares in zip(matrix["rows"], matrix["shares"], strict=True)
    ]


def sentences(found: Evaluation) -> list[str]:
    """The few things to know first, by rule."""
    last = {
        way: measurement_rows(way, scored)[-1]["encoders"][found.encoders[0]] for way, scored in found.scored.items()
    }
    out = ["Identity: " + ", ".join(f"{way} {with_interval(one['identity'])}" for way, one in last.items()) + "."]
    if len(found.concepts) > 1:
        shares = ", ".join(f"{way} {with_interval(one['right concept'])}" for way, one in last.items())
        out.append(f"Share of pictures that are nearest to the right concept: {shares}.")
    if left := kept_share(found):
        out.append(f"Together ({found.together}) the concepts keep {left[-1]['of alone']} of their identity alone.")
    if found.drift and (figure := found.drift[found.encoders[0]]):
        out.append(f"Ordinary prompts drift by {with_interval(figure, 3)}.")
    return out
