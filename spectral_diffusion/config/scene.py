"""The settings of ``generate``: everything that decides the pictures of a scene; the same in YAML, API and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from ..core.errors import UserError
from .settings import Precision, Quantization, Settings

Kind = Literal["sketch", "keypose"]
Box = tuple[float, float, float, float]
Component = Literal["unet", "text_encoder", "text_encoder_2", "transformer"]
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
    def _box_or_mask(self) -> Region:
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
            fix = "give pixels inside it, or fractions up to 1" if pixels else "fractions go up to 1"
            raise UserError(
                f"The box {box_text(self.box)} of '{self.prompt}' reaches outside the picture of {width}×{height}; "
                f"{fix}."
            )
        return left, top, right, bottom

    def weight_of(self, kind: str) -> float:
        """What a condition's weight is multiplied by in here."""
        weight = self.conditioning_scale
        return weight.get(kind, 1.0) if isinstance(weight, dict) else weight  # type: ignore[call-overload]


class ControlImage(Settings):
    """A control image that guides the picture through a T2I-Adapter."""

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
        "pocket",
        description="pocket, pocket-transformer, a fused or diffusers folder, a hub id or a .safetensors checkpoint.",
    )
    adapters: dict[str, Strength] = Field(
        default_factory=dict, description="Adapter file to scale; they act everywhere."
    )
    regions: list[Region] = Field(
        default_factory=list, description="Parts of the picture with prompts, and adapters, of their own."
    )
    auto_regions: bool | None = Field(
        None,
        description="Find each concept's place by attention and let its adapter act there alone. Default: where two or "
        "more adapters are named in the prompt and no region is given.",
    )
    global_prompt_weight: float = Field(0.0, ge=0, le=1, description="Share of the scene's prompt inside the regions.")
    region_isolation: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How far self-attention and group norms inside a region keep to it; 1 sees nothing of the rest.",
    )
    region_start: float = Field(0.0, ge=0, le=1, description="Share of the steps from which regions act.")
    region_end: float = Field(1.0, ge=0, le=1, description="Share of the steps up to which regions act.")
    controls: list[ControlImage] = Field(default_factory=list, description="Sketches and keyposes.")
    width: int | None = Field(None, ge=8, le=8192, description="Pixels, divisible by 8. Default: the base's own.")
    height: int | None = Field(None, ge=8, le=8192, description="Pixels, divisible by 8. Default: the base's own.")
    num_inference_steps: int = Field(20, ge=1, le=999, description="Denoising steps; more take longer and are finer.")
    guidance_scale: float = Field(
        4.0, ge=0, le=50, description="Classifier-free guidance scale: how closely the picture follows the prompt."
    )
    sampler: Literal["dpm", "ddim", "euler"] = Field("dpm", description="DPM-Solver++, DDIM or Euler.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the first picture.")
    num_images: int = Field(1, ge=1, le=4096, description="Number of pictures, with the seeds seed, seed + 1, …")
    seeds: list[int] = Field(default_factory=list, description="Seeds, instead of seed and num_images.")
    only_seed: int | None = Field(None, description="Of these seeds, write only this one's picture.")
    batch_size: int = Field(8, ge=1, le=256, description="Pictures denoised together.")
    allow_base: bool = Field(False, description="Accept adapters of a related base.")
    device: str = Field("auto", description="auto, cpu, cuda, mps …")
    dtype: str = Field("float32", description="Precision of the networks.")
    quantization: Quantization = Field(
        "none", description="Bits of a transformer's frozen weights: none, int8, fp8 (8) or nf4 (4, on a GPU only)."
    )
    layer_offload: bool = Field(
        False, description="Keep a transformer's layers in main memory; each comes to the GPU as it computes. Slower."
    )
    mixed_precision: Precision = Field("auto", description="Autocast: auto takes what this machine does fastest.")
    compile: bool = Field(
        False, description="Compile the denoising network (torch.compile): minutes at first, then quicker steps."
    )
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
