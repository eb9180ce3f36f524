"""What a training step of the base sees: encoded pictures with their captions, sketches and keyposes."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from torch import Tensor
from transformers import CLIPTokenizer

from .render import WorldConfig

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
    ids: Tensor  # (n, length)
    sketch_rows: Tensor
    sketches: Tensor  # (k, 1, H, W)
    keypose_rows: Tensor
    keyposes: Tensor  # (k, 3, H, W)
    labels: Tensor  # (n, 2, h, w): which class and which colour shows most in each latent's square

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
