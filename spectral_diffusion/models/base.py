"""Bases: load any Stable Diffusion pipeline, fingerprint it, and say whether an adapter belongs to it."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

from .. import pocket
from ..core.errors import Fix, UserError, reason
from ..core.files import check_not_disguised, read_header
from .denoiser import Denoiser
from .families import FAMILIES, family_named, family_of, family_titles
from .fingerprint import Fingerprint, Origin, kept_fingerprint, key_of_files, state_of
from .sd import SDDenoiser
from .targets import find_targets
from .tokens import add_token_rows, collapse, embedding_of, expand, ids_of, known_tokens, pool_at_end

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # and their tokenizers; SDXL has both
NETWORKS = tuple(dict.fromkeys(family.network_name for family in FAMILIES))
MODULAR = "modular_model_index.json"  # of diffusers' modular pipelines
TRIGGERS = "spectral_triggers"  # among a tokenizer's settings
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


@dataclass
class Base:
    """A loaded pipeline and what we need to know of it."""

    name: str
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline
    device: torch.device
    dtype: torch.dtype
    origin: Origin | None = None  # of weights that come from files

    @property
    def models(self) -> dict[str, nn.Module]:
        """The networks that adapters change, by component name."""
        return {name: getattr(self.pipeline, name) for name in (*self.tokenizers, self.family.network_name)}

    @property
    def family(self) -> type[Denoiser]:
        """The family of models that it belongs to."""
        family = family_of(self.pipeline)
        assert family is not None  # as base_of has checked
        return family

    @property
    def tokenizers(self) -> dict[str, Any]:
        """Text encoder to its tokenizer."""
        return {
            encoder: getattr(self.pipeline, tokenizer)
            for encoder, tokenizer in self.family.encoders.items()
            if getattr(self.pipeline, encoder, None) is not None
        }

    @property
    def triggers(self) -> dict[str, str]:
        """Tokens to the words that stand for them, where the base learns none; they are saved with the tokenizer."""
        if self.tokenizers:
            return {}
        kept: dict[str, str] = self.family.tokenizer_of(self.pipeline).init_kwargs.setdefault(TRIGGERS, {})
        return kept

    @property
    def known_tokens(self) -> dict[str, int]:
        """The concepts' tokens, with their numbers of vectors."""
        if not self.tokenizers:
            return dict.fromkeys(self.triggers, 1)
        return known_tokens(self.family.tokenizer_of(self.pipeline))

    def spell(self, prompt: str, full: bool = False) -> str:
        """A prompt as a pipeline takes it.

        Args:
            full: with every vector of a token written out, for pipelines that do not do so themselves.
        """
        for token, words in self.triggers.items():
            prompt = re.sub(re.escape(token), words.replace("\\", r"\\"), prompt, flags=re.IGNORECASE)
        if not self.tokenizers:
            return prompt
        known = self.known_tokens
        return expand(collapse(prompt, known), known) if full else collapse(prompt, known)

    def add_token(self, token: str, vectors: dict[str, Tensor]) -> None:
        """Add a token to every tokenizer and its vectors (n, width) to every text encoder.

        Raises:
            UserError: the token is there already.
        """
        for encoder, rows in vectors.items():
            add_token_rows(self.tokenizers[encoder], self.models[encoder], token, rows)

    def vectors(self, token: str) -> dict[str, Tensor]:
        """The vectors (n, width) of an installed token in every text encoder."""
        return {
            encoder: embedding_of(self.models[encoder]).weight.detach()[ids_of(tokenizer, [token])].clone()
            for encoder, tokenizer in self.tokenizers.items()
        }

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return kept_fingerprint(self.models, self.origin)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The family's way to encode, noise, predict and sample."""
        return self.family(self.models, self.pipeline.vae, self.dtype, self.pipeline)

    def check_side(self, pixels: int, option: str, step: int | None = None) -> None:
        """Raise a UserError that names ``option`` where a side does not fit.

        Args:
            step: what it must be divisible by; default: as the base's pictures.
        """
        step = step or self.denoiser.picture_multiple
        if pixels % step:
            near = sorted({max(step, pixels // step * step), (pixels // step + 1) * step})
            raise UserError(
                f"{option}={pixels} does not fit the base '{self.name}', which needs a multiple of {step}.",
                *(Fix(option, str(side)) for side in near),
            )

    @property
    def prediction_type(self) -> str:
        """``epsilon`` or ``v_prediction``, as the scheduler says."""
        return str(self.pipeline.scheduler.config.prediction_type)

    @property
    def size(self) -> int:
        """The side in pixels that the base was made for."""
        return self.denoiser.size

    def weights(self, targets: str = "attention") -> dict[str, Tensor]:
        """The target weights by layer name."""
        return {name: layer.weight.detach() for name, layer in find_targets(self.models, targets).items()}


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep the loading chatter of diffusers and transformers out of the user's way."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.set_verbosity(logging.CRITICAL)
            logger.disable_progress_bar()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.set_verbosity(level)
                logger.enable_progress_bar()


def parse_dtype(name: str) -> torch.dtype:
    """``float32``, ``float16`` or ``bfloat16``.

    Raises:
        UserError: anything else.
    """
    if name not in DTYPES:
        raise UserError(f"Unknown dtype '{name}'; use float32, float16 or bfloat16.")
    return DTYPES[name]


def parse_device(name: str) -> torch.device:
    """A torch device; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"Device '{name}' is not available here.", Fix("device", "cpu")) from error
    return device


def load_base(name: str = "pocket", device: str = "auto", dtype: str = "float32") -> Base:
    """Load ``pocket``, a diffusers folder, a hub id or a single ``.safetensors`` checkpoint.

    ``HF_HOME`` and ``HF_HUB_OFFLINE`` are honoured by the libraries underneath.

    Raises:
        UserError: nothing loadable under that name, with what to do about it.
    """
    torch_dtype, torch_device = parse_dtype(dtype), parse_device(device)
    try:
        with quiet_loading():
            pipeline, key = _load_pipeline(name, torch_dtype)
    except UserError:
        raise
    except Exception as error:  # the loaders raise nearly everything
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise UserError(f"Cannot load the base '{name}'{offline}: {reason(error)}.") from error
    if family := family_of(pipeline):
        family.place(pipeline, torch_device)
    base = base_of(pipeline, name, torch_dtype)
    base.origin = Origin(key, state_of(base.models)) if key else None
    return base


def base_of(pipeline: Any, name: str | None = None, dtype: torch.dtype | None = None) -> Base:
    """The base that a loaded diffusers pipeline is. Its networks are frozen and set to evaluation.

    Args:
        name: default: where the pipeline says it was loaded from.

    Raises:
        UserError: a pipeline of another family, or one for inpainting.
    """
    if name is None:
        name = str(pipeline.config.get("_name_or_path") or "pipeline")
        name = "pocket" if name == str(pocket.path()) else name
    family = family_of(pipeline)
    if family is None:
        raise UserError(f"'{name}' is a {type(pipeline).__name__}; these families can be used: {family_titles()}.")
    try:
        family.prepare(pipeline)
    except ValueError as error:
        raise UserError(f"'{name}' is {error}.") from error
    dtypes = {
        str(getattr(pipeline, part).dtype).removeprefix("torch.")
        for part in family.network_parts
        if getattr(pipeline, part, None)
    }
    if len(dtypes) > 1:
        raise UserError(
            f"The networks of '{name}' are loaded in {' and '.join(sorted(dtypes))}; load the pipeline with one "
            "torch_dtype."
        )
    pipeline.set_progress_bar_config(disable=True)
    network = getattr(pipeline, family.network_name)
    base = Base(name, pipeline, network.device, dtype or network.dtype)
    for model in (pipeline.vae, *base.models.values()):
        model.requires_grad_(False).eval()
    for encoder, tokenizer in base.tokenizers.items():
        pool_at_end(tokenizer, base.models[encoder])
    return base


def _load_pipeline(name: str, dtype: torch.dtype) -> tuple[Any, str | None]:
    """The pipeline under a base's name, and the key of the files that its weights come from."""
    options: dict[str, Any] = {"torch_dtype": dtype, "safety_checker": None}
    local = pocket.path() if name == "pocket" else Path(name)
    if name == "pocket" and not local.is_dir():
        raise UserError("The pocket base's weights are missing from this installation; install it again.")
    if local.is_dir():
        if (local / MODULAR).is_file():
            raise UserError(f"{local} is a modular pipeline; these families can be used: {family_titles()}.")
        if not (local / "model_index.json").is_file():
            raise UserError(f"{local} is not a diffusers folder: it holds no model_index.json.")
        _refuse_pickles(local)
        key = key_of_files(weight_files(local), dtype)  # before they are read, should they change meanwhile
        return _load_diffusers(str(local), options), key
    if local.suffix == ".safetensors":
        if not local.is_file():
            raise UserError(f"No such file: {local}.")
        key = key_of_files(weight_files(local), dtype)
        return load_single_file(local, options), key
    if local.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        raise UserError(f"{local} is a pickle checkpoint, which can run code; convert it to .safetensors.")
    if local.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"No base '{name}': use pocket, a diffusers folder, a hub id or a .safetensors file.")
    pipeline = _load_diffusers(name, options)
    family = family_of(pipeline)
    network = getattr(pipeline, family.network_name if family else "unet")
    cached = Path(network.config["_name_or_path"]).parent  # the snapshot in the hub's cache
    return pipeline, key_of_files(weight_files(cached), dtype)


def _load_diffusers(name: str, options: dict[str, Any]) -> Any:
    """A pipeline of a diffusers folder or the hub; every other one's class is only looked up where it is needed."""
    own = {family.pipeline_class.__name__: family.pipeline_class for family in FAMILIES}
    kind = own.get(DiffusionPipeline.load_config(name)["_class_name"])
    if kind is None:
        from diffusers import AutoPipelineForText2Image  # knows a hundred pipelines, and imports them

        kind = AutoPipelineForText2Image
    try:
        return kind.from_pretrained(name, use_safetensors=True, **options)
    except Exception as error:  # the loaders raise nearly everything
        family = next((family for family in FAMILIES if family.pipeline_class is kind), None)
        missing = [package for package in family.requires if find_spec(package) is None] if family else []
        if family is None or not missing:
            raise
        raise UserError(
            f"Cannot load the base '{name}': {family.title} needs {' and '.join(missing)}; install it with "
            f"pip install {' '.join(missing)}."
        ) from error


def weight_files(source: Path) -> list[Path]:
    """The files that decide a base's U-Net and text encoders: a diffusers folder's, or a checkpoint and its configs."""
    if source.is_file():
        beside = source.with_suffix("")
        return [source, *(weight_files(beside) if beside.is_dir() else [])]
    parts = [folder for part in (*NETWORKS, *ENCODERS) if (folder := source / part).is_dir()]
    return [file for folder in parts for file in folder.iterdir() if file.is_file()]


def size_from_configs(name: str) -> int | None:
    """The side in pixels that a base was made for, by its configs in a folder or the hub's cache; None without them."""
    folder = str(pocket.path()) if name == "pocket" else name
    try:
        with quiet_loading():
            index = DiffusionPipeline.load_config(folder, local_files_only=True)
            family = family_named(index["_class_name"]) or SDDenoiser
            network, vae = (
                family.network_class.load_config(folder, subfolder=part, local_files_only=True)
                for part in (family.network_name, "vae")
            )
        return family.size_of(network, vae)
    except Exception:  # the loaders raise nearly everything
        return None


def native_size(name: str) -> int:
    """The side in pixels that a base was made for; it is loaded only where its configs do not tell.

    Raises:
        UserError: no such base.
    """
    return size_from_configs(name) or load_base(name, "cpu").size


def load_single_file(path: Path, options: dict[str, Any]) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A pipeline from a checkpoint, whose configs and vocabulary lie elsewhere.

    They are taken from a diffusers folder beside it of the same name (weights are not needed there), else from the
    hub's cache, else from the hub.

    Raises:
        UserError: they are nowhere to be found; the sentence names them.
    """
    kind = StableDiffusionXLPipeline if is_sdxl_file(path) else StableDiffusionPipeline
    beside = path.with_suffix("")
    if (beside / "model_index.json").is_file():
        return kind.from_single_file(str(path), config=str(beside), **options)
    try:
        return kind.from_single_file(str(path), **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the loaders raise nearly everything
        from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

        repository = fetch_diffusers_config(load_single_file_checkpoint(str(path)))["pretrained_model_name_or_path"]
        raise UserError(
            f"Cannot load {path}: {reason(error)}. A single file holds no vocabulary and no configs; they come from "
            f"'{repository}' on the hub. Offline, put that repository's json and txt files into the folder {beside}."
        ) from error


def is_sdxl_file(path: Path) -> bool:
    """Whether a single-file checkpoint is an SDXL one, from its header alone.

    Raises:
        UserError: not a safetensors file.
    """
    names, _ = read_header(path)
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise UserError(f"{path} is no Stable Diffusion checkpoint: it holds no U-Net.")
    return any(name.startswith("conditioner.embedders.1.") for name in names)


def _refuse_pickles(folder: Path) -> None:
    """Refuse weights that are no safetensors files, whatever their names."""
    for part in (*NETWORKS, "vae", *ENCODERS):
        inside = folder / part
        files = sorted(inside.glob("*.safetensors"))
        if inside.is_dir() and not files:
            raise UserError(f"{inside} holds no .safetensors weights; save the base again with safetensors.")
        for file in files:
            check_not_disguised(file)
