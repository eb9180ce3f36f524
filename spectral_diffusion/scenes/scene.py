"""A scene: everything that decides one multi-object picture; the same in YAML, command line, API and PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, FiniteFloat, field_validator, model_validator
from torch import Tensor

from ..config.settings import Precision, Settings, read_yaml
from ..core.errors import UserError
from ..core.files import is_there
from ..data.image_io import on_ground, open_upright

Kind = Literal["sketch", "keypose"]
Box = tuple[float, float, float, float]
Component = Literal["unet", "text_encoder", "text_encoder_2"]
Strength = FiniteFloat | dict[Component, FiniteFloat]  # λ, or one per component; 1 for a component left out
MOST_FRACTION = 2  # the largest side of a box that is meant as a fraction, if too large a one


class Region(Settings):
    """A part of the picture with a prompt of its own, and perhaps adapters that act only there."""

    box: Box | None = Field(
        None, description="Left, top, right, bottom: fractions of the picture, or pixels if any is above 2."
    )
    mask: Path | None = Field(None, description="Instead of a box: an image that is white where the region is.")
    prompt: str = Field(description="Prompt of the region.")
    negative_prompt: str | None = Field(None, description="Negative prompt. Default: the scene's.")
    adapters: dict[str, Strength] = Field(
        default_factory=dict, description="Adapter file to scale; they act only in this region."
    )
    conditioning_scale: FiniteFloat | dict[Kind, FiniteFloat] = Field(
        1.0, description="Factor of the control images in this region; may be one per kind."
    )

    @field_validator("box")
    @classmethod
    def _some_area(cls, value: Box | None) -> Box | None:
        if value is not None:
            left, top, right, bottom = value
            if not (0 <= left < right and 0 <= top < bottom):
                raise ValueError("a box is left, top, right, bottom with 0 <= left < right and 0 <= top < bottom")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> Region:
        if (self.box is None) == (self.mask is None):
            raise ValueError(f"the region '{self.prompt[:40]}' needs a box or a mask, one of the two")
        return self

    def fractions(self, width: int, height: int) -> Box:
        """The box as fractions of a picture of that size.

        Raises:
            UserError: it reaches outside.
        """
        assert self.box is not None
        left, top, right, bottom = self.box
        pixels = max(self.box) > MOST_FRACTION
        if pixels:
            left, top, right, bottom = left / width, top / height, right / width, bottom / height
        if max(right, bottom) > 1:
            mend = "give pixels inside it, or fractions up to 1" if pixels else "fractions go up to 1"
            raise UserError(
                f"The box {box_text(self.box)} of '{self.prompt}' reaches outside the picture of {width}×{height}; "
                f"{mend}."
            )
        return left, top, right, bottom

    def weight_of(self, kind: str) -> float:
        """What a condition's weight is multiplied by in here."""
        weight = self.conditioning_scale
        return weight.get(kind, 1.0) if isinstance(weight, dict) else weight  # type: ignore[call-overload]


class ControlImage(Settings):
    """A drawing that the picture is held to, through a T2I-Adapter."""

    file: Path = Field(description="The control image; for keypose also keypoints as JSON.")
    kind: Kind = Field("sketch", description="Kind of control image.")
    conditioning_scale: float = Field(1.0, ge=0, le=4, description="Weight of the control image.")
    adapter: str | None = Field(
        None, description="Folder or hub id of a T2I-Adapter. Default: the base's own of that kind."
    )


