"""Which concept appears where? Scenes of two to four look-alikes with a sketch or keypose, by region and by fusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.apply import install_tokens
from ..config.evaluate import PLACES
from ..config.scene import Box, Region, Scene
from ..core import assets as resources
from ..data.image_grid import image_grid, labelled_grid
from ..metrics.statistics import mean_text
from ..models.base import Base
from ..scenes.control import ControlMap
from ..scenes.keypose import draw_keypose
from ..scenes.sampling import sample
from .fusion import MERGES, change_for, family_rate
from .registry import Findings, Row, Table, study
from .runner import Figures, StudyRunner, scaled

FAMILY = "spectral, own slots"
WIDTH, HEIGHT, FINE = 256, 128, 2  # of the pictures, and how much finer their control images are
SLOTS = {  # of the adapters; hero and bruno share theirs with concepts that are in no scene with them
    "rex": 0, "fido": 1, "brew": 2, "posy": 3, "inky": 4, "coral": 5, "bolt": 6, "hero": 0, "bruno": 1,
}  # fmt: skip
SCENES: dict[str, tuple[tuple[str, ...], ...]] = {
    "2": (("rex", "fido"), ("fido", "rex"), ("brew", "posy"), ("posy", "brew"), ("inky", "coral"), ("coral", "inky")),
    "3": (("rex", "fido", "brew"), ("brew", "rex", "fido"), ("posy", "inky", "coral"), ("coral", "brew", "posy")),
    "4": (("rex", "fido", "brew", "posy"), ("brew", "inky", "posy", "coral"), ("fido", "coral", "rex", "inky")),
    "3 puppets": (("bolt", "hero", "bruno"), ("bruno", "bolt", "hero")),
    "4, twice as wide": (
        ("rex", "fido", "brew", "posy"),
        ("brew", "inky", "posy", "coral"),
        ("fido", "coral", "rex", "inky"),
    ),
}
SEEDS = {
    "2": 48,
    "3": 36,
    "4": 36,
    "3 puppets": 24,
    "4, twice as wide": 36,
}  # pictures per number of concepts, over all scenes
STANDING = (
    (0.5, 0.16), (0.5, 0.30), (0.36, 0.31), (0.28, 0.45), (0.25, 0.58), (0.64, 0.31), (0.72, 0.45), (0.75, 0.58),
    (0.43, 0.60), (0.41, 0.76), (0.40, 0.92), (0.57, 0.60), (0.59, 0.76), (0.60, 0.92), (0.46, 0.13), (0.54, 0.13),
    (0.41, 0.15), (0.59, 0.15),
)  # of a person in a square, in OpenPose's order  # fmt: skip


@dataclass(frozen=True)
class SceneVariant:
    """How a scene is made: adapters bound to regions, or a fused base, with or without the regions' prompts."""

    merge: str | None
    regions: bool = True


VARIANTS = {
    "bound to regions": SceneVariant(None),
    "fused by sum, regions": SceneVariant("sum"),
    "fused by sum, no regions": SceneVariant("sum", False),
    "fused by gradient, regions": SceneVariant("gradient, anchored"),
    "fused by gradient, no regions": SceneVariant("gradient, anchored", False),
}


def boxes(count: int) -> list[Box]:
    """``count`` columns of the picture, from left to right."""
    return [(index / count, 0.0, (index + 1) / count, 1.0) for index in range(count)]


def width_of(number: str) -> int:
    """The width of the pictures of these scenes."""
    return 2 * WIDTH if number.endswith("wide") else WIDTH


def square_picture(box: Box, width: int) -> tuple[int, int, int, int]:
    """The largest square in the middle of a box, in the picture's pixels."""
    left, right = box[0] * width, box[2] * width
    side = min(right - left, HEIGHT)
    x, y = (left + right) / 2, HEIGHT / 2
    return round(x - side / 2), round(y - side / 2), round(x + side / 2), round(y + side / 2)


def drawing_of(lab: StudyRunner, names: Sequence[str], puppets: bool, width: int = WIDTH) -> ControlMap:
    """The classes' sketches, or standing skeletons, one in the middle of every region."""
    size = (width * FINE, HEIGHT * FINE)
    squares = [tuple(side * FINE for side in square_picture(box, width)) for box in boxes(len(names))]
    if puppets:
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
    rate, _ = family_rate(lab, FAMILY, False)
    quick = lab.settings["train"]["steps"] < 100
    change = scaled(lab, 1.0 if quick else rate)
    return [lab.trained(name, **change_for(FAMILY, SLOTS[name]), **change, seed=0)[0] for name in names]


def base_for(lab: StudyRunner, variant: SceneVariant, adapters: Sequence[Adapter]) -> Base:
    """A base with the adapters fused in, or only their tokens."""
    if variant.merge is not None:
        return lab.fused(adapters, **MERGES[variant.merge])
    base = lab.fresh()
    for adapter in adapters:
        install_tokens(base, adapter)
    return base


