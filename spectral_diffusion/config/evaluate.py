"""The settings of ``evaluate``, shared by YAML and command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat

from .settings import Precision, Quantization, Settings, Templates

PLACES = {
    "on the grass": "grass",
    "on the beach": "beach",
    "in the snow": "snow",
    "on a table": "table",
    "at night": "night",
    "in the desert": "desert",
}  # words of a prompt to the backdrop that the judges name
GENERIC_SUBJECTS = (
    "a red dog", "a blue teapot", "a green octopus", "a yellow car", "a white cat", "a purple fish",
    "an orange mushroom", "a black robot", "a dog", "a teapot", "a house", "an apple",
)  # fmt: skip


class EvaluateConfig(Settings):
    """Settings of an evaluation: what is measured, against which photos, and how images are generated."""

    adapters: list[Path] = Field(default_factory=list, description="Adapter files, or one fused folder.")
    output: Path = Field(Path("evaluation"), description="Folder of the report.")
    references: Path | None = Field(
        None, description="Photos of one concept, or a folder of them each. Default: the training photos."
    )
    others: bool = Field(False, description="Count further concepts in that folder as candidates for a mix-up.")
    pictures: Path | None = Field(None, description="A folder of pictures made here, measured as they are.")
    scenes: list[Path] = Field(default_factory=list, description="Scene files; what is in their regions is measured.")
    base: str | None = Field(None, description="Default: the base that the adapters name.")
    encoders: list[str] = Field(
        default_factory=list, description="pocket, CLIP or DINOv2 models. Default: what suits the base."
    )
    scales: dict[str, FiniteFloat] = Field(
        default_factory=dict, description="Concept name to λ in the sum; NAME.unet sets one component."
    )
    prompts: Templates = Field([f"a photo of {{}} {backdrop}" for backdrop in PLACES], description="Prompt templates.")
    prior_prompts: list[str] = Field(
        [f"a photo of {subject}" for subject in GENERIC_SUBJECTS],
        min_length=1,
        description="Prompts without any concept, which show drift.",
    )
    noun_baseline: bool = Field(True, description="Also generate each class noun on the untouched base.")
    seed: int = Field(0, ge=0, lt=2**30, description="Seed of everything random.")
    num_images: int = Field(4, ge=1, le=256, description="Pictures per prompt.")
    num_inference_steps: int = Field(20, ge=1, le=1000, description="Denoising steps of each picture.")
    guidance_scale: float = Field(4.0, ge=0, le=50, description="Guidance scale of each picture.")
    sampler: Literal["dpm", "ddim", "euler"] = Field("dpm", description="DPM-Solver++, DDIM or Euler.")
    negative_prompt: str = Field("", description="What guidance moves away from.")
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
    allow_tf32: bool = Field(False, description="On CUDA, round the factors of float32 products to TensorFloat-32.")

    def seeds(self, index: int) -> list[int]:
        """The seeds of prompt ``index``: different for every prompt, the same for every generation setting."""
        return [self.seed + index + 1000 * picture for picture in range(self.num_images)]
