"""Export adapters and fusions for other programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import pocket
from ..adapters.adapter import Adapter, check_base
from ..adapters.formats.card import MARK, model_card
from ..adapters.formats.checkpoint import checkpoint_tensors
from ..adapters.formats.fused_projections import join_parts, original_layers
from ..adapters.formats.lora import comfyui_tensors, diffusers_tensors, kohya_tensors, lora_metadata, write_hashed
from ..config.fuse import FuseConfig
from ..core.errors import ELSEWHERE, Fix, UserError
from ..core.files import atomic_folder, check_writable, read_header, write_tensors, write_text
from ..core.hooks import QUIET, Hooks
from ..core.machine import made_on, provenance
from ..core.outputs import check_replaceable, holds
from ..core.paths import without_folders
from ..linalg import Factors, to_float64, truncate
from ..models.base import Base
from ..models.denoiser import Denoiser
from ..models.families import family_named
from ..models.loading import load_base, parse_dtype
from ..models.original_names import OriginalNames
from ..models.per_layer_tokens import mean_note
from ..models.tokens import known_tokens
from .fuse import fuse_adapters
from .manifest import adapters_in_fusion, read_manifest, read_merged, save_pipeline

EXPORTED = "README.md"  # an exported folder has our card under this name
TOKEN = "spectral.token"
OURS = {TOKEN, "spectral.recipe"}  # in the metadata of what an export wrote
DIFFUSERS = Fix("format", "diffusers", "for a file with the names of diffusers")
FORMATS = ("kohya", "comfyui", "diffusers", "embedding", "folder", "checkpoint")


@dataclass
class ExportSource:
    """What is exported: one adapter, or a fusion of several.

    ``load`` gives the base with everything in its weights; ``distilled`` says that the tokens' vectors there
    are not the adapters' own any more.
    """

    title: str
    base: str
    adapters: list[Adapter]
    recipe: dict[str, Any]
    factors: Callable[[], dict[str, Factors]]
    load: Callable[[], Base]
    kernels: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    distilled: bool = False

    @property
    def nouns(self) -> dict[str, str]:
        """Every learned word by its noun; that of what an adapter was trained on top of has none."""
        named = {adapter.token: adapter.noun for adapter in self.adapters}
        learned = [token for adapter in self.adapters for token, vectors in adapter.tokens.items() if vectors]
        return {token: named.get(token, "") for token in learned}

    @property
    def triggers(self) -> list[str]:
        """The concepts' names in a prompt."""
        return [*self.nouns, *(adapter.trigger for adapter in self.adapters if adapter.trigger)]

    @property
    def fused(self) -> dict[str, dict[str, int]]:
        """Layers that hold several projections, with their parts' rows."""
        return {layer: rows for adapter in self.adapters for layer, rows in adapter.fused.items()}

    @property
    def family(self) -> type[Denoiser] | None:
        """The family of the base, if the adapters name it."""
        return family_named(self.adapters[0].family)

    @cached_property
    def loaded(self) -> Base:
        """The base with everything in its weights."""
        return self.load()

    @cached_property
    def tokens(self) -> dict[str, dict[str, Tensor]]:
        """The vectors of every word, by text encoder."""
        if self.distilled:
            return {token: self.loaded.vectors(token) for token in self.nouns}
        return {token: vectors for adapter in self.adapters for token, vectors in adapter.tokens.items()}


def open_source(path: Path, device: str = "auto") -> ExportSource:
    """An adapter file or a fused folder as something to export.

    Raises:
        UserError: neither, or damaged.
    """
    path = Path(path)
    adapters = adapters_in_fusion(path)
    kernels = {layer: kernel for adapter in adapters for layer, kernel in adapter.kernels.items()}
    if path.is_dir():
        recipe = read_manifest(path) or {}
        distilled = bool(recipe["settings"]["distill"]["steps"])
        shown = {
            "merge": recipe["merge"],
            "concepts": ", ".join(f"{n} ({c['method']}, {c['scale']})" for n, c in recipe["concepts"].items()),
            "mixed precision": recipe["settings"].get("mixed_precision", ""),
            "made on": made_on(recipe.get("provenance", {})),
        }
        return ExportSource(
            path.resolve().name, str(recipe["base"]), adapters, shown, lambda: read_merged(path),
            lambda: load_base(str(path), device), kernels, distilled,
        )  # fmt: skip
    [adapter] = adapters

    def load() -> Base:
        base = load_base(adapter.base, device)
        check_base(adapter, base)
        fuse_adapters(base, [adapter], FuseConfig(adapters=[path], output=path))
        return base

    def factors() -> dict[str, Factors]:
        weights: Mapping[str, Tensor] = {}
        if adapter.needs_base:
            base = load_base(adapter.base, device)
            check_base(adapter, base)
            weights = base.weights(adapter.targets)
        return {layer: adapter.factors(layer, weights.get(layer)) for layer in adapter.layers}

    shown = {
        "method": adapter.method.name, "rank": adapter.rank, "slot": str(adapter.slot or ""),
        "mixed precision": adapter.config.get("mixed_precision", ""), "made on": made_on(adapter.provenance),
    }  # fmt: skip
    return ExportSource(adapter.name, adapter.base, adapters, shown, factors, load, kernels)


