"""Measure the pocket base: every figure of its model card, again, from fixed seeds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt, sobel
from torch import Tensor

from spectral_diffusion.adapters.apply import put_adapters
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.presets import preset_settings
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.settings import build
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.assets import concepts as concept_folder
from spectral_diffusion.core.names import with_article
from spectral_diffusion.data.folder import load_concept, open_photo
from spectral_diffusion.metrics.classifiers import classify_images, load_classifier
from spectral_diffusion.metrics.identity import IdentityEncoder, embed, identity_score, load_identity_encoder
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.control import ControlMap
from spectral_diffusion.scenes.keypose import draw_keypose
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.training.run import train_to_file

from . import puppets
from .concepts import CONCEPTS, views
from .identity import held_out_auc
from .judges import SEEN
from .loop import Report
from .render import Picture, Renderer, WorldConfig, thicken
from .world import Backdrop, Thing

Figures = dict[str, Any]


def scenes(renderer: Renderer, world: WorldConfig, count: int, size: tuple[int, int], seed: str) -> list[Picture]:
    """True scenes of a size (width, height), which are also the captions to draw."""
    random = Random(seed)
    return [renderer.scene(random, world, *size) for _ in range(count)]


def draw(base: Base, pictures: Sequence[Picture], config: Scene, seed: int = 0) -> list[Image.Image]:
    """One generated picture per caption."""
    height, width = pictures[0].image.shape[:2]
    return sample(
        base,
        [picture.caption for picture in pictures],
        [seed + index for index in range(len(pictures))],
        config.model_copy(update={"width": width, "height": height}),
    )


def marks(judge: torch.nn.Module, images: Sequence[Image.Image], truth: Sequence[Picture]) -> Figures:
    """How many of the captions' things, colours and backdrops a judge finds."""
    counts = [len(picture.things) for picture in truth]
    verdicts = classify_images(judge, images, counts)
    nouns = colours = backdrops = every = tinted = 0
    for seen, picture in zip(verdicts, truth, strict=True):
        right = [v.noun == thing.noun for v, thing in zip(seen, picture.things, strict=True)]
        nouns += sum(right)
        hued = [v.colour == thing.colour for v, thing in zip(seen, picture.things, strict=True) if thing.colour]
        colours += sum(hued)
        tinted += len(hued)
        backdrops += seen[0].backdrop == (picture.backdrop.setting or picture.backdrop.colour)
        every += all(right) and all(hued)
    return {
        "class": nouns / sum(counts),
        "colour": colours / max(tinted, 1),
        "backdrop": backdrops / len(truth),
        "whole": every / len(truth),
        "all_classes": sum(
            all(v.noun == t.noun for v, t in zip(seen, p.things, strict=True))
            for seen, p in zip(verdicts, truth, strict=True)
        )
        / len(truth),
    }


def captions_kept(
    base: Base, renderer: Renderer, config: Scene, judges: dict[str, torch.nn.Module], count: int
) -> Figures:
    """One, two and three things: what each judge finds in generated pictures and in true renders."""
    side = base.denoiser.size
    every = replace(SEEN, natural=0.0, shift=0.04, rotate=5.0, scale=(0.78, 0.92), second_drawing=0.1)
    kinds = {
        "one": (replace(every, counts=(1.0,)), side),
        "two": (replace(every, counts=(0.0, 1.0)), side),
        "two_wide": (replace(every, wide_counts=(0.0, 1.0)), 2 * side),
        "three_wide": (replace(every, wide_counts=(0.0, 0.0, 1.0)), 2 * side),
    }
    out: Figures = {}
    for name, (world, width) in kinds.items():
        truth = scenes(renderer, world, count, (width, side), f"report/{name}")
        images = draw(base, truth, config)
        out[name] = {
            judge: {
                "generated": marks(network, images, truth),
                "true": marks(network, [Image.fromarray(p.image) for p in truth], truth),
            }
            for judge, network in judges.items()
        }
    return out


def spread(vectors: Tensor) -> float:
    """Mean distance 1 − cosine between different rows."""
    count = len(vectors)
    return float((1 - vectors @ vectors.mT)[~torch.eye(count, dtype=torch.bool)].mean())


def seeds_differ(
    base: Base, renderer: Renderer, config: Scene, encoder: IdentityEncoder, captions: int = 16, seeds: int = 8
) -> float:
    """Spread of pictures of one caption over seeds, as a share of the spread of true renders of it."""
    random, side = Random("report/seeds"), base.denoiser.size
    world = replace(SEEN, natural=0.0)
    drawn, true = [], []
    for index in range(captions):
        scene = renderer.scene(random, replace(world, counts=(1.0,)), side, side)
        images = sample(base, [scene.caption] * seeds, [1000 * index + s for s in range(seeds)], config)
        drawn.append(spread(embed(encoder, images)))
        again = [renderer.render(random, world, scene.things, scene.backdrop, side, side) for _ in range(seeds)]
        true.append(spread(embed(encoder, [Image.fromarray(picture.image) for picture in again])))
    return float(np.mean(drawn) / np.mean(true))


