"""The last used base stays in memory, so that the next picture begins at once; never more than one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..adapters.attach import remove_adapters
from ..models.base import ENCODERS, Base, load_base, quiet_loading
from ..models.tokens import embedding_of

SMALL = 50_000_000  # parameters of a U-Net; the pocket base's has 6 million, SD 1.5's 860 million
Key = tuple[str, str, str, tuple[tuple[str, int, int], ...]]


class BaseCache:
    """Lends a base to one user at a time, and takes it back as it was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entry: tuple[Key, Base] | None = None

    @contextmanager
    def acquire(self, name: str, device: str = "auto", dtype: str = "float32") -> Iterator[Base]:
        """A base that may be changed by adapters and tokens while the block runs; others wait for its end.

        Raises:
            UserError: it cannot be loaded.
        """
        with self._lock:
            key = (name, device, dtype, _state_of(name))
            if self._entry is None or self._entry[0] != key:
                self._entry = None  # before the next one is loaded: two would not fit
                self._entry = (key, load_base(name, device, dtype))
            entry, base = self._entry, self._entry[1]
            self._entry = None  # whatever goes wrong from here on, a half-changed base is never lent again
            move(base, base.device)
            take_off = snapshot(base)
            try:
                with _fitting_threads(base):
                    yield base
            finally:
                take_off()
                move(base, torch.device("cpu"))
                self._entry = entry

    def warm(self, name: str = "pocket") -> None:
        """Load a base ahead of its first use, with all that takes time at the first picture."""
        with suppress(Exception), self.acquire(name) as base:  # who uses it will be told
            base.fingerprint  # noqa: B018 (it is kept)

    def warm_soon(self) -> None:
        """Begin :meth:`warm` in the background unless a base is there or in use."""
        if self._entry is None and not self._lock.locked():
            threading.Thread(target=self.warm, daemon=True, name="warm base").start()


def is_small(base: Base) -> bool:
    """Whether a base is about as small as the pocket one."""
    return sum(weight.numel() for weight in base.models["unet"].parameters()) < SMALL


def move(base: Base, device: torch.device) -> None:
    """Bring a large base to its GPU, or out of it: trainings and fusions, in processes of their own, need the room."""
    if base.device.type == "cpu" or is_small(base):
        return
    with quiet_loading():
        base.pipeline.to(device)
    if device.type == "cpu" and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _fitting_threads(base: Base) -> Iterator[None]:
    """One thread for a small network on the CPU: two wait for each other, above all beside a running training."""
    before = torch.get_num_threads()
    if base.device.type == "cpu" and is_small(base):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def snapshot(base: Base) -> Callable[[], None]:
    """How a base is now: calling what is returned takes off all adapters and tokens that came later, bit for bit."""
    tables = {name: embedding_of(base.models[name]) for name in base.tokenizers}
    configs: dict[str, Any] = {name: base.models[name].config for name in tables}
    sizes = {name: config.vocab_size for name, config in configs.items()}
    names = [name for name in ENCODERS.values() if getattr(base.pipeline, name, None) is not None]
    tokenizers = {name: getattr(base.pipeline, name) for name in names}
    for name, tokenizer in tokenizers.items():
        setattr(base.pipeline, name, copy.deepcopy(tokenizer))
    precision = base.pipeline.vae.dtype

    def take_off() -> None:
        remove_adapters(base.models)
        if base.pipeline.vae.dtype != precision:  # a pipeline was stopped while it decoded in float32
            nn.Module.to(base.pipeline.vae, precision)
        for name, table in tables.items():
            cast(Any, base.models[name]).set_input_embeddings(table)
            configs[name].vocab_size = sizes[name]
        for name, tokenizer in tokenizers.items():
            setattr(base.pipeline, name, tokenizer)

    return take_off


def _state_of(name: str) -> tuple[tuple[str, int, int], ...]:
    """What tells that a local base has changed: its files with times and sizes; nothing for a hub id."""
    path = Path(name)
    whole = (path / "model_index.json").is_file()  # never walk through a folder that is no base
    files = sorted(path.rglob("*")) if whole else [path] if path.is_file() else []
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())
