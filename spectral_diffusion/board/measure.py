"""The figures of an entry for N concepts: identity kept, drift, confusion, collapse, seconds, bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.paths import without_folders
from ..data.image_grid import labelled_grid
from ..metrics.binding import (
    KINDS,
    RIGHT,
    binding_counts,
    binding_of,
    collapse_rate,
    collapsed_pictures,
    photo_similarity,
)
from ..metrics.statistics import difference_text, mean_text, share_text
from ..studies.runner import Figures, StudyRunner, cell_key
from .contestant import Contestant
from .entry import BoardEntry
from .painters import BasePainter, Shot
from .suite import BoardSuite

PAIRS = 8  # pairs of neighbours at most
SHOWN = 8  # concepts on a sheet
ABOUT = {"name", "author", "url", "notes", "counts"}  # of an entry: what changes no picture
MERGING = {"merge", "options", "calibration", "distill", "joint", "mean", "fused"}  # what changes none of one concept


def portraits_of(suite: BoardSuite, word: str, size: int) -> list[Shot]:
    """One picture of a concept per prompt."""
    return [
        Shot(prompt.replace("{}", word), 1000 * suite.seed + index, size, size)
        for index, prompt in enumerate(suite.prompts)
    ]


def generic_of(suite: BoardSuite, size: int) -> list[Shot]:
    """The pictures that show drift."""
    return [Shot(prompt, 1000 * suite.seed + 500 + index, size, size) for index, prompt in enumerate(suite.generic)]


def pairs_of(suite: BoardSuite, words: dict[str, str]) -> dict[tuple[str, str], list[Shot]]:
    """The pictures of two neighbours each."""
    names = list(words)
    pairs = [(left, right) for left, right in pairwise(names)][::2][:PAIRS]
    return {
        (left, right): [
            Shot(
                prompt.replace("{left}", words[left]).replace("{right}", words[right]),
                1000 * suite.seed + 700 + index,
                *suite.pair_size,
            )
            for index, prompt in enumerate(suite.pairs)
        ]
        for left, right in pairs
    }


def halves(image: Image.Image) -> list[Image.Image]:
    """The left and the right square of a wide picture."""
    side = min(image.width // 2, image.height)
    top = (image.height - side) // 2
    return [
        image.crop((x, top, x + side, top + side))
        for x in ((image.width // 2 - side) // 2, image.width // 2 + (image.width // 2 - side) // 2)
    ]


class Board:
    """A suite with its base and what never changes: the photos' vectors and the base's generic pictures."""

    def __init__(self, suite: BoardSuite, lab: StudyRunner) -> None:
        self.suite, self.lab = suite, lab
        base = lab.fresh()
        self.size = base.size
        self.photos = {name: lab.encoder.embed(lab.references(name)) for name in suite.concepts}
        self.base_scene = Contestant(BoardEntry(name="base", train={}), suite, lab).scene
        # Base and photos, on which all figures depend.
        self.given = cell_key([lab.fingerprint, *(lab.concept(name).digest() for name in suite.concepts)])
        self._generic: list[Image.Image] | None = None

    def generic(self) -> list[Image.Image]:
        """The untouched base's pictures of the generic prompts."""
        if self._generic is None:
            self._generic = BasePainter(self.lab.fresh(), self.base_scene).paint(generic_of(self.suite, self.size))
        return self._generic

    def cosines(self, images: Sequence[Image.Image], names: Sequence[str]) -> Tensor:
        """Mean cosines (pictures, concepts) with these concepts' photos."""
        centers = torch.stack([self.photos[name].mean(0) for name in names])
        return self.lab.encoder.embed(list(images)) @ centers.mT

    def key(self, contestant: Contestant, names: Sequence[str], alone: bool = False) -> dict[str, Any]:
        """What the figures of these concepts depend on, besides the lab's terms."""
        left_out = ABOUT | MERGING if alone else ABOUT
        entry = contestant.entry.model_dump(mode="json", exclude=left_out, exclude_defaults=True)
        tasks = self.suite.model_dump(mode="json", include={"prompts", "generic", "pairs", "pair_size", "seed"})
        loading = {"loading": dict(self.lab.loading)} if self.lab.loading else {}
        files = contestant.depends_on(names, alone)
        return {"entry": without_folders(entry), "names": list(names), "files": files, "tasks": tasks, **loading}

    def alone(self, contestant: Contestant, name: str) -> Figures:
        """One concept with nothing else learned: its identity, and every picture's cosines with all concepts.

        The identity is None where an entry has only merged results.
        """
        if not contestant.shows_alone:
            return {"identity": None, "cosines": None}

        def compute() -> Figures:
            word = contestant.words([name])[name]
            images = contestant.alone(name).paint(portraits_of(self.suite, word, self.size))
            cosines = self.cosines(images, self.suite.concepts)
            return {
                "identity": float(cosines[:, self.suite.concepts.index(name)].mean()),
                "cosines": [dict(zip(self.suite.concepts, row, strict=True)) for row in cosines.tolist()],
            }

        return self.lab.cell("board-alone", self.key(contestant, [name], alone=True), compute)

    def together(self, contestant: Contestant, names: Sequence[str]) -> Figures:
        """The figures of these concepts after all were merged; a sheet of pictures goes into the lab's folder."""

        def compute() -> Figures:
            painter, words = contestant.together(names), contestant.words(names)
            portraits = {name: portraits_of(self.suite, words[name], self.size) for name in names}
            pairs, generic = pairs_of(self.suite, words), generic_of(self.suite, self.size)
            shots = [shot for group in (*portraits.values(), generic, *pairs.values()) for shot in group]
            begun = time.monotonic()
            made = iter(painter.paint(shots))
            seconds = time.monotonic() - begun
            concepts: Figures = {}
            sheet = []
            for index, (name, wanted) in enumerate(portraits.items()):
                images = [next(made) for _ in wanted]
                cosines = self.cosines(images, names)
                concepts[name] = {
                    "identity": float(cosines[:, index].mean()),
                    "nearest": [int(nearest) for nearest in cosines.argmax(1)],
                }
                sheet.append(images[:4])
            generic_images = [next(made) for _ in generic]
            first, second = (self.lab.encoder.embed(images) for images in (self.generic(), generic_images))
            kinds = {}
            for pair, wanted in pairs.items():
                both = [halves(next(made)) for _ in wanted]
                kinds["+".join(pair)] = [binding_of(self.cosines(places, pair), self.truth(pair)) for places in both]
            file = self.sheet_of(contestant, names)
            file.parent.mkdir(parents=True, exist_ok=True)
            labelled_grid(sheet[:SHOWN], row_labels=list(names)[:SHOWN], gap=3).save(file)
            return {
                "concepts": concepts,
                "drift": float((1 - (first * second).sum(1)).mean()),
                "pairs": kinds,
                "seconds": painter.seconds,
                "seconds per picture": seconds / len(shots),
                "bytes": painter.size,
            }

        return self.lab.cell("board", self.key(contestant, names), compute)

    def truth(self, pair: Sequence[str]) -> Tensor:
        """How like each other two concepts' photos are."""
        return photo_similarity([self.photos[name] for name in pair])

    def sheet_of(self, contestant: Contestant, names: Sequence[str]) -> Path:
        """Where the sheet of an entry's pictures is kept."""
        return self.lab.folder / "board" / f"{cell_key([self.lab.terms, self.key(contestant, names)])}.png"

    def measure(self, contestant: Contestant, count: int) -> dict[str, Any]:
        """All figures for the first ``count`` concepts."""
        names = self.suite.concepts[:count]
        alone = {name: self.alone(contestant, name) for name in names}
        together = self.together(contestant, names)
        pairs = [pair.split("+") for pair in together["pairs"]]
        return {
            "alone": {name: figures["identity"] for name, figures in alone.items()},
            "pairs alone": {"+".join(pair): self.pair_alone(alone, pair) for pair in pairs},
            **together,
        }

    def pair_alone(self, alone: Mapping[str, Figures], pair: Sequence[str]) -> list[list[str]] | None:
        """What would become of two concepts if each were in its place as its own adapter generates it."""
        rows = [alone[name]["cosines"] for name in pair]
        if any(row is None for row in rows):
            return None
        return [
            binding_of(torch.tensor([[picture[name] for name in pair] for picture in places]), self.truth(pair))
            for places in zip(*rows, strict=True)
        ]


