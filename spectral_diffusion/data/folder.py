"""A photo folder as a concept: images, captions, masks, class noun, token."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from ..config.settings import read_yaml
from ..config.train import in_style, is_style_noun
from ..core.errors import UserError, nearest, short_repr
from ..core.files import is_file, is_folder
from ..core.names import check_token, is_name, latin, slug
from .captions import read_caption, read_metadata
from .hub_dataset import local_folder
from .image_io import MAX_PIXELS as MAX_PIXELS
from .image_io import SUFFIXES, UNREAD, is_control_image, on_ground, open_upright
from .image_io import open_photo as open_photo
from .masks import is_mask
from .sidecars import (
    DRAWING_ENDINGS,
    DRAWING_FOLDERS,
    MASK_ENDINGS,
    MASK_FOLDERS,
    TEXT_FOLDERS,
    TEXTS,
    Files,
    find_caption,
    find_mask,
    folded,
    is_label,
    twin_of,
)

QUIET = {".txt", ".caption", ".yaml", ".yml", ".json", ".jsonl", ".csv", ".md", ".safetensors"}
CONCEPT_KEYS = {"name", "noun", "token", "repeats"}
IMAGE_FOLDERS = ("image", "images", "train")
APART = {*TEXT_FOLDERS, *MASK_FOLDERS, *DRAWING_FOLDERS}  # folders of sidecar files
UNKNOWN = "object"  # the class noun of a name that gives none
MAX_REPEATS = 1000
MOST_FOLDERS = 1000  # that are looked through for photos which are not read


@dataclass(frozen=True)
class Photo:
    """One image of a concept, ``size`` (width, height) in pixels.

    ``caption`` is None where a template is used. ``mask`` is the photo itself where its alpha is the mask.
    In every epoch it is seen ``repeats`` times. ``token`` is its concept's, where several are trained jointly.
    """

    path: Path
    caption: str | None
    size: tuple[int, int]
    mask: Path | None = None
    repeats: int = 1
    token: str = ""


@dataclass(frozen=True)
class Concept:
    """A person's own thing.

    ``skipped`` holds a reason per file that could not be used, ``notes`` what else a person may want to know, and
    ``control_images`` the pictures left out because they are control images of the photos. ``joint`` are further
    concepts that are trained into the same adapter; ``photos`` holds theirs too.
    """

    name: str
    noun: str
    token: str
    photos: tuple[Photo, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...] = ()
    control_images: tuple[Path, ...] = ()
    joint: tuple[Concept, ...] = ()

    @property
    def nouns(self) -> list[str]:
        """The class nouns of all concepts in it, but for styles: there is no picture of a style."""
        return [concept.noun for concept in (self, *self.joint) if not is_style_noun(concept.noun)]

    @property
    def styles(self) -> list[str]:
        """The tokens of the styles in it."""
        return [concept.token for concept in (self, *self.joint) if is_style_noun(concept.noun)]

    @property
    def is_style(self) -> bool:
        """Whether everything in it is a style."""
        return not self.nouns

    def token_of(self, photo: Photo) -> str:
        """The token of what a photo shows."""
        return photo.token or self.token

    def prompt(self, text: str, token: str = "") -> str:
        """A caption or template with the concept's token in it, or with another of the jointly trained ones.

        ``<TOK>`` or ``{}`` mark the place; a caption that names the token, in upper or lower case, stays; any other is
        put after it.
        """
        token = token or self.token
        for mark in ("<TOK>", "{}"):
            if mark in text:
                return text.replace(mark, token)
        named = re.compile(re.escape(token), re.IGNORECASE)  # tokenizers do not tell upper case from lower
        return named.sub(token, text) if named.search(text) else f"{token}, {text}"

    @property
    def subject(self) -> str:
        """What a prompt says to show it: its token, or a dog in the style."""
        return in_style("a dog", self.token) if self.is_style else self.token

    def digest(self) -> str:
        """One hash of what a training sees of it: its words, photos, captions and masks.

        Raises:
            UserError: a file is gone.
        """
        words = [f"{concept.token}|{concept.noun}" for concept in (self, *self.joint)]
        hashed = hashlib.sha256("|".join(words).encode())
        for photo in self.photos:
            try:
                parts = [photo.path.read_bytes(), photo.mask.read_bytes() if photo.mask else b""]
            except OSError as error:
                raise UserError(
                    f"{photo.path} or its mask can no longer be read: {error.strerror or error}."
                ) from error
            for part in (*parts, f"{photo.caption}|{photo.repeats}{photo.token}".encode()):
                hashed.update(hashlib.sha256(part).digest())
        return hashed.hexdigest()[:32]


@dataclass(frozen=True)
class About:
    """A concept's names, and the repeats of ``concept.yaml``; ``given`` if a name was set explicitly."""

    name: str
    noun: str
    token: str
    repeats: Any
    given: bool


