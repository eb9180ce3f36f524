"""The demo: two photo folders, two adapters in two slots, one fusion, one picture where a sketch puts them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .adapters.apply import put_adapters
from .adapters.formats.native import load_adapter
from .config.fuse import FuseConfig
from .config.presets import preset_settings
from .config.scene import ControlImage, Region, Scene
from .config.settings import build, to_yaml
from .config.train import TrainConfig
from .core import assets as resources
from .core.files import write_text
from .core.hooks import QUIET, Hooks, brief_duration
from .core.machine import parse_device
from .core.precision import resolve_mixed_precision
from .data.folder import load_concept, open_photo
from .data.image_grid import image_grid, labelled
from .merging.fuse import fuse_to_folder
from .models.base import Base
from .models.loading import load_base
from .scenes.control import read_control_image
from .scenes.png_metadata import save_png, sources_of
from .scenes.sampling import sample
from .training.run import train_to_file
from .training.speed import seconds_per_picture, training_seconds

CONCEPTS = ("rex", "brew")
SKETCH = "dog-teapot.png"
TRAINING = 400  # steps of each concept, a little less than the preset's
DISTILLATION = 300  # steps
PLACES = ("on the grass", "on the beach", "in the snow", "on a table")
TILE = 96
# The measured cost of the rest of the demo, in pictures of a training step, and in seconds.
DISTILL_STEP = 24  # a step of distillation on 16 pictures
ALL_PICTURES = 1500  # all pictures together, those of the distillation included
STARTING = 20.0
FEWEST = 4  # denoising steps of a picture
PREPARED, NOISES = 24, 12  # at most, if steps are given: images of each part, and noises per image


def run_demo(
    output: Path,
    steps: int | None = None,
    hooks: Hooks = QUIET,
) -> Path:
    """Run the whole path on the pocket base and return the contact sheet's path.

    Args:
        steps: of each training, and at most as many of distillation; by default :data:`TRAINING` and
            :data:`DISTILLATION`. A few steps are a smoke test, with few images and denoising steps.
    """
    concepts = {name: load_concept(resources.concepts() / name) for name in CONCEPTS}
    files = {name: output / f"{name}.safetensors" for name in CONCEPTS}
    trainings = [training_settings(name, files[name], steps) for name in CONCEPTS]
    distill_steps = min(steps or DISTILLATION, DISTILLATION)
    hooks.notify(f"The whole demo takes about {brief_duration(demo_seconds(trainings, distill_steps))} here.")
    for config in trainings:
        train_to_file(config, force=True, hooks=hooks)
    fused = output / "fused"
    for warning in fuse_to_folder(fusion_settings(list(files.values()), fused, steps, distill_steps), hooks):
        hooks.notify(warning)
    hooks.notify(f"Fused into {fused}/.")

    changes = {"base": str(fused), "output": output / "together.png"}
    if steps:
        changes["num_inference_steps"] = min(max(steps, FEWEST), 20)
    settings = build(Scene, preset_settings("pocket", "generate"), changes)

    def pictures(base: Base, name: str) -> list[Image.Image]:
        prompts = [f"a photo of {concepts[name].token} {location}" for location in PLACES]
        return sample(base, prompts, [10 + i for i in range(len(prompts))], settings, hooks)

    alone = {}
    for name in CONCEPTS:
        with_one = load_base("pocket")
        put_adapters(with_one, [(load_adapter(files[name]), 1.0)])
        alone[name] = pictures(with_one, name)
    with_both = load_base(str(fused))
    after = {name: pictures(with_both, name) for name in CONCEPTS}
    both = picture_together(with_both, [concept.token for concept in concepts.values()], settings, hooks)
    references = {name: [open_photo(photo.path) for photo in concept.photos[:4]] for name, concept in concepts.items()}
    path = output / "sheet.png"
    contact_sheet({"references": references, "alone": alone, "after fusion": after}, both).save(path)
    return path


def few_images(steps: int | None) -> dict[str, int]:
    """The number of images that a demo of a few steps prepares for each part; a whole demo follows the preset."""
    return {"num_images": min(steps, PREPARED)} if steps else {}


def training_settings(name: str, output: Path, steps: int | None) -> TrainConfig:
    """The preset's training of one concept with the demo's steps."""
    change = {"steps": steps or TRAINING, "prior": few_images(steps)}
    concept = {"concept": resources.concepts() / name, "output": output}
    return build(TrainConfig, preset_settings("pocket", "train"), concept, change)


def fusion_settings(adapters: Sequence[Path], output: Path, steps: int | None, distill_steps: int) -> FuseConfig:
    """Gradient fusion of the adapters, then distillation."""
    images = few_images(steps)
    distill = {"steps": distill_steps, **images}
    if steps:
        distill |= {"num_prior_images": images["num_images"], "noises_per_image": min(steps, NOISES)}
    change = {"adapters": list(adapters), "output": output, "merge": "gradient"}
    change |= {"distill": distill, "calibration": images}
    return build(FuseConfig, preset_settings("pocket", "fuse"), change)


def picture_together(base: Base, tokens: Sequence[str], settings: Scene, hooks: Hooks) -> list[Image.Image]:
    """The sketch, and four pictures of both concepts placed by it; the first is written to a file with its scene."""
    control = ControlImage(file=resources.concepts() / "sketches" / SKETCH, conditioning_scale=0.4)
    sketch = read_control_image(control)
    first, second = tokens
    halves = (((0.0, 0.0, 0.5, 1.0), first), ((0.5, 0.0, 1.0, 1.0), second))
    scene = settings.model_copy(
        update={
            "prompt": f"{first} on the left and {second} on the right on the beach",
            "regions": [Region(box=box, prompt=f"a photo of {token} on the beach") for box, token in halves],
            "controls": [control],
            "width": 2 * base.size,
            "seed": 3,
        }
    )
    both = sample(base, [scene.prompt] * 4, [scene.seed + i for i in range(4)], scene, hooks, controls=[sketch])
    save_png(both[0], scene.output, scene, sources_of(scene, base))
    write_text(scene.output.with_suffix(".yaml"), to_yaml(scene))
    return [sketch.image.convert("RGB"), *both]


def demo_seconds(trainings: Sequence[TrainConfig], distill_steps: int) -> float:
    """Seconds of the demo on this machine, from a measured step, without other load."""
    device = parse_device("auto")
    picture = seconds_per_picture("pocket", device, resolve_mixed_precision("auto", device))
    trained = sum(training_seconds(config, "pocket") for config in trainings)
    return trained + (distill_steps * DISTILL_STEP + ALL_PICTURES) * picture + STARTING


def contact_sheet(columns: dict[str, dict[str, list[Image.Image]]], wide: Sequence[Image.Image]) -> Image.Image:
    """Pictures by column and concept, one row a concept; below, the sketch and the pictures of both together."""

    def tiles(images: Sequence[Image.Image], width: int, gap: int) -> Image.Image:
        return image_grid([image.resize((width, TILE), Image.Resampling.LANCZOS) for image in images], len(images), gap)

    names = next(iter(columns.values()))
    cells = [labelled(tiles(of[name], TILE, 2), text) for name in names for text, of in columns.items()]
    for start, text in ((0, "sketch and together, four seeds"), (2, ""), (4, "")):
        cells.append(labelled(tiles(wide[start : start + 2], 2 * TILE, 6), text))
    return image_grid(cells, len(columns), gap=12)
