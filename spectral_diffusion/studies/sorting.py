"""Does the identity encoder see what the eye sees? Unlabelled pictures of every merge, sorted by looking at them.

The first run draws numbered sheets and the concepts' photos into the lab's folder. Whoever sorts writes
``answers.txt`` there, a line ``number name`` for each picture, having seen nothing else; the next run compares.
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
WAYS: tuple[tuple[str, str], ...] = (
    ("spectral, own slots", ALONE),
    ("spectral, own slots", "sum"),
    ("spectral, own slots", "fedavg"),
    ("spectral, own slots", "gradient"),
    ("spectral, own slots", "gradient, anchored"),
    ("spectral, own slots", "ssr"),
    ("spectral, own slots", "ties"),
    ("spectral, same slot", "sum"),
    ("lora", "sum"),
    ("lora", "gradient"),
)
EACH = 2  # pictures of a concept by a way
SHEET = 40  # pictures a sheet
WANTED = 0.8  # rank correlation


@dataclass(frozen=True)
class Shown:
    """One picture: what made it, and whose it should be."""

    way: tuple[str, str]
    concept: str
    file: Path


def drawn(lab: StudyRunner, way: tuple[str, str], names: Sequence[str], quick: bool) -> list[Shown]:
    """A way's pictures, as kept in the lab's folder or drawn now.

    Raises:
        TimeOver: the lab's time is over.
    """
    family, merge = way
    rate, _ = family_rate(lab, family, quick)
    key = cell_key([family, merge, MERGES.get(merge), rate, list(names), lab.fingerprint, lab.recipe])
    folder = lab.folder / "sorting" / key
    places = Random(f"sorting/{key}")
    shown = [Shown(way, name, folder / f"{name}-{index}.png") for name in names for index in range(EACH)]
    if all(one.file.is_file() for one in shown):
        return shown
    held = [adapter for adapter, _ in adapters_of(lab, family, rate, names, 0, RANK)]
    base = lab.fresh() if merge == ALONE else lab.fused(held, **MERGES[merge])
    for adapter in held:
        if merge == ALONE:
            base = lab.fresh()
            put_adapters(base, [(adapter, 1.0)])
        pictures = lab.portraits(base, adapter.token)
        for index, picture in enumerate(places.sample(pictures, EACH)):
            with atomic(folder / f"{adapter.name}-{index}.png") as temporary:
                picture.save(temporary, format="PNG")
    return shown


def read_answers(path: Path, count: int, names: Sequence[str]) -> list[str] | None:
    """The names that were given, in the order of the numbers; None if there is no such file yet.

    Raises:
        UserError: a line that is none of ``number name``, a name that is no concept's, or a number left out.
    """
    if not path.is_file():
        return None
    found: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        number, _, name = line.strip().partition(" ")
        if not line.strip():
            continue
        if not number.isdigit() or name.strip() not in names:
            raise UserError(f"{path}: '{line[:40]}' is no line such as '12 {names[0]}'; the names are in names.txt.")
        found[int(number)] = name.strip()
    left = [number for number in range(1, count + 1) if number not in found]
    if left:
        raise UserError(f"{path} has no answer for picture {left[0]}, nor for {len(left) - 1} others.")
    return [found[number] for number in range(1, count + 1)]


@study(
    "sorting",
    "Figs. 5, 12, 13",
    "What the scores call the concept is what the eye sees.",
    (10, 0.5),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """The share that is sorted to the right concept by eye beside the encoder's identity, for every way to fuse."""
    names = TEST_CONCEPTS[:2] if quick else TEST_CONCEPTS
    missing: list[str] = []
    shown: list[Shown] = []
    for way in WAYS[:3] if quick else WAYS:
        try:
            shown += drawn(lab, way, names, quick)
        except TimeOver:
            missing.append(f"{way[1]} of {way[0]}")
    Random("sorting").shuffle(shown)
    pictures = []
    for one in shown:
        with Image.open(one.file) as image:
            pictures.append(image.convert("RGB"))
    references = {name: lab.encoder.embed(lab.references(name)) for name in names}
    vectors = lab.encoder.embed(pictures)
    likeness = {name: (vectors @ held.mT).mean(1).tolist() for name, held in references.items()}
    machine = [max(names, key=lambda name: likeness[name][index]) for index in range(len(shown))]
    sheets(lab, shown, names)
    place = lab.folder / "sorting" / "answers.txt"
    seen = machine if quick else read_answers(place, len(shown), names)  # nobody is asked for the quick form
    if seen is None:
        missing.append(f"{place.name}, sorted by eye, beside the sheets in the lab's folder 'sorting'")
    rows: list[Row] = []
    for way in dict.fromkeys(one.way for one in shown):
        mine = [index for index, one in enumerate(shown) if one.way == way]

        def right(said: Sequence[str] | None, mine: Sequence[int] = mine) -> float | None:
            return None if said is None else sum(said[i] == shown[i].concept for i in mine) / len(mine)

        rows.append(
            {
                "family": way[0],
                "merge": way[1],
                "pictures": len(mine),
                "identity": sum(likeness[shown[i].concept][i] for i in mine) / len(mine),
                "right by the encoder": right(machine),
                "right by eye": right(seen),
            }
        )
    return Findings([Table("Unlabelled pictures, sorted by concept", rows)], verdict(rows), missing=missing)


def sheets(lab: StudyRunner, shown: Sequence[Shown], names: Sequence[str]) -> None:
    """Write the numbered sheets, the concepts' photos and their names into the lab's folder."""
    folder = lab.folder / "sorting"
    for start in range(0, len(shown), SHEET):
        part = shown[start : start + SHEET]
        numbers = [str(start + index + 1) for index in range(len(part))]
        with atomic(folder / f"sheet-{start // SHEET + 1}.png") as temporary:
            labelled_sheet([one.file for one in part], numbers).save(temporary, format="PNG")
    photos = [(photo.path, name) for name in names for photo in lab.concept(name).photos[:3]]
    with atomic(folder / "photos.png") as temporary:
        labelled_sheet([path for path, _ in photos], [name for _, name in photos]).save(temporary, format="PNG")
    write_text(folder / "names.txt", "\n".join(names) + "\n")


def verdict(rows: Sequence[Row]) -> str:
    """Whether eye and encoder put the ways into one order."""
    eye, encoder = [row["right by eye"] for row in rows], [row["identity"] for row in rows]
    if None in eye or len(rows) < 3:
        return "Nobody has sorted the pictures yet."
    if len(set(eye)) == 1 or len(set(encoder)) == 1:
        return "All ways came out alike, so there is no order to compare."
    agreed = float(spearmanr(eye, encoder).statistic)
    word = "as" if agreed >= WANTED else "less than"
    return (
        f"Over {len(rows)} ways, the share sorted right by eye and the encoder's identity have a rank "
        f"correlation of {agreed:.2f}, {word} wanted (at least {WANTED})."
    )
