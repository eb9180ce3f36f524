"""Does a picture show what its prompt says? By a judge of pocket pictures, or by CLIP."""

from __future__ import annotations

from collections.abc import Sequence

from .classifiers import classify_images, load_classifier
from .encoders import Clip, Encoder
from .prompts import backdrop_of
from .views import CHUNK, View, embed_views

Values = list[float | None]  # one a view, None where it cannot be measured


def text_match(views: Sequence[View], encoders: Sequence[Encoder]) -> dict[str, Values]:
    """The measures that these encoders allow: ``backdrop`` beside the pocket encoder, ``CLIP-T`` by the first CLIP."""
    measures = {}
    if any(encoder.name == "pocket" for encoder in encoders):
        measures["backdrop"] = backdrops(views)
    reader = next((encoder for encoder in encoders if isinstance(encoder, Clip)), None)
    if reader is not None:
        measures["CLIP-T"] = cosines(views, reader)
    return measures


def backdrops(views: Sequence[View]) -> Values:
    """1 where the referee sees the backdrop that a whole picture's prompt names, else 0."""
    values: Values = [None] * len(views)
    with_backdrop = [index for index, view in enumerate(views) if view.box is None and backdrop_of(view.prompt)]
    judge = load_classifier("referee")
    for start in range(0, len(with_backdrop), CHUNK):
        part = with_backdrop[start : start + CHUNK]
        verdicts = classify_images(judge, [views[index].open() for index in part], [1] * len(part))
        for index, [verdict] in zip(part, verdicts, strict=True):
            values[index] = float(verdict.backdrop == backdrop_of(views[index].prompt))
    return values


def cosines(views: Sequence[View], reader: Clip) -> Values:
    """The cosine of what is seen with its prompt."""
    values: Values = [None] * len(views)
    with_prompt = [index for index, view in enumerate(views) if view.prompt]
    if with_prompt:
        texts = reader.embed_text([views[index].prompt for index in with_prompt])
        similarities = (embed_views(reader, [views[index] for index in with_prompt]) * texts).sum(1)
        for index, value in zip(with_prompt, similarities.tolist(), strict=True):
            values[index] = value
    return values
