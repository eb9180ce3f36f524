"""Atomic files: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .errors import ELSEWHERE, UserError, reason

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

DISGUISES = {  # of what is no safetensors file by its first bytes: what it is, and what to do
    b"version https://git-lfs": "a Git LFS pointer, which only names the file; get it with git lfs pull",
    b"PK\x03\x04": "a pickle, which can run code and is not opened; convert it to .safetensors",
    b"\x80": "a pickle, which can run code and is not opened; convert it to .safetensors",
    b"GGUF": "a GGUF file, which is not read here; convert it to .safetensors",
    b"<": "a web page; download the file again",
    b"{": "a text, perhaps a server's error; download the file again",
}
ABANDONED = 24 * 3600  # seconds after which a killed program's temporary is taken away
TEXT_BYTES = 64_000_000  # of a text file that is read whole, such as the captions of a large folder
LEVELS = 64  # of nesting in JSON
PROBE = 2**18  # bytes that a disk must take before work begins


def _clear(path: Path) -> None:
    """Remove what killed programs left beside ``path``."""
    for old in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > ABANDONED:
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def _beside(path: Path) -> Path:
    """A fresh temporary file in the folder of ``path``, which is made if need be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    os.close(handle)
    return Path(name)


def cannot_write(path: Path, error: Exception) -> UserError:
    """The sentence for an output that cannot be written."""
    detail = error.strerror if isinstance(error, OSError) else None
    return UserError(f"Cannot write {path}: {detail or reason(error)}.", ELSEWHERE)


def is_file(path: Path | str) -> bool:
    """Whether a file exists; False for what cannot be a path."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path | str) -> bool:
    """Whether a folder exists; False for what cannot be a path."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def is_special(path: Path) -> bool:
    """Whether the path is a pipe, a socket or a device."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def exists(path: Path | str) -> bool:
    """Whether a file or folder exists; False for what cannot be a path."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder; files that go meanwhile, and links, count nothing."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
    return size


def check_writable(path: Path, needed: int = PROBE) -> None:
    """Say now, not after an hour of work, that an output cannot be written, or that its disk is full.

    Args:
        needed: about how many bytes the output will have.

    Raises:
        UserError: it cannot.
    """
    temporary = _beside(Path(path))
    try:
        with temporary.open("wb") as file:  # some disks report free space that a quota does not grant
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(temporary.parent).free
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    if free < needed:
        raise UserError(
            f"{path} needs about {needed / 2**20:,.0f} MiB and its disk has {free / 2**20:,.0f} MiB free, so some "
            "space has to be freed.",
            ELSEWHERE,
        )


def read_text(path: Path, encoding: str = "utf-8", max_bytes: int = TEXT_BYTES) -> str:
    """A text file that a person or another program wrote. A pipe or a device is refused: reading it may never end.

    Raises:
        OSError: no such file, no regular one, or one of more than ``max_bytes`` bytes.
        ValueError: not in that encoding.
    """
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    if status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes // 1_000_000} MB")
    return Path(path).read_text(encoding=encoding)


def parse_json(text: str) -> Any:
    """JSON as Python values.

    Raises:
        ValueError: not JSON, or nested deeper than any of our files: later code may walk through it recursively.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if _deeper(value, LEVELS):
        raise ValueError("it is nested too deeply")
    return value


def _deeper(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper(item, levels - 1) for item in inside)


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
        with temporary.open("rb+") as done:  # Windows syncs no file that is only read
            os.fsync(done.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; replace ``path`` with it when the block ends well.

    Raises:
        UserError: the folder cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            _exchange(temporary, path)
        else:
            temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders' names at once where the system can, so that no kill ever finds neither."""
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if swap is None or swap(here, os.fsencode(new), here, os.fsencode(old), both) != 0:
        aside = old.with_name(f".{old.name}.{os.getpid()}.old")  # never taken for a killed program's temporary
        old.rename(aside)
        try:
            new.rename(old)
        except OSError:
            aside.rename(old)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; tensors are made contiguous."""
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, str(temporary), metadata)


def read_header(path: Path) -> tuple[set[str], dict[str, str]]:
    """The names of a safetensors file's tensors, and its metadata.

    Raises:
        UserError: missing, unreadable or not a safetensors file.
    """
    with _opened(path, "cpu") as file:
        return set(file.keys()), file.metadata() or {}


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata.

    Raises:
        UserError: missing, unreadable or not a safetensors file.
    """
    with _opened(path, device) as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata() or {}


def check_not_disguised(path: Path) -> None:
    """Refuse a file under a safetensors file's name that is something else by its first bytes.

    Raises:
        UserError: it is; the sentence says what, and what to do.
    """
    with Path(path).open("rb") as file:
        start = file.read(64)
    for mark, what in DISGUISES.items():
        if start.startswith(mark) and start[8:9] != b"{":  # a header begins there, behind its length
            raise UserError(f"{path} is not a readable safetensors file but {what}.")


@contextmanager
def _opened(path: Path, device: str) -> Iterator[Any]:
    path = Path(path)
    if not is_file(path):
        raise UserError(f"No such file: {path}.")
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            yield file
    except (SafetensorError, OSError, ValueError, MemoryError, OverflowError) as error:
        with suppress(OSError):
            check_not_disguised(path)
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is no adapter or weights: their files end in .safetensors.") from error
        raise UserError(f"{path} is not a readable safetensors file ({reason(error)}).") from error
