"""Paths in files that people share: no folder of a person or a machine is in them, and what they name is found again.

Adapters, fused folders, pictures, cards and reports hold paths relative to themselves, or names alone. Where a base
lies on this machine is remembered beside the caches, under its fingerprint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..pocket import is_pocket
from .cache import cache_folder
from .errors import UserError
from .files import exists, parse_json, read_text, write_json

UP = 6  # folders that a relative path may climb
BASES = "bases.json"  # beside the caches: fingerprint to path
REMEMBERED = 200  # bases


def is_full(name: str) -> bool:
    """Whether a text is a full path, of this system or another."""
    return PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()


def without_folders(value: Any, names: Mapping[str, str] | None = None) -> Any:
    """JSON-able settings in which full paths are names alone; ``names`` says what some are called instead."""
    if isinstance(value, dict):
        return {without_folders(key, names): without_folders(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item, names) for item in value]
    if names and isinstance(value, str) and value in names:
        return names[value]
    return PureWindowsPath(value).name or value if isinstance(value, str) and is_full(value) else value


def portable(name: str, folder: Path) -> str:
    """A path as a file in ``folder`` holds it: a full one relative to the folder, or the name alone if that is far.

    Far is more than :data:`UP` folders up, or so far that the way down names the user's home or begins at the root.
    """
    if not is_full(name):
        return name
    try:
        relative = Path(os.path.relpath(Path(name).resolve(), Path(folder).resolve()))
        shared = Path(os.path.commonpath([Path(name).resolve(), Path(folder).resolve()]))
        above = (*home().parents, Path(shared.anchor))
    except (OSError, ValueError):  # another drive, or a path of another system
        return str(without_folders(name))
    far = relative.parts.count(os.pardir) > UP or shared in above
    return str(without_folders(name)) if far else relative.as_posix()


def home() -> Path:
    """The user's home; the root where there is none."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def located(name: str, folder: Path) -> str:
    """A path from a file in ``folder``, as it can be opened here; unchanged if nothing exists there."""
    beside = os.path.normpath(Path(folder) / name)
    return beside if name and not is_full(name) and exists(beside) else name


def portable_base(base: str, fingerprint: str, folder: Path) -> str:
    """:func:`portable` for a base, whose place on this machine is remembered."""
    if is_pocket(base) or not exists(base):
        return str(without_folders(base))
    whole = str(Path(base).resolve())
    with suppress(OSError, UserError):  # a cache that cannot be written only costs naming the base
        known = _bases()
        if fingerprint and known.get(fingerprint) != whole:
            kept = list({**known, fingerprint: whole}.items())[-REMEMBERED:]
            write_json(cache_folder() / BASES, dict(kept))
    return portable(whole, folder)


def located_base(base: str, fingerprint: str, folder: Path) -> str:
    """:func:`located` for a base; if it is not beside the file, its last known path on this machine."""
    path = located(base, folder)
    if is_pocket(base) or exists(path):
        return path
    remembered = _bases().get(fingerprint, "")
    same = Path(remembered).name == PurePosixPath(base).name
    return remembered if same and exists(remembered) else path


def _bases() -> dict[str, str]:
    try:
        known = parse_json(read_text(cache_folder() / BASES))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in known.items()} if isinstance(known, dict) else {}
