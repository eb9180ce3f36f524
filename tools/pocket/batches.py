"""What a training step of the base sees: encoded pictures with their captions, sketches and keyposes."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from spectral_diffusion.generation.keypose import draw_keypose

from .compute import Compute
from .render import Picture, Renderer, WorldConfig, thicken
from .vae import pixels
from .world import caption

WORLD = WorldConfig(
    classes=40,
    counts=(0.75, 0.25),
    wide_counts=(0.0, 0.3, 0.5, 0.2),
    scale=(0.68, 0.95),
    shift=0.08,
    rotate=8,
    second_drawing=0.2,
    puppets=0.24,
)


@dataclass(frozen=True)
class Mix:
    """Shares of what the batches show."""

    world: WorldConfig = WORLD
    wide: float = 0.4  # of batches twice as wide as high
    sketch: float = 0.2  # of pictures that come with their sketch
    keypose: float = 0.7  # of pictures with puppets that come with their keypose
    classless: float = 0.3  # of captions with a sketch that name no class
    empty: float = 0.1  # of captions left out, for guidance


@dataclass
class Batch:
    """Encoded pictures; only the rows in ``sketch_rows`` and ``keypose_rows`` have a sketch or a keypose."""

    latents: Tensor  # (n, 8, h, w)
    where: Tensor  # (n, 1, h, w): the share of each latent's square that things cover
    ids: Tensor  # (n, 32)
    sketch_rows: Tensor
    sketches: Tensor  # (k, 1, H, W)
    keypose_rows: Tensor
    keyposes: Tensor  # (k, 3, H, W)

    @property
    def samples(self) -> int:
        """How many pictures it counts as; a wide one counts twice."""
        n, _, height, width = self.latents.shape
        return n * (width // height)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(n, 32) token ids."""
    length = tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


def wide_batch(random: Random, mix: Mix, batch: int) -> tuple[bool, int]:
    """Whether a step's pictures are twice as wide as high, and how many there are; a wide one counts as two."""
    wide = random.random() < mix.wide
    return wide, batch // 2 if wide else batch


@dataclass
class PillowSource:
    """Pictures drawn on the processor by :class:`Renderer`, one batch per step, keyed by the step.

    Drawing and encoding cost a quarter of a step, so every batch is seen twice, 16 steps apart, each time with
    other noise and other timesteps.
    """

    renderer: Renderer
    vae: AutoencoderKL  # that takes 64 pixels to the latents
    tokenizer: CLIPTokenizer
    compute: Compute
    mix: Mix
    batch: int
    reuse: bool = True
    _held: dict[int, Batch] = field(default_factory=dict)

    def __call__(self, step: int) -> Batch:
        first = step - 16 if self.reuse and step % 32 >= 16 else step
        if first not in self._held:
            self._held = {k: b for k, b in self._held.items() if k > step - 32}
            self._held[first] = self.draw(first)
        return self._held[first]

    def draw(self, step: int) -> Batch:
        """The batch of a step."""
        random, mix = Random(f"pocket2/{step}"), self.mix
        wide, count = wide_batch(random, mix, self.batch)
        width = 128 if wide else 64
        pictures: list[Picture] = []
        sketches: dict[int, np.ndarray] = {}
        keyposes: dict[int, np.ndarray] = {}
        captions = []
        for row in range(count):
            picture = self.renderer.scene(random, mix.world, width, 64)
            pictures.append(picture)
            captions.append(picture.caption)
            if random.random() < mix.sketch:
                sketches[row] = thicken(picture.sketch, random)
                if random.random() < mix.classless:
                    captions[row] = caption(picture.things, picture.backdrop, random, classless=True)
            if picture.people and random.random() < mix.keypose:
                keyposes[row] = np.asarray(draw_keypose(picture.people, width, 64), np.float32) / 255
            if random.random() < mix.empty:
                captions[row] = ""
        with torch.no_grad(), self.compute.autocast():
            latents = self.vae.encode(self.compute.move(pixels(pictures))).latent_dist.mean.float()
        masks = torch.from_numpy(np.stack([picture.mask for picture in pictures]))[:, None]
        blank = torch.zeros(0, 64, width)
        lines = torch.stack([torch.from_numpy(s) for s in sketches.values()]) if sketches else blank
        poses = (
            torch.from_numpy(np.stack(list(keyposes.values())))
            if keyposes
            else blank[..., None].expand(0, 64, width, 3)
        )
        move = self.compute.move
        return Batch(
            latents,
            move(F.avg_pool2d(masks, 4)),
            move(token_ids(self.tokenizer, captions)),
            move(torch.tensor(list(sketches), dtype=torch.long)),
            move(lines[:, None]),
            move(torch.tensor(list(keyposes), dtype=torch.long)),
            move(poses.permute(0, 3, 1, 2)),
        )