class Scene(Settings):
    """Pictures of one scene: prompts, regions, conditions, adapters or a fused folder, sampler, seeds."""

    prompt: str = Field("", description="Prompt of the whole picture; tokens such as <rex> name concepts.")
    negative_prompt: str = Field("", description="What guidance moves away from.")
    output: Path = Field(Path("out.png"), description="Picture to write; several go to <output>-<seed>.png.")
    base: str = Field(
        "pocket", description="pocket, a fused or diffusers folder, a hub id or a .safetensors checkpoint."
    )
    adapters: dict[str, Strength] = Field(
        default_factory=dict, description="Adapter file to scale; they act everywhere."
    )
    regions: list[Region] = Field(
        default_factory=list, description="Parts of the picture with prompts, and adapters, of their own."
    )
    global_prompt_weight: float = Field(0.0, ge=0, le=1, description="Share of the scene's prompt inside the regions.")
    region_isolation: float = Field(
        0.0, ge=0, le=1, description="How far a region's self-attention keeps to itself; 1 sees nothing of the rest."
    )
    region_start: float = Field(0.0, ge=0, le=1, description="Share of the steps from which regions act.")
    region_end: float = Field(1.0, ge=0, le=1, description="Share of the steps up to which regions act.")
    controls: list[ControlImage] = Field(default_factory=list, description="Sketches and keyposes.")
    width: int | None = Field(None, ge=8, le=8192, description="Pixels, divisible by 8. Default: the base's own.")
    height: int | None = Field(None, ge=8, le=8192, description="Pixels, divisible by 8. Default: the base's own.")
    num_inference_steps: int = Field(20, ge=1, le=999, description="Denoising steps.")
    guidance_scale: float = Field(4.0, ge=0, le=50, description="Classifier-free guidance scale.")
    sampler: Literal["dpm", "ddim", "euler"] = Field("dpm", description="DPM-Solver++, DDIM or Euler.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the first picture.")
    num_images: int = Field(1, ge=1, le=4096, description="Number of pictures, with the seeds seed, seed + 1, …")
    seeds: list[int] = Field(default_factory=list, description="Seeds, instead of seed and num_images.")
    only_seed: int | None = Field(None, description="Of these seeds, write only this one's picture.")
    batch_size: int = Field(8, ge=1, le=256, description="Pictures denoised together.")
    allow_base: bool = Field(False, description="Accept adapters of a related base.")
    device: str = Field("auto", description="auto, cpu, cuda, mps …")
    dtype: str = Field("float32", description="Precision of the networks.")
    mixed_precision: Precision = Field("auto", description="Autocast: auto takes what this machine does fastest.")
    allow_tf32: bool = Field(False, description="On CUDA, round the factors of float32 products to TensorFloat-32.")

    @field_validator("width", "height")
    @classmethod
    def _divisible(cls, value: int | None) -> int | None:
        if value is not None and value % 8:
            raise ValueError("must be divisible by 8")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or not all(0 <= seed < 2**31 for seed in value):
            raise ValueError("seeds are whole numbers from 0, each once")
        return value

    @model_validator(mode="after")
    def _window(self) -> Scene:
        if self.region_start >= self.region_end:
            raise ValueError("region_start must be below region_end")
        if not self.seeds and self.seed + self.num_images > 2**31:
            raise ValueError("seed + num_images must not be above 2147483648")
        return self

    def every_seed(self) -> list[int]:
        """The seeds of the pictures in their order."""
        return self.seeds or [self.seed + index for index in range(self.num_images)]


def box_text(box: Box) -> str:
    """A box for a person's eyes."""
    return "[" + ", ".join(f"{side:g}" for side in box) + "]"


def region_mask(region: Region, width: int, height: int) -> Tensor | Box:
    """A region's box as fractions, or its mask (h, w) in 0…1 of a picture's pixels.

    Raises:
        UserError: a box outside the picture, a mask that is not readable or empty.
    """
    if region.mask is None:
        return region.fractions(width, height)
    image = open_on_black(region.mask).convert("L").resize((width, height), Image.Resampling.NEAREST)
    mask = torch.from_numpy(np.asarray(image, np.float32) / 255)
    if not bool((mask > 0.5).any()):
        raise UserError(f"The mask {region.mask} is empty: paint white where '{region.prompt}' goes.")
    return mask


def open_on_black(path: Path) -> Image.Image:
    """A picture as RGB, upright; what is transparent is black, as in keyposes and masks.

    Raises:
        UserError: not a readable image.
    """
    return on_ground(open_upright(path), "black")


def read_scene(path: Path) -> dict[str, Any]:
    """A scene file's settings, its files looked for beside it first.

    Raises:
        UserError: no such file, or not YAML.
    """

    def found(name: str) -> str:
        return str(next((place for place in places_of(name, path.parent) if is_there(place)), name))

    return paths_in(read_yaml(path), found)


def places_of(name: str, folder: Path) -> Iterator[Path | str]:
    """Where the path in a file in ``folder`` may lead: beside that file, from here, or from a folder above it.

    Such a file is often written below the folder that its paths begin in.
    """
    if not Path(name).is_absolute():
        yield folder / name
    yield name
    if not Path(name).is_absolute():
        yield from (parent / name for parent in folder.resolve().parents)


def paths_in(settings: dict[str, Any], changed: Callable[[str], str]) -> dict[str, Any]:
    """A scene's settings with ``changed`` of every file and folder that they name; what is odd stays as it is."""

    def one(name: Any) -> Any:
        return changed(name) if isinstance(name, str) and name != "pocket" else name

    def keys(adapters: Any) -> Any:
        return {one(name): value for name, value in adapters.items()} if isinstance(adapters, dict) else adapters

    def part(item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        files = {key: one(item[key]) for key in ("file", "mask", "adapter") if key in item}
        return {**item, **files, **({"adapters": keys(item["adapters"])} if "adapters" in item else {})}

    out = part(settings)
    if "base" in out:
        out["base"] = one(out["base"])
    lists = {key: out[key] for key in ("controls", "regions") if isinstance(out.get(key), list)}
    return {**out, **{key: [part(item) for item in items] for key, items in lists.items()}}


def adapters_held(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The adapters of a scene's settings with their strengths, first those that act everywhere; what is odd is none."""
    regions = settings.get("regions")
    parts = [settings, *(regions if isinstance(regions, list) else [])]
    held = [part.get("adapters") for part in parts if isinstance(part, dict)]
    return [adapters for adapters in held if isinstance(adapters, dict)]


def adapter_files(scene: Scene) -> list[str]:
    """Every adapter file that a scene or a region of it names, once."""
    return list(dict.fromkeys([*scene.adapters, *(name for region in scene.regions for name in region.adapters)]))
