"""Several concepts as one, for training them jointly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..core.errors import UserError
from .folder import Concept, Photo


def joined(concepts: Sequence[Concept]) -> Concept:
    """Several concepts as one, for training them jointly; the photos of each count about equally often.

    Raises:
        UserError: two of them have one token.
    """
    first, totals = concepts[0], [sum(photo.repeats for photo in concept.photos) for concept in concepts]
    owners: dict[str, str] = {}
    photos: list[Photo] = []
    for concept, total in zip(concepts, totals, strict=True):
        if owner := owners.get(concept.token.lower()):
            raise UserError(
                f"'{owner}' and '{concept.name}' have one token, {concept.token}; give one of them another in its "
                "concept.yaml (token: <name>)."
            )
        owners[concept.token.lower()] = concept.name
        times = round(max(totals) / total)
        photos += [replace(photo, token=concept.token, repeats=times * photo.repeats) for photo in concept.photos]
    return replace(
        first,
        photos=tuple(photos),
        skipped=tuple(text for concept in concepts for text in concept.skipped),
        notes=tuple(text for concept in concepts for text in concept.notes),
        control_images=tuple(path for concept in concepts for path in concept.control_images),
        joint=tuple(concepts[1:]),
    )
