"""The demo: two photo folders, two adapters in two slots, one fusion, one picture where a sketch puts them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .adapters.formats.native import load_adapter
from .config.fuse import FuseConfig
from .config.presets import preset_settings
from .config.settings import build, to_yaml
from .config.train import TrainConfig
from .core import assets as resources
from .core.files import write_text
from .core.hooks import QUIET, Hooks, brief_duration
from .core.precision import resolve_mixed_precision
from .data.folder import load_concept, open_photo
from .data.image_grid import image_grid, labelled
from .merging.fuse import fuse_to_folder
from .models.base import Base, load_base, parse_device
from .scenes.control import read_control_image
from .scenes.generate import put_adapters, sample
from .scenes.png_metadata import save_png, sources_of
from .scenes.scene import ControlImage, Region, Scene
from .training.run import train_to_file
from .training.speed import seconds_per_picture, training_seconds

CONCEPTS = ("rex", "brew")
SKETCH = "dog-teapot.png"
TRAINING = 400  # steps of each concept, two thirds of the preset's: the demo is to be quick on every CPU
TEACHING = 300  # steps
PLACES = ("on the grass", "on the beach", "in the snow", "on a table")
TILE = 96
# What the demo takes beside its trainings, in pictures of a training step, and in seconds; as measured.
TAUGHT = 24  # a step of distillation, 16 pictures whose layers' weights learn
DRAWN = 1500  # all pictures together, those that distillation draws included
STARTING = 20.0
PREPARED = 24  # images at most that are prepared for each part, where the number of steps is given


def run_demo(
    output: Path,
    steps: int | None = None,
    hooks: Hooks = QUIET,
) -> Path:
    """Run the whole path on the pocket base and return the contact sheet's path.

    Args:
        steps: of each training, and at most as many of distillation; by default :data:`TRAINING` and
            :data:`TEACHING`. With a number, as many images at most are prepared for each part.
    """
    train, fuse, draw = (preset_settings("pocket", verb) for verb in ("train", "fuse", "generate"))
    folders = {name: resources.concepts() / name for name in CONCEPTS}
    concepts = {name: load_concept(folder) for name, folder in folders.items()}
    files = {name: output / f"{name}.safetensors" for name in CONCEPTS}

    # With a few steps only it shows that all of it runs, so that it prepares little too.
    few = {"num_images": min(steps or PREPARED, PREPARED)}
    shorter = {"steps": steps, "prior": few} if steps else {"steps": TRAINING}
    trainings = {
        name: build(TrainConfig, train, {"concept": folder, "output": files[name]}, shorter)
        for name, folder in folders.items()
    }
    teaching = min(steps or TEACHING, TEACHING)
    hooks.notify(f"The whole demo takes about {brief_duration(demo_seconds(list(trainings.values()), teaching))} here.")
    for config in trainings.values():
        train_to_file(config, force=True, hooks=hooks)

    fused = output / "fused"
    change = {"adapters": list(files.values()), "output": fused, "merge": "gradient"}
    change["distill"] = {"steps": teaching}
    if steps:
        change |= {"distill": {"steps": teaching, **few, "num_prior_images": few["num_images"]}, "calibration": few}
    for warning in fuse_to_folder(build(FuseConfig, fuse, change), hooks):
        hooks.notify(warning)
    hooks.notify(f"Fused into {fused}/.")

    settings = build(Scene, draw, {"base": str(fused), "output": output / "together.png"})

    def pictures(base: Base, name: str) -> list[Image.Image]:
        prompts = [f"a photo of {concepts[name].token} {place}" for place in PLACES]
        return sample(base, prompts, [10 + i for i in range(len(prompts))], settings, hooks)

    alone = {}
    for name in CONCEPTS:
        with_one = load_base("pocket")
        put_adapters(with_one, [(load_adapter(files[name]), 1.0)])
        alone[name] = pictures(with_one, name)
    with_both = load_base(str(fused))
    after = {name: pictures(with_both, name) for name in CONCEPTS}

    sketch_path = resources.concepts() / "sketches" / SKETCH
    condition = ControlImage(file=sketch_path, conditioning_scale=0.7)
    sketch = read_control_image(condition)
    first, second = (concepts[name].token for name in CONCEPTS)
    scene = settings.model_copy(
        update={
            "prompt": f"{first} on the left and {second} on the right on the beach",
            "regions": [
                Region(box=box, prompt=f"a photo of {token} on the beach")
                for box, token in (((0.0, 0.0, 0.5, 1.0), first), ((0.5, 0.0, 1.0, 1.0), second))
            ],
            "controls": [condition],
            "width": 2 * with_both.size,
            "seed": 3,
        }
    )
    both = sample(with_both, [scene.prompt] * 4, [scene.seed + i for i in range(4)], scene, hooks, drawings=[sketch])
    save_png(both[0], scene.output, scene, sources_of(scene, with_both))
    write_text(output / "together.yaml", to_yaml(scene))
    photos = {name: [open_photo(photo.path) for photo in concept.photos[:4]] for name, concept in concepts.items()}
    columns = {"references": photos, "alone": alone, "after fusion": after}
    sheet = contact_sheet(columns, [sketch.image.convert("RGB"), *both])
    path = output / "sheet.png"
    sheet.save(path)
    return path


def demo_seconds(trainings: Sequence[TrainConfig], teaching: int) -> float:
    """Seconds of the demo on this machine when it does nothing else, from a measured step."""
    device = parse_device("auto")
    picture = seconds_per_picture("pocket", device, resolve_mixed_precision("auto", device))
    trained = sum(training_seconds(config, "pocket") for config in trainings)
    return trained + (teaching * TAUGHT + DRAWN) * picture + STARTING


def contact_sheet(columns: dict[str, dict[str, list[Image.Image]]], wide: Sequence[Image.Image]) -> Image.Image:
    """Pictures by column and concept, one row a concept; below, the sketch and the pictures of both together."""

    def tiles(images: Sequence[Image.Image], width: int, gap: int) -> Image.Image:
        return image_grid([image.resize((width, TILE), Image.Resampling.LANCZOS) for image in images], len(images), gap)

    names = next(iter(columns.values()))
    cells = [labelled(tiles(of[name], TILE, 2), text) for name in names for text, of in columns.items()]
    for start, text in ((0, "sketch and together, four seeds"), (2, ""), (4, "")):
        cells.append(labelled(tiles(wide[start : start + 2], 2 * TILE, 6), text))
    return image_grid(cells, len(columns), gap=12)
