"""Which concept appears where? Two to ten subjects with a sketch or keypose, by region and by fusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.apply import install_tokens, put_adapters
from ..config.evaluate import PLACES
from ..config.scene import Box, Region, Scene
from ..core import assets as resources
from ..data.image_grid import image_grid, labelled_grid
from ..metrics.binding import (
    KINDS,
    RIGHT,
    binding_counts,
    binding_of,
    collapse_rate,
    collapsed_pictures,
    photo_similarity,
)
from ..metrics.statistics import leading, mean_text
from ..models.base import Base
from ..scenes.control import ControlMap
from ..scenes.keypose import draw_keypose
from ..scenes.sampling import sample
from .fusion import MERGES, change_for, family_rate
from .registry import Findings, Row, Table, study
from .runner import TEST_CONCEPTS, Figures, NotMeasured, StudyRunner, scaled

FAMILY = "spectral, own slots"
WIDTH, HEIGHT, FINE = 256, 128, 2  # of the pictures, and how much finer their control images are
# Of the adapters: the pocket base has columns for eight of rank 8. Only in the scenes of ten are two in one slot.
SLOTS = {name: slot for slot, name in enumerate(TEST_CONCEPTS)}
SLOTS |= {"hoot": 6, "luna": 7, "moss": 0, "hero": 0, "bruno": 1}
STANDING = (
    (0.5, 0.16), (0.5, 0.30), (0.36, 0.31), (0.28, 0.45), (0.25, 0.58), (0.64, 0.31), (0.72, 0.45), (0.75, 0.58),
    (0.43, 0.60), (0.41, 0.76), (0.40, 0.92), (0.57, 0.60), (0.59, 0.76), (0.60, 0.92), (0.46, 0.13), (0.54, 0.13),
    (0.41, 0.15), (0.59, 0.15),
)  # of a person in a square, in OpenPose's order  # fmt: skip


@dataclass(frozen=True)
class SceneGroup:
    """Scenes of the same number of subjects.

    Attributes:
        scenes: the concepts of each, from left to right and from top to bottom.
        pictures: of all of them, by one variant.
        rows: in how many rows the subjects are.
        puppets: whether skeletons in place of sketches say where they are.
        sketched: whether sketches or skeletons say it at all.
        isolation: of the regions; None: as the study's settings have it.
    """

    scenes: tuple[tuple[str, ...], ...]
    pictures: int
    width: int = WIDTH
    height: int = HEIGHT
    rows: int = 1
    puppets: bool = False
    sketched: bool = True
    isolation: float | None = None

    @property
    def is_usual(self) -> bool:
        """Whether all variants are measured; else the pictures are larger than the base has seen in training."""
        return (self.width, self.height) == (WIDTH, HEIGHT)


FOUR = (("rex", "fido", "brew", "posy"), ("brew", "inky", "posy", "coral"), ("fido", "coral", "rex", "inky"))
EIGHT = ("rex", "fido", "brew", "posy", "inky", "coral", "hoot", "luna")
GROUPS: dict[str, SceneGroup] = {
    "2": SceneGroup(
        (("rex", "fido"), ("fido", "rex"), ("brew", "posy"), ("posy", "brew"), ("inky", "coral"), ("coral", "inky")), 48
    ),
    "3": SceneGroup(
        (("rex", "fido", "brew"), ("brew", "rex", "fido"), ("posy", "inky", "coral"), ("coral", "brew", "posy")), 36
    ),
    "4": SceneGroup(FOUR, 36),
    "3 puppets*": SceneGroup((("bolt", "hero", "bruno"), ("bruno", "bolt", "hero")), 24, puppets=True),
    "4, twice as wide": SceneGroup(FOUR, 36, 2 * WIDTH),
    "6": SceneGroup((EIGHT[:6], EIGHT[5::-1]), 24, 384, 256, rows=2),
    "8": SceneGroup((EIGHT, EIGHT[::-1]), 24, 512, 256, rows=2),
    "10": SceneGroup(((*EIGHT, "zippy", "moss"), ("moss", "zippy", *EIGHT[::-1])), 24, 640, 256, rows=2),
}


@dataclass(frozen=True)
class SceneVariant:
    """How a scene is made: adapters bound to regions, or a fused base, with or without the regions' prompts."""

    merge: str | None
    regions: bool = True