def edges(image: Image.Image) -> np.ndarray:
    """Strong edges of a picture, (H, W) bool."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    size = np.max([np.hypot(sobel(pixels[..., c], 0), sobel(pixels[..., c], 1)) for c in range(3)], axis=0)
    return size > max(0.6, float(np.quantile(size, 0.85)))


def edge_f1(found: np.ndarray, wanted: np.ndarray, tolerance: float = 0.0234) -> float:
    """F1 of edges that lie within ``tolerance`` of the picture's height of each other."""
    tolerance *= len(wanted)
    if not found.any() or not wanted.any():
        return 0.0
    precision = float((distance_transform_edt(~wanted)[found] <= tolerance).mean())
    recall = float((distance_transform_edt(~found)[wanted] <= tolerance).mean())
    return 2 * precision * recall / max(precision + recall, 1e-9)


def sketches_kept(base: Base, renderer: Renderer, config: Scene, count: int = 64) -> Figures:
    """Edge F1 of pictures with their own sketch, minus the same with another scene's sketch."""
    world = replace(SEEN, counts=(1.0,), natural=0.0, scale=(0.6, 0.9), shift=0.12, rotate=12.0)
    truth = scenes(renderer, world, count, (base.denoiser.size,) * 2, "report/sketch")
    random = Random("report/strokes")
    strokes = [Image.fromarray((thicken(p.sketch, random) * 255).astype(np.uint8), "L") for p in truth]
    images = [
        sample(base, [picture.caption], [index], config, controls=[ControlMap(stroke)])[0]
        for index, (picture, stroke) in enumerate(zip(truth, strokes, strict=True))
    ]
    wanted = [picture.sketch > 0.4 for picture in truth]
    found = [edges(image) for image in images]
    own = float(np.mean([edge_f1(f, w) for f, w in zip(found, wanted, strict=True)]))
    other = float(np.mean([edge_f1(f, w) for f, w in zip(found[1:] + found[:1], wanted, strict=True)]))
    return {"own": own, "shuffled": other, "difference": own - other}


def silhouette(image: Image.Image) -> np.ndarray:
    """What stands out from a plain backdrop, (H, W) bool."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    return np.abs(pixels - np.median(border, 0)).max(-1) > 45


def iou(one: np.ndarray, two: np.ndarray) -> float:
    """Intersection over union."""
    return float((one & two).sum() / max((one | two).sum(), 1))


def poses_kept(base: Base, renderer: Renderer, config: Scene, count: int = 64) -> Figures:
    """Silhouette IoU of puppets with their own keypose, minus the same with another's."""
    random, side = Random("report/keypose"), base.denoiser.size
    world = replace(SEEN, scale=(0.75, 0.92), shift=0.05)
    truth, images = [], []
    for index in range(count):
        colour = random.choice(["red", "blue", "green", "purple", "orange"])
        thing = Thing(random.choice(puppets.NOUNS), colour)
        picture = renderer.render(random, world, [thing], Backdrop(None, "white"), side, side)
        keypose = ControlMap(draw_keypose(picture.people, side, side), "keypose")
        images += sample(base, [picture.caption], [index], config, controls=[keypose])
        truth.append(picture.mask > 0.5)
    found = [silhouette(image) for image in images]
    own = float(np.mean([iou(f, t) for f, t in zip(found, truth, strict=True)]))
    other = float(np.mean([iou(f, t) for f, t in zip(found[1:] + found[:1], truth, strict=True)]))
    return {"own": own, "shuffled": other, "difference": own - other}


def settings_of(base: str, verb: str) -> dict[str, Any]:
    """The settings of a base's preset for a verb, of the pocket preset for a folder's."""
    return preset_settings(base, verb) or preset_settings("pocket", verb)


