"""The adapters of the workspace: looked up by name, and read one by one so that a bad file hides no other."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import UserError
from ..slots.ledger import LEDGER, ROWS, Ledger
from .jobs import refuse_busy
from .trash import discard
from .workspace import Workspace, pick, sentence_of, visible

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter

ADAPTER_COLUMNS = ("Adapter", "Token", "Noun", "Method", "Columns", "Rank", "Base")


def workspace_adapters(workspace: Workspace) -> dict[str, Path]:
    """The adapter files by name; states of unfinished trainings do not count."""
    return {
        path.stem: path
        for path in visible(workspace.adapters)
        if path.suffix == ".safetensors" and not path.stem.endswith(".state")
    }


def newest_adapter(workspace: Workspace) -> str | None:
    """The name of the adapter that was written last."""
    times = {}
    for name, path in workspace_adapters(workspace).items():
        with suppress(OSError):  # deleted meanwhile
            times[name] = path.stat().st_mtime_ns
    return max(times, key=lambda name: times[name], default=None)


def adapter_file(workspace: Workspace, name: str | None) -> Path:
    """The file of a listed adapter.

    Raises:
        UserError: there is none of that name.
    """
    return pick(name, workspace_adapters(workspace), "adapter", "train it in step 2")


def read_adapter(workspace: Workspace, name: str | None) -> Adapter:
    """A listed adapter, read-only: the last few are cached until their files change.

    Raises:
        UserError: there is none of that name, or it is damaged.
    """
    path = adapter_file(workspace, name)
    try:
        seen = path.stat()
    except OSError as error:
        raise UserError(f"Cannot read {path.name}: {error.strerror or error}.") from error
    return _read(path, seen.st_mtime_ns, seen.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, changed: int, size: int) -> Adapter:
    from ..adapters.formats.native import load_adapter  # imports torch and diffusers, which a page need not wait for

    return load_adapter(path)


def adapter_rows(workspace: Workspace) -> tuple[list[list[str]], list[str]]:
    """The table of readable adapters under ``ADAPTER_COLUMNS``, and a sentence per file that cannot be read."""
    rows, problems = [], []
    for name, path in workspace_adapters(workspace).items():
        try:
            seen = path.stat()
            rows.append([name, *_described(path, seen.st_mtime_ns, seen.st_size)])
        except Exception as error:  # one bad file must not hide the others
            problems.append(_read_error(workspace, error))
    return rows, problems


def _read_error(workspace: Workspace, error: Exception) -> str:
    """An error about a file, with its name in the workspace."""
    return sentence_of(error).replace(f"{workspace.adapters}/", "")


@lru_cache(maxsize=256)
def _described(path: Path, changed: int, size: int) -> list[str]:
    """An adapter's row without its name; a file is read again only when it has changed."""
    from ..adapters.formats.native import load_adapter

    adapter = load_adapter(path)
    return [adapter.token, adapter.noun, adapter.method.name, str(adapter.slot or "–"), str(adapter.rank), adapter.base]


def delete_adapter(workspace: Workspace, name: str | None) -> str:
    """Put a listed adapter and its files into the trash, and free its slot in the ledger; returns a message.

    Raises:
        UserError: there is none of that name, its concept is in training, or it cannot be deleted.
    """
    from ..training.run import state_path
    from ..training.validation import samples_folder

    path = adapter_file(workspace, name)
    refuse_busy(workspace, path.stem)  # a running training needs its columns
    unfinished = state_path(path).exists()  # a training of the same concept, which needs the rest
    beside = [] if unfinished else [path.with_suffix(".yaml"), path.with_suffix(".md"), samples_folder(path)]
    folder = discard(workspace, path.stem, [path, *beside])
    if not unfinished:
        release_slot(workspace, path.stem)
    columns = "the unfinished training keeps its columns" if unfinished else "its columns are free again"
    return f"Deleted the adapter '{name}'; {columns}. It is in {folder.relative_to(workspace.root)} of the workspace."


def release_slot(workspace: Workspace, concept: str) -> None:
    """Free a concept's columns and rows, if it has any."""
    for ledger in (Ledger(workspace.adapters / LEDGER), Ledger(workspace.adapters / ROWS)):
        if any(concept in concepts for concepts in ledger.read().values()):
            ledger.release(concept)