@dataclass(frozen=True)
class ExportOptions:
    """How an export is written.

    Attributes:
        rank: of a LoRA file. Default: the exact one, or 32 for a change of full rank.
        dtype: default: float16 for LoRA files, float32 for the rest.
        picture: a sample picture for the model card.
        device: on which bases are loaded.
    """

    rank: int | None = None
    dtype: str | None = None
    picture: Path | None = None
    device: str = "auto"

    def dtype_or(self, default: str) -> torch.dtype:
        """The dtype that is asked, else the default.

        Raises:
            UserError: there is no such dtype.
        """
        return parse_dtype(self.dtype or default)


DEFAULT_OPTIONS = ExportOptions()


def export(
    path: Path, output: Path, kind: str, options: ExportOptions = DEFAULT_OPTIONS, hooks: Hooks = QUIET
) -> list[Path]:
    """Write ``path`` (an adapter or a fused folder) in another program's format; returns what was written.

    A change of full rank goes out as a LoRA, and a note gives the error; token embeddings are written beside everything
    that cannot hold them.

    Raises:
        UserError: an unknown format, or a change that it cannot hold.
    """
    if kind not in FORMATS:
        raise UserError(f"Unknown format '{kind}'; known: {', '.join(FORMATS)}.")
    source, output = open_source(path, options.device), Path(output)
    check_free(path, source, output, kind)
    for adapter in source.adapters:
        if adapter.per_layer_vectors:
            hooks.notify(mean_note(adapter.name))
    if kind == "folder":
        write_folder(source, output, options)
        return [output]
    if output.suffix != ".safetensors":
        raise UserError(f"The output {output} must end in .safetensors for the format {kind}.")
    check_writable(output)
    if kind == "embedding":
        if not source.nouns:
            raise UserError(f"{path} has no token, so there is no embedding to write.")
        return embeddings(source, output, options.dtype_or("float32"), kind)
    if kind == "checkpoint":
        write_checkpoint(source, output, options.dtype_or("float32"))
    else:
        write_lora(source, output, kind, options, hooks)
    written = [output]
    if source.nouns:
        written += embeddings(source, output, torch.float32, kind)
    card = output.with_suffix(".md")
    write_text(card, export_card(source, [file.name for file in written], options.picture))
    return [*written, card]


def write_folder(source: ExportSource, output: Path, options: ExportOptions) -> None:
    """A diffusers folder of the whole pipeline, with everything in its weights."""
    base = source.loaded
    with atomic_folder(output) as new:
        save_pipeline(base.pipeline.to("cpu", options.dtype_or("float32")), new)
        write_text(new / EXPORTED, export_card(source, [output.name], options.picture))


def write_lora(source: ExportSource, output: Path, kind: str, options: ExportOptions, hooks: Hooks) -> None:
    """A LoRA file of the change, in kohya's, ComfyUI's or diffusers' spelling."""
    factors = truncated_factors(source, options.rank, hooks)
    dtype, architecture = options.dtype_or("float16"), architecture_of(source, factors)
    factors = join_parts(factors, source.fused)
    names = None if kind == "diffusers" else original_names(source, factors, kind)
    if kind == "kohya" and names is None and source.family and source.family.original_names:
        hooks.notify(
            "ComfyUI does not find the attention layers of this base by kohya's names; for it, choose comfyui."
        )
    if kind == "kohya" and names and not names.diffusers_reads_kohya:
        hooks.notify(
            "diffusers does not read kohya's names of this base's layers; for it, choose diffusers or comfyui."
        )
    factors = original_layers(factors, names) if names else factors
    factors = {layer: pair for layer, pair in factors.items() if len(pair.down)}  # a pruned layer changes nothing
    if not factors:
        raise UserError(f"'{source.title}' changes no weight, so there is no LoRA to write.")
    if kind == "diffusers":
        tensors = diffusers_tensors(factors, source.kernels, dtype)
    elif kind == "comfyui" and names:
        tensors = comfyui_tensors(factors, names, dtype)
    else:
        tensors = kohya_tensors(factors, source.kernels, dtype, architecture.startswith("stable-diffusion-xl"))
    version = source.family.base_version if source.family else ""
    write_hashed(output, tensors, lora_metadata(factors, architecture, titles(source), version) | ours(source))


