"""What the encoders of styles learn from: one style on many scenes, and one look in many styles.

The encoder of styles measures the ready-made ones, so it has seen them, on scenes that are in no folder. That of
identity has not: it must know things in styles that it never saw.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from torch import Tensor, nn

from spectral_diffusion.metrics.identity import SIZE, auc, embed

from .concepts import drawn
from .identity import GROUPS, MISSES, as_tensor, held_out_auc, random_look, view
from .identity import near_miss as near_look
from .render import Renderer
from .styles import READY_MADE, STYLES, Style, near_miss, random_style, style_views, styled

PAIRS = 16  # of a style and its near miss in a step
BESIDE_PLAIN = 0.35  # share of pairs whose near miss is no style at all, which a badly learned style looks like
PLAIN = 0.25  # share of views in no style, where the look counts


def style_batch(renderer: Renderer, random: Random) -> Tensor:
    """(2, n, 3, 128, 128) in −1…1: two scenes in each of n styles, in pairs of near misses."""
    rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for _ in range(PAIRS):
        style = any_style(random)
        plain = random.random() < BESIDE_PLAIN and style != Style()
        for member in (style, Style() if plain else near_miss(style, random, any_of=True)):
            for side in rows:
                [picture] = style_views(renderer, member, random, 1, SIZE)
                side.append(softened(picture.image, random))
    return as_tensor(rows)


def any_style(random: Random) -> Style:
    """A style that a judge may meet: none, a ready-made one on other scenes than its folder's, or any other."""
    kind = random.random()
    if kind < 0.1:
        return Style()
    return random.choice(list(READY_MADE.values())) if kind < 0.35 else random_style(random)


def styled_identity_batch(renderer: Renderer, random: Random) -> Tensor:
    """(2, n, 3, 128, 128) in −1…1: two views of n looks in families of look-alikes, each view in a style of its own.

    A style may hide what tells two looks apart, so only mild ones are drawn.
    """
    rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for _ in range(GROUPS):
        look = random_look(random)
        for member in (look, *(near_look(look, random) for _ in range(MISSES))):
            sprite = drawn(renderer, member)
            for side in rows:
                image = view(renderer, member, sprite, random)
                side.append(image if random.random() < PLAIN else styled(image, mild_style(random)))
    return as_tensor(rows)


def mild_style(random: Random) -> Style:
    """A style that leaves shapes and colours, as the ready-made ones do."""
    while True:
        style = random_style(random)
        if style.colour >= 0.7 and style.tile <= 6 and style.levels != 2 and (style.tile == 0 or style.lines == "none"):
            return replace(style, strength=min(style.strength, 0.8))


def softened(image: np.ndarray, random: Random) -> np.ndarray:
    """Sometimes as soft as a generated picture."""
    if random.random() >= 0.4:
        return image
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(random.uniform(0.004, 0.012) * SIZE)))


def held_out_styled_auc(encoder: nn.Module, renderer: Renderer, vae: AutoencoderKL | None = None) -> float:
    """The score of :func:`.identity.held_out_auc` where every picture is in a ready-made style, the lowest of these."""
    scores = [held_out_auc(encoder, renderer, vae, 4, partial(styled, style=style)) for style in STYLES.values()]
    return min(scores)


@torch.no_grad()
def held_out_style_auc(
    encoder: nn.Module, renderer: Renderer, vae: AutoencoderKL | None = None, count: int = 16
) -> float:
    """Same ready-made style against its near misses, other styles and none; scenes differ everywhere.

    With a VAE every picture takes its round trip first, as generated ones do.
    """
    was_training = encoder.training
    encoder.eval()

    def vectors(style: Style, random: Random) -> Tensor:
        images = [picture.image for picture in style_views(renderer, style, random, count, SIZE)]
        if vae is not None:
            stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
            decoded = vae.decode(vae.encode(stack).latent_dist.mean).sample.clamp(-1, 1)
            images = list(((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        return embed(encoder, [Image.fromarray(image) for image in images])

    positive, negative = [], []
    for name, style in STYLES.items():
        random = Random(f"held-out style/{name}")
        mine = vectors(style, random)
        same = mine @ mine.mT
        positive.append(same[~torch.eye(count, dtype=torch.bool)])
        others = [Style(), *(near_miss(style, random) for _ in range(4)), *(random_style(random) for _ in range(3))]
        others += [other for other in STYLES.values() if other != style]
        negative += [(mine @ vectors(other, random).mT).flatten() for other in others]
    encoder.train(was_training)
    return auc(torch.cat(positive), torch.cat(negative))
