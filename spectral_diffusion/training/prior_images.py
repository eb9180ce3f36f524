"""Ordinary pictures: what the base itself draws of many things, or a folder of pictures of the concept's class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from ..config.train import DataConfig, PriorPreservationConfig, TrainConfig, generic_subject
from ..core.cache import cache_folder
from ..core.hooks import QUIET, Hooks
from ..core.rng import keyed_generator
from ..data.folder import load_concept
from ..data.latents_cache import cached_latents
from ..data.samples import PhotoCrops
from ..models.base import Base

CHUNK = 8  # pictures drawn together
STEPS = 20  # of each
OWN = 3  # every third shows the concept's own class


@dataclass
class PriorImages:
    """Pictures the base drew, or of the class: latents (n, c, h, w), what each shows, and its prompt."""

    latents: Tensor
    things: list[str]
    prompts: list[str]


def prior_prompts(config: PriorPreservationConfig, noun: str, seed: int) -> tuple[list[str], list[str]]:
    """What to draw: things ("a red dog") and whole prompts, every third thing of the concept's own class."""
    things, prompts = [], []
    for index in range(config.num_images):
        generator = keyed_generator(seed, "ordinary", index)

        def pick(options: list[str], generator: torch.Generator = generator) -> str:
            return options[int(torch.randint(len(options), (), generator=generator))]

        thing = generic_subject(pick(config.adjectives), noun if index % OWN == 0 else pick(config.nouns))
        things.append(thing)
        prompts.append(pick(config.scenes).replace("{}", thing))
    return things, prompts


def read_class_images(
    folder: Path, base: Base, config: TrainConfig, noun: str, size: int, hooks: Hooks = QUIET
) -> PriorImages:
    """Square crops of a folder's pictures, ``prior.num_images`` of them if there are more.

    They are prompted with their captions, a picture without one as a photo of the noun.

    Raises:
        UserError: no readable picture there.
    """
    pictures = load_concept(folder, name="class", noun=noun)
    if pictures.skipped:
        hooks.notify(f"Skipped in {folder}: {'; '.join(pictures.skipped)}.")
    for text in pictures.notes:
        hooks.notify(f"In {folder}: {text}")
    chosen = torch.randperm(len(pictures.photos), generator=keyed_generator(config.seed, "class"))
    photos = [pictures.photos[int(index)] for index in chosen[: config.prior.num_images]]
    plain = DataConfig(latents_cache_dir=config.data.latents_cache_dir)
    settings = config.model_copy(update={"crops_per_image": 1, "data": plain})
    crops = PhotoCrops(replace(pictures, photos=tuple(photos)), base, settings, size)
    latents, _ = crops.take([(index, 0) for index in range(len(photos))])
    thing = f"a {noun}"
    captions = [photo.caption or f"a photo of {thing}" for photo in photos]
    return PriorImages(
        latents, [thing] * len(photos), [text.replace("<TOK>", thing).replace("{}", thing) for text in captions]
    )


def make_prior_images(base: Base, config: TrainConfig, noun: str, size: int, hooks: Hooks = QUIET) -> PriorImages:
    """Let the untouched base draw its ordinary pictures, or read those of the class; only their latents are needed.

    What was drawn is kept beside the spectra: those of the class, and those of everything else, which the next concept
    needs again.

    Raises:
        Cancelled: ``hooks.should_stop``, asked at every step of every image, said so.
    """
    wanted = config.prior
    if config.data.class_images_dir:
        return read_class_images(config.data.class_images_dir, base, config, noun, size, hooks)
    things, prompts = prior_prompts(wanted, noun, config.seed)
    own = list(range(0, len(prompts), OWN))
    rest = [index for index in range(len(prompts)) if index % OWN]
    found: dict[int, Tensor] = {}
    for part in (rest, own):
        if not part:
            continue

        def tell(done: int, before: int = len(found)) -> None:
            hooks.raise_if_stopped("Stopped before the first step; nothing was saved yet.")
            hooks.step("draw", before + done, len(prompts))

        asked = [(prompts[index], index) for index in part]
        latents = cached_prior_latents(base, asked, config.seed, size, wanted.guidance_scale, tell)
        found |= dict(zip(part, latents, strict=True))
    return PriorImages(torch.stack([found[index] for index in range(len(prompts))]), things, prompts)


def cached_prior_latents(
    base: Base, asked: Sequence[tuple[str, int]], seed: int, size: int, guidance: float, tell: Callable[[int], None]
) -> Tensor:
    """Latents (n, c, h, w) of pictures by prompt and number, as kept, or drawn now and then kept.

    Args:
        tell: is called with how many are done, at every step of every chunk; what it raises ends the drawing.
    """
    scheduler = {key: value for key, value in base.pipeline.scheduler.config.items() if not key.startswith("_")}
    decides = [base.fingerprint.exact, str(base.dtype), base.device.type, torch.__version__, diffusers.__version__]
    whole = [*decides, scheduler, list(asked), seed, size, guidance, STEPS, CHUNK]
    key = hashlib.sha256(json.dumps(whole, default=str).encode()).hexdigest()
    latents, _ = cached_latents(
        cache_folder() / "ordinary", key, lambda: (sample_prior_latents(base, asked, seed, size, guidance, tell), None)
    )
    tell(len(asked))
    return latents.to(base.device)


def sample_prior_latents(
    base: Base, asked: Sequence[tuple[str, int]], seed: int, size: int, guidance: float, tell: Callable[[int], None]
) -> Tensor:
    """The sampling of :func:`cached_prior_latents`."""
    latents = []
    for start in range(0, len(asked), CHUNK):
        chunk = asked[start : start + CHUNK]
        found = base.denoiser.sample_latents(
            [prompt for prompt, _ in chunk],
            [keyed_generator(seed, "drawn", index) for _, index in chunk],
            STEPS,
            guidance,
            size,
            on_step=lambda step, latents, start=start: tell(start),  # type: ignore[misc]
        )
        latents.append(found.float())
    return torch.cat(latents)