def load_concept(folder: Path, name: str | None = None, token: str | None = None, noun: str | None = None) -> Concept:
    """Read a photo folder.

    Images are in it; in ``image/``, ``images/`` or ``train/`` inside it; in folders such as ``10_name/``, whose
    photos are seen 10 times an epoch; or where its metadata says. Captions come from ``metadata.jsonl`` or
    ``metadata.csv`` (``file_name``, ``text``), else ``<image>.txt`` beside the image or in ``caption/`` or
    ``captions/``, else a template. Masks: :func:`.sidecars.find_mask`, else the image's alpha. ``concept.yaml`` may
    give ``name``, ``noun``, ``token`` and ``repeats``, a number or one per folder.

    ``hub:user/dataset`` is a dataset of the hub: :func:`.hub_dataset.local_folder`.

    Raises:
        UserError: no such folder, no usable image in it, or several concepts.
    """
    folder = local_folder(Path(folder))
    about = describe(folder, name, token, noun)
    folders = image_folders(folder, about.repeats)
    if not about.given:
        check_single_concept(folder, folders)
    content = read_photos(folder, folders)
    if not content.photos:
        broken = f" ({'; '.join(content.skipped)})" if content.skipped else ""
        raise UserError(
            f"{folder} holds no readable photo{broken}; put at least one .jpg, .png or .webp there"
            f"{f'. {content.nested}' if content.nested else '.'}"
        )
    notes = [*content.notes, *([content.nested] if content.nested else [])]
    if about.noun == UNKNOWN:
        notes.append(
            f"'{about.name}' gives no class noun, so it is trained as an {UNKNOWN}; class_noun=dog says what it is."
        )
    return Concept(
        about.name, about.noun, about.token, tuple(content.photos), tuple(content.skipped), tuple(notes),
        tuple(content.control_images),
    )  # fmt: skip


def describe(folder: Path, name: str | None = None, token: str | None = None, noun: str | None = None) -> About:
    """A concept's names: as given, else from its ``concept.yaml``, else from its folder's name.

    Raises:
        UserError: no such folder, an invalid ``concept.yaml``, or a name or token that cannot be one.
    """
    folder = local_folder(folder)
    if not is_folder(folder):
        raise UserError(f"No such folder: {folder}.")
    described, repeats = read_about(folder)
    given = any([name, token, noun, *described.values()])
    name = unicodedata.normalize("NFC", name or described.get("name") or folder.resolve().name)
    if not is_name(name, 80) or name.startswith("."):
        raise UserError(f"'{name}' cannot be a concept's name; use letters, digits, - and _ (name=rex).")
    token = check_token(token or described.get("token") or f"<{slug(name) or 'it'}>")
    noun = noun or described.get("noun") or re.sub(r"[^A-Za-z]+", " ", latin(name)).strip() or UNKNOWN
    return About(name, noun, token, repeats, given)


def check_single_concept(folder: Path, folders: Iterable[Path]) -> None:
    """Refuse folders such as ``10_rex dog`` and ``5_mug cup`` beside each other: they are two concepts.

    Raises:
        UserError: they begin with different words.
    """
    numbered = [(path, match[1]) for path in folders if (match := re.fullmatch(r"\d+_([^\s_-]+).*", path.name))]
    others = [path for path, word in numbered if word.casefold() != numbered[0][1].casefold()]
    if others:
        raise UserError(
            f"{folder} holds folders of two names, '{numbered[0][0].name}' and '{others[0].name}': train each by "
            f"itself ('{numbered[0][0]}'), or say by name= that they are one concept."
        )


