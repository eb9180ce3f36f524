"""Sprites as tensors: the packed artwork, its tinted copies and many drawn puppets in one bank of textures.

A texture is one sprite in the middle of a square, its longer side two pixels short of the square's on either side,
with premultiplied alpha; at half and at a quarter of its size it stands again to the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spectral_diffusion.core.files import read_tensors, write_tensors

from . import puppets
from .art import PRETRAINING
from .render import Array, Renderer, backdrop_canvas
from .world import CLASSES, COLOURS, PLAIN, SETTINGS

MARGIN = 2  # pixels around a sprite
TRAINED = 40  # classes of the pretraining
NOUNS = (*list(CLASSES)[:TRAINED], *puppets.NOUNS)
TINTS = (*COLOURS, "own")
BACKDROPS = (*SETTINGS, *PLAIN)
VARIANTS = 24  # drawings of each setting
LIGHT = (0.299, 0.587, 0.114)

Map = Callable[..., Iterable[Any]]  # the built-in map, or that of a pool of processes


def fitted(sprite: Image.Image, size: int) -> Array:
    """The sprite in the middle of a square (size, size, 4) uint8."""
    factor = (size - 2 * MARGIN) / max(sprite.size)
    shape = (max(1, round(sprite.width * factor)), max(1, round(sprite.height * factor)))
    square = Image.new("RGBA", (size, size))
    square.paste(sprite.resize(shape, Image.Resampling.LANCZOS), ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return np.asarray(square)


def pack_artwork(renderer: Renderer, path: Path, size: int = 128) -> None:
    """Write the drawings that pretraining shows into one file (n, size, size, 4), which needs no icon sets."""
    sprites = [renderer.sets[drawing].sprite(CLASSES[noun], 2 * size) for noun, drawing in icon_keys()]
    tensor = torch.from_numpy(np.stack([fitted(sprite, size) for sprite in sprites]))
    sizes = torch.tensor([[side / max(sprite.size) for side in sprite.size] for sprite in sprites])
    write_tensors(path, {"sprites": tensor, "sizes": sizes})


def icon_keys() -> list[tuple[str, str]]:
    """Class and drawing of each packed sprite, in order."""
    return list(product(list(CLASSES)[:TRAINED], PRETRAINING))


def tinted(sprite: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """The sprite (S, S, 4) in 0…1 in one named colour, as :func:`render.tint` has it."""
    rgb, alpha = sprite[..., :3], sprite[..., 3:]
    light = rgb @ rgb.new_tensor(LIGHT)
    low, high = torch.quantile(light[alpha[..., 0] > 0.25], light.new_tensor([0.04, 0.96]))
    tone = ((light - low) / (high - low).clamp_min(0.15)).clamp(0, 1)[..., None]
    base = rgb.new_tensor(colour) / 255
    dark, pale = base * 0.45, base + (1 - base) * 0.5
    shaded = torch.where(tone < 0.5, dark + (base - dark) * tone * 2, base + (pale - base) * (tone * 2 - 1))
    detail = ((light < 0.16) & (rgb.amax(-1) - rgb.amin(-1) < 0.25))[..., None]
    return torch.cat([torch.where(detail, rgb, shaded), alpha], -1)


def textures(sprites: Tensor) -> Tensor:
    """(n, S, S, 4) in 0…1, straight alpha, to premultiplied (n, 4, S, 3S/2) uint8 with two smaller copies."""
    pixels = sprites.permute(0, 3, 1, 2)
    pixels = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)
    size = pixels.shape[-1]
    half, quarter = F.avg_pool2d(pixels, 2), F.avg_pool2d(pixels, 4)
    out = pixels.new_zeros(len(pixels), 4, size, size + size // 2)
    out[..., :size] = pixels
    out[..., : size // 2, size:] = half
    out[..., size // 2 : size // 2 + size // 4, size : size + size // 4] = quarter
    return (out * 255).round().to(torch.uint8)


def draw_puppet(noun: str, colour: str, pose: str, number: int, size: int) -> tuple[Array, Array, Array]:
    """One puppet: square sprite (size, size, 4), its width and height over the longer side, keypoints (18, 2).

    Keypoints count from the middle, in longer sides.
    """
    random = Random(f"puppet/{noun}/{colour}/{pose}/{number}")
    look = puppets.random_look(random, noun, COLOURS[colour])
    sprite, points = puppets.draw_figure(puppets.random_pose(random, pose), look, size)
    longer = max(sprite.size)
    middle = np.array(sprite.size) / 2
    return fitted(sprite, size), np.array(sprite.size) / longer, (points - middle) / longer


@dataclass(frozen=True)
class Catalogue:
    """Where in the bank a sprite is, and its width and height over its longer side (n, 2). It has no pixels."""

    sizes: Array
    puppets: int  # drawings of each puppet in a colour and a pose

    def icon(self, noun: str, second: bool, colour: str | None) -> int:
        """The row of a class, in one of its drawings and a colour (None: its own)."""
        row = NOUNS.index(noun) * len(PRETRAINING) + second
        return row * len(TINTS) + TINTS.index(colour or "own")

    def puppet(self, noun: str, colour: str, pose: str, number: int) -> int:
        """The row of a puppet in a colour and a pose ("": any)."""
        cell = puppet_cells().index((noun, colour, pose))
        return len(icon_keys()) * len(TINTS) + cell * self.puppets + number


def puppet_cells() -> list[tuple[str, str, str]]:
    """Noun, colour and pose of the bank's puppets, in order."""
    return list(product(puppets.NOUNS, COLOURS, (*puppets.POSES, "")))


