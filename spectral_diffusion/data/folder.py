"""A photo folder as a concept: images, captions, class noun, token."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from ..config import read_yaml
from ..errors import UserError, nearest
from ..tokens import check_token

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
QUIET = {".txt", ".yaml", ".yml", ".json", ".jsonl", ".md", ".safetensors"}
MAX_PIXELS = 80_000_000
CONCEPT_KEYS = {"name", "noun", "token"}


@dataclass(frozen=True)
class Photo:
    """One image of a concept; ``caption`` is None where a template shall be used."""

    path: Path
    caption: str | None


@dataclass(frozen=True)
class Concept:
    """A person's own thing. ``skipped`` holds a reason per file that could not be used."""

    name: str
    noun: str
    token: str
    photos: tuple[Photo, ...]
    skipped: tuple[str, ...]

    def prompt(self, text: str) -> str:
        """A caption or template with the concept's token in it.

        ``<TOK>`` or ``{}`` mark the place; a caption that names the token stays; any other is put after it.
        """
        for mark in ("<TOK>", "{}"):
            if mark in text:
                return text.replace(mark, self.token)
        return text if self.token in text else f"{self.token}, {text}"


def open_photo(path: Path) -> Image.Image:
    """An image as RGB, upright, transparency on white.

    Raises:
        UserError: not a readable image, or unreasonably large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{path.name} has more than {MAX_PIXELS // 1_000_000} million pixels")
                image.load()
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I;16") or upright.mode in {"I", "F"}:
                    upright = upright.point(lambda v: v / 256).convert("L")
                if upright.mode in {"RGBA", "LA", "PA"} or "transparency" in upright.info:
                    upright = upright.convert("RGBA")
                    white = Image.new("RGBA", upright.size, "white")
                    return Image.alpha_composite(white, upright).convert("RGB")
                return upright.convert("RGB")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"No such file: {path}.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{path.name} is too large an image") from error
    except (OSError, SyntaxError, ValueError, MemoryError, EOFError, IndexError, TypeError) as error:
        raise UserError(f"{path.name} is not a readable image") from error


def load_concept(folder: Path, name: str | None = None, token: str | None = None, noun: str | None = None) -> Concept:
    """Read a photo folder. Images lie in it, or in ``image/`` or ``images/`` inside it.

    Captions come from ``metadata.jsonl`` (``file_name``, ``text``), else ``<image>.txt`` beside the image or
    in ``caption/`` or ``captions/``, else a template. ``concept.yaml`` may give ``name``, ``noun``, ``token``.

    Raises:
        UserError: no such folder, or no usable image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"No such folder: {folder}.")
    described: dict[str, str] = {}
    if (folder / "concept.yaml").is_file():
        for key, value in read_yaml(folder / "concept.yaml").items():
            if key not in CONCEPT_KEYS:
                raise UserError(f"Unknown key '{key}' in {folder / 'concept.yaml'}{nearest(key, CONCEPT_KEYS)}.")
            described[key] = str(value)
    name = name or described.get("name") or folder.resolve().name
    if not re.fullmatch(r"[\w .-]{1,80}", name) or name.startswith("."):
        raise UserError(f"'{name}' cannot be a concept's name; use letters, digits, - and _ (name=rex).")
    token = check_token(
        token or described.get("token") or f"<{re.sub(r'[^A-Za-z0-9-]+', '-', name).strip('-') or 'it'}>"
    )
    noun = noun or described.get("noun") or re.sub(r"[^A-Za-z]+", " ", name).strip() or "object"

    places = [folder, *(folder / sub for sub in ("image", "images") if (folder / sub).is_dir())]
    captions = _metadata(folder)
    photos, skipped, others = [], [], 0
    for path in sorted(p for place in places for p in place.iterdir() if p.is_file()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() not in SUFFIXES:
            others += path.suffix.lower() not in QUIET
            continue
        try:
            open_photo(path)
        except UserError as error:
            skipped.append(str(error))
            continue
        photos.append(Photo(path, captions.get(path.name) or _text_beside(path)))
    if others:
        skipped.append(f"{others} file{'s' if others > 1 else ''} of other kinds")
    if not photos:
        broken = f" ({'; '.join(skipped)})" if skipped else ""
        raise UserError(f"{folder} holds no readable photo{broken}; put at least one .jpg, .png or .webp there.")
    return Concept(name, noun, token, tuple(photos), tuple(skipped))


def _metadata(folder: Path) -> dict[str, str]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return {}
    captions = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a UTF-8 text file; save it again as UTF-8.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            captions[Path(str(row["file_name"])).name] = str(row["text"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'{path} line {number} must be {{"file_name": …, "text": …}}.') from error
    return captions


def _text_beside(path: Path) -> str | None:
    for place in (path.parent, path.parent.parent / "caption", path.parent.parent / "captions"):
        file = place / f"{path.stem}.txt"
        if file.is_file():
            try:
                text = " ".join(file.read_text(encoding="utf-8").split())
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file} is not a UTF-8 text file; save it again as UTF-8.") from error
            return text or None
    return None
