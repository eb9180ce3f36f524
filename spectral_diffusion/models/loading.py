"""Load a base: a diffusers folder, a hub id or a single checkpoint, perhaps quantized or off the GPU."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from .. import pocket
from ..core.errors import Fix, UserError, reason
from ..core.files import check_not_disguised, exists, read_header
from ..core.hub import is_repository
from ..core.machine import parse_device
from .base import ENCODERS, NETWORKS, Base, base_of
from .denoiser import Denoiser
from .families import FAMILIES, family_named, family_of, family_titles
from .fingerprint import Origin, key_of_files, state_of
from .offload import offload
from .quantization import Quantization, check_quantization, load_quantized
from .sd import SDDenoiser

MODULAR = "modular_model_index.json"  # of diffusers' modular pipelines
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


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


def load_base(
    name: str = "pocket",
    device: str = "auto",
    dtype: str = "float32",
    quantization: Quantization = "none",
    layer_offload: bool = False,
) -> Base:
    """Load ``pocket``, a diffusers folder, a hub id or a single ``.safetensors`` checkpoint.

    ``HF_HOME`` and ``HF_HUB_OFFLINE`` are honoured by the libraries underneath.

    Args:
        quantization: of the denoising network (see :mod:`.quantization`).
        layer_offload: keep the denoising network in main memory and bring its layers to the device as they compute.

    Raises:
        UserError: nothing loadable under that name, with what to do about it.
    """
    torch_dtype, torch_device = parse_dtype(dtype), parse_device(device)
    check_quantization(quantization, torch_device, torch_dtype, layer_offload)
    options: dict[str, Any] = {"torch_dtype": torch_dtype, "safety_checker": None}
    where = torch.device("cpu") if layer_offload else torch_device
    try:
        with quiet_loading():
            source = name
            if quantization != "none" or layer_offload:
                source, family = _shrinkable(name)
                if quantization != "none":
                    network = load_quantized(family.network_class, Path(source) / family.network_name, quantization,
                                             torch_dtype, where)  # fmt: skip
                    options[family.network_name] = network
            pipeline, key = _load_pipeline(source, options)
    except UserError:
        raise
    except Exception as error:  # the loaders raise nearly everything
        if not exists(name) and is_repository(name):
            offline = ", where HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
            raise UserError(
                f"Cannot load the base '{name}': there is no such folder here{offline}, and the hub gives none: "
                f"{reason(error)}."
            ) from error
        raise UserError(f"Cannot load the base '{name}': {reason(error)}.") from error
    if layer_offload:
        family.prepare(pipeline)  # which splits layers: their parts are what moves
        offload(getattr(pipeline, family.network_name), torch_device)
    if known := family_of(pipeline):
        known.place(pipeline, torch_device)
    base = base_of(pipeline, name, torch_dtype)
    base.origin = Origin(key, {} if base.stored else state_of(base.models)) if key else None
    return base


def _shrinkable(name: str) -> tuple[str, type[Denoiser]]:
    """The local folder and the family of a base whose network can be quantized or stay off the GPU.

    Raises:
        UserError: it is of a family for which there is no need.
    """
    local = _local(name)
    if local and local.is_file():
        index, folder = {"_class_name": ""}, Path(name)
    else:
        folder = local or Path(DiffusionPipeline.download(name))
        index = DiffusionPipeline.load_config(str(folder))
    family = family_named(index["_class_name"])
    if family is None or not family.quantizable:
        titles = ", ".join(family.title for family in FAMILIES if family.quantizable)
        raise UserError(
            f"The base '{name}' is neither quantized nor offloaded: that is for {titles}.",
            Fix("quantization", "none"),
            Fix("layer_offload", "false"),
        )
    return str(folder), family


def _load_pipeline(name: str, options: dict[str, Any]) -> tuple[Any, str | None]:
    """The pipeline under a base's name, and the key of the files that its weights come from.

    Args:
        options: of diffusers' loader: the precision, and parts that are loaded already.
    """
    dtype, local = options["torch_dtype"], _local(name)
    if local:
        key = key_of_files(weight_files(local), dtype)  # before they are read, should they change meanwhile
        load = _load_diffusers if local.is_dir() else load_single_file
        return load(local, options), key
    pipeline = _load_diffusers(name, options)
    family = family_of(pipeline)
    network = getattr(pipeline, family.network_name if family else "unet")
    cached = Path(network.config["_name_or_path"]).parent  # the snapshot in the hub's cache
    return pipeline, key_of_files(weight_files(cached), dtype)


def _local(name: str) -> Path | None:
    """The diffusers folder or the checkpoint that a base's name means; None of a hub id.

    Raises:
        UserError: it is none of them.
    """
    local = pocket.path(name) if pocket.is_pocket(name) else Path(name)
    if pocket.is_pocket(name) and not local.is_dir():
        raise UserError(f"The weights of the base '{name}' are missing from this installation; install it again.")
    if local.is_dir():
        if (local / MODULAR).is_file():
            raise UserError(f"{local} is a modular pipeline; these families can be used: {family_titles()}.")
        if not (local / "model_index.json").is_file():
            raise UserError(f"{local} is not a diffusers folder: it holds no model_index.json.")
        _refuse_pickles(local)
        return local
    if local.suffix == ".safetensors":
        if not local.is_file():
            raise UserError(f"No such file: {local}.")
        return local
    if local.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        raise UserError(f"{local} is a pickle checkpoint, which can run code; convert it to .safetensors.")
    if local.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"No base '{name}': use pocket, pocket-transformer, a diffusers folder, a hub id or a .safetensors file."
        )
    return None


def _load_diffusers(source: str | Path, options: dict[str, Any]) -> Any:
    """A pipeline of a diffusers folder or the hub; every other one's class is only looked up where it is needed."""
    name = str(source)
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
    folder = str(pocket.path(name)) if pocket.is_pocket(name) else name
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