def row_of(figures: dict[str, Any]) -> dict[str, Any]:
    """One row of the page; intervals are by a bootstrap over concepts, and over pairs."""
    concepts, alone = figures["concepts"], figures["alone"]
    names, pairs = list(concepts), list(figures["pairs"])
    identity = [concepts[name]["identity"] for name in names]
    single = [alone[name] for name in names]
    known = all(value is not None for value in single)
    right = [[index == nearest for nearest in concepts[name]["nearest"]] for index, name in enumerate(names)]
    pictures = [kinds for found in figures["pairs"].values() for kinds in found]
    counts, subjects = binding_counts(pictures), sum(len(kinds) for kinds in pictures)
    lost_alone = [collapse_rate(binding_counts(found)) for found in figures["pairs alone"].values() if found]
    return {
        "concepts": len(names),
        "identity alone": mean_text(single, names) if known else None,
        "identity": mean_text(identity, names),
        "kept": share_text(identity, single, names) if known else None,
        "single minus merged": difference_text(single, identity, names) if known else None,
        "drift of others": figures["drift"],
        "right concept": mean_text([sum(row) / len(row) for row in right], names),
        "collapse rate": mean_text(
            [collapse_rate(binding_counts(found)) for found in figures["pairs"].values()], pairs
        ),
        "collapse alone": sum(lost_alone) / len(lost_alone) if lost_alone else None,
        "pictures with a collapse": collapsed_pictures(pictures),
        **{kind: counts[kind] / subjects for kind in KINDS if kind != RIGHT},
        "seconds to merge": figures["seconds"],
        "seconds per picture": figures["seconds per picture"],
        "MB": None if figures["bytes"] is None else figures["bytes"] / 1e6,
    }
