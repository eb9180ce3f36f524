"""Captions: where they are read from, and how they vary from step to step."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..config.train import DataConfig
from ..core.errors import UserError
from ..core.files import parse_json, read_text
from ..core.rng import keyed_random


def read_metadata(folder: Path) -> dict[Path, str]:
    """Captions by image file from ``metadata.jsonl`` and ``metadata.csv`` (``file_name``, ``text``), if they exist.

    ``file_name`` may lead into folders below.

    Raises:
        UserError: a damaged file or line, or a name that leads out of the folder.
    """
    captions: dict[Path, str] = {}
    for path, rows in ((folder / "metadata.csv", _csv_rows), (folder / "metadata.jsonl", _json_rows)):
        if not path.is_file():
            continue
        for number, row in rows(path):
            try:
                name, text = row["file_name"], row["text"]
            except (KeyError, TypeError) as error:
                raise _bad_line(path, number) from error
            if name is None or text is None:
                raise _bad_line(path, number)
            inside = PurePosixPath(str(name))
            if inside.is_absolute() or ".." in inside.parts or "\0" in str(inside):
                raise UserError(f"{path} line {number} names a file outside of its folder: {inside}.")
            captions[folder / inside] = str(text)
    return captions


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise _bad_line(path, number) from error


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(_text_of(path), newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise _bad_line(path, reader.reader.line_num) from error


def _bad_line(path: Path, number: int) -> UserError:
    if path.suffix == ".csv":
        return UserError(f"{path} line {number} has no file_name and text; the first line must name both columns.")
    return UserError(f'{path} line {number} must be {{"file_name": …, "text": …}}.')


def _text_of(path: Path) -> str:
    try:
        return read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a UTF-8 text file; save it again as UTF-8.") from error


def read_caption(file: Path) -> str | None:
    """The caption in a text file, on one line; None if it is empty.

    Raises:
        UserError: it is not UTF-8.
    """
    return " ".join(_text_of(file).split()) or None


def vary(caption: str, token: str, config: DataConfig, *key: int | str) -> str:
    """A caption as one sample sees it: parts shuffled, parts left out, or nothing at all.

    The first ``config.keep_tokens`` of its comma-separated parts stay where they are, and what has the token in it is
    never left out. The result depends on nothing but the key.
    """
    if not (config.shuffle_caption or config.tag_dropout or config.caption_dropout):
        return caption
    random = keyed_random(*key)
    if random.random() < config.caption_dropout:
        return ""
    parts = [part.strip() for part in caption.split(",")]
    fixed, others = parts[: config.keep_tokens], parts[config.keep_tokens :]
    others = [part for part in others if random.random() >= config.tag_dropout or token in part]
    if config.shuffle_caption:
        random.shuffle(others)
    return ", ".join(fixed + others)