def concept_learnt(
    base_name: str,
    renderer: Renderer,
    config: Scene,
    encoder: IdentityEncoder,
    names: Sequence[str],
    change: Mapping[str, Any] | None = None,
) -> Figures:
    """The way from a generic thing of the class (0) to held-out views after the VAE's round trip (1).

    Args:
        change: settings of the training to change; the others are those of the base's preset.
    """
    out: Figures = {}
    places = ("on the grass", "on the beach", "in the snow", "on a table", "at night", "in the desert")
    for name in names:
        folder = concept_folder() / name
        concept = load_concept(folder)
        references = [open_photo(photo.path) for photo in concept.photos]
        base = load_base(base_name)

        def pictures(base: Base, what: str) -> list[Image.Image]:
            return sample(base, [f"a photo of {what} {place}" for place in places], list(range(6)), config)

        generic = float(identity_score(encoder, pictures(base, with_article(concept.noun)), references).mean())
        held = [
            picture.image
            for picture in views(renderer, CONCEPTS[name], Random(f"report/{name}"), 12, base.denoiser.size)
        ]
        stack = torch.from_numpy(np.stack(held)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            vae = base.pipeline.vae
            decoded = vae.decode(vae.encode(stack).latent_dist.mean).sample.clamp(-1, 1)
        arrays = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        top = float(identity_score(encoder, [Image.fromarray(array) for array in arrays], references).mean())
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"{name}.safetensors"
            where = {"concept": folder, "output": file, "base": base_name}
            begun = time.monotonic()
            train_to_file(build(TrainConfig, settings_of(base_name, "train"), dict(change or {}), where), base=base)
            seconds = time.monotonic() - begun
            with_it = load_base(base_name)
            put_adapters(with_it, [(load_adapter(file), 1.0)])
        mine = float(identity_score(encoder, pictures(with_it, concept.token), references).mean())
        out[name] = {
            "generic": generic,
            "learnt": mine,
            "held_out": top,
            "way": (mine - generic) / max(top - generic, 1e-6),
            "seconds": seconds,
        }
    out["mean_way"] = float(np.mean([figures["way"] for figures in out.values()]))
    return out


def seconds_per_picture(base: Base, config: Scene) -> float:
    """One square picture of a batch of eight."""
    prompts = ["a red dog on the grass"] * 8
    sample(base, prompts, list(range(8)), config)
    begun = time.monotonic()
    sample(base, prompts, list(range(8)), config)
    return (time.monotonic() - begun) / 8


def make_report(
    renderer: Renderer, base_name: str = "pocket", count: int = 300, weights: Path | None = None, report: Report = print
) -> Figures:
    """Every figure, in a nested mapping. ``weights`` holds ``judges/`` and ``identity/`` if they are not shipped."""
    base = load_base(base_name)
    config = build(Scene, settings_of(base_name, "generate"), {"base": base_name, "guidance_scale": 4.0})
    encoder = load_identity_encoder(weights / "identity" / "model.safetensors" if weights else None)
    judges = {name: load_classifier(name, weights / "judges" if weights else None) for name in ("chooser", "referee")}
    parts: dict[str, Callable[[], Any]] = {
        "captions": lambda: captions_kept(base, renderer, config, judges, count),
        "seeds": lambda: seeds_differ(base, renderer, config, encoder),
        "identity_auc": lambda: {
            "clean": held_out_auc(encoder, renderer),
            "round_trip": held_out_auc(encoder, renderer, base.pipeline.vae),
        },
        "seconds_per_picture": lambda: seconds_per_picture(base, config),
        "concept": lambda: concept_learnt(base_name, renderer, config, encoder, ("rex", "brew", "inky", "bolt")),
    }
    if base.denoiser.controls == "t2i":
        parts |= {
            "sketch": lambda: sketches_kept(base, renderer, config),
            "keypose": lambda: poses_kept(base, renderer, config),
        }
    out: Figures = {"base": base.fingerprint.exact, "pictures_per_row": count, "guidance_scale": config.guidance_scale}
    for name, measure in parts.items():
        begun = time.monotonic()
        out[name] = measure()
        report(f"{name}: {time.monotonic() - begun:.0f} s")
    return out


def table(figures: Figures) -> str:
    """The figures as the lines of the model card's table."""
    referee = {name: row["referee"] for name, row in figures["captions"].items()}
    concept = figures["concept"]

    def line(what: str, value: float, true: float | None = None) -> str:
        beside = "" if true is None else f"{true:.3f}"
        return f"| {what} | {value:.3f} | {beside} |"

    one = referee["one"]
    rows = [
        "| what | figure | on true renders |",
        "| --- | --- | --- |",
        *(
            line(f"one thing: {key}", one["generated"][key], one["true"][key])
            for key in ("class", "colour", "backdrop")
        ),
        *(
            line(f"{text}, classes", referee[key]["generated"]["all_classes"], referee[key]["true"]["all_classes"])
            + "\n"
            + line(f"{text}, classes and colours", referee[key]["generated"]["whole"], referee[key]["true"]["whole"])
            for key, text in (("two", "two, square"), ("two_wide", "two at 2:1"), ("three_wide", "three at 2:1"))
        ),
        line("seeds differ, share of true spread", figures["seeds"]),
        *(
            line(f"{name}: {measure}, own − shuffled", figures[name]["difference"])
            for name, measure in (("sketch", "edge F1"), ("keypose", "silhouette IoU"))
            if name in figures
        ),
        line("identity AUC, held out", figures["identity_auc"]["clean"]),
        line("identity AUC, after the VAE", figures["identity_auc"]["round_trip"]),
        line("one concept: way from generic to held-out", concept["mean_way"]),
        line("seconds per square picture", figures["seconds_per_picture"]),
    ]
    return "\n".join(rows)