def read_about(folder: Path) -> tuple[dict[str, str], Any]:
    """The words of a folder's ``concept.yaml`` (name, noun, token), and its repeats; nothing and 1 without one.

    Raises:
        UserError: an unknown key, or a word that is none.
    """
    path = folder / "concept.yaml"
    described = read_yaml(path) if path.is_file() else {}
    for key in described:
        if key not in CONCEPT_KEYS:
            raise UserError(f"Unknown key {short_repr(key)} in {path}{nearest(key[:80], CONCEPT_KEYS)}.")
    repeats = described.pop("repeats", 1)
    values: dict[str, str] = {}
    for key, value in described.items():
        try:
            if isinstance(value, bool) or not isinstance(value, str | int | float | date | None):
                raise ValueError
            values |= {} if value is None else {key: str(value)}
        except ValueError as error:  # Python writes no number of thousands of digits
            raise UserError(f"{path} must give {key} as a word; put it into quotes.") from error
    return values, repeats


def image_folders(folder: Path, repeats: Any) -> dict[Path, int]:
    """A concept's image folders, and how often the photos of each are seen in an epoch.

    Args:
        repeats: what ``concept.yaml`` says: a number for all, or a mapping from folders inside (``.`` is the concept's
            own) to numbers. A folder's name such as ``10_name`` says it too.

    Raises:
        UserError: a folder that is not there, or a number out of range.
    """
    source = f"repeats in {folder / 'concept.yaml'}"
    each: Mapping[Any, Any] = repeats if isinstance(repeats, dict) else {}
    default = 1 if isinstance(repeats, dict) else checked_repeats(repeats, source)
    folders = {folder: default} | {folder / sub: default for sub in IMAGE_FOLDERS if (folder / sub).is_dir()}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (match := re.fullmatch(r"(\d+)_.+", path.name)):
            folders[path] = checked_repeats(int(match[1][:9]), f"The name of the folder {path}")
    inside = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    for key, value in each.items():
        if key != "." and key not in inside:
            word = (key if isinstance(key, str) else short_repr(key))[:80]
            raise UserError(f"{source} name the folder '{word}', which is not there{nearest(word, inside)}.")
        folders[folder / key] = checked_repeats(value, source)
    return folders


def checked_repeats(value: Any, source: str) -> int:
    """``value`` as a number of repeats.

    Raises:
        UserError: it is not a whole number in range; the sentence begins with ``source``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_REPEATS:
        raise UserError(f"{source} must say a whole number from 1 to {MAX_REPEATS}, not {short_repr(value, 40)}.")
    return value


@dataclass
class FolderContent:
    """The content of a photo folder; ``nested`` is a note on photos in folders that are not read, or empty."""

    photos: list[Photo]
    skipped: list[str]
    notes: list[str]
    control_images: list[Path]
    nested: str = ""


def read_photos(folder: Path, folders: Mapping[Path, int]) -> FolderContent:
    """The photos in these folders and those that their metadata names, with captions and masks."""
    captions: dict[Path, str] = {}
    for directory in folders:
        captions |= read_metadata(directory)
    listed = {path for path in captions if is_file(path)}
    elsewhere = [path for path in captions if path not in listed]
    by_name = {folded(path.name): captions[path] for path in elsewhere}  # named from another folder, or otherwise
    paths = {path for directory in folders for path in Files.all(directory)} | listed
    images, others = sorted_out(sorted(paths))
    photos: list[Photo] = []
    skipped: list[str] = []
    control_images: list[Path] = []
    masks: dict[Path, Path] = {}
    same: dict[str, list[str]] = {}
    files = Files()
    for path in images:
        if is_control_image(path) or twin_of(path, DRAWING_ENDINGS, images):
            control_images.append(path)
            continue
        try:
            image = open_upright(path)
        except UserError as error:
            skipped.append(str(error))
            continue
        if (photo := twin_of(path, MASK_ENDINGS, images)) and is_mask(image):
            masks[photo] = path
            continue
        shown = on_ground(image, "white")
        pixels = hashlib.sha256(f"{shown.size}".encode() + shown.tobytes()).hexdigest()
        same.setdefault(pixels, []).append(path.relative_to(folder).as_posix())
        caption = captions.get(path) or by_name.get(folded(path.name))
        if not caption and (text := find_caption(path, folder, files)):
            caption = read_caption(text)
        mask = find_mask(path, folder, files)
        if image.mode == "RGBA":
            masks.setdefault(path, path)
        repeats = next((folders[directory] for directory in path.parents if directory in folders), 1)
        photos.append(Photo(path, caption, image.size, mask, repeats))
    photos = [photo if photo.mask else replace(photo, mask=masks.get(photo.path)) for photo in photos]
    named = {folded(photo.path.name) for photo in photos}
    notes = list(notes_of(same.values(), [path.name for path in elsewhere if folded(path.name) not in named]))
    notes += unused(photos, folder, files)
    return FolderContent(photos, [*skipped, *others], notes, control_images, nested_photos(folder, folders, listed))


def sorted_out(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The pictures among files, without masks beside photos; and a sentence's part on other kinds of files."""
    images, unread, others = [], [], []
    for path in paths:
        suffix = path.suffix.lower()
        if path.name.startswith(".") or is_label(path):
            continue
        if suffix in SUFFIXES:
            images.append(path)
        elif suffix in UNREAD:
            unread.append(path)
        elif suffix not in QUIET:
            others.append(path.name)
    reasons = []
    if unread:
        kinds = " and ".join(sorted({UNREAD[path.suffix.lower()] for path in unread}))
        verb = "is" if len(unread) == 1 else "are"
        names = and_more([path.name for path in unread], 1)
        reasons.append(f"{names} {verb} {kinds}, which is not read here: save as JPEG")
    if others:
        reasons.append(f"{len(others)} file{'s' if len(others) > 1 else ''} of other kinds ({and_more(others, 2)})")
    return images, reasons