def original_names(source: ExportSource, layers: Iterable[str], kind: str) -> OriginalNames | None:
    """The original's names of the layers, in kohya's or ComfyUI's spelling; None where kohya's are diffusers' names.

    ComfyUI reads kohya's spelling for Stable Diffusion.

    Raises:
        UserError: a layer has none, or nothing tells.
    """
    family = source.family
    if family is None and all(not layer.startswith("transformer.") for layer in layers):
        return None
    if family is None:
        raise UserError(f"'{source.title}' does not say which family of bases it is for; train it again.", DIFFUSERS)
    names = family.original_names
    if kind == "kohya":
        return names if names and names.in_kohya else None
    if family.comfyui_reads_kohya:
        return None
    if names is None:
        raise UserError(f"No names that ComfyUI reads are known for the layers of '{source.base}'.", DIFFUSERS)
    if strange := next((layer for layer in layers if not names.find(layer.partition(".")[2])), None):
        raise UserError(f"The original code of '{source.base}' has no such layer as {strange}.", DIFFUSERS)
    return names


def titles(source: ExportSource) -> dict[str, str]:
    """ModelSpec's fields of what an export is called, how it is prompted and what it is merged from."""
    fields = {"title": source.title, "trigger_phrase": ", ".join(source.triggers)}
    if len(source.adapters) > 1:
        fields["merged_from"] = ", ".join(adapter.name for adapter in source.adapters)
    return fields


def check_free(path: Path, source: ExportSource, output: Path, kind: str) -> None:
    """Refuse to write over what somebody may want to keep: the source, its base, an adapter, a fusion, other files.

    Raises:
        UserError: the output, or a file that goes beside it, is one of these.
    """
    here, there = Path(path).resolve(), Path(output).resolve()
    if there == here or here in there.parents:
        raise UserError(f"{output} is what is exported, or inside it.", ELSEWHERE)
    if kind == "folder":
        if not there.exists() or (there.is_dir() and not any(there.iterdir())):
            return
        if not is_our_export(there / EXPORTED) or (there / "manifest.json").exists():
            raise UserError(f"{output} exists and is no earlier export.", ELSEWHERE)
        check_replaceable(output, {EXPORTED})
        if holds(there, here) or (not pocket.is_pocket(source.base) and holds(there, source.base)):
            raise UserError(f"{output} holds what is exported, or its base.", ELSEWHERE)
        return
    files: dict[Path, str | None] = {} if kind == "embedding" else {output: None}
    for file, token in {**files, **embedding_files(source, output, kind)}.items():
        if not file.exists():
            continue
        names, metadata = read_header(file)
        if not OURS & set(metadata) and (token is None or names not in ({token}, {"clip_l", "clip_g"})):
            raise UserError(f"{file} is no earlier export, and would be lost.", ELSEWHERE)
    described = there.with_suffix(".md")
    if kind != "embedding" and described.exists() and not is_our_export(described):
        raise UserError(f"{described} is not a card of this program, and would be lost.", ELSEWHERE)


def is_our_export(described: Path) -> bool:
    """Whether a file is a card that an export wrote."""
    return described.is_file() and MARK in described.read_text("utf-8", "replace")


def truncated_factors(source: ExportSource, rank: int | None, hooks: Hooks) -> dict[str, Factors]:
    """The factors at a rank that a LoRA file is sensible at: exact if nothing is asked, else the error is reported."""
    factors = source.factors()
    full = any(not adapter.method.low_rank for adapter in source.adapters)
    if rank is None and full:
        rank = 32
        hooks.notify(
            "This method's change has full rank; a LoRA file only comes near it, the nearer the higher its rank."
        )
    if rank is None:
        return factors
    out, lost, whole = {}, 0.0, 0.0
    for layer, one in factors.items():
        change = Factors(to_float64(one.up), to_float64(one.down))
        out[layer] = truncate(change, rank) if rank < change.up.shape[1] else change
        whole += float(change.delta().square().sum())
        lost += float((change.delta() - out[layer].delta()).square().sum())
    hooks.notify(
        f"At rank {rank} the file is {(lost / whole) ** 0.5 if whole else 0.0:.2%} away from the exact change."
    )
    return out


