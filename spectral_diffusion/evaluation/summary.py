"""The measurements as tables and sentences, the same for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..metrics.statistics import difference_text, share_text
from .measure import ALL, PHOTOS, Figure, Scored, binding_rows, confusion_of, measurement_rows, with_interval
from .tables import Row

FLOOR, ALONE = "untouched base", "alone"


@dataclass
class Evaluation:
    """The results of an evaluation.

    Attributes:
        about: settings, versions, base and concepts, as in the JSON.
        scored: setting to scored views.
        together: the setting with all concepts enabled, if there is one.
        drift: of generic prompts, by encoder.
        seconds: per image, by setting.
    """

    about: dict[str, Any]
    concepts: Sequence[str]
    encoders: Sequence[str]
    scored: Mapping[str, Sequence[Scored]]
    together: str | None = None
    drift: Mapping[str, Figure | None] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The results as JSON."""
        return {
            **self.about,
            "measures": [row for setting, scored in self.scored.items() for row in measurement_rows(setting, scored)],
            "confusion": self.confusion(),
            "binding": self.binding(),
            "kept": kept_share(self),
            "drift": dict(self.drift),
            "seconds": dict(self.seconds),
        }

    def confusion(self) -> list[dict[str, Any]]:
        """The confusion matrices; none of a single concept."""
        if len(self.concepts) < 2:
            return []
        return [
            matrix for setting, scored in self.scored.items() for matrix in confusion_of(setting, scored, self.concepts)
        ]

    def binding(self) -> list[dict[str, Any]]:
        """What became of the subjects of pictures that show several; none where no picture does."""
        photos = self.scored.get(PHOTOS, ())
        settings = {setting: scored for setting, scored in self.scored.items() if setting != PHOTOS and scored}
        return [
            row for setting, scored in settings.items() for row in binding_rows(setting, scored, photos, self.concepts)
        ]


def short(encoder: str, others: Sequence[str] = ()) -> str:
    """An encoder's name without its folder, unless another of these has the same name."""
    name = Path(encoder).name
    return encoder if [Path(other).name for other in others].count(name) > 1 else name


def kept_share(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Per concept the share of its identity alone that is left together, by the first encoder.

    ``of alone`` is the ratio of identities, ``of the gain`` that of the gains over the untouched base.
    """
    if evaluation.together is None or ALONE not in evaluation.scored or evaluation.together not in evaluation.scored:
        return []
    encoder, rows = evaluation.encoders[0], []

    def identities(setting: str, name: str) -> list[float]:
        return [
            result.identity(encoder)
            for result in evaluation.scored.get(setting, ())
            if name in (ALL, result.view.concept)
        ]

    names = list(dict.fromkeys(result.view.concept for result in evaluation.scored[ALONE]))
    for name in [*names, *([ALL] if len(names) > 1 else [])]:
        alone, together, floor = (identities(setting, name) for setting in (ALONE, evaluation.together, FLOOR))
        concepts = [result.view.concept for result in evaluation.scored[ALONE] if name in (ALL, result.view.concept)]
        row: dict[str, Any] = {"concept": name, "of alone": share_text(together, alone, concepts)}
        row["single minus merged"] = difference_text(alone, together, concepts)
        if floor:
            gained = [value - low for value, low in zip(together, floor, strict=True)]
            whole = [value - low for value, low in zip(alone, floor, strict=True)]
            row["of the gain"] = share_text(gained, whole, concepts)
        rows.append(row)
    return rows


def identity_table(evaluation: Evaluation, intervals: bool = True) -> list[Row]:
    """A row per setting and concept."""

    def cell(figure: Figure | None) -> str | None:
        return with_interval(figure) if figure is None or intervals else f"{figure['mean']:.2f}"

    several = len(evaluation.encoders) > 1
    rows: list[Row] = []
    for row in (row for setting, scored in evaluation.scored.items() for row in measurement_rows(setting, scored)):
        cells: dict[str, Any] = {"shown": row["way"], "concept": row["concept"], "pictures": row["pictures"]}
        for encoder in evaluation.encoders:
            mark = f", {short(encoder, evaluation.encoders)}" if several else ""
            for kind, figure in row["encoders"][encoder].items():
                if len(evaluation.concepts) > 1 or kind == "identity":
                    cells[kind + mark] = cell(figure)
        for kind in dict.fromkeys(
            kind for scored in evaluation.scored.values() for result in scored for kind in result.text
        ):
            cells["text match" if kind == "backdrop" else kind] = cell(row["text"].get(kind))
        rows.append(cells)
    return rows


def tables(evaluation: Evaluation, intervals: bool = True) -> dict[str, list[Row]]:
    """All tables but the matrices, by title, without missing measurements. ``intervals`` is for the first table."""
    out: dict[str, list[Row]] = {
        "Identity: mean cosine with the concept's photos": identity_table(evaluation, intervals)
    }
    if left := kept_share(evaluation):
        out[f"What is kept of the identity alone ({evaluation.together})"] = list(left)
    if bound := evaluation.binding():
        several = len({row["encoder"] for row in bound}) > 1
        out["What becomes of the subjects of a picture (MultiBind's words), and the Subject Collapse Rate"] = [
            {"shown": row["way"]}
            | ({"encoder": short(row["encoder"], evaluation.encoders)} if several else {})
            | {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in list(row.items())[2:]}
            for row in bound
        ]
    if evaluation.drift:
        out["Drift of generic prompts (1 − cosine with the untouched base's pictures)"] = [
            {"encoder": short(encoder, evaluation.encoders), "drift": with_interval(figure, 3)}
            for encoder, figure in evaluation.drift.items()
        ]
    if evaluation.seconds:
        out["Seconds a picture"] = [
            {"shown": setting, "seconds": round(value, 2)} for setting, value in evaluation.seconds.items()
        ]
    return out


def matrix_title(matrix: Mapping[str, Any], encoders: Sequence[str]) -> str:
    """The title of a confusion matrix: setting and encoder."""
    return f"{matrix['way']}, by {short(matrix['encoder'], encoders)}" if len(encoders) > 1 else str(matrix["way"])


def matrix_rows(matrix: Mapping[str, Any]) -> list[Row]:
    """A confusion matrix as a table."""
    return [
        {"shown": name, **{column: f"{value:.2f}" for column, value in zip(matrix["columns"], shares, strict=True)}}
        for name, shares in zip(matrix["rows"], matrix["shares"], strict=True)
    ]


def sentences(evaluation: Evaluation) -> list[str]:
    """The main results in sentences, by rule."""
    last = {
        setting: measurement_rows(setting, scored)[-1]["encoders"][evaluation.encoders[0]]
        for setting, scored in evaluation.scored.items()
    }
    out = [
        "Identity: "
        + ", ".join(f"{setting} {with_interval(result['identity'])}" for setting, result in last.items())
        + "."
    ]
    if len(evaluation.concepts) > 1:
        shares = ", ".join(f"{setting} {with_interval(result['right concept'])}" for setting, result in last.items())
        out.append(f"Share of pictures that are nearest to the right concept: {shares}.")
    if left := kept_share(evaluation):
        out.append(
            f"Together ({evaluation.together}) the concepts keep {left[-1]['of alone']} of their identity alone."
        )
    if evaluation.drift and (figure := evaluation.drift[evaluation.encoders[0]]):
        out.append(f"Generic prompts drift by {with_interval(figure, 3)}.")
    return out
