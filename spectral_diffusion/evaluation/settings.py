"""The settings of ``evaluate``, shared by YAML and command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat

from ..config.settings import Precision, Settings, Templates
from ..metrics.prompts import ORDINARY, PLACES


class EvaluateConfig(Settings):
    """What is measured, against which photos, and how its pictures are drawn."""

    adapters: list[Path] = Field(default_factory=list)  # adapter files, or one fused folder
    output: Path = Path("evaluation")
    references: Path | None = None  # photos of one concept, or a folder of them each; default: the training photos
    others: bool = False  # further concepts in the references' folder are candidates for a mistake too
    pictures: Path | None = None  # a folder of pictures made here, to measure as they are
    scenes: list[Path] = Field(default_factory=list)  # scene files; what is in their regions is measured
    base: str | None = None  # default: the base the adapters name
    encoders: list[str] = Field(default_factory=list)  # pocket, CLIP or DINOv2 models; default: what suits the base
    scales: dict[str, FiniteFloat] = Field(
        default_factory=dict
    )  # of the sum: concept name to λ; NAME.unet for one component
    prompts: Templates = Field([f"a photo of {{}} {place}" for place in PLACES])
    prior_prompts: list[str] = Field([f"a photo of {words}" for words in ORDINARY], min_length=1)  # name no concept
    noun_baseline: bool = True  # also draw each class noun on the untouched base
    seed: int = Field(0, ge=0, lt=2**30)
    num_images: int = Field(4, ge=1, le=256)  # pictures per prompt
    num_inference_steps: int = Field(20, ge=1, le=1000)
    guidance_scale: float = Field(4.0, ge=0, le=50)
    sampler: Literal["dpm", "ddim", "euler"] = "dpm"
    negative_prompt: str = ""
    batch_size: int = Field(8, ge=1, le=256)
    allow_base: bool = False
    device: str = "auto"
    dtype: str = "float32"
    mixed_precision: Precision = "auto"  # of the pictures; auto is what this machine does quickly
    allow_tf32: bool = False  # on CUDA, round the factors of float32 products to TensorFloat-32

    def seeds(self, index: int) -> list[int]:
        """The seeds of the prompt with that number: other ones for every prompt, the same in every way of drawing."""
        return [self.seed + index + 1000 * picture for picture in range(self.num_images)]