VARIANTS = {
    "bound to regions": SceneVariant(None),
    "fused by sum, regions": SceneVariant("sum"),
    "fused by sum, no regions": SceneVariant("sum", False),
    "fused by gradient, regions": SceneVariant("gradient, prior term"),
    "fused by gradient, no regions": SceneVariant("gradient, prior term", False),
}
LARGE = ("bound to regions", "fused by gradient, regions")  # what is measured where pictures are larger than usual


def boxes(count: int, rows: int = 1) -> list[Box]:
    """``count`` equal parts of the picture, row by row, from left to right."""
    columns = count // rows
    return [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]


def square_picture(box: Box, width: int, height: int = HEIGHT) -> tuple[int, int, int, int]:
    """The largest square in the middle of a box, in the picture's pixels."""
    left, top, right, bottom = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    side = min(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    return round(x - side / 2), round(y - side / 2), round(x + side / 2), round(y + side / 2)


def squares_of(group: SceneGroup) -> list[tuple[int, int, int, int]]:
    """The pixels of every subject's place."""
    return [square_picture(box, group.width, group.height) for box in boxes(len(group.scenes[0]), group.rows)]


def control_of(lab: StudyRunner, names: Sequence[str], group: SceneGroup) -> ControlMap:
    """The classes' sketches, or standing skeletons, one in the middle of every region."""
    size = (group.width * FINE, group.height * FINE)
    squares = [tuple(side * FINE for side in square) for square in squares_of(group)]
    if group.puppets:
        people = [np.array(STANDING) * (right - left) + (left, top) for left, top, right, _ in squares]
        return ControlMap(draw_keypose(people, *size), "keypose")
    canvas = Image.new("L", size)
    for name, (left, top, right, bottom) in zip(names, squares, strict=True):
        with Image.open(resources.concepts() / "sketches" / f"{lab.concept(name).noun}.png") as stroke:
            canvas.paste(
                stroke.convert("L").resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top)
            )
    return ControlMap(canvas, weight=0.8)


def prompt_of(tokens: Sequence[str], location: str) -> str:
    """The whole scene in one prompt, worded as in the base's captions."""
    if len(tokens) == 2:
        return f"{tokens[0]} on the left and {tokens[1]} on the right {location}"
    if len(tokens) == 3:
        return f"{tokens[0]} on the left, {tokens[1]} in the middle and {tokens[2]} on the right {location}"
    return ", ".join(tokens[:-1]) + f" and {tokens[-1]} {location}"


def scene_adapters(lab: StudyRunner, names: Sequence[str]) -> list[Adapter]:
    """The study ``fusion``'s adapters of these concepts, trained here if they are not cached."""
    return [lab.trained(name, **adapter_change(lab, name))[0] for name in names]


def adapter_change(lab: StudyRunner, name: str) -> dict[str, Any]:
    """The changed settings of a concept's training."""
    rate, _ = family_rate(lab, FAMILY, lab.settings["train"]["steps"] < 100)
    return {**change_for(FAMILY, SLOTS[name]), **scaled(lab, rate), "seed": 0}


def base_for(lab: StudyRunner, variant: SceneVariant, adapters: Sequence[Adapter]) -> Base:
    """A base with the adapters fused in, or only their tokens."""
    if variant.merge is not None:
        return lab.fused(adapters, **MERGES[variant.merge])
    base = lab.fresh()
    for adapter in adapters:
        install_tokens(base, adapter)
    return base


