"""Which photo each sample of each step shows, known from the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch

from ..config.train import TrainConfig
from ..core.rng import keyed_generator


def photo_of(step: int, sample: int, photos: int, config: TrainConfig) -> int:
    """Which photo a sample shows: every photo once per epoch, in a shuffled order."""
    position = step * config.batch_size + sample
    epoch, offset = divmod(position, photos)
    order = torch.randperm(photos, generator=keyed_generator(config.seed, "epoch", epoch))
    return int(order[offset])


@dataclass(frozen=True)
class Order:
    """Photos in groups of one shape each; a photo is in its group as often as an epoch shows it.

    A step shows one group. Every group goes through its own photos in shuffled epochs, always in full batches, and the
    groups' steps are mixed in proportion to their photos. So every photo is seen equally often over a cycle of steps:
    once, where the batch divides the sizes of all groups.
    """

    groups: tuple[tuple[int, ...], ...]
    config: TrainConfig

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], repeats: Sequence[int], config: TrainConfig) -> Order:
        """Group photos by shape, in the order in which the shapes first appear."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (shape, times) in enumerate(zip(shapes, repeats, strict=True)):
            groups.setdefault(shape, []).extend([index] * times)
        return cls(tuple(tuple(group) for group in groups.values()), config)

    @property
    def turns(self) -> list[int]:
        """How many steps of a cycle show each group."""
        shared = gcd(self.config.batch_size, *(len(group) for group in self.groups))
        return [len(group) // shared for group in self.groups]

    def photos(self, step: int) -> list[int]:
        """The photo that each sample of a step shows."""
        index, turn = self._group(step)
        group = self.groups[index]
        return [group[photo_of(turn, sample, len(group), self.config)] for sample in range(self.config.batch_size)]

    def _group(self, step: int) -> tuple[int, int]:
        """Which group a step shows, and how many steps have shown it before."""
        if len(self.groups) == 1:
            return 0, step
        turns = self.turns
        cycle, turn = divmod(step, sum(turns))
        order = torch.randperm(sum(turns), generator=keyed_generator(self.config.seed, "bucket", cycle))
        mixed = torch.repeat_interleave(torch.arange(len(turns)), torch.tensor(turns))[order]
        group = int(mixed[turn])
        return group, cycle * turns[group] + int((mixed[:turn] == group).sum())
