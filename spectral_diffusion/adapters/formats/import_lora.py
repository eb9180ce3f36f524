"""LoRA files of other programs as adapters of this one."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import ELSEWHERE, Fix, UserError
from ...core.files import check_writable
from ...core.machine import provenance
from ...core.names import check_name, check_token
from ...linalg import kernel_size
from ...methods import get_method
from ...models.base import Base
from ...models.loading import load_base, quiet_loading
from ...models.split_linear import fused_layers
from ...models.targets import EVERYTHING, find_targets, layer_shape
from ...models.tokens import embedding_of
from ..adapter import Adapter
from .fused_projections import split_parts, trimmed
from .native import is_native, load_adapter, save_adapter
from .reading import NAMED, lora_file, read_lora


def import_lora(
    path: Path,
    output: Path | None,
    base_name: str,
    name: str | None = None,
    device: str = "auto",
    base: Base | None = None,
) -> Adapter:
    """A LoRA file of another program (or PEFT's or diffusers' folder) as an adapter of this one.

    It is of method lora at the largest rank that a layer uses, and without a token but for embeddings that the file
    brings along.

    Raises:
        UserError: not such a file, or of another base; an output that cannot be written, or that would lose something.
    """
    if output:
        check_output(path, output)
    base = base or load_base(base_name, device)
    layers = find_targets(base.models, EVERYTHING)
    fused = fused_layers(base.models)
    with quiet_loading():  # diffusers' readers warn of every name that they do not know
        lora = read_lora(path, [*layers, *fused], None if base.tokenizers else base.denoiser.convert_lora)
    lora.factors = {layer: trimmed(pair) for layer, pair in split_parts(lora.factors, fused).items()}
    if strange := next((layer for layer in lora.factors if layer not in layers), None):
        raise UserError(f"{path} is a LoRA for another base: {strange} is of another size.", Fix("base"))
    if not lora.factors:
        raise UserError(f"{path} changes no layer: all its factors are zero.")
    rank = max(len(pair.down) for pair in lora.factors.values())
    parameters: dict[str, Tensor] = {}
    for layer, (up, down) in sorted(lora.factors.items()):
        if (len(up), down.shape[1]) != layer_shape(layers[layer]):
            raise UserError(f"{path} is a LoRA for another base: {layer} is of another size.", Fix("base"))
        missing = rank - len(down)
        parameters[f"{layer}.A"] = torch.nn.functional.pad(down, (0, 0, 0, missing))
        parameters[f"{layer}.B"] = torch.nn.functional.pad(up, (0, missing))
    tokens = tokens_of(path, lora.embeddings, base)
    token, vectors = next(iter(tokens.items()), ("", {}))
    changed = sorted(lora.factors)
    adapter = Adapter(
        name=check_name(name or name_of(path)), noun="", token=token, method=get_method("lora"), rank=rank, slot=None,
        targets=EVERYTHING, base=base.name, fingerprint=base.fingerprint, parameters=parameters,
        sizes={layer: layer_shape(layers[layer]) for layer in changed}, frozen={}, vectors=vectors,
        kernels={layer: kernel for layer in changed if (kernel := kernel_size(layers[layer].weight))},
        fused=fused, family=base.family.pipeline_class.__name__,
        earlier={other: rows for other, rows in tokens.items() if other != token},
        config={"imported": Path(path).name}, provenance=provenance(),
    )  # fmt: skip
    if output:
        save_adapter(adapter, output)
    return adapter


def name_of(path: Path) -> str:
    """A foreign LoRA's name: its file's, or its folder's where all files have one name, without unsafe characters."""
    file = lora_file(path).resolve()
    stem = file.parent.name if file.stem in NAMED else file.stem
    cleaned = re.sub(r"\.{2,}", ".", re.sub(r"[^\w.+-]+", " ", stem)).strip(" .")
    return cleaned[:100].strip(" .") or "lora"


def distinct(name: str, taken: Collection[str]) -> str:
    """The name, or with -2, -3, … behind it the first that is free; names are compared regardless of case."""
    used = {candidate.lower() for candidate in taken}
    names = (name, *(f"{name}-{number}" for number in range(2, len(used) + 3)))
    return next(candidate for candidate in names if candidate.lower() not in used)


def tokens_of(path: Path, embeddings: dict[str, dict[str, Tensor]], base: Base) -> dict[str, dict[str, Tensor]]:
    """The embeddings that a file brings along by the tokens that they are typed as, with their vectors.

    Raises:
        UserError: one that does not fit the base's text encoders.
    """
    widths = {encoder: embedding_of(base.models[encoder]).embedding_dim for encoder in base.tokenizers}
    tokens: dict[str, dict[str, Tensor]] = {}
    for name, rows in embeddings.items():
        finite = all(torch.isfinite(vectors).all() for vectors in rows.values())
        lengths = {len(vectors) for vectors in rows.values() if vectors.dim() == 2}
        if {part: vectors.shape[-1] for part, vectors in rows.items()} != widths or len(lengths) != 1 or not finite:
            raise UserError(f"{path} brings an embedding '{name}' that does not fit this base's text encoders.")
        word = re.sub(r"_(\d+)$", r"-\1", re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("_-")) or "embedding"
        tokens[check_token(f"<{distinct(word, [token[1:-1] for token in tokens])}>")] = rows
    return tokens


def check_output(path: Path, output: Path) -> None:
    """Refuse an output that is no adapter file, or that exists and was not imported.

    Raises:
        UserError: it is.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"The output {output} must end in .safetensors.")
    if output.is_dir() or output.resolve() == lora_file(path).resolve():
        raise UserError(f"{output} is a folder, or what is imported.", ELSEWHERE)
    if output.exists() and not (is_native(output) and "imported" in load_adapter(output).config):
        raise UserError(f"{output} was not imported, and would be lost.", ELSEWHERE)
    check_writable(output)
