"""A photo folder as a concept: images, captions, masks, class noun, token."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ..config import read_yaml
from ..errors import UserError, nearest, shown
from ..files import is_file, is_folder
from ..tokens import check_token
from .captions import read_metadata, text_beside
from .masks import find_mask, is_label
from .pictures import MAX_PIXELS as MAX_PIXELS
from .pictures import SUFFIXES, on_ground, open_upright
from .pictures import open_photo as open_photo

QUIET = {".txt", ".caption", ".yaml", ".yml", ".json", ".jsonl", ".csv", ".md", ".safetensors"}
CONCEPT_KEYS = {"name", "noun", "token", "repeats"}
IMAGE_FOLDERS = ("image", "images", "train")
MAX_REPEATS = 1000


@dataclass(frozen=True)
class Photo:
    """One image of a concept, ``size`` (width, height) in pixels.

    ``caption`` is None where a template shall be used. ``mask`` is the photo itself where its alpha is the mask.
    In every epoch it is seen ``repeats`` times.
    """

    path: Path
    caption: str | None
    size: tuple[int, int]
    mask: Path | None = None
    repeats: int = 1


@dataclass(frozen=True)
class Concept:
    """A person's own thing.

    ``skipped`` holds a reason per file that could not be used, ``notes`` what else a person may want to know.
    """

    name: str
    noun: str
    token: str
    photos: tuple[Photo, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def prompt(self, text: str) -> str:
        """A caption or template with the concept's token in it.

        ``<TOK>`` or ``{}`` mark the place; a caption that names the token stays; any other is put after it.
        """
        for mark in ("<TOK>", "{}"):
            if mark in text:
                return text.replace(mark, self.token)
        return text if self.token in text else f"{self.token}, {text}"

    def digest(self) -> str:
        """One hash of what a training sees of it: its words, photos, captions and masks.

        Raises:
            UserError: a file is gone.
        """
        hashed = hashlib.sha256(f"{self.token}|{self.noun}".encode())
        for photo in self.photos:
            try:
                parts = [photo.path.read_bytes(), photo.mask.read_bytes() if photo.mask else b""]
            except OSError as error:
                raise UserError(
                    f"{photo.path} or its mask can no longer be read: {error.strerror or error}."
                ) from error
            for part in (*parts, f"{photo.caption}|{photo.repeats}".encode()):
                hashed.update(hashlib.sha256(part).digest())
        return hashed.hexdigest()[:32]


def load_concept(folder: Path, name: str | None = None, token: str | None = None, noun: str | None = None) -> Concept:
    """Read a photo folder.

    Images lie in it; in ``image/``, ``images/`` or ``train/`` inside it; in folders such as ``10_name/``, whose
    photos are seen 10 times an epoch; or where its metadata says. Captions come from ``metadata.jsonl`` or
    ``metadata.csv`` (``file_name``, ``text``), else ``<image>.txt`` beside the image or in ``caption/`` or
    ``captions/``, else a template. Masks: :func:`.masks.find_mask`, else the image's alpha. ``concept.yaml`` may give
    ``name``, ``noun``, ``token`` and ``repeats``, a number or one per folder.

    Raises:
        UserError: no such folder, or no usable image in it.
    """
    folder = Path(folder)
    if not is_folder(folder):
        raise UserError(f"No such folder: {folder}.")
    said, repeats = read_about(folder)
    name = name or said.get("name") or folder.resolve().name
    if not re.fullmatch(r"[\w .-]{1,80}", name) or name.startswith("."):
        raise UserError(f"'{name}' cannot be a concept's name; use letters, digits, - and _ (name=rex).")
    token = check_token(token or said.get("token") or f"<{re.sub(r'[^A-Za-z0-9-]+', '-', name).strip('-') or 'it'}>")
    noun = noun or said.get("noun") or re.sub(r"[^A-Za-z]+", " ", name).strip() or "object"

    places = image_folders(folder, repeats)
    photos, skipped, notes = read_photos(folder, places)
    if not photos:
        broken = f" ({'; '.join(skipped)})" if skipped else ""
        raise UserError(f"{folder} holds no readable photo{broken}; put at least one .jpg, .png or .webp there.")
    return Concept(name, noun, token, tuple(photos), tuple(skipped), tuple(notes))


def read_about(folder: Path) -> tuple[dict[str, str], Any]:
    """The words of a folder's ``concept.yaml`` (name, noun, token), and its repeats; nothing and 1 without one.

    Raises:
        UserError: an unknown key, or a word that is none.
    """
    path = folder / "concept.yaml"
    described = read_yaml(path) if path.is_file() else {}
    for key in described:
        if key not in CONCEPT_KEYS:
            raise UserError(f"Unknown key {shown(key)} in {path}{nearest(key[:80], CONCEPT_KEYS)}.")
    repeats = described.pop("repeats", 1)
    said: dict[str, str] = {}
    for key, value in described.items():
        try:
            if isinstance(value, bool) or not isinstance(value, str | int | float | date | None):
                raise ValueError
            said |= {} if value is None else {key: str(value)}
        except ValueError as error:  # Python writes no number of thousands of digits
            raise UserError(f"{path} must give {key} as a word; put it into quotes.") from error
    return said, repeats


def image_folders(folder: Path, repeats: Any) -> dict[Path, int]:
    """Where a concept's images lie, and how often those of each place are seen in an epoch.

    Args:
        repeats: what ``concept.yaml`` says: a number for all, or a mapping from folders inside (``.`` is the concept's
            own) to numbers. A folder's name such as ``10_name`` says it too.

    Raises:
        UserError: a folder that is not there, or a number out of range.
    """
    source = f"repeats in {folder / 'concept.yaml'}"
    each: Mapping[Any, Any] = repeats if isinstance(repeats, dict) else {}
    usual = 1 if isinstance(repeats, dict) else checked_repeats(repeats, source)
    places = {folder: usual} | {folder / sub: usual for sub in IMAGE_FOLDERS if (folder / sub).is_dir()}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (found := re.fullmatch(r"(\d+)_.+", path.name)):
            places[path] = checked_repeats(int(found[1][:9]), f"The name of the folder {path}")
    inside = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    for key, value in each.items():
        if key != "." and key not in inside:
            word = (key if isinstance(key, str) else shown(key))[:80]
            raise UserError(f"{source} name the folder '{word}', which is not there{nearest(word, inside)}.")
        places[folder / key] = checked_repeats(value, source)
    return places


def checked_repeats(value: Any, source: str) -> int:
    """``value`` as a number of repeats.

    Raises:
        UserError: it is not a whole number in range; the sentence begins with ``source``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_REPEATS:
        raise UserError(f"{source} must say a whole number from 1 to {MAX_REPEATS}, not {shown(value, 40)}.")
    return value


