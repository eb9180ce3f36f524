"""The concepts tab without gradio: photo folders of the workspace, and the ready-made ones."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path

from PIL import Image

from .. import pocket
from ..core import assets as resources
from ..core.errors import UserError
from ..core.names import check_token, slug
from ..data.folder import Concept, Photo, load_concept, open_photo, read_about
from ..data.image_io import FORMATS, SUFFIXES
from ..data.sidecars import DRAWING_ENDINGS, MASK_ENDINGS, is_label, twin_of
from .adapter_headers import AdapterInfo, adapter_headers, owner_of_adapter
from .uploads import PHOTOS, pixels_of, small_jpeg
from .workspace import Workspace, pick, visible

THUMBNAIL = 256
ABOUT = "concept.yaml"


# --- reading -------------------------------------------------------------------------------------------------


def own_folders(workspace: Workspace) -> dict[str, Path]:
    """The user's own photo folders by name."""
    return {path.name: path for path in visible(workspace.concepts) if path.is_dir()}


def concept_folders(workspace: Workspace) -> dict[str, Path]:
    """The user's own photo folders, then the ready-made ones, by name; an own one hides a ready-made namesake."""
    own = own_folders(workspace)
    ready = {path.parent.name: path.parent for path in sorted(resources.concepts().glob("*/concept.yaml"))}
    return own | {name: path for name, path in ready.items() if name not in own}


def concept_folder(workspace: Workspace, name: str | None) -> Path:
    """The folder of a listed concept.

    Raises:
        UserError: none is chosen, there is none of that name, or a link in it leads elsewhere.
    """
    if not name:
        raise UserError("No concept is chosen; pick one in step 1, or add your own photos there.")
    folder = pick(name, concept_folders(workspace), "concept", "add it in step 1")
    inside = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise UserError(f"'{name}' holds a link that leads out of it, {path.name}; put the file itself there.")
    return folder


def own_folder(workspace: Workspace, name: str | None) -> Path:
    """The folder of a concept that can be changed.

    Raises:
        UserError: it is ready-made; see also :func:`concept_folder`.
    """
    folder = concept_folder(workspace, name)
    if folder.name not in own_folders(workspace):
        raise UserError(f"'{name}' is ready-made and stays as it is; press 'Make it mine' to change a copy.")
    return folder


def read_concept(folder: Path) -> Concept:
    """:func:`load_concept`, which reads every photo, only when something in the folder has changed.

    Raises:
        UserError: see :func:`load_concept`.
    """
    paths = sorted(folder.rglob("*"))
    return _read(folder, tuple((str(path), (seen := path.lstat()).st_mtime_ns, seen.st_size) for path in paths))


@lru_cache(maxsize=64)
def _read(folder: Path, state: tuple[tuple[str, int, int], ...]) -> Concept:
    return load_concept(folder)


def view_concept(workspace: Workspace, name: str | None) -> tuple[Concept, list[Image.Image]]:
    """A concept and small copies of its photos, at most :data:`PHOTOS`.

    Raises:
        UserError: see :func:`concept_folder` and :func:`load_concept`.
    """
    concept = read_concept(concept_folder(workspace, name))
    return concept, [opened(thumbnail(photo.path, THUMBNAIL)) for photo in concept.photos[:PHOTOS]]


def photo_files(folder: Path) -> list[Path]:
    """The photos at the top of a folder, broken ones too."""
    paths = (path for path in visible(folder) if path.is_file() and path.suffix.lower() in SUFFIXES)
    images = [path for path in paths if not is_label(path)]
    return [path for path in images if not twin_of(path, (*MASK_ENDINGS, *DRAWING_ENDINGS), images)]


def is_picture(path: Path) -> bool:
    """Whether a file has an image's header."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # a hostile file may break a decoder in any way
        return False


def thumbnail(path: Path, side: int) -> bytes:
    """A photo as a JPEG of at most ``side`` × ``side`` pixels.

    Raises:
        UserError: it cannot be read.
    """
    try:
        seen = path.stat()
    except OSError as error:
        raise UserError(f"{path.name} is gone; reload the page") from error
    return _thumbnail(path, seen.st_mtime_ns, seen.st_size, side)


@lru_cache(maxsize=2000)
def _thumbnail(path: Path, changed: int, size: int, side: int) -> bytes:
    return small_jpeg(open_photo(path), side)


def opened(data: bytes) -> Image.Image:
    """A thumbnail as an image."""
    return Image.open(io.BytesIO(data))


def file_names(folder: Path, concept: Concept) -> dict[str, Photo]:
    """The photos by their names within the folder."""
    return {photo.path.relative_to(folder).as_posix(): photo for photo in concept.photos}


def odd_files(folder: Path) -> list[Path]:
    """The broken photos at the top of a folder, and duplicates of earlier ones."""
    odd, seen = [], set()
    for path in photo_files(folder):
        digest = pixels(path)
        if digest is None or digest in seen:
            odd.append(path)
        seen.add(digest)
    return odd


def pixels(path: Path) -> str | None:
    """The hash of a photo's pixels; None if it cannot be read."""
    try:
        return pixels_of(open_photo(path))
    except UserError:
        return None


# --- tokens --------------------------------------------------------------------------------------------------


def known_concepts(workspace: Workspace) -> dict[str, tuple[str, str, str]]:
    """Folder name to (name, noun, token); a broken folder has its own name and no token."""
    details = {}
    for folder, path in concept_folders(workspace).items():
        try:
            details[folder] = about(path)
        except UserError:
            details[folder] = (folder, "", "")
    return details


@lru_cache(maxsize=1)
def pocket_tokens() -> frozenset[str]:
    """The words and added tokens of the pocket base, read from its tokenizer's file."""
    data = json.loads((pocket.path() / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    return frozenset({token["content"] for token in data["added_tokens"]} | set(data["model"]["vocab"]))


def about(folder: Path) -> tuple[str, str, str]:
    """Name, class noun and token of a concept, from ``concept.yaml`` alone if it has all of them.

    Raises:
        UserError: see :func:`load_concept`.
    """
    try:
        settings, _ = read_about(folder)
        return settings["name"], settings["noun"], check_token(settings["token"])
    except (KeyError, UserError):
        concept = read_concept(folder)
        return concept.name, concept.noun, concept.token


def suggest_token(workspace: Workspace, name: str | None) -> str:
    """``<name>``, or ``<name-2>`` if another concept has that token; empty for a name without letters."""
    name_slug = slug(name or "").lower()
    if not name_slug:
        return ""
    used = {token for _, _, token in known_concepts(workspace).values()} | pocket_tokens()
    token, number = f"<{name_slug}>", 2
    while token in used:
        token, number = f"<{name_slug}-{number}>", number + 1
    return token


def adapters_of_concept(workspace: Workspace, name: str) -> list[AdapterInfo]:
    """The adapters that were trained from a concept's folder."""
    details = known_concepts(workspace)
    return [label for label in adapter_headers(workspace)[0] if owner_of_adapter(label, details) == name]