def pictures_of(
    lab: StudyRunner,
    variant: SceneVariant,
    names: Sequence[str],
    seeds: Sequence[int],
    puppets: bool,
    width: int = WIDTH,
) -> list[Image.Image]:
    """Pictures of one scene, the locations in turn."""
    adapters = scene_adapters(lab, names)
    base, tokens = base_for(lab, variant, adapters), [adapter.token for adapter in adapters]
    drawing, images = drawing_of(lab, names, puppets, width), []
    for start, location in enumerate(PLACES):
        mine = list(seeds[start :: len(PLACES)])
        regions = [
            Region(box=box, prompt=f"a photo of {token} {location}")
            for box, token in zip(boxes(len(names)), tokens, strict=True)
        ]
        scene = Scene(
            **{**lab.pictures_config.model_dump(exclude={"regions"}), "width": width, "height": HEIGHT},
            regions=regions if variant.regions else [],
        )
        bound = [[(adapter, 1.0)] for adapter in adapters] if variant.merge is None else []
        images += sample(base, [prompt_of(tokens, location)] * len(mine), mine, scene, controls=[drawing], bound=bound)
    return images


def confusion(lab: StudyRunner, images: Sequence[Image.Image], names: Sequence[str]) -> list[list[float]]:
    """Per region (row) the share of pictures in which each concept (column) is nearest to the region's content."""
    references = torch.stack([lab.encoder.embed(lab.references(name)).mean(0) for name in names])
    rows = []
    for box in boxes(len(names)):
        cosines = lab.encoder.embed([image.crop(square_picture(box, image.width)) for image in images]) @ references.mT
        rows.append([float((cosines.argmax(1) == index).double().mean()) for index in range(len(names))])
    return rows


def scene_cell(lab: StudyRunner, name: str, variant: str, names: Sequence[str], count: int, puppets: bool) -> Figures:
    """One scene by one variant: its confusion matrix and the mean identity of the right concepts."""

    width = width_of(name)

    def compute() -> Figures:
        images = pictures_of(lab, VARIANTS[variant], names, range(count), puppets, width)
        likeness = [
            lab.identity([image.crop(square_picture(box, width)) for image in images], concept)
            for box, concept in zip(boxes(len(names)), names, strict=True)
        ]
        return {"confusion": confusion(lab, images, names), "identity": likeness, "pictures": len(images)}

    kind = {"way": vars(VARIANTS[variant]), "names": list(names), "num_images": count, "puppets": puppets}
    return lab.cell("scene", kind if width == WIDTH else {**kind, "width": width}, compute)


@study(
    "scenes",
    "Figs. 5, 12, 13",
    "With sketches or keyposes and regions every concept appears in its own place as itself.",
    (40, 1.0),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """How often the right concept is in its region, for look-alikes, by variant and number."""
    chosen = {"2": SCENES["2"][:1]} if quick else SCENES
    variants = ("bound to regions", "fused by sum, regions") if quick else tuple(VARIANTS)
    rows: list[Row] = []
    matrices: list[Row] = []
    for number, scenes in chosen.items():
        for variant in variants if width_of(number) == WIDTH else variants[:1]:
            right, likeness, shown, pictures = [], [], list[str](), 0
            for names in scenes:
                count = len(PLACES) if quick else SEEDS[number] // len(scenes)
                cell = scene_cell(lab, number, variant, names, count, number.endswith("puppets"))
                right += [row[index] for index, row in enumerate(cell["confusion"])]
                likeness += cell["identity"]
                shown += names
                pictures += cell["pictures"]
                matrices += [
                    {"scene": ", ".join(names), "way": variant, "region of": name}
                    | {f"{i + 1}": row[i] if i < len(row) else None for i in range(4)}
                    for name, row in zip(names, cell["confusion"], strict=True)
                ]
            figures: dict[str, Any] = {
                "right concept": mean_text(right, shown),
                "likeness": mean_text(likeness, shown),
                "chance": 1 / len(scenes[0]),
            }
            rows.append({"concepts": number, "way": variant, "pictures": pictures, **figures})
            lab.note(f"{number}, {variant}: {rows[-1]['right concept']} of regions hold the right concept")
    tables = [
        Table("The right concept in its region, by the identity encoder", rows),
        Table("Confusion: which concept of the scene (1st, 2nd, …) is nearest to what a region shows", matrices),
    ]
    return Findings(tables, verdict(rows), {} if quick else {"sheet": scenes_sheet(lab)})


def verdict(rows: Sequence[Row]) -> str:
    """The best variant for every number of concepts."""
    sentences = []
    for number in dict.fromkeys(row["concepts"] for row in rows):
        best = max((r for r in rows if r["concepts"] == number), key=lambda r: float(r["right concept"].split()[0]))
        sentences.append(f"{number}: best {best['way']}, {best['right concept']} of regions hold the right concept.")
    return " ".join(sentences)


def scenes_sheet(lab: StudyRunner) -> Image.Image:
    """Four pictures of one scene of every number, one row per variant; the control image first."""
    blocks = []
    for number, scenes in SCENES.items():
        if width_of(number) != WIDTH:
            continue
        names, puppets = scenes[0], number.endswith("puppets")
        drawing = drawing_of(lab, names, puppets).at(WIDTH, HEIGHT).convert("RGB")
        rows = [[drawing, *pictures_of(lab, variant, names, range(4), puppets)] for variant in VARIANTS.values()]
        blocks.append(labelled_grid(rows, gap=3))
    return image_grid(blocks, 1, gap=12)
