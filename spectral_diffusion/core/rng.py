"""Random numbers that depend on nothing but a key, so that resumed and parallel runs draw the same."""

from __future__ import annotations

import hashlib
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _seed(key: tuple[int | str, ...]) -> int:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_random(*key: int | str) -> Random:
    """A Python random generator whose stream depends on nothing but the key."""
    return Random(_seed(key))


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on nothing but the key."""
    import torch

    return torch.Generator().manual_seed(_seed(key))
