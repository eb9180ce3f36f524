"""Finished pictures: PNGs with their scene inside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from PIL.Image import DecompressionBombError

from ..adapters.formats.reading import lora_file
from ..config.scene import Scene
from ..core.errors import Fix, UserError
from ..core.files import atomic, exists, is_file, parse_json
from ..core.machine import provenance
from ..core.paths import is_full, located, located_base, portable, portable_base
from ..models.base import Base
from .auto_regions import Box
from .control import weights_of
from .scene import adapter_files, adapter_tables, candidate_paths, paths_in

SETTINGS_KEY = "spectral_diffusion"
UNREAD = (
    OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError, DecompressionBombError, SyntaxError,
)  # fmt: skip
BASE = "base"  # among the sources
APART = {"output", "device"}  # of a scene: its output and its device


def save_png(
    image: Image.Image, path: Path, scene: Scene, sources: Mapping[str, str], places: Mapping[str, Box] | None = None
) -> None:
    """Write a PNG with its scene, what it was made from (see :func:`sources_of`) and the machine inside.

    ``places``: the places of concepts that were found in it.
    """
    info = PngImagePlugin.PngInfo()
    metadata = {**embedded(scene, path, sources), "provenance": provenance()}
    metadata |= {"places": dict(places)} if places else {}
    info.add_itxt(SETTINGS_KEY, json.dumps(metadata))  # in their own order: adapters act in it
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def embedded(scene: Scene, path: Path, sources: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of the picture ``path``: its scene and sources.

    Full paths are relative to the picture, or names alone: people share it.
    """
    folder = path.parent
    settings = paths_in(scene.model_dump(mode="json", exclude=APART), lambda name: portable(name, folder))
    if is_full(scene.base):
        settings["base"] = portable_base(scene.base, sources.get(BASE, ""), folder)
    return {"settings": settings, "sources": {portable(name, folder): value for name, value in sources.items()}}


def sources_of(scene: Scene, base: Base) -> dict[str, str]:
    """The sources of a picture besides its settings: the base's fingerprint, and a hash of every file it names.

    Call it before anything is loaded on the base.
    """
    files = [condition.file for condition in scene.controls]
    files += [region.mask for region in scene.regions if region.mask]
    named = {str(file): file for file in files} | {name: lora_file(Path(name)) for name in adapter_files(scene)}
    named = {name: file for name, file in named.items() if is_file(file)}  # others are reported where they are used
    for number, condition in enumerate(scene.controls, 1):
        named |= {f"adapter of condition {number}": file for file in weights_of(base, condition)}
    return {BASE: base.fingerprint.exact} | {name: hash_file(file) for name, file in named.items()}


def read_embedded(path: Path) -> dict[str, Any]:
    """Everything that is embedded in a picture.

    Raises:
        UserError: the picture holds none.
    """
    try:
        if not is_file(path):  # opening a pipe may never end
            raise ValueError
        with Image.open(path, formats=["PNG"]) as image:
            metadata: dict[str, Any] = parse_json(image.info[SETTINGS_KEY])
        return {"settings": dict(metadata["settings"]), "sources": dict(metadata.get("sources") or {})}
    except UNREAD as error:
        raise UserError(f"{path} holds no settings of this program.") from error


def read_places(path: Path) -> dict[str, Box]:
    """Where concepts were found in a picture, by token; nothing where no places were found.

    Raises:
        UserError: it is none of this program's pictures.
    """
    read_embedded(path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            found = parse_json(image.info[SETTINGS_KEY]).get("places") or {}
        boxes: dict[str, Box] = {}
        for token, (left, top, right, bottom) in found.items():
            boxes[str(token)] = float(left), float(top), float(right), float(bottom)
        return boxes
    except UNREAD as error:
        raise UserError(f"The places in {path} cannot be read.") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings embedded in a picture.

    Raises:
        UserError: the picture holds none.
    """
    metadata = read_embedded(path)
    settings = paths_in(metadata["settings"], lambda name: located(name, path.parent))
    settings.setdefault("auto_regions", False)  # pictures from before there was any
    if isinstance(settings.get("base"), str):
        settings["base"] = located_base(settings["base"], str(metadata["sources"].get(BASE)), path.parent)
    return settings


def read_sources(path: Path) -> dict[str, str]:
    """The sources that a picture names.

    Raises:
        UserError: it is none of this program's pictures.
    """
    sources = read_embedded(path)["sources"].items()
    return {name if name == BASE else located(str(name), path.parent): str(value) for name, value in sources}


@dataclass
class FoundSources:
    """A picture's settings with its files where they are now.

    Attributes:
        sources: what the picture was made from, under the same names.
        placed: the files among those named anew that replace some of the picture's own.
    """

    settings: dict[str, Any]
    sources: dict[str, str]
    placed: set[str]


def find_again(path: Path, named: Iterable[str] = ()) -> FoundSources:
    """A picture's sources, wherever their files are now: those of the same content come first.

    They are searched among ``named`` adapters, then as the picture names them: from here, beside it, and from the
    folders above it.

    Raises:
        UserError: no picture of this program's, or an adapter of it is missing.
    """
    folder, digests = Path(path).parent, read_sources(path)
    digest_of = {name: _digest(name) for name in named}
    moved: dict[str, str] = {}

    def locate(name: str) -> str:
        digest, file = digests.get(name), Path(name).name
        existing = [str(candidate) for candidate in candidate_paths(name, folder) if exists(candidate)]
        same = [
            candidate for candidate in [name, *existing, str(folder / file)] if digest and _digest(candidate) == digest
        ]
        known = [other for other, own in digest_of.items() if digest and own == digest] + same
        likely = [name] * exists(name) + [other for other in digest_of if Path(other).name == file] + existing
        moved[name] = next(iter(known + likely), name)
        return moved[name]

    settings = paths_in(read_settings(path), locate)
    if lost := next((name for adapters in adapter_tables(settings) for name in adapters if not exists(name)), None):
        raise UserError(
            f"{path} was generated with {lost}, which no longer exists.", Fix("adapters", so="to name it where it is")
        )
    sources = {moved.get(name, name): digest for name, digest in digests.items()}
    return FoundSources(settings, sources, {name for name in moved.values() if name in digest_of})


def _digest(name: str | Path) -> str | None:
    """The hash that a picture holds of such a file; None if it is not there."""
    try:
        return hash_file(lora_file(Path(name)))
    except (OSError, ValueError, UserError):
        return None


def hash_file(path: Path) -> str:
    """A hash of a file's bytes, which may be many gigabytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


def is_our_png(path: Path) -> bool:
    """Whether a file is a picture that this program drew."""
    try:
        return bool(read_embedded(path))
    except UserError:
        return False


def is_same(path: Path, scene: Scene, sources: Mapping[str, str]) -> bool:
    """Whether a picture exists that was generated from this very scene, base and files."""
    try:
        metadata = read_embedded(path)
    except UserError:
        return False
    return metadata == embedded(scene, path, sources)
