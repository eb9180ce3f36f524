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
from ..core.files import check_writable, write_settings
from ..core.hooks import QUIET, Hooks
from ..core.machine import heading, provenance
from ..core.paths import without_folders
from ..data.folder import Concept
from ..metrics.views import View
from ..scenes.generate import generate_to_file
from .generate import EvaluationImages, GeneratedImages, count_of, draw_adapters
from .inputs import EvaluationInputs, choose_encoders, hold, read_pictures, read_scenes, subjects
from .measure import image_drift, score, with_photos
from .references import references_of
from .region_crops import scene_in, views_in
from .report import NAME, write_report
from .summary import ALONE, Evaluation


def evaluate_to_folder(
    config: EvaluateConfig,
    hooks: Hooks = QUIET,
) -> Evaluation:
    """Draw, measure and write ``evaluation.json``, ``.md``, ``.html``, ``.png`` and the settings into the output.

    Pictures that are there already, made from the same settings, base and files, are not drawn again.

    Raises:
        Cancelled: ``should_stop`` said so; what is drawn is kept.
        UserError: anything the person can mend; most of it is told before anything is drawn.
    """
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"The output {config.output} is a file.", Fix("output", so="to name a folder"))
    held = hold(config)
    scenes = read_scenes(config, held)
    pictures = read_pictures(config.pictures) if config.pictures else {}
    if not (held or scenes or pictures):
        raise UserError(
            "Nothing to evaluate: neither adapter files nor a fused folder is given.",
            Fix("scenes", so="to draw and measure a scene"),
            Fix("pictures", so="to measure a folder of pictures"),
        )
    every = [*scenes.values(), *pictures.values()]
    concepts = references_of(subjects(config, held, every), config.references, config.others)
    encoders = choose_encoders(config.encoders, [held.base] if held else [scene.base for scene in every])
    check_writable(config.output / f"{NAME}.json")

    of_scenes = sum(len(scene.every_seed()) for scene in scenes.values())
    shelf = EvaluationImages(config, count_of(config, held) + of_scenes, hooks.progress, hooks.should_stop)
    drawn = draw_adapters(shelf, held, hooks) if held else GeneratedImages()
    for name, scene in scenes.items():
        paths = generate_to_file(scene, Hooks(notify=hooks.notify, should_stop=hooks.should_stop), resume=True)
        drawn.shown[name] = views_of({path: scene_in(path) for path in paths}, concepts)
        shelf.count(len(scene.every_seed()))
    if pictures:
        drawn.shown["pictures"] = views_of(pictures, concepts)
    for way, views in drawn.shown.items():
        if not views:
            hooks.notify(f"Note: nothing in '{way}' names one concept in one place, so it is not measured.")
    if not any(drawn.shown.values()):
        raise UserError("No picture names one concept in one place; use scenes with regions that name a token each.")

    encoder_names = [encoder.name for encoder in encoders]
    scored = score(with_photos(drawn.shown, concepts), concepts, encoders, hooks)
    result = Evaluation(evaluation_record(config, held, drawn, concepts), list(concepts), encoder_names, scored)
    if held:
        result.together = None if held.together == ALONE else held.together
        result.drift = {encoder.name: image_drift(encoder, *drawn.ordinary) for encoder in encoders}
        result.seconds = {way: shelf.each(way) for way in drawn.shown if shelf.each(way)}
    write_settings(config.output / f"{NAME}.yaml", heading() + to_yaml(config))
    write_report(result, config.output)
    return result


def views_of(pictures: Mapping[Path, Scene | None], concepts: Mapping[str, Concept]) -> list[View]:
    """The views of pictures by their scenes; none of contact sheets, which have none."""
    tokens = {concept.token: (concept.name, concept.noun) for concept in concepts.values()}
    found = []
    for path, scene in pictures.items():
        if scene is not None:
            with Image.open(path) as image:
                found += views_in(path, scene, tokens, image.size)
    return found


def evaluation_record(
    config: EvaluateConfig, held: EvaluationInputs | None, drawn: GeneratedImages, concepts: Mapping[str, Concept]
) -> dict[str, Any]:
    """What an evaluation was made from, as JSON."""
    return {
        "config": without_folders(config.model_dump(mode="json")),
        "provenance": provenance(),
        "base": {"name": without_folders(held.base), "fingerprint": drawn.base} if held else None,
        "concepts": {
            name: {"token": one.token, "noun": one.noun, "photos": len(one.photos)} for name, one in concepts.items()
        },
    }
