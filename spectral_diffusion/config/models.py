"""The settings of every verb: one pydantic model each, shared by YAML, command line and API.

Misspelt keys are errors that name the nearest known key; nothing is swallowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from ..core.assets import preset, preset_of
from ..core.errors import UserError, nearest, reason, shown
from ..core.files import read_text
from ..core.paths import without_folders

ORDINARY_NOUNS = ["dog", "cat", "horse", "fish", "car", "house", "tree", "cup", "teapot", "chair", "flower", "person"]
ORDINARY_ADJECTIVES = ["", "red", "yellow", "green", "blue", "white", "black"]
ORDINARY_SCENES = ["{}", "a photo of {}"] + [
    f"a photo of {{}} {place}"
    for place in ["on the grass", "on the beach", "in the snow", "on a table", "at night", "on a white background"]
]


def ordinary_thing(adjective: str, noun: str) -> str:
    """``a red dog``, or ``a dog`` without an adjective."""
    return f"a {adjective} {noun}".replace("  ", " ")


def _one_place(texts: list[str]) -> list[str]:
    if any(text.count("{}") != 1 for text in texts):
        raise ValueError("every one needs {} exactly once, where the concept goes")
    return texts


Precision = Literal["auto", "no", "bf16", "fp16"]
Templates = Annotated[list[str], Field(min_length=1), AfterValidator(_one_place)]  # texts with a place for a concept


class Settings(BaseModel):
    """Strict base of all settings."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("true and false are none of its values (as words they go into quotes)")
        return value


class PreservationConfig(Settings):
    """Keep ordinary pictures as the base draws them while a concept is learnt. Off at weight 0."""

    weight: float = Field(0.0, ge=0)  # of the preservation loss, beside the photos' 1
    batch: int = Field(2, ge=1, le=1024)  # ordinary pictures per step
    pictures: int = Field(32, ge=1, le=10_000)  # the base draws before training
    others: float = Field(0.33, ge=0, le=1)  # share of prompts that hold another concept's random word
    cut_mix: float = Field(0.0, ge=0, le=1)  # share of steps that show photos beside ordinary pictures, 2:1
    guidance: float = Field(4.0, ge=0, le=50)  # of the ordinary pictures
    nouns: list[str] = Field(ORDINARY_NOUNS, min_length=1)
    adjectives: list[str] = Field(ORDINARY_ADJECTIVES, min_length=1)
    scenes: Templates = ORDINARY_SCENES


class DataConfig(Settings):
    """How photos become samples. The defaults: square crops at random, captions as they are."""

    buckets: bool = False  # photos keep about their shape, at about resolution² pixels; a step sees one shape
    crop: Literal["random", "center", "head"] = "random"  # head holds the top of the picture
    flip: float = Field(0.0, ge=0, le=1)  # share of crops mirrored, but where the caption says left or right
    mask_weight: float = Field(0.0, ge=0, le=1)  # the loss outside the masks counts 1 minus this
    shuffle: bool = False  # put the comma-separated parts of a caption into another order at every step
    keep: int = Field(1, ge=0, le=1000)  # the first parts stay first, and are never dropped
    part_dropout: float = Field(0.0, ge=0, le=1)  # share of the other parts left out; never one that holds the token
    caption_dropout: float = Field(0.0, ge=0, le=1)  # share of samples with the empty prompt
    class_images: Path | None = None  # pictures of the class, for preservation instead of such as the base draws
    cache_latents: bool = True  # encode the crops once; false encodes those of a step at the step
    cache: Path | None = None  # folder of encoded crops; default: latents/ beside the spectra


class ObjectiveConfig(Settings):
    """What the loss is. The default is the plain mean squared error of what the base predicts, ε or v."""

    loss: Literal["mse", "huber"] = "mse"
    huber_delta: float = Field(0.1, gt=0)  # errors above about this count linearly
    snr_gamma: float = Field(0.0, ge=0)  # min-SNR-γ weights of the timesteps (Hang et al. 2023); 0 weighs all alike
    attention: float = Field(0.0, ge=0)  # weight of keeping the token's attention inside the masks


class OptimiserConfig(Settings):
    """Who takes the steps, and how many pictures each of them sees."""

    name: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    factor: float = Field(1.0, gt=0)  # of prodigy's own step size, which takes the learning rates' place
    warmup: int = Field(0, ge=0)  # steps in which the rates rise to what they are
    accumulate: int = Field(1, ge=1, le=1024)  # batches per step
    ema: float = Field(0.0, ge=0, lt=1)  # write a moving average that forgets so slowly; 0: the last numbers


