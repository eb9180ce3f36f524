"""Uploads: photos, captions and zips, checked before anything of them is kept."""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps

from ..core.errors import UserError, reason
from ..data.image_io import FORMATS, SUFFIXES, open_photo
from ..data.sidecars import is_label
from .sentences import rendered

PHOTOS = 100  # of one concept
PIXELS = 50_000_000  # of one photo
FILE_BYTES = 50_000_000  # of one file, also inside a zip
UNPACKED_BYTES = 400_000_000  # of one upload
MEMBERS = 1000  # of one zip
DIRECTORY_BYTES = 500 * MEMBERS  # of a zip's table of contents, which is read whole
CAPTION_BYTES = 20_000
THUMBNAIL = 256


@dataclass(frozen=True)
class UploadedPhotos:
    """A file of an upload: its path now, and its original name (with its folder inside a zip)."""

    path: Path
    label: PurePosixPath


@dataclass(frozen=True)
class Upload:
    """A usable photo; ``pixels`` is the hash of its pixels, ``small`` a JPEG of at most 256 pixels."""

    path: Path
    label: str
    caption: str
    pixels: str
    small: bytes


@dataclass(frozen=True)
class Intake:
    """The usable photos of an upload, and a reason for each file left out."""

    photos: tuple[Upload, ...]
    problems: tuple[str, ...]


@contextmanager
def looked_through(files: Iterable[Path], known: Iterable[str] = (), room: int = PHOTOS) -> Iterator[Intake]:
    """The photos of an upload while the block runs; zips are unpacked into a temporary folder.

    Args:
        known: hashes of the photos that the concept has already.
        room: how many more photos may be kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        problems: list[str] = []
        uploaded = _single_files([Path(file) for file in files], Path(folder), problems)
        captions = _captions([upload for upload in uploaded if upload.label.suffix.lower() == ".txt"], problems)
        seen = dict.fromkeys(known, "a photo that is there already")
        photos: list[Upload] = []
        for upload in uploaded:
            if upload.label.suffix.lower() == ".txt":
                continue
            try:
                if len(photos) >= room:
                    raise UserError(f"{upload.label.name} is one too many: a concept may have {PHOTOS} photos")
                caption = (
                    captions.get(upload.label.with_suffix("")) or captions.get(PurePosixPath(upload.label.stem)) or ""
                )
                photo = _looked_at(upload, caption)
                if photo.pixels in seen:
                    raise UserError(f"{upload.label.name} is the same picture as {seen[photo.pixels]}")
            except UserError as error:
                problems.append(rendered(error))
                continue
            seen[photo.pixels] = upload.label.name
            photos.append(photo)
        yield Intake(tuple(photos), tuple(problems))


def pixels_of(image: Image.Image) -> str:
    """The hash of an image's pixels."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def small_jpeg(image: Image.Image, side: int = THUMBNAIL) -> bytes:
    """A copy of at most ``side`` × ``side`` pixels as a JPEG file."""
    buffer = io.BytesIO()
    small = ImageOps.contain(image, (side, side)) if max(image.size) > side else image
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _looked_at(upload: UploadedPhotos, caption: str) -> Upload:
    """Read and check one photo.

    Raises:
        UserError: not a photo, or too large.
    """
    name = upload.label.name
    if upload.label.suffix.lower() not in SUFFIXES:
        raise UserError(f"{name} is not a .jpg, .png, .webp, .bmp, .tif or .gif")
    if is_label(Path(name)):
        raise UserError(f"{name} is a mask, which this page does not take")
    if upload.path.stat().st_size > FILE_BYTES:
        raise UserError(f"{name} has more than {FILE_BYTES // 1_000_000} MB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(upload.path, formats=FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has more than {PIXELS // 1_000_000} million pixels") from error
    except Exception as error:  # a hostile file may break a decoder in any way
        raise UserError(f"{name} is not a readable image") from error
    if width * height > PIXELS:
        raise UserError(f"{name} has more than {PIXELS // 1_000_000} million pixels")
    try:
        photo = open_photo(upload.path)
    except UserError as error:
        raise UserError(str(error).replace(upload.path.name, name)) from error
    return Upload(upload.path, name, caption, pixels_of(photo), small_jpeg(photo))


def _captions(texts: list[UploadedPhotos], problems: list[str]) -> dict[PurePosixPath, str]:
    """Captions by file name without ending, both with its folder and without, for photos in other folders."""
    captions: dict[PurePosixPath, str] = {}
    for upload in texts:
        try:
            data = upload.path.read_bytes()
            if len(data) > CAPTION_BYTES:
                raise ValueError
            text = " ".join(data.decode("utf-8-sig").split())
        except (OSError, ValueError):
            problems.append(f"{upload.label.name} is not a caption in UTF-8")
            continue
        captions[upload.label.with_suffix("")] = text
        captions.setdefault(PurePosixPath(upload.label.stem), text)
    return captions