def read_photos(folder: Path, places: Mapping[Path, int]) -> tuple[list[Photo], list[str], list[str]]:
    """The photos in these places and where their metadata leads, what was skipped and why, and other notes."""
    captions: dict[Path, str] = {}
    for place in places:
        captions |= read_metadata(place)
    there = {path for path in captions if is_file(path)}
    by_name = {path.name: text for path, text in captions.items() if path not in there}  # named from another folder
    files = {path for place in places for path in place.iterdir() if path.is_file()}
    files |= there
    photos, skipped, others = [], [], 0
    same: dict[str, list[str]] = {}
    for path in sorted(files):
        if path.name.startswith(".") or is_label(path):
            continue
        if path.suffix.lower() not in SUFFIXES:
            others += path.suffix.lower() not in QUIET
            continue
        try:
            image = open_upright(path)
        except UserError as error:
            skipped.append(str(error))
            continue
        shown = on_ground(image, "white")
        pixels = hashlib.sha256(f"{shown.size}".encode() + shown.tobytes()).hexdigest()
        same.setdefault(pixels, []).append(path.relative_to(folder).as_posix())
        caption = captions.get(path) or by_name.get(path.name) or text_beside(path, folder)
        mask = find_mask(path, folder) or (path if image.mode == "RGBA" else None)
        repeats = next((places[place] for place in path.parents if place in places), 1)
        photos.append(Photo(path, caption, image.size, mask, repeats))
    if others:
        skipped.append(f"{others} file{'s' if others > 1 else ''} of other kinds")
    named = {photo.path.name for photo in photos}
    gone = [path.name for path in captions if path not in there and path.name not in named]
    return photos, skipped, notes_of(same.values(), gone)


def notes_of(same: Iterable[list[str]], gone: list[str]) -> list[str]:
    """What a person may want to know: photos that are the same, names in the metadata that no photo has."""
    notes = [f"{len(names)} photos are the same: {', '.join(names)}." for names in same if len(names) > 1]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        notes.append(f"Named in the metadata but not among the photos: {gone[0][:80]!r}{more}.")
    return notes