class WatchConfig(Settings):
    """What is shown and recorded on the way. Nothing of it changes the result, but for stopping early."""

    every: int = Field(0, ge=0)  # steps between two sample grids; 0 draws none
    prompts: Templates = ["a photo of {}", "{} on the beach", "{} in the snow"]
    strengths: list[FiniteFloat] = Field([0.0, 0.7, 1.0], min_length=1)  # of the adapter, a column of the grid each
    seed: int = Field(0, ge=0, lt=2**31)
    steps: int = Field(20, ge=1, le=1000)  # of each picture
    guidance: float = Field(4.0, ge=0, le=50)
    patience: int = Field(0, ge=0)  # stop after so many grids without a better likeness; 0 never
    tracker: Literal["none", "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"] = (
        "none"
    )
    card: bool = False  # write <output>.md with the curve, the samples and the settings

    @field_validator("patience")
    @classmethod
    def _needs_grids(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("every"):
            raise ValueError("patience counts sample grids; set watch.every above 0 too")
        return value


class TrainConfig(Settings):
    """Train one concept into one adapter. Defaults are the paper's fusion recipe for Stable Diffusion 1.5.

    The command line lays the preset of the base over them; so does :func:`settings_for`.
    """

    concept: Path
    output: Path
    base: str = "pocket"
    method: str = "spectral-additive"
    rank: int = Field(8, ge=1, le=4096)
    slot: str = "next"  # next, a number, 16:24, 1,5,9, sampled, sampled:128, random, bottom
    budget: int | None = Field(None, ge=1)  # choose the largest rank that trains no more numbers than this
    continue_from: Path | None = None  # a spectral-rotation adapter whose turned columns to go on from
    slot_seed: int | None = Field(None, ge=0, lt=2**31)  # of a drawn slot; default: fresh, and recorded
    targets: str = "attention"
    name: str | None = None  # of the concept; default: concept.yaml, else the folder's name
    token: str | None = None  # default: concept.yaml, else <name>
    noun: str | None = None  # class noun; default: concept.yaml, else the name
    layerwise: bool = False  # the token's vectors differ for every cross-attention layer of the U-Net
    steps: int = Field(1250, ge=1, le=10_000_000)
    batch: int = Field(2, ge=1, le=1024)
    seed: int = Field(0, ge=0, lt=2**31)
    learning_rate: float = Field(1e-4, ge=0)  # of the U-Net
    text_encoder_learning_rate: float = Field(1e-5, ge=0)
    embedding_learning_rate: float = Field(1e-3, ge=0)
    normalise: bool = False  # train A_U S_b / s_max, so that every slot's steps weigh alike
    slot_rate: float = Field(0.0, ge=-2, le=2)  # a layer's rates times (s_max / mean S_b) to this power
    decay: Literal["linear", "constant", "cosine"] = "linear"
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    objective: ObjectiveConfig = ObjectiveConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    timestep_power: float = Field(1.0, gt=0, le=4)  # t = T u^power; below 1 more steps at high noise, for shapes
    noise_offset: float = Field(0.01, ge=0)
    embedding_norm: float = Field(1.45, gt=0)  # stop moving the token at this times its first norm
    resolution: int | None = Field(None, ge=8, le=4096)  # short edge in pixels; default: the base's size
    crop_scale: float = Field(1.0, ge=1.0, le=2.0)  # short edge before the random crop, over the resolution
    crops: int = Field(4, ge=1, le=256)  # random crops per photo, encoded once
    templates: Templates = ["a photo of {}", "a picture of {}", "an image of {}", "{}"]
    preservation: PreservationConfig = PreservationConfig()
    data: DataConfig = DataConfig()
    watch: WatchConfig = WatchConfig()
    save_every: int = Field(100, ge=1)
    device: str = "auto"
    dtype: str = "float32"  # of the frozen base; adapters stay float32
    mixed_precision: Precision = "auto"  # of the networks' work; auto is what this machine does quickly
    allow_tf32: bool = False  # on CUDA, round the factors of float32 products to TensorFloat-32
    gradient_checkpointing: bool = False  # compute the U-Net's activations twice instead of keeping them

    @field_validator("slot", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("budget", mode="before")
    @classmethod
    def _thousands(cls, value: Any) -> Any:
        if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)([km])", value.strip().lower())):
            return round(float(match[1]) * {"k": 1_000, "m": 1_000_000}[match[2]])
        return value

    @field_validator("data")
    @classmethod
    def _class_images_are_for_preservation(cls, value: DataConfig, info: ValidationInfo) -> DataConfig:
        preservation = info.data.get("preservation")
        if value.class_images and preservation and preservation.weight == 0:
            raise ValueError("class_images needs preservation.weight above 0")
        return value


class GradientConfig(Settings):
    """What the merges that watch activations (``gradient``, ``ssr``) watch, and how they solve."""

    anchor: float = Field(1.0, ge=0)  # weight of the base's ordinary prompts, in concepts; 0 leaves them out
    ridge: float = Field(1e-6, ge=0)  # of the mean diagonal of the Gram matrices
    ridge_to: Literal["zero", "mean"] = "zero"  # where directions that nothing was seen of go
    staging: Literal["own", "fused"] = "own"  # each adapter alone, or as Mix-of-Show: on the stages fused before
    prompts: Templates = ORDINARY_SCENES
    pictures: int = Field(8, ge=1, le=10_000)  # per concept, and of ordinary prompts
    steps: int = Field(10, ge=1, le=1000)  # of each picture
    guidance: float = Field(4.0, ge=0, le=50)
    rows: int = Field(256, ge=1, le=1_000_000)  # drawn from what a layer sees at one call
    cache: bool = True  # keep what was seen beside the spectra, per adapter


class TeachConfig(Settings):
    """After any merge, teach the fused base what each adapter draws alone and what the base draws. Off at 0 steps."""

    steps: int = Field(0, ge=0, le=1_000_000)
    learning_rate: float = Field(1e-4, gt=0)  # falls to nothing in a line
    token_learning_rate: float = Field(1e-3, ge=0)  # of the concepts' own words; 0 leaves them as they are
    batch: int = Field(16, ge=2, le=1024)  # predictions at once
    accumulate: int = Field(1, ge=1, le=1024)  # batches per step
    gradient_checkpointing: bool = False  # compute the U-Net's activations twice instead of keeping them
    ordinary: float = Field(0.75, gt=0, lt=1)  # share of them that are of ordinary pictures
    pictures: int = Field(24, ge=1, le=10_000)  # drawn for a concept
    plain: int = Field(96, ge=1, le=10_000)  # drawn of ordinary things
    draws: int = Field(12, ge=1, le=1000)  # of noise and time for each picture
    empty: float = Field(0.15, ge=0, le=1)  # share of the ordinary ones with the empty prompt
    guidance: float = Field(4.0, ge=0, le=50)  # of the pictures
    targets: str | None = None  # layers that learn besides those that the adapters change, named as in training
    things: list[str] = []  # ordinary things such as "a red dog"; default: usual nouns in usual colours


class FuseConfig(Settings):
    """Fuse adapters into one checkpoint."""

    adapters: list[Path] = Field(min_length=1)
    output: Path
    base: str | None = None  # default: the base the adapters name
    merge: str = "spectral"
    form: Literal["sum", "mean", "paper"] = "sum"  # of spectral
    strength: dict[str, FiniteFloat] = {}  # concept name to λ; NAME.unet and NAME.text_encoder for one component
    density: float = Field(0.5, gt=0, le=1)  # of ties and dare
    svd_rank: int = Field(16, ge=1, le=4096)  # of svd
    gradient: GradientConfig = GradientConfig()
    teach: TeachConfig = TeachConfig()
    seed: int = Field(0, ge=0, lt=2**31)
    allow_base: bool = False
    device: str = "auto"
    mixed_precision: Precision = "auto"  # of distillation; auto is what this machine does quickly
    allow_tf32: bool = False  # on CUDA, round the factors of float32 products to TensorFloat-32


class ConditionConfig(Settings):
    """Train a T2I-Adapter for a base from pictures with conditions."""

    folder: Path
    output: Path  # a diffusers T2IAdapter folder
    base: str = "pocket"
    kind: Literal["sketch", "keypose"] = "sketch"
    steps: int = Field(5000, ge=1, le=10_000_000)
    batch: int = Field(8, ge=1, le=1024)
    seed: int = Field(0, ge=0, lt=2**31)
    learning_rate: float = Field(1e-4, ge=0)
    decay: Literal["linear", "constant"] = "linear"
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    resolution: int | None = Field(None, ge=8, le=4096)  # short edge in pixels; default: the base's size
    crop_scale: float = Field(1.0, ge=1.0, le=2.0)  # short edge before the random crop, over the resolution
    crops: int = Field(1, ge=1, le=256)  # random crops per picture, encoded once
    flip: bool = False  # half of the views mirrored, but where the caption says left or right
    template: str = ""  # caption of a picture that has none; {} is concept.yaml's noun
    caption_dropout: float = Field(0.3, ge=0, le=1)  # share of empty captions, so that the condition has to say it
    timestep_power: float = Field(0.33, gt=0, le=4)  # t = T u^power; 1/3 has the mean of the paper's cubic draw
    save_every: int = Field(500, ge=1)
    device: str = "auto"
    dtype: str = "float32"  # of the frozen base; the adapter stays float32
    mixed_precision: Precision = "auto"  # of the networks' work; auto is what this machine does quickly
    allow_tf32: bool = False  # on CUDA, round the factors of float32 products to TensorFloat-32

    @field_validator("flip")
    @classmethod
    def _sides(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("kind") == "keypose":
            raise ValueError("a mirrored keypose has its left and right limbs in each other's colours")
        return value


Model = TypeVar("Model", bound=Settings)
VERBS = {"train", "fuse", "generate", "train-condition", "evaluate"}  # that a preset may have a part for


YAML_BYTES = 1_000_000  # of a file of settings, which has some thousands


def _as_in_yaml_1_2(tag: str, found: re.Pattern[str]) -> re.Pattern[str]:
    """What YAML 1.1 takes for a number, but none of base 60; for a boolean, but true and false only."""
    if tag.endswith(":bool"):
        return re.compile(r"true|True|TRUE|false|False|FALSE")
    number = tag.endswith((":int", ":float"))
    return re.compile(rf"(?![-+]?[0-9][0-9_]*:){found.pattern}", re.X) if number else found


# What PyYAML raises for text that it cannot read: its constructors, of dates and numbers, nearly anything.
UNREAD = (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError, IndexError)


class Loader(yaml.SafeLoader):
    """Safe YAML in which ``16:24``, ``no`` and ``on`` are texts, as in YAML 1.2.

    Aliases are refused: a few hundred bytes of them stand for a value of thousands of millions of parts.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise Alias(None, None, f"the alias *{event.anchor}", event.start_mark)
        return super().compose_node(parent, index)


class Alias(yaml.composer.ComposerError):
    """A value that stands for an earlier one."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, _as_in_yaml_1_2(tag, found)) for tag, found in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping.

    Raises:
        UserError: missing, not YAML, or not a mapping.
    """
    try:
        data = yaml.load(read_text(Path(path), most=YAML_BYTES), Loader)
    except FileNotFoundError as error:
        raise UserError(f"No such file: {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {getattr(error, 'strerror', None) or reason(error)}.") from error
    except Alias as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} uses {error.problem}{where}; write the value itself there.") from error
    except UNREAD as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f" at line {line + 1}" if line is not None else ""
        raise UserError(f"{path} is not valid YAML{where}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{path} must hold key: value lines.")
    return data


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """``["steps=10", "strength.rex=0.8"]`` to a mapping; values are read as YAML scalars.

    Raises:
        UserError: a word without ``=``.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError(f"'{pair}' is not understood; overrides are written key=value.")
        try:
            value = yaml.load(text, Loader) if text else ""
        except UNREAD:
            value = text
        target = out
        *path, last = key.split(".")
        for part in path:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise UserError(f"'{pair}' sets a part of something that was set whole before.")
        target[last] = value
    return out


def build(model: type[Model], *layers: dict[str, Any], file: str = "") -> Model:
    """Merge layers (later ones win) and validate them. The first layer was read from ``file``, if named.

    Raises:
        UserError: one sentence about the first thing wrong, with the nearest known key for a misspelt one.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                value = merged[key] | value
            merged[key] = value
    try:
        return model(**merged)
    except ValidationError as error:
        first = error.errors()[0]["loc"][:1]
        from_file = file and first and first[0] in layers[0] and not any(first[0] in layer for layer in layers[1:])
        raise UserError(_sentence(model, error, f" in {file}" if from_file else "")) from error


def preset_part(name: str, verb: str) -> dict[str, Any]:
    """What a shipped preset says for a verb.

    Raises:
        UserError: no such preset.
    """
    return read_yaml(preset(name)).get(verb) or {}


RATES = ("learning_rate", "text_encoder_learning_rate")  # those that depend on the method


def rates_for(settings: dict[str, Any], method: Any) -> dict[str, Any]:
    """A preset's or file's settings, with its rates scaled where another method takes the place of its own.

    Rates that stand beside a method are that method's; those of a file without a method are anybody's.

    Raises:
        UserError: there is no such method.
    """
    before = settings.get("method")
    if not (isinstance(before, str) and isinstance(method, str)) or before == method:
        return settings
    from ..methods import get_method

    ratio = get_method(method).lr_scale / get_method(before).lr_scale
    scaled = {}
    for name in RATES:
        try:
            scaled[name] = tidy(float(settings[name]) * ratio)
        except (KeyError, TypeError, ValueError):
            continue  # not there, or no number, which is told when the settings are checked
    return {**settings, **scaled}


def with_rates(config: TrainConfig) -> TrainConfig:
    """Settle the learning rates that nobody set: the defaults, times the method's ``lr_scale``.

    Raises:
        UserError: there is no such method.
    """
    from ..methods import get_method

    scale = get_method(config.method).lr_scale
    unset = {name: tidy(getattr(config, name) * scale) for name in RATES if name not in config.model_fields_set}
    return config.model_copy(update=unset)


def tidy(rate: float) -> float:
    """A rate without the rounding of a multiplication: 3e-4, not 0.00030000000000000003."""
    return float(f"{rate:.12g}")


def usual_settings(base: str, verb: str) -> dict[str, Any]:
    """What the preset that a base brings along says for a verb; nothing where there is none."""
    name = preset_of(base)
    return preset_part(name, verb) if name else {}


def settings_for(
    model: type[Model],
    verb: str,
    *changes: Mapping[str, Any],
    config: str | None = None,
    held: Mapping[str, Any] | None = None,
    source: str = "",
    base: str = "pocket",
) -> Model:
    """The settings of a verb as the command line resolves them; with few words the same as there::

        settings_for(TrainConfig, "train", {"concept": "photos/rex", "output": "rex.safetensors"})

    A preset by name or a YAML file comes first, then what a scene held, then the changes, of which later ones win.

    Args:
        config: the preset or file; by default the preset that the base brings along.
        held: what a scene held that was read from ``source``.
        base: what is meant where nothing names one.

    Raises:
        UserError: no such preset or file, one of another verb, or a setting that cannot be.
    """
    named = [layer["base"] for layer in (held or {}, *changes) if layer.get("base") is not None]
    chosen = config or preset_of(str([base, *named][-1]))
    layer: dict[str, Any] = {}
    if chosen is not None:
        layer = read_yaml(preset(chosen))
        if layer and set(layer) <= VERBS:
            if verb == "train" and verb not in layer:
                raise UserError(f"{chosen} is a preset for {', '.join(layer)}; choose another for train with --config.")
            layer = layer.get(verb) or {}
            if not isinstance(layer, dict):
                raise UserError(f"The part '{verb}' of {chosen} must hold key: value lines.")
    last = [dict(change) for change in changes]
    if held:
        return build(model, dict(held), {k: v for k, v in layer.items() if k not in held}, *last, file=source)
    if verb != "train":
        return build(model, layer, *last, file=config or "")
    method = next((change["method"] for change in reversed(last) if change.get("method")), None)
    settings = build(model, rates_for(layer, method), *last, file=config or "")
    return cast(Model, with_rates(cast(TrainConfig, settings)))


def _sentence(model: type[Settings], error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part)[:80] for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"Unknown setting '{key}'{where}{nearest(key, model.model_fields)}."
    if first["type"] == "missing":
        return f"The setting '{key}' is missing{where}."
    why = first["msg"].removeprefix("Value error, ")
    return f"Setting '{key}'{where} cannot be {shown(first['input'])}: {why[0].lower()}{why[1:]}."


def to_yaml(settings: Settings, shared: bool = False) -> str:
    """The resolved settings as YAML that ``--config`` reads back; full paths are names alone where it is ``shared``."""
    held = settings.model_dump(mode="json")
    return yaml.safe_dump(without_folders(held) if shared else held, sort_keys=False, allow_unicode=True)