def and_more(names: Sequence[str], shown: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(name[:80] for name in names[:shown])}{more}"


def notes_of(same: Iterable[list[str]], gone: list[str]) -> Iterator[str]:
    """Notes for the user: identical photos, names in the metadata that no photo has."""
    for names in same:
        if len(names) > 1:
            yield f"{len(names)} photos are the same: {', '.join(names)}."
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        yield f"Named in the metadata but not among the photos: {gone[0][:80]!r}{more}."


def unused(photos: Sequence[Photo], folder: Path, files: Files) -> Iterator[str]:
    """Notes on captions and masks that were given and are not used."""
    around = {photo.path.parent for photo in photos} | {folder}
    texts = [*around, *(directory / name for directory in around for name in TEXT_FOLDERS)]
    masks = [directory / name for directory in around for name in MASK_FOLDERS]
    for kind, candidates, endings in (("captions", texts, set(TEXTS)), ("masks", masks, SUFFIXES | set(UNREAD))):
        left = [
            path for directory in sorted(candidates) for path in Files.all(directory) if path.suffix.lower() in endings
        ]
        left = sorted(path for path in left if path not in files.used and not path.name.startswith("."))
        if left:
            names = [path.relative_to(folder).as_posix() for path in left]
            why = "no photo has that name" + (", or its caption is elsewhere" if kind == "captions" else "")
            yield f"Not used as {kind}: {and_more(names, 3)} ({why})."


def nested_photos(folder: Path, folders: Mapping[Path, int], listed: Collection[Path]) -> str:
    """A note on photos in folders below that are not read; empty if there are none."""
    count, names = 0, []
    for number, (where, inside, files) in enumerate(os.walk(folder)):
        directory = Path(where)
        inside[:] = sorted(name for name in inside if not name.startswith(".") and name.lower() not in APART)
        if number >= MOST_FOLDERS:
            break
        if directory in folders:
            continue
        pictures = [name for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")]
        if left := [name for name in pictures if directory / name not in listed]:
            count += len(left)
            names.append(directory.relative_to(folder).as_posix() + "/")
    if not names:
        return ""
    photos = "1 photo in" if count == 1 else f"{count} photos in"
    direct = [name.rstrip("/") for name in names if name.count("/") == 1]
    naming = f", or name their folders in concept.yaml (repeats: {{{direct[0]}: 1}})" if direct else ""
    return f"Not read: {photos} {and_more(names, 3)}; move them up{naming}."
