"""Which files of a folder belong to which photo: captions, masks and control images, found by their names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..core.files import is_file
from .image_io import SUFFIXES

TEXTS = (".txt", ".caption")
TEXT_FOLDERS = ("caption", "captions")
MASK_FOLDERS = ("masks", "mask")
DRAWINGS = ("sketch", "keypose")
DRAWING_FOLDERS = ("conditions", *DRAWINGS)
LABEL = "-masklabel"  # after the name of a photo, as OneTrainer names a mask beside it
MASK_ENDINGS = ("_mask", "-mask", ".mask")
DRAWING_ENDINGS = (*(f"{mark}{kind}" for kind in DRAWINGS for mark in "._"), "-condlabel")
IMAGES = (".png", *sorted(SUFFIXES - {".png"}))


def folded(name: str) -> str:
    """A file's name without its case and in one Unicode form: macOS writes ``é`` as two characters."""
    return unicodedata.normalize("NFC", name).casefold()


class Files:
    """The files of some folders, each folder listed once."""

    def __init__(self) -> None:
        self.used: set[Path] = set()
        self._listed: dict[Path, dict[str, Path]] = {}

    def find(self, folder: Path, names: Iterable[str]) -> Path | None:
        """The file with the first of these names; names as written come before those in another case or form."""
        if folder not in self._listed:
            listed = {path.name: path for path in self.all(folder)}
            self._listed[folder] = {folded(name): path for name, path in sorted(listed.items())} | listed
        listed, names = self._listed[folder], list(names)
        match = next((listed[name] for name in (*names, *map(folded, names)) if name in listed), None)
        if match:
            self.used.add(match)
        return match

    @staticmethod
    def all(folder: Path) -> list[Path]:
        """The files of a folder; none of one that cannot be listed."""
        try:
            return [path for path in folder.iterdir() if is_file(path)] if folder.is_dir() else []
        except OSError:
            return []


def named_after(photo: Path, endings: Sequence[str], marks: Sequence[str] = ("",)) -> list[str]:
    """``1.txt`` and ``1.jpg.txt`` of ``1.jpg``, for every mark between the name and its ending."""
    return [f"{stem}{mark}{ending}" for stem in (photo.stem, photo.name) for mark in marks for ending in endings]


def sidecar_folders(photo: Path, folder: Path, names: Sequence[str]) -> list[Path]:
    """Folders of these names: beside a photo first, then in the concept's folder."""
    return list(dict.fromkeys(directory / name for directory in (photo.parent, folder) for name in names))


def find_caption(photo: Path, folder: Path, files: Files) -> Path | None:
    """A photo's text file: beside it, or in ``caption/`` or ``captions/`` there or in the concept's folder."""
    names = named_after(photo, TEXTS)
    directories = (photo.parent, *sidecar_folders(photo, folder, TEXT_FOLDERS))
    return next((text for directory in directories if (text := files.find(directory, names))), None)


def find_mask(photo: Path, folder: Path, files: Files) -> Path | None:
    """A photo's mask: in ``masks/`` or ``mask/`` under its name, or ``<name>-masklabel.png`` beside it."""
    names = named_after(photo, IMAGES)
    in_folders = (files.find(directory, names) for directory in sidecar_folders(photo, folder, MASK_FOLDERS))
    return next(filter(None, in_folders), None) or files.find(photo.parent, named_after(photo, IMAGES, (LABEL,)))


def find_control_image(photo: Path, folder: Path, kind: str, files: Files) -> Path | None:
    """A photo's sketch or keypose: beside it as ``<name>_<kind>.png``, or in ``<kind>/`` or ``conditions/``."""
    beside = files.find(photo.parent, named_after(photo, IMAGES, (f".{kind}", f"_{kind}")))
    in_folders = (files.find(folder / name, named_after(photo, IMAGES)) for name in (kind, "conditions"))
    return beside or next(filter(None, in_folders), None)


def is_label(path: Path) -> bool:
    """Whether a file is a mask beside its photo, by its name alone."""
    return path.stem.lower().endswith(LABEL)


def twin_of(path: Path, endings: Sequence[str], images: Iterable[Path]) -> Path | None:
    """The photo among ``images`` that a picture such as ``<photo>_mask.png`` is named after."""
    match = re.fullmatch(rf"(.+)(?:{'|'.join(map(re.escape, endings))})", folded(path.stem))
    if not match:
        return None
    beside = (image for image in images if image.parent == path.parent and image != path)
    return next((image for image in beside if match[1] in (folded(image.stem), folded(image.name))), None)
