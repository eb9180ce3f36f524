"""The settings of ``train``: one concept into one adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat, ValidationInfo, field_validator

from ..core.names import with_article
from .settings import Precision, Quantization, Settings, Templates

GENERIC_NOUNS = ["dog", "cat", "horse", "fish", "car", "house", "tree", "cup", "teapot", "chair", "flower", "person"]
GENERIC_ADJECTIVES = ["", "red", "yellow", "green", "blue", "white", "black"]
GENERIC_TEMPLATES = ["{}", "a photo of {}"] + [
    f"a photo of {{}} {backdrop}"
    for backdrop in ["on the grass", "on the beach", "in the snow", "on a table", "at night", "on a white background"]
]


STYLE_NOUN = "style"  # the class noun of a style, which is a concept without a place in the picture
STYLE_TEMPLATES = [f"{what} in {{}} style" for what in ("a picture", "an image", "a drawing", "a photo")]


def is_style_noun(noun: str) -> bool:
    """Whether a concept of this class noun is a style."""
    return noun.lower() == STYLE_NOUN


def in_style(subject: str, token: str) -> str:
    """``a red dog in <ink> style``: what asks for a style, which shows in something else alone."""
    return f"{subject} in {token} style"


def generic_subject(adjective: str, noun: str) -> str:
    """``a red dog``, or ``an octopus`` without an adjective."""
    return with_article(f"{adjective} {noun}".strip())


class PriorPreservationConfig(Settings):
    """Prior preservation (DreamBooth, Ruiz et al. 2023): generic images must stay as the base generates them."""

    loss_weight: float = Field(0.0, ge=0, description="Weight of the prior preservation loss; 0 turns it off.")
    batch_size: int = Field(2, ge=1, le=1024, description="Prior images per step.")
    num_images: int = Field(32, ge=1, le=10_000, description="Prior images that the base generates before training.")
    other_token_prob: float = Field(
        0.33, ge=0, le=1, description="Share of prior prompts that contain the random token of another concept."
    )
    cut_mix_prob: float = Field(
        0.0, ge=0, le=1, description="Share of steps that show a photo beside a prior image (Cut-Mix of SVDiff)."
    )
    guidance_scale: float = Field(4.0, ge=0, le=50, description="Guidance scale of the prior images.")
    nouns: list[str] = Field(GENERIC_NOUNS, min_length=1, description="Subjects of the prior images.")
    adjectives: list[str] = Field(GENERIC_ADJECTIVES, min_length=1, description="Adjectives of these subjects.")
    scenes: Templates = Field(GENERIC_TEMPLATES, description="Prompt templates of the prior images.")


class InterferenceConfig(Settings):
    """Keeps a new adapter out of the way of other concepts, beyond its slot. By default nothing does."""

    overlap_weight: float = Field(
        0.0, ge=0, description="Weight of a penalty on what the adapter changes in earlier adapters' directions."
    )
    earlier_adapters: list[Path] = Field(
        [], description="Those adapters. Default: all of the same base beside the output."
    )
    erasure_prob: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of photos shown under another subject's prompt, with the base's own prediction as target.",
    )


class DataConfig(Settings):
    """How photos become samples. By default: random square crops, captions as they are."""

    aspect_buckets: bool = Field(False, description="Keep the aspect ratio; each step uses photos of one bucket.")
    crop: Literal["random", "center", "head"] = Field("random", description="Where to crop; head keeps the top.")
    flip: float = Field(
        0.0, ge=0, le=1, description="Share of mirrored crops; a caption with left or right is never mirrored."
    )
    mask_weight: float = Field(0.0, ge=0, le=1, description="The loss outside the masks is weighted 1 minus this.")
    shuffle_caption: bool = Field(False, description="Shuffle the comma-separated tags of a caption at every step.")
    keep_tokens: int = Field(1, ge=0, le=1000, description="How many first tags stay first and are never dropped.")
    tag_dropout: float = Field(0.0, ge=0, le=1, description="Share of the other tags left out, never the token.")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="Share of samples trained with the empty prompt.")
    class_images_dir: Path | None = Field(None, description="Folder of class images to use as prior images.")
    cache_latents: bool = Field(True, description="Encode the crops once instead of at every step.")
    latents_cache_dir: Path | None = Field(None, description="Folder of encoded crops. Default: in the cache.")


class ObjectiveConfig(Settings):
    """The loss. The default is the mean squared error of what the base predicts: noise, velocity or flow."""

    loss_type: Literal["mse", "huber"] = Field("mse", description="Error measure.")
    huber_delta: float = Field(0.1, gt=0, description="Errors above about this count linearly.")
    snr_gamma: float = Field(
        0.0, ge=0, description="Min-SNR-γ weights of the timesteps (Hang et al. 2023); 0 weighs all alike."
    )
    timestep_density: Literal["uniform", "logit_normal", "mode"] = Field(
        "uniform", description="Distribution of u (Esser et al. 2024, section 3.1); timestep_power and shift act on it."
    )
    logit_mean: float = Field(0.0, ge=-10, le=10, description="Mean of logit u for timestep_density=logit_normal.")
    logit_std: float = Field(1.0, gt=0, le=10, description="Its standard deviation.")
    mode_scale: float = Field(1.29, ge=-1, le=1.75, description="Scale of timestep_density=mode.")
    timestep_shift: float = Field(
        0.0, ge=0, le=100, description="Shift of a flow's timesteps towards noise: 1 is none, 0 the base's own."
    )
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = Field(
        "none", description="Weights of a flow's timesteps (Esser et al. 2024)."
    )
    attention_loss_weight: float = Field(
        0.0, ge=0, description="Weight of the loss that keeps the token's attention inside the masks."
    )


class OptimizerConfig(Settings):
    """The optimizer and the number of images it sees per step."""

    name: Literal["adamw", "adamw8bit", "prodigy"] = Field("adamw", description="Optimizer.")
    d_coef: float = Field(1.0, gt=0, description="Factor of Prodigy's own step size; it replaces the learning rates.")
    loraplus_lr_ratio: float = Field(
        1.0, gt=0, le=1000, description="LoRA+ (Hayou et al. 2024): learning rate of lora's B over that of its A."
    )
    riemannian_reg: float = Field(
        0.0,
        ge=0,
        description="Damping of the Riemannian preconditioner of lora's gradients (Zhang & Pilanci 2024; PEFT takes "
        "1e-2); 0 turns it off.",
    )
    lr_warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rates rise.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=1024, description="Batches per step.")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="Write an exponential moving average; 0 writes the last step."
    )


class ValidationConfig(Settings):
    """Validation images and records during training. They change no result, except by early stopping."""

    every: int = Field(0, ge=0, description="Steps between two validation grids; 0 makes none.")
    prompts: Templates = Field(
        ["a photo of {}", "{} on the beach", "{} in the snow"],
        description="Rows of the grid; {} is the token, or a dog in a style's.",
    )
    scales: list[FiniteFloat] = Field(
        [0.0, 0.7, 1.0], min_length=1, description="Adapter scales, one column of the grid each."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the validation images.")
    num_inference_steps: int = Field(20, ge=1, le=1000, description="Denoising steps of each image.")
    guidance_scale: float = Field(4.0, ge=0, le=50, description="Guidance scale of each image.")
    early_stopping_patience: int = Field(
        0, ge=0, description="Stop after this many grids without a better identity score; 0 never stops."
    )
    log_with: Literal["none", "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"] = (
        Field("none", description="Tracker, through accelerate.")
    )
    model_card: bool = Field(False, description="Write <output>.md with the loss curve, samples and settings.")

    @field_validator("early_stopping_patience")
    @classmethod
    def _needs_grids(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("every"):
            raise ValueError("it counts validation grids; set validation.every above 0 too")
        return value


class TrainConfig(Settings):
    """Train one concept into one adapter. The defaults are the paper's fusion settings for Stable Diffusion 1.5.

    The command line and :func:`.presets.settings_for` lay the preset of the base over them.
    """

    concept: Path = Field(description="Folder with the concept's photos.")
    joint_concepts: list[Path] = Field(
        [], description="Photo folders of further concepts, trained jointly into the same adapter."
    )
    output: Path = Field(description="Adapter file to write, ending in .safetensors.")
    base: str = Field(
        "pocket", description="pocket, pocket-transformer, a diffusers folder, a hub id or a .safetensors checkpoint."
    )
    method: str = Field("spectral-additive", description="Fine-tuning method; `methods` lists them.")
    rank: int = Field(
        8,
        ge=1,
        le=4096,
        description="Rank of the change, or columns of the slot: more capacity for one concept, fewer concepts fit.",
    )
    slot: str = Field(
        "next",
        description="Singular vectors to train: next (the first free slot), a number, 16:24, 1,5,9, sampled, "
        "sampled:128, random or bottom.",
    )
    param_budget: int | None = Field(
        None, ge=1, description="Choose the largest rank with at most this many trainable parameters (50k, 1.5m)."
    )
    init_from_adapter: Path | None = Field(
        None, description="A spectral-rotation adapter whose rotated columns training starts from."
    )
    ledger: Path | None = Field(None, description="Ledger of slots. Default: slots.json beside the output.")
    slot_seed: int | None = Field(None, ge=0, lt=2**31, description="Seed of a random slot. Default: fresh, recorded.")
    target_modules: str = Field(
        "attention", description="Layers to adapt: attention, feed-forward, conv …, joined by +."
    )
    name: str | None = Field(None, description="Name of the concept. Default: concept.yaml, else the folder's name.")
    token: str | None = Field(None, description="Token for prompts. Default: concept.yaml, else <name>.")
    class_noun: str | None = Field(None, description="Class noun, such as dog. Default: concept.yaml, else the name.")
    per_layer_tokens: bool = Field(
        False, description="Learn one token embedding per cross-attention layer (P+, Voynov et al. 2023)."
    )
    steps: int = Field(1250, ge=1, le=10_000_000, description="Training steps; each sees one batch of photos.")
    batch_size: int = Field(2, ge=1, le=1024, description="Photos per batch.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything random.")
    learning_rate: float = Field(1e-4, ge=0, description="Learning rate of the denoiser's adapter.")
    text_encoder_learning_rate: float = Field(1e-5, ge=0, description="Learning rate of the text encoders' adapter.")
    embedding_learning_rate: float = Field(1e-3, ge=0, description="Learning rate of the token embeddings.")
    normalize: bool = Field(False, description="Train A_U S_b / s_max, so that every slot takes steps of equal weight.")
    slot_lr_power: float = Field(
        0.0, ge=-2, le=2, description="Multiply a layer's learning rate by (s_max / mean S_b) to this power."
    )
    lr_scheduler: Literal["linear", "constant", "cosine"] = Field("linear", description="Learning rate schedule.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of parameters whose neutral value is 0.")
    max_grad_norm: float = Field(1.0, gt=0, description="Clip the gradient to this norm.")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="The loss.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimizer.")
    timestep_power: float = Field(
        1.0, gt=0, le=4, description="Sample t = T u^power; below 1 trains high noise more, which decides shapes."
    )
    noise_offset: float = Field(0.01, ge=0, description="Offset noise per channel, in standard deviations.")
    max_embedding_norm_ratio: float = Field(
        1.45, gt=0, description="Stop training a token embedding at this multiple of its first norm."
    )
    resolution: int | None = Field(None, ge=8, le=4096, description="Short edge in pixels. Default: the base's size.")
    resize_ratio: float = Field(1.0, ge=1.0, le=2.0, description="Short edge before the crop, over the resolution.")
    crops_per_image: int = Field(4, ge=1, le=256, description="Random crops per photo, encoded once.")
    templates: Templates = Field(
        ["a photo of {}", "a picture of {}", "an image of {}", "{}"],
        description="Captions of photos without one; a style has its own default.",
    )
    prior: PriorPreservationConfig = Field(PriorPreservationConfig(), description="Prior preservation.")
    interference: InterferenceConfig = Field(
        InterferenceConfig(), description="What keeps the adapter off other concepts."
    )
    data: DataConfig = Field(DataConfig(), description="Photos, captions and masks.")
    validation: ValidationConfig = Field(ValidationConfig(), description="Validation grids, trackers, early stopping.")
    checkpointing_steps: int = Field(100, ge=1, description="Save the training state every this many steps.")
    device: str = Field("auto", description="auto, cpu, cuda, mps …")
    dtype: str = Field("float32", description="Precision of the frozen base; adapters stay float32.")
    quantization: Quantization = Field(
        "none", description="Bits of a transformer's frozen weights: none, int8, fp8 (8) or nf4 (4, on a GPU only)."
    )
    layer_offload: bool = Field(
        False, description="Keep a transformer's layers in main memory; each comes to the GPU as it computes. Slower."
    )
    shard_base: bool = Field(
        False, description="Of several processes, each keeps a part of a transformer's frozen weights (FSDP2)."
    )
    mixed_precision: Precision = Field("auto", description="Autocast: auto takes what this machine does fastest.")
    compile: bool = Field(
        False, description="Compile the denoising network (torch.compile): minutes at first, then quicker steps."
    )
    allow_tf32: bool = Field(False, description="On CUDA, round the factors of float32 products to TensorFloat-32.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")

    @field_validator("slot", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("param_budget", mode="before")
    @classmethod
    def _thousands(cls, value: Any) -> Any:
        if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)([km])", value.strip().lower())):
            return round(float(match[1]) * {"k": 1_000, "m": 1_000_000}[match[2]])
        return value

    @field_validator("data")
    @classmethod
    def _class_images_need_prior_preservation(cls, value: DataConfig, info: ValidationInfo) -> DataConfig:
        prior = info.data.get("prior")
        if value.class_images_dir and prior and prior.loss_weight == 0:
            raise ValueError("class_images_dir needs prior.loss_weight above 0")
        return value
