"""Does the identity encoder agree with the eye? Unlabelled pictures of every merge, sorted and graded by people.

The first run writes numbered sheets, the concepts' photos and ``how.txt`` into the runner's folder. Every rater writes
an ``answers-WHO.txt`` there, a line ``number name grade`` for each picture, from these alone; the next run compares.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean

import numpy as np
from PIL import Image
from scipy.stats import spearmanr

from ..adapters.apply import put_adapters
from ..core.errors import UserError
from ..core.files import atomic, read_text, write_text
from ..data.image_grid import labelled_sheet
from ..metrics.statistics import leading, rank_correlation_text
from .fusion import MERGES, RANK, adapters_of, family_rate
from .registry import Findings, Row, Table, study
from .runner import TEST_CONCEPTS, NotMeasured, StudyRunner, cell_key

ALONE = "alone"
VARIANTS: tuple[tuple[str, str], ...] = (
    ("spectral, own slots", ALONE),
    ("spectral, own slots", "sum"),
    ("spectral, own slots", "fedavg"),
    ("spectral, own slots", "gradient"),
    ("spectral, own slots", "gradient, prior term"),
    ("spectral, own slots", "ssr"),
    ("spectral, own slots", "ties"),
    ("spectral, same slot", "sum"),
    ("lora", "sum"),
    ("lora", "gradient"),
)
EACH = 2  # pictures of a concept per variant
SHEET = 40  # pictures a sheet
WANTED = 0.9  # rank correlation
GRADES = (
    "nothing of it: a guess",
    "a trace of its colors",
    "its colors and a rough arrangement or outline, much damaged",
    "clearly this individual, with visible damage to shape or pattern",
    "this individual, shape and pattern right",
)
HOW = (
    "Every picture of the sheets should show one of the things in photos.png. Write a line 'number name grade' for "
    "each into a file answers-WHO.txt here, and look at nothing else. The grade says how much the thing is the very "
    "one of the photos (halves are allowed):\n\n"
)


@dataclass(frozen=True)
class Shown:
    """One picture, the variant that made it and the concept it should show."""

    variant: tuple[str, str]
    concept: str
    file: Path


def variant_images(lab: StudyRunner, variant: tuple[str, str], names: Sequence[str], quick: bool) -> list[Shown]:
    """A variant's pictures, from the runner's folder or generated now.

    Raises:
        TimeOver: the time limit is reached.
    """
    family, merge = variant
    rate, _ = family_rate(lab, family, quick)
    key = cell_key([family, MERGES.get(merge, merge), rate, list(names), lab.fingerprint, lab.settings])
    folder = lab.folder / "sorting" / key
    random = Random(f"sorting/{key}")
    shown = [Shown(variant, name, folder / f"{name}-{index}.png") for name in names for index in range(EACH)]
    if all(image.file.is_file() for image in shown):
        return shown
    adapters = [adapter for adapter, _ in adapters_of(lab, family, rate, names, 0, RANK)]
    base = lab.fresh() if merge == ALONE else lab.fused(adapters, **MERGES[merge])
    for adapter in adapters:
        if merge == ALONE:
            base = lab.fresh()
            put_adapters(base, [(adapter, 1.0)])
        pictures = lab.portraits(base, adapter.token)
        for index, picture in enumerate(random.sample(pictures, EACH)):
            with atomic(folder / f"{adapter.name}-{index}.png") as temporary:
                picture.save(temporary, format="PNG")
    return shown


@dataclass(frozen=True)
class Answers:
    """One rater's names of the pictures and grades from 0 to 4, both in the order of their numbers."""

    names: Sequence[str]
    grades: Sequence[float]

    def likeness(self, shown: Sequence[Shown]) -> list[float]:
        """How much of its concept each picture shows: the grade, or 0 under another concept's name."""
        answers = zip(self.names, self.grades, shown, strict=True)
        return [grade if name == image.concept else 0.0 for name, grade, image in answers]


def read_answers(path: Path, count: int, names: Sequence[str]) -> Answers:
    """A rater's file.

    Raises:
        UserError: a line is not ``number name grade``, a name is no concept's, or a number is missing or twice.
    """
    answers: dict[int, tuple[str, float]] = {}
    left = set(range(1, count + 1))
    for line in filter(None, map(str.strip, read_text(path).splitlines())):
        number, name, grade = parsed_line(line)
        if number not in left or name not in names or not 0 <= grade <= len(GRADES) - 1:
            raise UserError(
                f"{path}: '{line[:40]}' is not a line such as '12 {names[0]} 3', with a number from 1 to "
                f"{count} once, a name of names.txt and a grade from 0 to {len(GRADES) - 1}."
            )
        left.remove(number)
        answers[number] = name, grade
    if left:
        raise UserError(f"{path} has no answer for picture {min(left)}, nor for {len(left) - 1} others.")
    ordered = [answers[number] for number in range(1, count + 1)]
    return Answers([name for name, _ in ordered], [grade for _, grade in ordered])


def parsed_line(line: str) -> tuple[int | None, str, float]:
    """The number, name and grade of an answer; the number is None if the line has another form."""
    parts = line.split()
    try:
        number, name, grade = parts
        return int(number), name, float(grade)
    except ValueError:
        return None, "", 0.0


