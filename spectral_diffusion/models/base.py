"""A loaded pipeline and what the rest of the library needs to know of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from .. import pocket
from ..core.errors import Fix, UserError
from .denoiser import Denoiser
from .families import FAMILIES, family_of, family_titles, hollow_networks
from .fingerprint import Fingerprint, Origin, fingerprint_of, kept, kept_fingerprint
from .offload import is_offloaded, keep_nothing
from .quantization import Quantization, is_torchao, quantization_of
from .stored_weights import LayerWeights, StoredWeights
from .targets import find_targets, layer_shape
from .tokens import add_token_rows, collapse, embedding_of, expand, ids_of, known_tokens, pool_at_end

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # and their tokenizers; SDXL has both
NETWORKS = tuple(dict.fromkeys(family.network_name for family in FAMILIES))
TRIGGERS = "spectral_triggers"  # among a tokenizer's settings


@dataclass
class Base:
    """A loaded pipeline and what we need to know of it."""

    name: str
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline
    device: torch.device
    dtype: torch.dtype
    origin: Origin | None = None  # of weights that come from files
    stored: StoredWeights | None = None  # the network's weights as they were before it was quantized
    quantization: Quantization = "none"  # of the network

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
        """That of the weights before they were quantized, so that adapters fit the base in every form."""
        if self.stored is None:
            return kept_fingerprint(self.models, self.origin)
        stored = self.stored
        return kept(self.origin.key if self.origin else None, lambda: fingerprint_of(stored))

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

    def weights(self, targets: str = "attention") -> Mapping[str, Tensor]:
        """The target weights by layer name; those of a quantized base are read from its files, one at a time."""
        layers = find_targets(self.models, targets)
        if self.stored is not None:
            stored = self.stored
            return LayerWeights(layers, lambda layer: stored[f"{layer}.weight"])
        if is_offloaded(self.denoiser.network):
            return LayerWeights(layers, lambda layer: layers[layer].weight.detach().to(self.device))
        return {name: layer.weight.detach() for name, layer in layers.items()}

    def sizes(self, targets: str = "attention") -> dict[str, tuple[int, int]]:
        """Rows and columns of the target weights by layer name."""
        return {name: layer_shape(layer) for name, layer in find_targets(self.models, targets).items()}


def base_of(pipeline: Any, name: str | None = None, dtype: torch.dtype | None = None) -> Base:
    """The base that a loaded diffusers pipeline is. Its networks are frozen and set to evaluation.

    Args:
        name: default: where the pipeline says it was loaded from.

    Raises:
        UserError: a pipeline of another family, or one for inpainting.
    """
    if name is None:
        name = str(pipeline.config.get("_name_or_path") or "pipeline")
        name = next((own for own, folder in pocket.BASES.items() if name == str(folder)), name)
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
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and is_torchao(layer):
            keep_nothing(layer)
    base.quantization = quantization_of(network)
    if base.quantization != "none":
        base.stored = stored_weights(base)
    for model in (pipeline.vae, *base.models.values()):
        model.requires_grad_(False).eval()
    for encoder, tokenizer in base.tokenizers.items():
        pool_at_end(tokenizer, base.models[encoder])
    return base


def stored_weights(base: Base) -> StoredWeights:
    """The weights that the network of a quantized base was made from, which its config says where to find.

    Raises:
        UserError: it was not loaded from a diffusers folder or the hub.
    """
    name, network = base.family.network_name, base.denoiser.network
    source = str(network.config.get("_name_or_path") or "")
    folders = [Path(source).parent, Path(source)]
    if source.count("/") == 1 and not Path(source).exists():
        with suppress(Exception):  # the hub's libraries raise nearly everything
            folders = [Path(DiffusionPipeline.download(source, local_files_only=True))]
    folder = next((folder for folder in folders if (folder / "model_index.json").is_file()), None)
    if folder is None:
        raise UserError(
            f"The network of '{base.name}' is quantized, and its bands are computed from the weights before that; load "
            "it with from_pretrained from a diffusers folder or the hub."
        )
    hollow = hollow_networks(folder)[0][name].to(base.dtype)
    return StoredWeights(folder / name, name, hollow, base.dtype, base.device)
