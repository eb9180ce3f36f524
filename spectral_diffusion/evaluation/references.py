"""The reference photos that images are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import Fix, UserError
from ..data.folder import Concept, load_concept


@dataclass(frozen=True)
class Subject:
    """A concept to measure; ``photos`` is the folder it was trained on, if known."""

    name: str
    noun: str
    token: str
    photos: Path | None = None


def read_references(folder: Path) -> tuple[list[Concept], bool]:
    """The concepts of a folder, and whether it holds the photos of a single one.

    Raises:
        UserError: it holds neither photos nor folders of photos.
    """
    if not folder.is_dir():
        raise UserError(f"No such folder of references: {folder}.")
    single = _concept(folder)
    if single:
        return [single], True
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    concepts = [concept for path in inside if (concept := _concept(path))]
    if not concepts:
        raise UserError(
            f"{folder} holds no references: put photos of one concept there, or a folder of photos for each."
        )
    return concepts, False


def references_of(subjects: Sequence[Subject], folder: Path | None, others: bool = False) -> dict[str, Concept]:
    """Every subject's photos by name, from a folder or from its training folder; then the folder's other concepts.

    Raises:
        UserError: a subject has none; the sentence names the searched folder.
    """
    if folder is None:
        return {subject.name: _trained_on(subject) for subject in subjects}
    concepts, single = read_references(folder)
    if single:
        if len(subjects) > 1:
            names = ", ".join(subject.name for subject in subjects)
            raise UserError(f"{folder} holds photos of one concept; give a folder that has one for each of {names}.")
        return {subject.name: _as(subject, concepts[0]) for subject in subjects}
    photos = {}
    for subject in subjects:
        mine = [c for c in concepts if c.name == subject.name] or [c for c in concepts if c.token == subject.token]
        if not mine:
            names = ", ".join(concept.name for concept in concepts)
            raise UserError(f"{folder} holds photos of {names}, but none of '{subject.name}'; put them there too.")
        photos[subject.name] = _as(subject, mine[0])
    if others:
        taken = {concept.photos[0].path for concept in photos.values()}
        rest = [c for c in concepts if c.photos[0].path not in taken and c.name not in photos]
        photos |= {concept.name: concept for concept in rest}
    return photos


def _concept(folder: Path) -> Concept | None:
    try:
        return load_concept(folder)
    except UserError:
        return None


def _as(subject: Subject, concept: Concept) -> Concept:
    """The photos with the subject's name, token and noun."""
    return replace(concept, name=subject.name, token=subject.token, noun=subject.noun or concept.noun)


def _trained_on(subject: Subject) -> Concept:
    concept = _concept(subject.photos) if subject.photos else None
    if concept is None:
        where = f"are not in {subject.photos} any more" if subject.photos else "are not known"
        raise UserError(f"The photos of '{subject.name}' {where}.", Fix("references", so="to say where they are"))
    return _as(subject, concept)