@dataclass
class Bank:
    """Everything that scenes are composed from, on one device."""

    size: int
    textures: Tensor  # (n, 4, S, 3S/2) uint8
    keypoints: Tensor  # (n - first_puppet, 18, 2)
    first_puppet: int
    backdrops: dict[bool, Tensor]  # by whether it is wide: (settings × VARIANTS + plain colours, 3, H, W) uint8
    catalogue: Catalogue


def build_bank(
    artwork: Path, size: int, puppets_each: int, device: torch.device, mapped: Map = map, quick: bool = False
) -> Bank:
    """The bank for pictures ``size`` pixels high, from a file that :func:`pack_artwork` wrote.

    Args:
        puppets_each: drawings of each puppet in a colour and a pose.
        mapped: the built-in map, or that of a pool of processes.
        quick: one variant of each backdrop, for tests.
    """
    packed, _ = read_tensors(artwork)
    icons = packed["sprites"].float() / 255
    if icons.shape[1] > size:
        straight = icons.permute(0, 3, 1, 2)
        premultiplied = torch.cat([straight[:, :3] * straight[:, 3:], straight[:, 3:]], 1)
        small = F.interpolate(premultiplied, size=(size, size), mode="area")
        small[:, :3] /= small[:, 3:].clamp_min(1e-3)
        icons = small.permute(0, 2, 3, 1).clamp(0, 1)
    parts = []
    for icon in icons:
        every = [tinted(icon, colour) for colour in COLOURS.values()]
        parts.append(textures(torch.stack([*every, icon])))
    sizes = [packed["sizes"].repeat_interleave(len(TINTS), 0).numpy()]
    first = len(parts) * len(TINTS)
    jobs = [(*cell, number, size) for cell in puppet_cells() for number in range(puppets_each)]
    keypoints = np.zeros((len(jobs), 18, 2), np.float32)
    shapes = np.zeros((len(jobs), 2), np.float32)
    block: list[Array] = []
    for row, (sprite, shape, points) in enumerate(mapped(draw_puppet, *zip(*jobs))):
        keypoints[row], shapes[row] = points, shape
        block.append(sprite)
        if len(block) == 256 or row == len(jobs) - 1:
            parts.append(textures(torch.from_numpy(np.stack(block)).float() / 255))
            block = []
    return Bank(
        size,
        torch.cat(parts).to(device),
        torch.from_numpy(keypoints).to(device),
        first,
        {wide: draw_backdrops(size, wide, mapped, quick).to(device) for wide in (False, True)},
        Catalogue(np.concatenate([*sizes, shapes]), puppets_each),
    )


def draw_backdrops(size: int, wide: bool, mapped: Map = map, quick: bool = False) -> Tensor:
    """Every variant of every setting, then the plain colours: (n, 3, H, W) uint8."""
    variants = [0] * VARIANTS if quick else range(VARIANTS)
    width = 2 * size if wide else size
    jobs: list[tuple[str | None, str | None, int, int, int]]
    jobs = [(setting, None, width, size, variant) for setting in SETTINGS for variant in variants]
    jobs += [(None, colour, width, size, 0) for colour in PLAIN]
    canvases = [canvas.round().astype(np.uint8) for canvas in mapped(backdrop_canvas, *zip(*jobs))]
    return torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2).contiguous()
