"""The settings of ``fuse``: several adapters into one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat

from .settings import Precision, Settings, Templates
from .train import GENERIC_TEMPLATES


class CalibrationConfig(Settings):
    """Calibration: the activations that merges such as ``gradient`` and ``ssr`` record."""

    prior_weight: float = Field(
        1.0, ge=0, description="Weight of the base's activations on generic prompts, in concepts; 0 leaves them out."
    )
    calibrate_on: Literal["adapter", "previous_stages"] = Field(
        "adapter",
        description="Record with each adapter alone, or stage by stage on what is fused already, as Mix-of-Show does.",
    )
    prompts: Templates = Field(GENERIC_TEMPLATES, description="Prompt templates of the calibration images.")
    num_images: int = Field(8, ge=1, le=10_000, description="Images per concept, and of generic prompts.")
    num_inference_steps: int = Field(10, ge=1, le=1000, description="Denoising steps of each image.")
    guidance_scale: float = Field(4.0, ge=0, le=50, description="Guidance scale of each image.")
    tokens_per_call: int = Field(
        256,
        ge=1,
        le=1_000_000,
        description="Inputs sampled from each call of a layer, that is from each denoising step.",
    )
    cache: bool = Field(True, description="Keep the recorded activations in the cache, per adapter.")


class DistillConfig(Settings):
    """Distillation after a merge: the fused model learns what each adapter, and the base, predict alone."""

    steps: int = Field(0, ge=0, le=1_000_000, description="Distillation steps; 0 turns it off.")
    rank: int = Field(
        0, ge=0, le=4096, description="Rank of the correction that every layer learns; 0 trains whole weights."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate; it falls linearly to 0.")
    token_learning_rate: float = Field(
        1e-3, ge=0, description="Learning rate of the concepts' token embeddings; 0 freezes them."
    )
    batch_size: int = Field(16, ge=2, le=1024, description="Predictions per batch.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=1024, description="Batches per step.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    prior_share: float = Field(0.75, gt=0, lt=1, description="Share of predictions on prior images.")
    num_images: int = Field(24, ge=1, le=10_000, description="Images that each adapter generates of its concept.")
    num_prior_images: int = Field(
        96, ge=1, le=10_000, description="Images that the base generates of generic subjects."
    )
    resolution: int | None = Field(
        None, ge=8, le=4096, description="Side of the images in pixels. Default: the base's size."
    )
    noises_per_image: int = Field(12, ge=1, le=1000, description="Pairs of noise and timestep per image.")
    empty_prompt_prob: float = Field(0.15, ge=0, le=1, description="Share of prior predictions with the empty prompt.")
    guidance_scale: float = Field(4.0, ge=0, le=50, description="Guidance scale of the images.")
    target_modules: str | None = Field(
        None, description="Layers to train besides those that the adapters change, named as in training."
    )
    prior_subjects: list[str] = Field(
        [], description='Generic subjects such as "a red dog". Default: common nouns in common colors.'
    )
    cache: bool = Field(False, description="Keep the teachers' images and predictions in the cache, per adapter.")


class MergeConfig(Settings):
    """How adapters are merged, and what happens after."""

    merge: str = Field("spectral", description="How to merge; `merges` lists them.")
    options: dict[str, Any] = Field({}, description="Settings of the merge itself, such as options.density=0.3.")
    scales: dict[str, FiniteFloat] = Field(
        {}, description="Concept name to λ; NAME.unet and NAME.text_encoder set one component."
    )
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="What merges with activations record.")
    distill: DistillConfig = Field(DistillConfig(), description="Distillation after the merge.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything random.")
    allow_base: bool = Field(False, description="Accept adapters of a related base.")
    device: str = Field("auto", description="auto, cpu, cuda, mps …")
    mixed_precision: Precision = Field("auto", description="Autocast in distillation: auto takes what is fastest.")
    allow_tf32: bool = Field(False, description="On CUDA, round the factors of float32 products to TensorFloat-32.")


class FuseConfig(MergeConfig):
    """Fuse several adapters into one model and write it."""

    adapters: list[Path] = Field(min_length=1, description="Adapter files or fused folders.")
    output: Path = Field(description="Folder to write.")
    dtype: str = Field("float32", description="Precision of the fused weights: float32, bfloat16 or float16.")
    base: str | None = Field(None, description="Base to fuse into. Default: the base that the adapters name.")