@study(
    "sorting",
    "Figs. 5, 12, 13",
    "What the scores call the concept is what the eye sees.",
    (10, 0.1),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """The share sorted to the right concept by eye, beside the encoder's identity, for every variant."""
    names = TEST_CONCEPTS[:2] if quick else TEST_CONCEPTS
    missing: list[str] = []
    shown: list[Shown] = []
    for variant in VARIANTS[:3] if quick else VARIANTS:
        try:
            shown += variant_images(lab, variant, names, quick)
        except NotMeasured:
            missing.append(f"{variant[1]} of {variant[0]}")
    if not shown:
        return Findings([], "Nobody has sorted the pictures yet.", missing=missing)
    Random("sorting").shuffle(shown)
    pictures = []
    for shown_image in shown:
        with Image.open(shown_image.file) as image:
            pictures.append(image.convert("RGB"))
    references = {name: lab.encoder.embed(lab.references(name)) for name in names}
    vectors = lab.encoder.embed(pictures)
    scores = {name: (vectors @ vectors_of.mT).mean(1).tolist() for name, vectors_of in references.items()}
    # Answers are for exactly these pictures.
    folder = lab.folder / "sorting" / cell_key([f"{image.file.parent.name}/{image.file.name}" for image in shown])
    sheets(lab, folder, shown, names)
    files = [] if quick else sorted(folder.glob("answers-*.txt"))  # the quick form asks nobody
    raters = [read_answers(file, len(shown), names) for file in files]
    if not raters and not quick:
        missing.append(f"answers-WHO.txt, sorted by eye, beside the sheets in sorting/{folder.name} of the cache")
    identity = [scores[image.concept][index] for index, image in enumerate(shown)]
    called = [max(names, key=lambda name: scores[name][index]) for index in range(len(shown))]
    rows = [variant_row(variant, shown, identity, called, raters) for variant in variants_of(shown)]
    title = "Unlabelled pictures, sorted by concept and graded from 0 to 4"
    return Findings([Table(title, rows)], verdict(shown, identity, raters), missing=missing)


def variants_of(shown: Sequence[Shown]) -> list[tuple[str, str]]:
    """The variants of the pictures, in the order of the study."""
    return [variant for variant in VARIANTS if any(image.variant == variant for image in shown)]


def variant_row(
    variant: tuple[str, str],
    shown: Sequence[Shown],
    identity: Sequence[float],
    called: Sequence[str],
    raters: Sequence[Answers],
) -> Row:
    """A variant's row: means over its pictures and the raters; ``called`` are the encoder's names of the pictures."""
    mine = [index for index, image in enumerate(shown) if image.variant == variant]

    def right(labels: Sequence[str]) -> float:
        return fmean(labels[index] == shown[index].concept for index in mine)

    likeness = [rater.likeness(shown) for rater in raters]
    return {
        "family": variant[0],
        "merge": variant[1],
        "pictures": len(mine),
        "identity": fmean(identity[index] for index in mine),
        "right by the encoder": right(called),
        "right by eye": fmean(right(rater.names) for rater in raters) if raters else None,
        "likeness by eye": fmean(grades[index] for grades in likeness for index in mine) if raters else None,
    }


def sheets(lab: StudyRunner, folder: Path, shown: Sequence[Shown], names: Sequence[str]) -> None:
    """Write the numbered sheets, the concepts' photos and their names into a folder."""
    for start in range(0, len(shown), SHEET):
        part = shown[start : start + SHEET]
        numbers = [str(start + index + 1) for index in range(len(part))]
        with atomic(folder / f"sheet-{start // SHEET + 1}.png") as temporary:
            labelled_sheet([image.file for image in part], numbers).save(temporary, format="PNG")
    photos = [(photo.path, name) for name in names for photo in lab.concept(name).photos[:3]]
    with atomic(folder / "photos.png") as temporary:
        labelled_sheet([path for path, _ in photos], [name for _, name in photos]).save(temporary, format="PNG")
    write_text(folder / "names.txt", "\n".join(names) + "\n")
    grades = "\n".join(f"{number}  {meaning}" for number, meaning in enumerate(GRADES))
    write_text(folder / "how.txt", HOW + grades + "\n")


def verdict(shown: Sequence[Shown], identity: Sequence[float], raters: Sequence[Answers]) -> str:
    """Whether eye and encoder rank the variants alike, and two raters each other."""
    count = len(variants_of(shown))
    if not raters or count < 3:
        return "Nobody has sorted the pictures yet."
    encoder, eyes = by_variant(shown, identity), [by_variant(shown, rater.likeness(shown)) for rater in raters]
    eye = np.mean(eyes, axis=0)
    if any(len(set(scores.mean(1))) == 1 for scores in (encoder, eye)):
        return "All fusions came out alike, so there is no order to compare."
    agreed = rank_correlation_text(encoder, eye)
    word = "as" if leading(agreed) >= WANTED else "less than"
    pictures = spearmanr(identity, np.mean([rater.likeness(shown) for rater in raters], axis=0)).statistic
    text = (
        f"Over {count} fusions, the likeness that the eye sees and the encoder's identity have a rank correlation of "
        f"{agreed}, {word} wanted (at least {WANTED}); over the {len(shown)} single pictures {pictures:.2f}."
    )
    pairs = [rank_correlation_text(first, second) for first, second in itertools.combinations(eyes, 2)]
    return f"{text} Two raters agree with each other by {', '.join(pairs)}." if pairs else text


def by_variant(shown: Sequence[Shown], values: Sequence[float]) -> np.ndarray:
    """The mean value of each variant's pictures of each concept, (variants, concepts)."""
    concepts = list(dict.fromkeys(image.concept for image in shown))
    pairs = list(zip(shown, values, strict=True))

    def mean(variant: tuple[str, str], concept: str) -> float:
        return fmean(value for image, value in pairs if image.variant == variant and image.concept == concept)

    return np.array([[mean(variant, concept) for concept in concepts] for variant in variants_of(shown)])
