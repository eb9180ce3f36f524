"""Encoders of pictures to unit vectors: the pocket base's own, CLIP, DINOv2. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import pocket
from ..core.errors import UserError, only_a_pickle, reason
from ..core.machine import parse_device
from .identity import embed, load_identity_encoder
from .style import load_style_encoder

BATCH = 16  # pictures at once, for the encoders of photographs
PHOTOGRAPHS = ("openai/clip-vit-base-patch32", "facebook/dinov2-base")  # used if installed and none is named


class Encoder(Protocol):
    """What pictures are compared by.

    Attributes:
        name: how a table calls it.
        kind: ``image``, or ``image and text`` where it has ``embed_text`` too (see :class:`Clip`).
    """

    name: str
    kind: Literal["image", "image and text"]

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d), float32 on the CPU, of pictures of any size."""
        ...


POCKET: dict[str, tuple[str, Callable[[Path], nn.Module]]] = {  # name to folder and loader
    "pocket": ("identity", load_identity_encoder),
    "pocket-any-style": ("styled_identity", load_identity_encoder),
    "pocket-style": ("style", load_style_encoder),
}


class Pocket:
    """An encoder that comes with the pocket base and knows pocket pictures only.

    ``pocket`` tells things apart, ``pocket-any-style`` things whatever the style of the picture, ``pocket-style``
    styles whatever they show.
    """

    kind: Literal["image", "image and text"] = "image"

    def __init__(self, device: torch.device | str = "cpu", name: str = "pocket") -> None:
        self.name = name
        folder, load = POCKET[name]
        self.model = load(pocket.path() / folder / "model.safetensors").to(device)

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, 128)."""
        return embed(self.model, images)


class Dino:
    """A DINOv2 model: the class token of its last layer."""

    kind: Literal["image", "image and text"] = "image"

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name, self.model, self.processor = name, model, processor

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, width)."""
        features = [self._features(pixels.to(self.model.device)) for pixels in _batches(self.processor, images)]
        return F.normalize(torch.cat(features), dim=1).cpu()

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model(pixel_values=pixels).last_hidden_state[:, 0].float()
        return features


class Clip(Dino):
    """A CLIP model: pictures and texts in one space, for CLIP-I and CLIP-T."""

    kind: Literal["image", "image and text"] = "image and text"

    def __init__(self, name: str, model: Any, processor: Any, tokenizer: Any) -> None:
        super().__init__(name, model, processor)
        self.tokenizer = tokenizer

    def _features(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (n, width); what is longer than the model reads is cut."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        return F.normalize(_pooled(self.model.get_text_features(**tokens)), dim=1).cpu()


def _batches(processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
    rgb = [image.convert("RGB") for image in images]
    parts = [rgb[start : start + BATCH] for start in range(0, len(rgb), BATCH)]
    return [processor(images=part, return_tensors="pt")["pixel_values"] for part in parts]


def _pooled(output: Any) -> Tensor:
    """Projected features, which newer transformers put into an output object."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features.float()


def load_encoder(name: str, device: str = "cpu") -> Encoder:
    """One that comes with the pocket base, or the folder or hub id of a CLIP or DINOv2 model that is on this machine.

    Args:
        device: where it computes, ``auto`` being the fastest.

    Raises:
        UserError: no such model here, or one of another kind.
    """
    where = parse_device(device)
    if name in POCKET:
        return Pocket(where, name)
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    from ..models.loading import quiet_loading

    here = {"local_files_only": True}
    try:
        with quiet_loading():
            kind = AutoConfig.from_pretrained(name, **here).model_type
            if kind not in {"clip", "dinov2"}:
                raise UserError(f"The encoder '{name}' is a {kind} model; use pocket, a CLIP or a DINOv2 model.")
            model = AutoModel.from_pretrained(name, use_safetensors=True, **here).eval().requires_grad_(False).to(where)
            processor = AutoImageProcessor.from_pretrained(name, **here)
            if kind == "dinov2":
                return Dino(name, model, processor)
            return Clip(name, model, processor, AutoTokenizer.from_pretrained(name, **here))
    except UserError:
        raise
    except Exception as error:  # the loaders raise nearly everything
        if pickled := only_a_pickle(name, error):
            raise UserError(f"The encoder {pickled}") from error
        if Path(name).exists():
            raise UserError(f"{name} is no folder of a CLIP or DINOv2 model ({reason(error, 90)}).") from error
        raise UserError(
            f"The encoder '{name}' is not on this machine; use pocket, the folder of a CLIP or DINOv2 model, or the "
            "hub id of one that was downloaded before."
        ) from error


def encoders_here(device: str = "cpu") -> list[Encoder]:
    """The default encoders of photographs that are installed on this machine."""
    encoders = []
    parse_device(device)  # not one of the errors that mean that an encoder is not here
    for name in PHOTOGRAPHS:
        try:
            encoders.append(load_encoder(name, device))
        except UserError:
            continue
    return encoders
