"""What people do with LoRA files without this program: diffusers' and PEFT's own ways, and sums key by key."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from ..core.errors import UserError, reason
from ..core.files import read_tensors

MERGED = "merged"
NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # of pipelines, that LoRA files change
DENSITY = 0.5  # of ties and dare, as PEFT's documentation has it


@dataclass(frozen=True)
class LoraFiles:
    """One concept's files in diffusers' spelling; the token's vectors are in a textual-inversion file, if any."""

    lora: Path
    embedding: Path | None
    token: str


def load_tokens(pipeline: Any, files: Mapping[str, LoraFiles]) -> None:
    """Put every concept's token on a stock pipeline."""
    for concept in files.values():
        if concept.embedding:
            load_word(pipeline, concept.embedding, concept.token)


def load_word(pipeline: Any, file: Path, token: str) -> None:
    """A textual-inversion file on a stock pipeline; SDXL's have vectors for two text encoders."""
    tensors = read_tensors(file)[0]
    if "clip_g" not in tensors:
        pipeline.load_textual_inversion(str(file), token=token)
        return
    for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = (getattr(pipeline, f"{part}{suffix}") for part in ("text_encoder", "tokenizer"))
        pipeline.load_textual_inversion(tensors[name], token=token, text_encoder=encoder, tokenizer=tokenizer)


def load_all(pipeline: Any, files: Mapping[str, LoraFiles]) -> None:
    """Load every LoRA under its concept's name."""
    for name, concept in files.items():
        pipeline.load_lora_weights(str(concept.lora.parent), weight_name=concept.lora.name, adapter_name=name)


def use_set_adapters(pipeline: Any, files: Mapping[str, LoraFiles], scale: float) -> None:
    """diffusers: every adapter acts at once."""
    load_all(pipeline, files)
    pipeline.set_adapters(list(files), [scale] * len(files))


def use_add_weighted_adapter(pipeline: Any, files: Mapping[str, LoraFiles], scale: float, kind: str, seed: int) -> int:
    """PEFT: one adapter of all, by one of its combination types; returns its count of numbers.

    Follows diffusers' guide on merging LoRAs: each network is wrapped as a PEFT model with the same adapters.

    Args:
        seed: of what dare drops.

    Raises:
        UserError: PEFT cannot combine these adapters, for example such of different ranks.
    """
    untouched = {name: copy.deepcopy(getattr(pipeline, name)) for name in NETWORKS if getattr(pipeline, name, None)}
    load_all(pipeline, files)
    options: dict[str, Any] = {} if kind in {"cat", "svd"} else {"density": DENSITY}
    count = 0
    for name, network in untouched.items():
        loaded = getattr(pipeline, name)
        if not (configs := getattr(loaded, "peft_config", None)):
            continue
        mine = [adapter for adapter in files if adapter in configs]
        wrapped = get_peft_model(network, configs[mine[0]], adapter_name=mine[0])
        for adapter in mine[1:]:
            wrapped.add_adapter(adapter, configs[adapter])
        state = {f"base_model.model.{key}": value for key, value in loaded.state_dict().items()}
        wrapped.load_state_dict(state)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                wrapped.base_model.add_weighted_adapter(
                    mine, [scale] * len(mine), MERGED, combination_type=kind, **options
                )
            except ValueError as error:
                raise UserError(f"PEFT cannot combine these adapters by {kind}: {reason(error)}.") from error
        wrapped.base_model.set_adapter(MERGED)
        count += sum(value.numel() for key, value in wrapped.state_dict().items() if f".{MERGED}." in key)
        setattr(pipeline, name, wrapped.base_model.model)
        pipeline.register_modules(**{name: wrapped.base_model.model})
    return count


def use_key_by_key(pipeline: Any, files: Mapping[str, LoraFiles], scale: float) -> int:
    """The sum of every A and of every B by its name, each with the root of the scale; returns its count of numbers.

    A file's alpha is multiplied into its B first, as files may differ in it. Σ B_i Σ A_i has the products of different
    concepts in it: what is wrong with this way of merging.

    Raises:
        UserError: the files are not of one rank.
    """
    total: dict[str, Tensor] = {}
    for name, concept in files.items():
        for key, value in without_alpha(read_tensors(concept.lora)[0]).items():
            part = value.float() * scale**0.5
            if key in total and total[key].shape != part.shape:
                raise UserError(f"{concept.lora.name} of '{name}' has another rank than the rest, so no key by key.")
            total[key] = total[key] + part if key in total else part
    pipeline.load_lora_weights(dict(total), adapter_name=MERGED)
    return sum(value.numel() for value in total.values())


def without_alpha(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's tensors with α / r multiplied into the half that is applied last."""
    out = {}
    for key, value in tensors.items():
        if key.endswith(".alpha"):
            continue
        stem, _, part = key.rpartition(".lora_") if ".lora_" in key else (key, "", "")
        alpha = tensors.get(f"{stem}.alpha")
        is_last = part.startswith(("up", "B"))
        rank = value.shape[1] if is_last and value.ndim > 1 else 1
        out[key] = value * (float(alpha) / rank) if alpha is not None and is_last else value
    return out


def numbers_in(files: Mapping[str, LoraFiles]) -> int:
    """How many numbers the files of all concepts hold."""
    paths = [path for concept in files.values() for path in (concept.lora, concept.embedding) if path]
    return sum(value.numel() for path in paths for value in read_tensors(path)[0].values())


def vectors_in(files: Mapping[str, LoraFiles]) -> int:
    """How many numbers the concepts' tokens hold."""
    paths = [concept.embedding for concept in files.values() if concept.embedding]
    return sum(value.numel() for path in paths for value in read_tensors(path)[0].values())