def _single_files(files: list[Path], folder: Path, problems: list[str]) -> list[UploadedPhotos]:
    """The single files of an upload; zips are unpacked into ``folder``."""
    uploads: list[UploadedPhotos] = []
    for file in files:
        if file.suffix.lower() != ".zip":
            uploads.append(UploadedPhotos(file, PurePosixPath(file.name)))
            continue
        try:
            _unpack(file, folder, uploads, problems)
        except UserError as error:
            problems.append(rendered(error))
        except Exception as error:  # a hostile zip may break the reader in any way
            problems.append(f"{file.name} is not a readable zip ({reason(error)})")
    return uploads


def _unpack(file: Path, folder: Path, uploads: list[UploadedPhotos], problems: list[str]) -> None:
    """Unpack photos and captions under generated names; a zip's names never become paths."""
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) > MEMBERS:
            raise UserError(f"{file.name} holds more than {MEMBERS} files; pack only the photos")
        unpacked = sum(upload.path.stat().st_size for upload in uploads if upload.path.parent == folder)
        for member in members:
            label = PurePosixPath(member.filename.replace("\\", "/"))
            if label.name.startswith(".") or "__MACOSX" in label.parts:
                continue
            try:
                _check_member(label, member, file.name)
                path = folder / f"{len(uploads):05}{label.suffix.lower()}"
                unpacked += _copy(archive, member, path, unpacked)
            except UserError as error:
                problems.append(rendered(error))
                continue
            uploads.append(UploadedPhotos(path, label))


def _check_directory(file: Path) -> None:
    """Refuse a zip whose table of contents is too large to read.

    Raises:
        UserError: it is.
    """
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(0, size - 66_000))
        tail = opened.read()
    at = tail.find(b"PK\5\6")
    while at >= 0:
        if int.from_bytes(tail[at + 12 : at + 16], "little") > DIRECTORY_BYTES or b"PK\6\7" in tail:
            raise UserError(f"{file.name} holds too many files; pack only the photos")
        at = tail.find(b"PK\5\6", at + 1)


def _check_member(label: PurePosixPath, member: zipfile.ZipInfo, zip_name: str) -> None:
    """Refuse members that do not belong in a zip of photos.

    Raises:
        UserError: a path out of the zip, a link, an encrypted file, or another kind of file.
    """
    shown = f"'{str(label)[:60]}' in {zip_name}"
    if label.is_absolute() or ".." in label.parts or ":" in label.parts[0]:
        raise UserError(f"{shown} leads out of the zip")
    if (member.external_attr >> 16) & 0o170000 == 0o120000:
        raise UserError(f"{shown} is a link")
    if member.flag_bits & 1:
        raise UserError(f"{shown} is locked with a password")
    if label.suffix.lower() not in SUFFIXES | {".txt"}:
        raise UserError(f"{shown} is neither a photo nor a caption")


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, before: int) -> int:
    """Unpack one member and return its size, counted from the output and not from the zip's header.

    Raises:
        UserError: too large, or damaged.
    """
    name = PurePosixPath(member.filename).name
    try:
        with archive.open(member) as source, path.open("wb") as out:
            while piece := source.read(1 << 20):
                if out.tell() + len(piece) > FILE_BYTES:
                    raise UserError(f"{name} unpacks to more than {FILE_BYTES // 1_000_000} MB")
                if before + out.tell() + len(piece) > UNPACKED_BYTES:
                    raise UserError(f"{name} is too much: the upload unpacks to over {UNPACKED_BYTES // 1_000_000} MB")
                out.write(piece)
            return out.tell()
    except UserError:
        path.unlink()
        raise
    except Exception as error:  # damaged, or an unsupported compression
        path.unlink(missing_ok=True)
        raise UserError(f"{name} cannot be unpacked ({reason(error)})") from error


def copy_into(folder: Path, photos: Iterable[Upload], first: int = 1) -> list[str]:
    """Copy photos as ``001.jpg``, ``002.png``, … with their captions beside them; returns the names."""
    names = []
    for number, photo in enumerate(photos, first):
        file = folder / f"{number:03}{photo.path.suffix.lower()}"
        shutil.copyfile(photo.path, file)
        if photo.caption:
            file.with_suffix(".txt").write_text(photo.caption + "\n", encoding="utf-8")
        names.append(file.name)
    return names