def pictures_of(
    lab: StudyRunner, variant: SceneVariant, names: Sequence[str], seeds: Sequence[int], group: SceneGroup
) -> list[Image.Image]:
    """Pictures of one scene, the locations in turn."""
    adapters = scene_adapters(lab, names)
    base, tokens = base_for(lab, variant, adapters), [adapter.token for adapter in adapters]
    controls, images = [control_of(lab, names, group)] if group.sketched else [], []
    for start, location in enumerate(PLACES):
        mine = list(seeds[start :: len(PLACES)])
        regions = [
            Region(box=box, prompt=f"a photo of {token} {location}")
            for box, token in zip(boxes(len(names), group.rows), tokens, strict=True)
        ]
        shared = lab.pictures_config.model_dump(exclude={"regions"})
        shared |= {"width": group.width, "height": group.height}
        shared |= {} if group.isolation is None else {"region_isolation": group.isolation}
        scene = Scene(**shared, regions=regions if variant.regions else [])
        bound = [[(adapter, 1.0)] for adapter in adapters] if variant.merge is None else []
        images += sample(base, [prompt_of(tokens, location)] * len(mine), mine, scene, controls=controls, bound=bound)
    return images


def similarities(
    lab: StudyRunner, images: Sequence[Image.Image], names: Sequence[str], group: SceneGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosines with every subject's photos: of the places (pictures, k, k), and of the photos (k, k)."""
    photos = [lab.encoder.embed(lab.references(name)) for name in names]
    centers = torch.stack([vectors.mean(0) for vectors in photos])
    places = [lab.encoder.embed([image.crop(square) for image in images]) @ centers.mT for square in squares_of(group)]
    return torch.stack(places, 1), photo_similarity(photos)


def scene_cell(lab: StudyRunner, variant: str, names: Sequence[str], count: int, group: SceneGroup) -> Figures:
    """One scene by one variant: what became of its subjects, its confusion matrix, identity in the right places."""

    def compute() -> Figures:
        images = pictures_of(lab, VARIANTS[variant], names, range(count), group)
        similarity, truth = similarities(lab, images, names, group)
        nearest = similarity.argmax(2)
        shares = [[float((row == index).double().mean()) for index in range(len(names))] for row in nearest.unbind(1)]
        return {
            "confusion": shares,
            "identity": similarity.diagonal(dim1=1, dim2=2).mean(0).tolist(),
            "kinds": [binding_of(one, truth) for one in similarity],
            "pictures": len(images),
        }

    key = {"variant": asdict(VARIANTS[variant]), "names": list(names), "num_images": count, "group": layout(group)}
    key["adapters"] = [adapter_change(lab, name) for name in names]
    return lab.cell("scene", key, compute)


def alone_rate(lab: StudyRunner, names: Sequence[str]) -> float:
    """The collapse rate of these concepts if each were in its place as its own adapter generates it alone."""

    def cosines_of(name: str) -> Figures:
        def compute() -> Figures:
            base = lab.fresh()
            [adapter] = scene_adapters(lab, [name])
            put_adapters(base, [(adapter, 1.0)])
            vectors = lab.encoder.embed(lab.portraits(base, adapter.token))
            return {other: (vectors @ lab.encoder.embed(lab.references(other)).mean(0)).tolist() for other in SLOTS}

        return lab.cell("scene-alone", {"concept": name, "adapter": adapter_change(lab, name)}, compute)

    truth = photo_similarity([lab.encoder.embed(lab.references(name)) for name in names])
    found = {name: cosines_of(name) for name in names}
    pictures = [
        binding_of(torch.tensor([[found[name][other][index] for other in names] for name in names]), truth)
        for index in range(len(PLACES))
    ]
    return collapse_rate(binding_counts(pictures))


def layout(group: SceneGroup) -> dict[str, Any]:
    """What a group's pictures depend on."""
    found = {"width": group.width, "height": group.height, "rows": group.rows, "puppets": group.puppets}
    # What is left out keeps the keys of cells that were measured before there was a choice.
    found |= {} if group.sketched else {"sketched": False}
    return found if group.isolation is None else {**found, "isolation": group.isolation}


@study(
    "scenes",
    "Figs. 5, 12, 13",
    "With sketches or keyposes and regions every concept appears in its own place as itself.",
    (60, 0.2),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """What becomes of each subject, for look-alikes, by variant and number."""
    chosen = {"2": SceneGroup(GROUPS["2"].scenes[:1], len(PLACES))} if quick else GROUPS
    rows: list[Row] = []
    matrices: list[Row] = []
    missing: list[str] = []
    for number, group in chosen.items():
        variants = ("bound to regions", "fused by sum, regions") if quick else tuple(VARIANTS)
        for variant in variants if group.is_usual else LARGE:
            try:
                cells = [scene_cell(lab, variant, n, group.pictures // len(group.scenes), group) for n in group.scenes]
                alone = [alone_rate(lab, names) for names in group.scenes]
            except NotMeasured:
                missing.append(f"{number} by {variant}")
                continue
            row = {**scene_row(cells, group), "collapse alone": sum(alone) / len(alone)}
            rows.append({"subjects": number, "variant": variant, **row})
            matrices += [
                {"scene": ", ".join(names), "variant": variant, "region of": name}
                | {f"{i + 1}": row[i] if i < len(row) else None for i in range(10)}
                for names, cell in zip(group.scenes, cells, strict=True)
                for name, row in zip(names, cell["confusion"], strict=True)
            ]
            lab.note(f"{number}, {variant}: {rows[-1]['collapse rate']} of subjects collapse")
    tables = [
        Table(
            "What becomes of each subject (MultiBind's words), and the Subject Collapse Rate; * two of the puppets are "
            "among the concepts on which rates are chosen",
            rows,
        ),
        Table("Confusion: which concept of the scene (1st, 2nd, …) is nearest to what a region shows", matrices),
    ]
    pictures: dict[str, Image.Image] = {}
    try:
        pictures = {} if quick else {"sheet": scenes_sheet(lab)}
    except NotMeasured:
        missing.append("the sheet")
    return Findings(tables, verdict(rows), pictures, missing)


def scene_row(cells: Sequence[Figures], group: SceneGroup) -> Row:
    """One row: shares over all subjects of these scenes; intervals by a bootstrap over concepts."""
    shown = [name for names in group.scenes for name in names]
    kinds = [picture for cell in cells for picture in cell["kinds"]]
    counts, total = binding_counts(kinds), sum(len(picture) for picture in kinds)
    collapsed = [
        sum(picture[index] != RIGHT for picture in cell["kinds"]) / len(cell["kinds"])
        for cell, names in zip(cells, group.scenes, strict=True)
        for index in range(len(names))
    ]
    nearest = [row[index] for cell in cells for index, row in enumerate(cell["confusion"])]
    return {
        "pictures": sum(cell["pictures"] for cell in cells),
        "right concept": mean_text(nearest, shown),
        "identity": mean_text([value for cell in cells for value in cell["identity"]], shown),
        "collapse rate": mean_text(collapsed, shown),
        "pictures with a collapse": collapsed_pictures(kinds),
        **{kind: counts[kind] / total for kind in KINDS if kind != RIGHT},
        "chance": 1 / len(group.scenes[0]),
    }


def verdict(rows: Sequence[Row]) -> str:
    """The best variant for every number of subjects."""
    sentences = []
    for number in dict.fromkeys(row["subjects"] for row in rows):
        best = min((r for r in rows if r["subjects"] == number), key=lambda r: leading(r["collapse rate"]))
        sentences.append(
            f"{number}: best {best['variant']}, {best['right concept']} of regions hold the right concept, "
            f"{best['collapse rate']} of subjects collapse."
        )
    return " ".join(sentences) or "Nothing was measured yet."


def scenes_sheet(lab: StudyRunner) -> Image.Image:
    """Four pictures of one scene of every usual number, one row per variant; the control image first."""
    blocks = []
    for group in GROUPS.values():
        if not group.is_usual:
            continue
        names = group.scenes[0]
        control = control_of(lab, names, group).at(group.width, group.height).convert("RGB")
        rows = [[control, *pictures_of(lab, variant, names, range(4), group)] for variant in VARIANTS.values()]
        blocks.append(labelled_grid(rows, gap=3))
    return image_grid(blocks, 1, gap=12)
