"""Regions that are found while a picture is made: where it attends to each concept's token, only that concept acts.

A few coarse steps show where the picture looks for each token (after FreeFuse, arXiv 2510.23515), with the concepts'
words and nothing else of them: adapters that act everywhere would mix what they draw. The maps become disjoint masks.
Then the picture is made from the same noise, every adapter in its own mask and at its own text (after TARA,
arXiv 2508.08812). Nothing is trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.apply import Strength
from ..config.scene import Scene
from ..config.train import is_style_noun
from ..core.errors import Fix, UserError
from ..core.files import is_folder
from ..merging.manifest import read_manifest
from ..models.attention_maps import AttentionMaps, shape_of
from ..models.base import Base
from ..models.tokens import ids_of

STEPS, WATCHED = 4, 2  # of the coarse picture, and the last of them whose attention counts
SMOOTHING = 2.0  # cells of the latents
TOKEN_SMOOTHING = 1.0  # tokens of a transformer, which are two cells wide
SHARE = (0.6, 1.4)  # of the picture that a concept has at least and at most, times an equal share
ROUNDS = 400  # of weighing the maps

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class AutoConcept:
    """A concept that a prompt names, with the adapters that act in its region."""

    token: str
    bound: Sequence[tuple[Adapter, Strength]] = ()


def concepts_named(base: Base, scene: Scene, adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Tokens of the concepts for which regions are found, by adapter file, or by themselves for concepts of the base.

    It is empty where the scene has regions, or where fewer than two of its adapters are named in the prompt. A style
    has no place of its own and acts everywhere; so does an adapter of several concepts that are all named.

    Raises:
        UserError: ``auto_regions`` is asked for and does not work on this scene.
    """
    wanted, prompt = scene.auto_regions, scene.prompt.lower()
    reference = bool(scene.controls) and base.family.controls == "reference"
    if wanted is False or (not wanted and (scene.regions or reference)):
        return {}
    without = Fix("auto_regions", "false")
    if layerwise := next((adapter for adapter in adapters.values() if adapter.per_layer_vectors), None):
        if wanted:
            raise UserError(f"'{layerwise.name}' has layer-wise vectors, beside which no regions are found.", without)
        return {}  # its words make every encoding longer
    named: dict[str, str] = {}
    for path, adapter in adapters.items():
        own = [token for token in adapter.tokens if token.lower() in prompt]
        is_one_thing = len(own) == 1 and not adapter.is_style
        if is_one_thing and (wanted or is_bindable(base, adapter)):
            named[path] = own[0]
    if wanted and len(named) < 2:  # else a picture that records what was found by default would be made otherwise again
        placeless = {*named.values(), *styles_of(base)}
        others = [token for token in base.known_tokens if token.lower() in prompt and token not in placeless]
        named |= {token: token for token in others}
    if len(named) >= 2 and not (scene.regions or reference):
        return named
    if not wanted:
        return {}
    if scene.regions:
        raise UserError("The scene has regions, so none have to be found.", without, Fix("regions", so="left empty"))
    if reference:
        raise UserError(
            f"{base.family.title} reads a control image as a reference picture, beside which no regions are found.",
            without,
            Fix("controls", so="left empty"),
        )
    raise UserError("Regions are found for two concepts or more, each named in the prompt by its token.", without)


def styles_of(base: Base) -> list[str]:
    """The tokens of the styles that a fused folder holds."""
    manifest = read_manifest(Path(base.name)) if is_folder(base.name) else None
    concepts = manifest["concepts"].values() if manifest else ()
    return [str(concept["token"]) for concept in concepts if is_style_noun(str(concept["noun"]))]


def is_bindable(base: Base, adapter: Adapter) -> bool:
    """Whether a region can keep all layers of an adapter to itself; a transformer's outside its blocks it cannot."""
    if base.family.attention == "cross":
        return True
    try:
        for layer in adapter.layers:
            base.denoiser.token_kind(layer)
    except UserError:
        return False
    return True


def own_prompt(prompt: str, token: str, others: Sequence[str]) -> str:
    """A prompt that names one concept of several: the others' tokens are left out of it."""
    for other in others:
        if other.lower() != token.lower():
            prompt = re.sub(rf"{re.escape(other)}(_\d+)?", " ", prompt, flags=re.IGNORECASE)  # and its further vectors
    return re.sub(r"\s+([,.;:])", r"\1", re.sub(r"\s+", " ", prompt)).strip(" ,;")


