"""From the settings of an evaluation to its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..config.evaluate import EvaluateConfig
from ..config.scene import Scene
from ..config.settings import to_yaml
from ..core.errors import Fix, UserError
from ..core.files import check_writable
from ..core.hooks import QUIET, Hooks
from ..core.machine import heading, provenance
from ..core.outputs import write_settings
from ..core.paths import without_folders
from ..data.folder import Concept
from ..metrics.views import View
from ..scenes.generate import generate_to_file
from .generate import EvaluationImages, GeneratedImages, count_of, generate_adapters
from .inputs import EvaluationInputs, choose_encoders, load_inputs, read_pictures, read_scenes, subjects
from .measure import image_drift, score, with_photos
from .references import references_of
from .region_crops import scene_in, views_in
from .report import NAME, write_report
from .summary import ALONE, Evaluation


def evaluate_to_folder(
    config: EvaluateConfig,
    hooks: Hooks = QUIET,
) -> Evaluation:
    """Generate, measure and write ``evaluation.json``, ``.md``, ``.html``, ``.png`` and the settings into the output.

    Existing images of the same settings, base and files are kept.

    Raises:
        Cancelled: ``should_stop`` returned True; finished images are kept.
        UserError: anything the user can fix; most of it is checked before the first image.
    """
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"The output {config.output} is a file.", Fix("output", so="to name a folder"))
    inputs = load_inputs(config)
    scenes = read_scenes(config, inputs)
    pictures = read_pictures(config.pictures) if config.pictures else {}
    if not (inputs or scenes or pictures):
        raise UserError(
            "Nothing to evaluate: neither adapter files nor a fused folder is given.",
            Fix("scenes", so="to draw and measure a scene"),
            Fix("pictures", so="to measure a folder of pictures"),
        )
    every = [*scenes.values(), *pictures.values()]
    concepts = references_of(subjects(config, inputs, every), config.references, config.others)
    bases = [inputs.base] if inputs else [scene.base for scene in every]
    encoders = choose_encoders(config.encoders, bases, config.device)
    check_writable(config.output / f"{NAME}.json")

    of_scenes = sum(len(scene.every_seed()) for scene in scenes.values())
    images = EvaluationImages(config, count_of(config, inputs) + of_scenes, hooks.progress, hooks.should_stop)
    generated = generate_adapters(images, inputs, hooks) if inputs else GeneratedImages()
    for name, scene in scenes.items():
        paths = generate_to_file(scene, Hooks(notify=hooks.notify, should_stop=hooks.should_stop), resume=True)
        generated.shown[name] = views_of({path: scene_in(path) for path in paths}, concepts)
        images.count(len(scene.every_seed()))
    if pictures:
        generated.shown["pictures"] = views_of(pictures, concepts)
    for setting, views in generated.shown.items():
        if not views:
            hooks.notify(f"Note: nothing in '{setting}' names one concept in one place, so it is not measured.")
    if not any(generated.shown.values()):
        raise UserError("No picture names one concept in one place; use scenes with regions that name a token each.")

    encoder_names = [encoder.name for encoder in encoders]
    scored = score(with_photos(generated.shown, concepts), concepts, encoders, hooks)
    result = Evaluation(evaluation_record(config, inputs, generated, concepts), list(concepts), encoder_names, scored)
    if inputs:
        result.together = None if inputs.together == ALONE else inputs.together
        result.drift = {encoder.name: image_drift(encoder, *generated.generic_images) for encoder in encoders}
        result.seconds = {setting: images.each(setting) for setting in generated.shown if images.each(setting)}
    write_settings(config.output / f"{NAME}.yaml", heading() + to_yaml(config))
    write_report(result, config.output)
    return result


def views_of(pictures: Mapping[Path, Scene | None], concepts: Mapping[str, Concept]) -> list[View]:
    """The views of pictures by their scenes; contact sheets have none."""
    tokens = {concept.token: (concept.name, concept.noun) for concept in concepts.values()}
    views = []
    for path, scene in pictures.items():
        if scene is not None:
            with Image.open(path) as image:
                views += views_in(path, scene, tokens, image.size)
    return views


def evaluation_record(
    config: EvaluateConfig, inputs: EvaluationInputs | None, generated: GeneratedImages, concepts: Mapping[str, Concept]
) -> dict[str, Any]:
    """The inputs of an evaluation as JSON."""
    return {
        "config": without_folders(config.model_dump(mode="json")),
        "provenance": provenance(),
        "base": {"name": without_folders(inputs.base), "fingerprint": generated.base} if inputs else None,
        "concepts": {
            name: {"token": concept.token, "noun": concept.noun, "photos": len(concept.photos)}
            for name, concept in concepts.items()
        },
    }
