"""The fingerprint of a base: hashes of all its weights, measured in one pass and kept by file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.files import write_text
from ..svd_cache import cache_folder, hash_rounded

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
LOADERS = ("diffusers", "transformers", "safetensors", "torch")  # they decide which weights a file becomes
State = Mapping[str, tuple[int, int]]  # weight to its address and the number of changes made to it in place


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of all U-Net and text-encoder weights as float32, float16 and bfloat16."""

    exact: str
    half: str
    brain: str

    def same(self, other: Fingerprint) -> bool:
        """The very same numbers."""
        return self.exact == other.exact

    def same_rounded(self, other: Fingerprint) -> bool:
        """The same numbers up to half precision."""
        return self.half == other.half or self.brain == other.brain


@dataclass(frozen=True)
class Origin:
    """The files that a base's weights were loaded from, and the weights' state right after loading.

    Attributes:
        key: names the files, their sizes and modification times, and the precision they were loaded in.
        state: the weights as they were loaded; see :func:`state_of`.
    """

    key: str
    state: State


def fingerprint(models: Mapping[str, nn.Module]) -> Fingerprint:
    """That of all their weights.

    The ``text_model.`` level that older transformers put into names does not count.
    """
    weights = {
        f"{component}.{name.removeprefix('text_model.')}": weight
        for component, model in models.items()
        for name, weight in model.named_parameters()
    }
    return fingerprint_of(weights)


def fingerprint_of(weights: Mapping[str, Tensor]) -> Fingerprint:
    """One hash per weight, then one over all, so that it does not depend on which layers are adapted."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases Python's lock
        hashes = list(pool.map(lambda name: hash_rounded(weights[name], PRECISIONS), weights))
    digests = []
    for index in range(len(PRECISIONS)):
        lines = sorted(f"{name}={each[index]}" for name, each in zip(weights, hashes, strict=True))
        digests.append(hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32])
    return Fingerprint(*digests)


def kept_fingerprint(models: Mapping[str, nn.Module], origin: Origin | None) -> Fingerprint:
    """The fingerprint of these models, from the cache if their weights are still those of their files."""
    untouched = origin is not None and state_of(models) == origin.state
    return kept(origin.key if origin and untouched else None, lambda: fingerprint(models))


def kept(key: str | None, measure: Callable[[], Fingerprint]) -> Fingerprint:
    """The fingerprint that the cache has under a key, else a measured one; without a key always that.

    A cache that cannot be written or read only costs the time to measure.
    """
    if key is None:
        return measure()
    path = cache_folder() / "fingerprints" / f"{key}.json"
    found = _read(path)
    if found is None:
        found = measure()
        with suppress(OSError, UserError):
            write_text(path, fingerprint_json(found))
    return found


def key_of_files(files: Iterable[Path], dtype: torch.dtype) -> str | None:
    """A name for what these files hold when they are loaded as ``dtype``; None if one cannot be looked at."""
    lines = [str(dtype), *(f"{library} {version(library)}" for library in LOADERS)]
    try:
        for file in sorted({Path(file).resolve() for file in files}):
            seen = file.stat()
            lines.append(f"{file} {seen.st_size} {seen.st_mtime_ns}")
    except OSError:
        return None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def state_of(models: Mapping[str, nn.Module]) -> State:
    """Where every weight lies in memory, and how often it was changed in place: another one after any change."""

    def one(weight: Tensor) -> tuple[int, int]:
        return weight.data_ptr(), weight._version

    return {f"{part}.{name}": one(weight) for part, m in models.items() for name, weight in m.named_parameters()}


def fingerprint_json(value: Fingerprint) -> str:
    """A fingerprint as it stands in a file's metadata."""
    return json.dumps(asdict(value), sort_keys=True)


def parse_fingerprint(text: str) -> Fingerprint:
    """Read :func:`fingerprint_json`.

    Raises:
        ValueError: not one.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or set(data) != {"exact", "half", "brain"}:
        raise ValueError("not a fingerprint")
    return Fingerprint(**{key: str(value) for key, value in data.items()})


def _read(path: Path) -> Fingerprint | None:
    """A kept fingerprint; None of a missing or damaged one, which is measured again."""
    try:
        found = parse_fingerprint(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if all(re.fullmatch("[0-9a-f]{32}", value) for value in asdict(found).values()) else None
