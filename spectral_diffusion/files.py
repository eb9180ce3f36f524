"""Atomic files: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, reason

if TYPE_CHECKING:
    from torch import Tensor


def _beside(path: Path) -> Path:
    """A fresh temporary file in the folder of ``path``, which is made if need be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    os.close(handle)
    return Path(name)


def cannot_write(path: Path, error: OSError) -> UserError:
    """The sentence for an output that cannot be written."""
    return UserError(f"Cannot write {path}: {error.strerror or error}; choose another output with -o.")


def check_writable(path: Path) -> None:
    """Say now, not after an hour of work, that an output cannot be written.

    Raises:
        UserError: it cannot.
    """
    _beside(Path(path)).unlink()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it into place when the block ends well.

    Raises:
        UserError: the folder cannot be written.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as done:
            os.fsync(done.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; tensors are made contiguous."""
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, str(temporary), metadata)


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata.

    Raises:
        UserError: missing, unreadable or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"No such file: {path}.")
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, MemoryError, OverflowError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({reason(error)}).") from error
