"""Cache files: where they are kept, and how damaged ones are recognized."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError

from .errors import UserError
from .files import read_tensors, write_tensors
from .locks import locked

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
T = TypeVar("T")

DIGEST = "spectral.digest"  # in a file's metadata: the hash of everything else in it
WAIT = 3600.0  # seconds for another process that computes the same; then it is computed twice


def cache_folder() -> Path:
    """``$SPECTRAL_DIFFUSION_CACHE``, or ``spectral_diffusion`` under the user's cache folder."""
    own = os.environ.get("SPECTRAL_DIFFUSION_CACHE")
    if own:
        return Path(own)
    if user := os.environ.get("XDG_CACHE_HOME"):
        return Path(user) / "spectral_diffusion"
    try:
        return Path.home() / ".cache" / "spectral_diffusion"
    except RuntimeError:  # neither HOME nor a line in passwd, as in some containers
        return _without_home()


@cache
def _without_home() -> Path:
    """A private folder in the system's temporary one; the same for every process of a user."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"spectral_diffusion-{user}"
    with suppress(OSError):
        folder.mkdir(mode=0o700)
        log.warning("There is no home folder: the cache is %s; SPECTRAL_DIFFUSION_CACHE names another.", folder)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix="spectral_diffusion-"))  # made by another user


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, shapes, values and metadata, whatever their order in the file."""
    import torch  # here: pages and --help wait for no torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    total.update(json.dumps({key: metadata[key] for key in sorted(metadata) if key != DIGEST}).encode())
    return total.hexdigest()


def store(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bool:
    """Write tensors with their hash; returns whether that worked, since a cache only saves time."""
    fields = dict(metadata or {})
    try:
        write_tensors(path, dict(tensors), {**fields, DIGEST: digest(tensors, fields)})
    except (OSError, UserError, SafetensorError):  # a full disk, or one that is read only
        return False
    return True


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The content that :func:`store` wrote; None if the file is missing or damaged (which is logged)."""
    if not path.exists():
        return None
    with suppress(UserError, RuntimeError):
        tensors, metadata = read_tensors(path)
        if metadata.get(DIGEST) == digest(tensors, metadata):
            return tensors, metadata
    log.warning("%s is damaged or of an earlier version; its contents are computed again.", path)
    return None


def restored(path: Path, unpack: Callable[[dict[str, Tensor], dict[str, str]], T]) -> T | None:
    """What ``unpack`` makes of a file's tensors and metadata; None if the file is missing or damaged, or is refused."""
    with suppress(OSError, LookupError, ValueError, TypeError):
        if content := load(path):
            return unpack(*content)
    return None


def cached(
    path: Path,
    make: Callable[[], T],
    pack: Callable[[T], tuple[Mapping[str, Tensor], Mapping[str, str]]],
    unpack: Callable[[dict[str, Tensor], dict[str, str]], T],
    wait: float = 0.0,
    max_bytes: int = 0,
) -> T:
    """The value cached in ``path``, else what ``make`` returns, which is then cached there.

    A folder that cannot be written or read only costs the time to make it.

    Args:
        pack: returns the tensors and metadata to keep.
        unpack: takes them back; it refuses wrong ones with a LookupError, ValueError or TypeError.
        wait: seconds to wait for another process that makes the same; 0 does not wait.
        max_bytes: bytes that the folder may keep, the last used first; 0 keeps all.
    """
    with ExitStack() as stack:
        if wait:
            with suppress(OSError, UserError):  # a folder that cannot be written is not locked
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(Path(f"{path}.lock"), wait))
        loaded = restored(path, unpack)
        if loaded is not None:
            with suppress(OSError):
                path.touch()  # used just now
            return loaded
        value = make()
        if store(path, *pack(value)) and max_bytes:
            with suppress(OSError):
                prune(path.parent, max_bytes)
        return value


def prune(folder: Path, max_bytes: int) -> None:
    """Delete the least recently used files of a cache until it has at most ``max_bytes``."""
    files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob("*.safetensors"))
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total <= max_bytes:
            return
        path.unlink()
        total -= size
