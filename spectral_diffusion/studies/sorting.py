"""Does the identity encoder agree with the eye? Unlabelled pictures of every merge, sorted by a person.

The first run writes numbered sheets and the concepts' photos into the runner's folder. The person who sorts writes
``answers.txt`` there, a line ``number name`` for each picture, from these alone; the next run compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image
from scipy.stats import spearmanr

from ..adapters.apply import put_adapters
from ..core.errors import UserError
from ..core.files import atomic, write_text
from ..data.image_grid import labelled_sheet
from .fusion import MERGES, RANK, adapters_of, family_rate
from .registry import Findings, Row, Table, study
from .runner import TEST_CONCEPTS, StudyRunner, TimeOver, cell_key

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
WANTED = 0.8  # rank correlation


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


def read_answers(path: Path, count: int, names: Sequence[str]) -> list[str] | None:
    """The names in the order of the numbers; None if there is no such file yet.

    Raises:
        UserError: a line is not ``number name``, a name is no concept's, or a number is missing.
    """
    if not path.is_file():
        return None
    answers: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        number, _, name = line.strip().partition(" ")
        if not line.strip():
            continue
        if not number.isdigit() or name.strip() not in names:
            raise UserError(f"{path}: '{line[:40]}' is not a line such as '12 {names[0]}'; names.txt lists the names.")
        answers[int(number)] = name.strip()
    left = [number for number in range(1, count + 1) if number not in answers]
    if left:
        raise UserError(f"{path} has no answer for picture {left[0]}, nor for {len(left) - 1} others.")
    return [answers[number] for number in range(1, count + 1)]


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
        except TimeOver:
            missing.append(f"{variant[1]} of {variant[0]}")
    if not shown:
        return Findings([], verdict([]), missing=missing)
    Random("sorting").shuffle(shown)
    pictures = []
    for shown_image in shown:
        with Image.open(shown_image.file) as image:
            pictures.append(image.convert("RGB"))
    references = {name: lab.encoder.embed(lab.references(name)) for name in names}
    vectors = lab.encoder.embed(pictures)
    likeness = {name: (vectors @ vectors_of.mT).mean(1).tolist() for name, vectors_of in references.items()}
    machine = [max(names, key=lambda name: likeness[name][index]) for index in range(len(shown))]
    # Answers are for exactly these pictures.
    folder = lab.folder / "sorting" / cell_key([f"{image.file.parent.name}/{image.file.name}" for image in shown])
    sheets(lab, folder, shown, names)
    seen = None if quick else read_answers(folder / "answers.txt", len(shown), names)  # the quick form asks nobody
    if seen is None and not quick:
        missing.append(f"answers.txt, sorted by eye, beside the sheets in sorting/{folder.name} of the cache")
    rows: list[Row] = []
    for variant in dict.fromkeys(image.variant for image in shown):
        mine = [index for index, image in enumerate(shown) if image.variant == variant]

        def right(labels: Sequence[str] | None, mine: Sequence[int] = mine) -> float | None:
            return None if labels is None else sum(labels[i] == shown[i].concept for i in mine) / len(mine)

        rows.append(
            {
                "family": variant[0],
                "merge": variant[1],
                "pictures": len(mine),
                "identity": sum(likeness[shown[i].concept][i] for i in mine) / len(mine),
                "right by the encoder": right(machine),
                "right by eye": right(seen),
            }
        )
    return Findings([Table("Unlabelled pictures, sorted by concept", rows)], verdict(rows), missing=missing)


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


def verdict(rows: Sequence[Row]) -> str:
    """Whether eye and encoder rank the variants alike."""
    eye, encoder = [row["right by eye"] for row in rows], [row["identity"] for row in rows]
    if None in eye or len(rows) < 3:
        return "Nobody has sorted the pictures yet."
    if len(set(eye)) == 1 or len(set(encoder)) == 1:
        return "All fusions came out alike, so there is no order to compare."
    agreed = float(spearmanr(eye, encoder).statistic)
    word = "as" if agreed >= WANTED else "less than"
    return (
        f"Over {len(rows)} fusions, the share sorted right by eye and the encoder's identity have a rank "
        f"correlation of {agreed:.2f}, {word} wanted (at least {WANTED})."
    )