def columns_of(base: Base, prompts: Sequence[str], token: str) -> Tensor:
    """(n, length) bool: where a token's vectors are in encoded prompts, as the first text encoder counts them.

    Raises:
        UserError: a prompt has none, or it is cut off behind what the encoder reads.
    """
    tokenizer = next(iter(base.tokenizers.values()))
    wanted = torch.tensor(ids_of(tokenizer, [token]))
    written = [base.spell(prompt, full=True) for prompt in prompts]
    length = tokenizer.model_max_length
    ids = tokenizer(written, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    columns = torch.isin(ids, wanted)
    for prompt, found in zip(prompts, columns, strict=True):
        if not found.any():
            raise UserError(
                f"The text encoder reads no {token} in '{prompt[:60]}', so it has no place; name it early.",
                Fix("auto_regions", "false"),
            )
    return columns


def coarse_steps(base: Base, scene: Scene) -> int:
    """The steps of the coarse picture: on transformers, which may have only four for a picture, fewer if need be."""
    return STEPS if base.family.attention == "cross" else max(WATCHED, min(STEPS, scene.num_inference_steps // 4))


def word_columns_of(base: Base, prompt: str, token: str) -> Tensor:
    """(length,) bool: where a concept's words are in a prompt that a transformer reads.

    Raises:
        UserError: the prompt has none, or it is cut off behind what the encoder reads.
    """
    columns = base.denoiser.word_columns(base.spell(prompt), base.spell(token))
    if not columns.any():
        raise UserError(
            f"The text encoder reads no {token} in '{prompt[:60]}', so it has no place; name it early.",
            Fix("auto_regions", "false"),
        )
    return columns


class Enough(Exception):
    """The coarse picture has shown what it was made for."""


class AttentionTotals:
    """How much each place of a picture attends to each concept's token, over layers and steps."""

    def __init__(
        self, columns: Tensor, size: tuple[int, int], steps: int = STEPS, smoothing: float = SMOOTHING
    ) -> None:
        """``columns``: (concepts, n, length) bool; ``size``: height and width of the latents, or in tokens."""
        self.columns, self.size, self.steps, self.smoothing = columns, size, steps, smoothing
        self.total = torch.zeros(columns.shape[1], columns.shape[0], *size)

    def add(self, seen: Tensor, grid: tuple[int, int]) -> None:
        """Take a layer's attention (n or 2n, places, length); of a guided batch the second half is the prompts'."""
        count = self.columns.shape[1]
        attended = torch.einsum("npl,knl->nkp", seen[-count:].float().cpu(), self.columns.float())
        maps = attended.unflatten(2, grid)
        maps = maps / maps.mean((2, 3), keepdim=True).clamp_min(1e-12)
        self.total += F.interpolate(maps, self.size, mode="bilinear", align_corners=False)

    def after_step(self, maps: AttentionMaps, step: int) -> None:
        """Take what a step has attended to, if it is one of the last.

        Raises:
            Enough: it was the last one.
        """
        for seen in maps.found.values() if step > self.steps - WATCHED else ():
            self.add(seen, shape_of(seen.shape[1], *self.size))
        maps.begin()
        if step == self.steps:
            raise Enough

    def masks(self) -> Tensor:
        """(n, concepts, h, w) bool, disjoint."""
        return torch.stack([disjoint(maps, self.smoothing) for maps in self.total])


def disjoint(maps: Tensor, smoothing: float = SMOOTHING) -> Tensor:
    """Attention maps (concepts, h, w) as masks that do not overlap.

    Every cell belongs to the concept that it attends to most, beside that concept's mean. A concept whose attention is
    spread out would win all of the background, so the maps are weighed until every concept has its share of the
    picture. Of what a concept has, the connected part with the most attention stays, without holes.
    """
    smooth = np.stack([ndimage.gaussian_filter(one, smoothing) for one in maps.numpy()])
    ratio = np.log(smooth / smooth.mean((1, 2), keepdims=True).clip(1e-12) + 1e-6)
    owner = balanced(ratio)
    masks = np.stack([main_part(owner == index, smooth[index]) for index in range(len(smooth))])
    for mask in masks:
        mask |= ndimage.binary_fill_holes(mask) & ~masks.any(0)
    return torch.from_numpy(masks)


def boxes_of(tokens: Sequence[str], masks: Tensor) -> dict[str, Box]:
    """The smallest box around each concept's mask (concepts, h, w), as fractions; none for an empty one."""
    height, width = masks.shape[1:]
    boxes: dict[str, Box] = {}
    for token, mask in zip(tokens, masks, strict=True):
        if mask.any():
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            left, right = int(columns[0]) / width, (int(columns[-1]) + 1) / width
            top, bottom = int(rows[0]) / height, (int(rows[-1]) + 1) / height
            boxes[token] = (round(left, 4), round(top, 4), round(right, 4), round(bottom, 4))
    return boxes


def balanced(ratio: np.ndarray) -> np.ndarray:
    """The concept (h, w) with the highest value at each cell, after adding to each what brings its share into range."""
    count = len(ratio)
    bias = np.zeros((count, 1, 1))
    for _ in range(ROUNDS):
        owner = (ratio + bias).argmax(0)
        share = np.array([(owner == index).mean() for index in range(count)])
        off = share - share.clip(SHARE[0] / count, SHARE[1] / count)
        if not off.any():
            break
        bias -= 0.3 * off[:, None, None]
    for index in range(count):  # of few cells one concept may get none
        if not (owner == index).any():
            owner[np.unravel_index(ratio[index].argmax(), owner.shape)] = index
    return owner


def main_part(mask: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The connected part of a mask with the most attention."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    return np.asarray(parts == 1 + int(np.argmax(ndimage.sum(attention, parts, range(1, count + 1)))))
