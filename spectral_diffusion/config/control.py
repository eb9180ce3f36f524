"""The settings of ``train-control``: a T2I-Adapter from pictures with sketches or keyposes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from .settings import Precision, Settings


class ControlConfig(Settings):
    """Train a T2I-Adapter (Mou et al. 2023) for a base from pictures with control images."""

    folder: Path = Field(description="Folder of pictures with a control image each.")
    output: Path = Field(description="Diffusers T2IAdapter folder to write.")
    base: str = Field("pocket", description="pocket, a diffusers folder, a hub id or a .safetensors checkpoint.")
    kind: Literal["sketch", "keypose"] = Field("sketch", description="Kind of control image.")
    steps: int = Field(5000, ge=1, le=10_000_000, description="Training steps.")
    batch_size: int = Field(8, ge=1, le=1024, description="Pictures per step.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything random.")
    learning_rate: float = Field(1e-4, ge=0, description="Learning rate.")
    lr_scheduler: Literal["linear", "constant"] = Field("linear", description="Learning rate schedule.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Clip the gradient to this norm.")
    resolution: int | None = Field(None, ge=8, le=4096, description="Short edge in pixels. Default: the base's size.")
    resize_ratio: float = Field(1.0, ge=1.0, le=2.0, description="Short edge before the crop, over the resolution.")
    crops_per_image: int = Field(1, ge=1, le=256, description="Random crops per picture, encoded once.")
    flip: bool = Field(False, description="Mirror half of the crops; a caption with left or right is never mirrored.")
    template: str = Field("", description="Caption of pictures without one; {} is concept.yaml's noun.")
    caption_dropout: float = Field(
        0.3, ge=0, le=1, description="Share of empty captions, so that the control image has to say it."
    )
    timestep_power: float = Field(
        0.33, gt=0, le=4, description="Sample t = T u^power; 1/3 has the mean of the paper's cubic sampling."
    )
    checkpointing_steps: int = Field(500, ge=1, description="Save the training state every this many steps.")
    device: str = Field("auto", description="auto, cpu, cuda, mps …")
    dtype: str = Field("float32", description="Precision of the frozen base; the T2I-Adapter stays float32.")
    mixed_precision: Precision = Field("auto", description="Autocast: auto takes what this machine does fastest.")
    allow_tf32: bool = Field(False, description="On CUDA, round the factors of float32 products to TensorFloat-32.")

    @field_validator("flip")
    @classmethod
    def _sides(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("kind") == "keypose":
            raise ValueError("mirroring a keypose swaps the colors of its left and right limbs")
        return value
