"""What the identity encoder learns from: views of looks in families of look-alikes; and its held-out score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from torch import Tensor, nn

from spectral_diffusion.metrics.identity import SIZE, auc, embed

from . import puppets
from .art import PRETRAINING
from .backdrops import backdrop_canvas
from .concepts import CONCEPTS, PATTERNS, Look, drawn, place_view, views
from .render import Renderer
from .world import CLASSES, PLAIN, SETTINGS

AnyLook = Look | puppets.Look
GROUPS = 8  # families of look-alikes per step
MISSES = 3  # near misses per family


def random_colour(random: Random) -> tuple[int, int, int]:
    return random.randrange(256), random.randrange(256), random.randrange(256)


def random_look(random: Random) -> AnyLook:
    """Any look that training may show: never the held-out drawings."""
    if random.random() < 0.2:
        look = puppets.random_look(random, random.choice(puppets.NOUNS), random_colour(random))
        stripe = random_colour(random) if random.random() < 0.3 else None
        extra = random.choice(("", "", "scarf", "cape", "horn"))
        return replace(look, second=random_colour(random), stripe=stripe, extra=extra)
    noun, drawing = random.choice(list(CLASSES)), random.choice(PRETRAINING)
    return Look(noun, random_colour(random), random_colour(random), random.choice(PATTERNS), drawing)


def near_miss(look: AnyLook, random: Random) -> AnyLook:
    """The same but for one thing: colours swapped, one colour new, another shape, another pattern."""
    if isinstance(look, puppets.Look):
        change = random.randrange(4)
        if change == 0:
            return replace(look, main=look.second, second=look.main)
        if change == 1:
            return replace(look, main=random_colour(random))
        if change == 2:
            return replace(look, second=random_colour(random))
        other = puppets.random_look(random, random.choice(puppets.NOUNS), look.main)
        return replace(other, second=look.second, stripe=look.stripe)
    change = random.randrange(5)
    if change == 0:
        return replace(look, first=look.second, second=look.first)
    if change == 1:
        return replace(look, first=random_colour(random))
    if change == 2:
        return replace(look, second=random_colour(random))
    if change == 3:
        return replace(look, noun=random.choice([noun for noun in CLASSES if noun != look.noun]))
    return replace(look, pattern=random.choice([pattern for pattern in PATTERNS if pattern != look.pattern]))


def view(renderer: Renderer, look: AnyLook, sprite: Image.Image | None, random: Random) -> np.ndarray:
    """One picture (128, 128, 3) of a look, sometimes as soft as a generated one."""
    setting = random.choice([*SETTINGS, None])
    colour = None if setting else random.choice(list(PLAIN))
    canvas = backdrop_canvas(setting, colour, SIZE, SIZE, random.randrange(24))
    placed = place_view(look, sprite, SIZE * random.uniform(0.6, 0.96), SIZE, random)
    image, _, _ = renderer.compose([placed], canvas)
    if random.random() < 0.4:
        soft = Image.fromarray(image).filter(ImageFilter.GaussianBlur(random.uniform(0.006, 0.017) * SIZE))
        image = np.asarray(soft)
    return image


def batch(renderer: Renderer, random: Random) -> Tensor:
    """(2, n, 3, 128, 128) in −1…1: two views of n looks, in families of look-alikes."""
    rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for _ in range(GROUPS):
        look = random_look(random)
        for one in (look, *(near_miss(look, random) for _ in range(MISSES))):
            sprite = drawn(renderer, one)
            for side in rows:
                side.append(view(renderer, one, sprite, random))
    return as_tensor(rows)


def as_tensor(rows: tuple[list[np.ndarray], list[np.ndarray]]) -> Tensor:
    """Two lists of pictures (128, 128, 3) uint8 as (2, n, 3, 128, 128) in −1…1."""
    stack = torch.from_numpy(np.stack([np.stack(side) for side in rows])).permute(0, 1, 4, 2, 3).float()
    return stack / 127.5 - 1


@torch.no_grad()
def held_out_auc(
    encoder: nn.Module,
    renderer: Renderer,
    vae: AutoencoderKL | None = None,
    count: int = 12,
    change: Callable[[np.ndarray], np.ndarray] = lambda image: image,
) -> float:
    """Same thing against same class in another look, on the ready-made concepts, whose drawings it never saw.

    With a VAE every picture takes its round trip first, as generated ones do; ``change`` comes before.
    """
    was_training = encoder.training
    encoder.eval()
    positive, negative = [], []
    for name, look in CONCEPTS.items():
        random = Random(f"held-out/{name}")

        def vectors(other: AnyLook, random: Random = random) -> Tensor:
            images = [change(picture.image) for picture in views(renderer, other, random, count, SIZE)]
            if vae is not None:
                stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
                decoded = vae.decode(vae.encode(stack).latent_dist.mean).sample.clamp(-1, 1)
                images = list(((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
            return embed(encoder, [Image.fromarray(image) for image in images])

        mine = vectors(look)
        same = mine @ mine.mT
        positive.append(same[~torch.eye(count, dtype=torch.bool)])
        for _ in range(6):
            other = near_miss(look, random)
            while (other.noun if isinstance(other, Look) else other.kind) != (
                look.noun if isinstance(look, Look) else look.kind
            ):
                other = near_miss(look, random)  # the same class, another look
            negative.append((mine @ vectors(other).mT).flatten())
    encoder.train(was_training)
    return auc(torch.cat(positive), torch.cat(negative))
