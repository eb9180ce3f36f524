"""What an output may replace: what this program wrote, and nothing that a person or another program made."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from .errors import ELSEWHERE, UserError
from .files import exists, is_file, write_text

PIPELINE = {
    "model_index.json", "unet", "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
    "processor", "scheduler", "feature_extractor", "image_encoder", "safety_checker",
}  # fmt: skip
DROPPED = {".DS_Store", "Thumbs.db", "desktop.ini"}  # by file managers
RESOLVED = "# Resolved settings, written by spectral-diffusion.\n"


def refuse_overwriting_settings(path: Path) -> None:
    """Refuse to write resolved settings over a file that a person wrote.

    Raises:
        UserError: there is one.
    """
    if not path.exists():
        return
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    if not text.startswith(RESOLVED):
        raise UserError(
            f"{path} would be replaced by the settings that are written beside every output, unless it is renamed.",
            ELSEWHERE,
        )


def refuse_overwriting_page(path: Path, mark: str) -> None:
    """Refuse to write a page or card over one that a person wrote.

    Args:
        mark: a text that every page of ours of this kind has.

    Raises:
        UserError: there is one, or a folder.
    """
    if not exists(path):
        return
    if not is_file(path) or mark not in path.read_text("utf-8", "replace"):
        raise UserError(f"{path} was not written by this program, and would be lost, unless it is renamed.", ELSEWHERE)


def write_settings(path: Path, text: str) -> None:
    """Write resolved settings, in YAML; :func:`refuse_overwriting_settings` knows them by their first line."""
    write_text(path, RESOLVED + text)


def check_replaceable(folder: Path, own: Collection[str]) -> None:
    """Refuse to replace a folder that holds anything but a diffusers pipeline and what is our ``own``.

    Raises:
        UserError: it does; the sentence names one such thing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is a file.", ELSEWHERE)
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{folder} is the folder that you are in.", ELSEWHERE)
    check_only(folder, {*PIPELINE, *own})


def check_only(folder: Path, own: Collection[str]) -> None:
    """Refuse a folder that holds anything but our ``own`` and what systems drop everywhere.

    Raises:
        UserError: it does; the sentence names one such thing.
    """
    names = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    if other := sorted(names - {*own, *DROPPED}):
        raise UserError(f"{folder} holds {other[0]}, which would be lost.", ELSEWHERE)


def holds(folder: Path, other: Path | str) -> bool:
    """Whether a path exists and is a folder or inside it."""
    root, target = Path(folder).resolve(), Path(other).resolve()
    return target.exists() and (target == root or root in target.parents)
