"""Views: regions of pictures, and the photos that they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data.folder import Concept, open_photo
from .encoders import Encoder

CHUNK = 64  # pictures in memory together


@dataclass(frozen=True)
class View:
    """One region of one picture that should show a concept.

    Attributes:
        prompt: its prompt, with the noun for the concept's token; empty if unknown.
        box: left, top, right, bottom in pixels; None is the whole picture.
    """

    concept: str
    path: Path
    prompt: str = ""
    box: tuple[int, int, int, int] | None = None

    def open(self) -> Image.Image:
        """The view's pixels."""
        image = open_photo(self.path)
        return image.crop(self.box) if self.box else image


def embed_views(encoder: Encoder, views: Sequence[View]) -> Tensor:
    """Unit vectors (n, d) of the views."""
    parts = [views[start : start + CHUNK] for start in range(0, len(views), CHUNK)]
    return torch.cat([encoder.embed([view.open() for view in part]) for part in parts])


@dataclass(frozen=True)
class References:
    """The concepts' photos as one encoder sees them: concept to unit vectors (m, d)."""

    photos: Mapping[str, Tensor]

    @cached_property
    def centres(self) -> Tensor:
        """Mean vectors (concepts, d): a product with them is the mean cosine with all photos."""
        return torch.stack([vectors.mean(0) for vectors in self.photos.values()])

    def scores(self, concept: str, vector: Tensor, is_own_photo: bool = False) -> list[float]:
        """Mean cosine of a vector (d,) with the photos of every concept.

        ``is_own_photo``: it is one of the concept's own photos, and compared with the others of them only.
        """
        cosines: list[float] = (self.centres @ vector).tolist()
        if is_own_photo:
            own, count = list(self.photos).index(concept), len(self.photos[concept])
            cosines[own] = (cosines[own] * count - 1) / (count - 1)
        return cosines


def embed_references(encoder: Encoder, concepts: Mapping[str, Concept]) -> References:
    """Embed every concept's photos."""
    return References(
        {name: embed_views(encoder, [View(name, photo.path) for photo in c.photos]) for name, c in concepts.items()}
    )
