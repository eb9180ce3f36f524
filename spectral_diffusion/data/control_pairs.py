"""Pictures paired with sketches or keyposes for training a T2I-Adapter, and crops of both alike."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from ..config.control import ControlConfig
from ..core.errors import UserError
from ..core.hooks import Event, Hooks
from ..core.rng import keyed_generator
from ..models.vae import encode
from .folder import load_concept, open_photo
from .samples import random_crop
from .sidecars import Files, find_control_image

CHANNELS = {"sketch": 1, "keypose": 3}

Read = Callable[[Path], Image.Image]


@dataclass(frozen=True)
class ControlPair:
    """A picture, its condition and its caption."""

    picture: Path
    condition: Path
    caption: str


def read_pairs(config: ControlConfig, hooks: Hooks) -> list[ControlPair]:
    """The folder's pictures that have a condition, with their captions.

    Pictures and captions are laid out as for a concept (:func:`..data.folder.load_concept`). A picture's condition has
    its name in ``sketch/`` or ``keypose/`` or else ``conditions/``, or is beside it as ``<name>.sketch.png`` or
    ``<name>_sketch.png``, which ``extract sketch`` writes.

    Raises:
        UserError: no picture has one, or one shows another frame than its picture.
    """
    folder, kind = config.folder, config.kind
    concept = load_concept(folder, name="it")
    files = Files()
    pairs, skipped, bare, wordless = [], list(concept.skipped), 0, 0
    for photo in concept.photos:
        condition = find_control_image(photo.path, folder, kind, files)
        if condition is None:
            bare += 1
            continue
        try:
            frames = [open_photo(path).size for path in (photo.path, condition)]
        except UserError as error:
            skipped.append(str(error))
            continue
        check_frames(photo.path, condition, *frames)
        wordless += photo.caption is None
        caption = photo.caption or config.template
        pairs.append(
            ControlPair(photo.path, condition, caption.replace("<TOK>", concept.noun).replace("{}", concept.noun))
        )
    if not pairs:
        raise UserError(
            f"{folder} holds no picture with a {kind}; put {kind} images of the pictures' names into {folder / kind}."
        )
    if bare:
        skipped.append(f"{bare} without a {kind}")
    if skipped:
        hooks.notify(f"Skipped in {folder}: {'; '.join(skipped)}.")
    for text in concept.notes:
        hooks.notify(text)
    if wordless:
        hooks.notify(
            f"Without a caption: {wordless} pictures, read as '{config.template}'; another template can be given."
        )
    return pairs


def check_frames(
    picture: Path, condition: Path, picture_size: tuple[int, int], condition_size: tuple[int, int]
) -> None:
    """Say that a condition's sides (width, height) are not in its picture's proportions, up to a pixel.

    Raises:
        UserError: they are not.
    """
    scale = picture_size[0] / condition_size[0]
    if abs(condition_size[1] * scale - picture_size[1]) > max(1.0, scale):
        sides = ["×".join(map(str, frame)) for frame in (condition_size, picture_size)]
        raise UserError(
            f"{condition} has {sides[0]} pixels, {picture.name} {sides[1]}: a condition shows the same frame as its "
            "picture; save it in the same proportions."
        )


def open_control_image(path: Path, kind: str) -> Image.Image:
    """A condition as RGB; a sketch in gray, white strokes on black whichever way round it came."""
    image = open_photo(path)
    if kind != "sketch":
        return image
    gray = image.convert("L")
    dark = sum(value * count for value, count in enumerate(gray.histogram())) <= 127 * gray.width * gray.height
    return (gray if dark else gray.point(lambda value: 255 - value)).convert("RGB")


@torch.no_grad()
def encode_pairs(
    pairs: Sequence[ControlPair],
    vae: AutoencoderKL,
    config: ControlConfig,
    size: int,
    hooks: Hooks,
    read: Read | None = None,
) -> tuple[Tensor, Tensor]:
    """All views of all pairs; a view cuts picture and condition alike.

    Returns:
        Latents (pairs, views, channels, h, w) float32 on the VAE's device; conditions (pairs, views, 1 or 3, size,
        size) uint8 on the CPU.
    """
    rows, shown = [], []
    for index, pair in enumerate(pairs):
        picture = open_photo(pair.picture)
        condition = (read(pair.condition) if read else open_control_image(pair.condition, config.kind)).convert("RGB")
        if condition.size != picture.size:
            condition = condition.resize(picture.size, Image.Resampling.LANCZOS)
        views = []
        for view in range(config.crops_per_image * (1 + config.flip)):
            both = torch.stack(
                [
                    random_crop(image, size, config.resize_ratio, keyed_generator(config.seed, "crop", index, view))
                    for image in (picture, condition)
                ]
            )
            mirrored = config.flip and view % 2 and not re.search(r"\b(left|right)\b", pair.caption.lower())
            views.append(both.flip(-1) if mirrored else both)
        pictures, conditions = torch.stack(views, 1)
        rows.append(encode(vae, pictures))
        shown.append(((conditions + 1) * 127.5).round().to(torch.uint8)[:, : CHANNELS[config.kind]])
        hooks.progress(Event("encode", index + 1, len(pairs)))
    return torch.stack(rows) * vae.config.scaling_factor, torch.stack(shown)


def pairs_digest(pairs: Sequence[ControlPair]) -> str:
    """Which pictures, conditions and captions a run sees."""
    hashed = hashlib.sha256()
    for pair in pairs:
        for part in (pair.picture.read_bytes(), pair.condition.read_bytes(), pair.caption.encode()):
            hashed.update(hashlib.sha256(part).digest())
    return hashed.hexdigest()[:32]
