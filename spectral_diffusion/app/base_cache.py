"""A cache of one base: the last used one stays in memory, so that the next picture begins at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.settings import Quantization

if TYPE_CHECKING:  # torch and what needs it are imported in the functions: no page has to wait for them
    import torch

    from ..models.base import Base

SMALL = 50_000_000  # parameters of a U-Net; the pocket base's has 6 million, SD 1.5's 860 million
Key = tuple[str, str, str, str, bool, tuple[tuple[str, int, int], ...]]


class BaseCache:
    """Lends a base to one user at a time, and restores it afterwards."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entry: tuple[Key, Base] | None = None

    @contextmanager
    def acquire(
        self,
        name: str,
        device: str = "auto",
        dtype: str = "float32",
        quantization: Quantization = "none",
        layer_offload: bool = False,
    ) -> Iterator[Base]:
        """A base for exclusive use inside the block, where adapters and tokens may change it.

        Args: as of :func:`.models.loading.load_base`.

        Raises:
            UserError: it cannot be loaded.
        """
        import torch

        from ..adapters.snapshot import snapshot
        from ..models.loading import load_base

        with self._lock:
            options = (name, device, dtype, quantization, layer_offload)
            key = (*options, _state_of(name))
            if self._entry is None or self._entry[0] != key:
                self._entry = None  # before the next one is loaded: two would not fit
                self._entry = (key, load_base(*options))
            entry, base = self._entry, self._entry[1]
            self._entry = None  # after an error a half-changed base must not be lent again
            move(base, base.device)
            restore = snapshot(base)
            try:
                with _fitting_threads(base):
                    yield base
            finally:
                restore()
                move(base, torch.device("cpu"))
                self._entry = entry

    def warm(self, name: str = "pocket") -> None:
        """Load a base, with all slow preparations, before its first use."""
        with suppress(Exception), self.acquire(name) as base:  # the first use reports errors
            base.fingerprint  # noqa: B018 (it is kept)

    def warm_soon(self) -> None:
        """Start :meth:`warm` in the background unless a base is cached or in use."""
        if self._entry is None and not self._lock.locked():
            threading.Thread(target=self.warm, daemon=True, name="warm base").start()


def is_small(base: Base) -> bool:
    """Whether a base is about as small as the pocket base."""
    return sum(weight.numel() for weight in base.denoiser.network.parameters()) < SMALL


def move(base: Base, device: torch.device) -> None:
    """Move a large base to its GPU or off it: trainings and fusions in other processes need the memory."""
    import torch

    from ..models.loading import quiet_loading

    if base.device.type == "cpu" or is_small(base):
        return
    with quiet_loading():
        base.family.place(base.pipeline, device)
    if device.type == "cpu" and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _fitting_threads(base: Base) -> Iterator[None]:
    """Use one thread for a small network on the CPU: more are slower, above all beside a running training."""
    import torch

    before = torch.get_num_threads()
    if base.device.type == "cpu" and is_small(base):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _state_of(name: str) -> tuple[tuple[str, int, int], ...]:
    """The state of a local base: its files with times and sizes; empty for a hub id."""
    path = Path(name)
    whole = (path / "model_index.json").is_file()  # walk only through bases
    files = sorted(path.rglob("*")) if whole else [path] if path.is_file() else []
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())