def architecture_of(source: ExportSource, factors: Mapping[str, Factors]) -> str:
    """ModelSpec's name of the architecture: the family's, else as the tokens' vectors or the layers tell it."""
    if source.family and source.family.architecture:
        return source.family.architecture
    widths = [vectors["text_encoder"].shape[1] for vectors in source.tokens.values() if "text_encoder" in vectors]
    if any("text_encoder_2" in vectors for vectors in source.tokens.values()) or any(
        layer.startswith("text_encoder_2.") or ".transformer_blocks.9." in layer for layer in factors
    ):
        return "stable-diffusion-xl-v1-base"
    keys = [one.down.shape[1] for layer, one in factors.items() if layer.endswith("attn2.to_k")]
    return "stable-diffusion-v2" if 1024 in (*widths, *keys) else "stable-diffusion-v1"


def ours(source: ExportSource) -> dict[str, str]:
    """Where an export came from, in our own words."""
    return {
        "spectral.recipe": json.dumps(source.recipe, sort_keys=True),
        "spectral.base": without_folders(source.base),
        "spectral.base_fingerprint": source.adapters[0].fingerprint.exact,
        "spectral.versions": json.dumps(provenance(), sort_keys=True),
    }


def embedding_files(source: ExportSource, output: Path, kind: str) -> dict[Path, str]:
    """Where the tokens of an export go: beside it, or to the output itself if that is all there is to write."""
    if kind == "embedding" and len(source.nouns) == 1:
        return {output: next(iter(source.nouns))}
    return {output.with_name(f"{output.stem}.{token.strip('<>')}.safetensors"): token for token in source.nouns}


def embeddings(source: ExportSource, output: Path, dtype: torch.dtype, kind: str) -> list[Path]:
    """Token embeddings as textual-inversion files: ``{"<rex>": (n, width)}``, or clip_l and clip_g for SDXL."""
    files = embedding_files(source, output, kind)
    for path, token in files.items():
        vectors = source.tokens[token]
        tensors = (
            {"clip_l": vectors["text_encoder"], "clip_g": vectors["text_encoder_2"]}
            if "text_encoder_2" in vectors
            else {token: vectors["text_encoder"]}
        )
        write_tensors(path, {name: value.to(dtype) for name, value in tensors.items()}, {TOKEN: token})
    return list(files)


def write_checkpoint(source: ExportSource, output: Path, dtype: torch.dtype) -> None:
    """One file in the original's spelling; new tokens do not fit into it."""
    base = source.loaded
    if not base.family.supports_checkpoint:
        raise UserError(
            f"'{source.base}' has no single checkpoint to write; export a folder, or a LoRA (kohya, diffusers)."
        )
    rows = {encoder: vocabulary(tokenizer) for encoder, tokenizer in base.tokenizers.items()}
    tensors = checkpoint_tensors(base.models, base.pipeline.vae, rows)
    velocity, large = base.prediction_type == "v_prediction", "text_encoder_2" in base.models
    if velocity and large:  # the weights do not tell; programs look for these marks
        marks = ["v_pred"] + ["ztsnr"] * bool(base.pipeline.scheduler.config.get("rescale_betas_zero_snr"))
        tensors |= {mark: torch.zeros(0) for mark in marks}
    second = base.pipeline.text_encoder.config.hidden_act == "gelu"
    v2 = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
    about = {
        **titles(source),
        "architecture": "stable-diffusion-xl-v1-base" if large else v2 if second else "stable-diffusion-v1",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "prediction_type": "v" if velocity else "epsilon",
    }
    metadata = {"modelspec.sai_model_spec": "1.0.1", **{f"modelspec.{k}": v for k, v in about.items() if v}}
    write_hashed(output, {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()},
                 metadata | ours(source))  # fmt: skip


def vocabulary(tokenizer: Any) -> int:
    """How many words a tokenizer has without anybody's tokens, also those of concepts that were subtracted again."""
    return len(tokenizer) - sum(known_tokens(tokenizer).values())


def export_card(source: ExportSource, files: list[str], picture: Path | None) -> str:
    """The model card of an export."""
    return model_card(
        source.title, without_folders(source.base), source.nouns, source.recipe, files, picture.name if picture else ""
    )
