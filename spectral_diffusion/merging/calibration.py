"""Run the base with one adapter and record its layers' inputs, for the merges that need them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.formats.native import content_hash
from ..adapters.low_rank import padded
from ..config.fuse import CalibrationConfig
from ..config.train import GENERIC_ADJECTIVES, GENERIC_NOUNS, generic_subject, in_style
from ..core.cache import WAIT, cache_folder, cached
from ..core.files import parse_json
from ..core.hooks import QUIET, Event, Hooks
from ..core.machine import CPU
from ..core.rng import keyed_generator, keyed_random
from ..models.base import Base
from ..models.targets import layer_shape
from .activations import GramAccumulator

CHUNK = 4  # images per batch
KEPT = 20 * 2**30  # bytes on the disk; what was not used for the longest goes first


def tokens_of_call(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """A layer's input as rows (m, in·kh·kw) that its flattened weight multiplies."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    x, padding = padded(x.float(), layer)
    patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


@contextmanager
def record_activations(
    layers: Mapping[str, nn.Linear | nn.Conv2d], most: int, seed: int
) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Record at most ``most`` input rows of every layer's last forward, sampled by ``seed``; yields what takes them."""
    rows_of: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name: str) -> Callable[..., None]:
        generator = keyed_generator("rows", seed, name)  # a layer's sample depends on no other layer

        def see(module: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = tokens_of_call(module, inputs[0].detach())
            if len(rows) > most:
                rows = rows[torch.randperm(len(rows), generator=generator)[:most].to(rows.device)]
            rows_of[name].append(rows)

        return see

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]

    def take() -> dict[str, Tensor]:
        taken = {name: torch.cat(rows) for name, rows in rows_of.items() if rows}
        for rows in rows_of.values():
            rows.clear()
        return taken

    try:
        yield take
    finally:
        for handle in handles:
            handle.remove()


def calibration_prompts(config: CalibrationConfig, token: str | None, seed: int, is_style: bool = False) -> list[str]:
    """The calibration prompts: with the concept, with generic subjects, or with these in a style."""
    random = keyed_random("gradient", token or "ordinary", seed)
    prompts = []
    for index in range(config.num_images):
        subject = token or ""
        if is_style or not token:
            generic = generic_subject(random.choice(GENERIC_ADJECTIVES), random.choice(GENERIC_NOUNS))
            subject = in_style(generic, token) if token else generic
        prompts.append(config.prompts[index % len(config.prompts)].replace("{}", subject))
    return prompts


@torch.no_grad()
def calibrate(
    base: Base,
    tokens: Iterable[str],
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    config: CalibrationConfig,
    seed: int,
    hooks: Hooks = QUIET,
    homes: Mapping[str, torch.device] = MappingProxyType({}),
    styles: Collection[str] = (),
) -> dict[str, GramAccumulator]:
    """The inputs of ``layers`` while the base, with what adapters act on it, generates prompts with these tokens.

    Args:
        tokens: installed ones; without any the prompts are generic.
        homes: where a layer's inputs are summed up, if not on the CPU.
        styles: which of the tokens are styles'.
    """
    grams = {
        name: GramAccumulator(layer_shape(layer)[1], device=homes.get(name, CPU)) for name, layer in layers.items()
    }
    subjects: list[str | None] = [*tokens] or [None]
    prompts = [
        base.spell(text)
        for subject in subjects
        for text in calibration_prompts(config, subject, seed, is_style=subject in styles)
    ]
    with record_activations(layers, config.tokens_per_call, seed) as take:

        def fold(step: int, latents: Tensor) -> None:
            hooks.raise_if_stopped()
            for name, rows in take().items():
                grams[name].add(rows)

        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            generators = [keyed_generator("gradient", seed, start + i) for i in range(len(chunk))]
            base.denoiser.sample_latents(
                chunk, generators, config.num_inference_steps, config.guidance_scale, on_step=fold
            )
            hooks.progress(Event("calibrate", min(start + CHUNK, len(prompts)), len(prompts)))
    return grams


def cached_seen(
    base: Base,
    adapter: Adapter | None,
    homes: Mapping[str, torch.device],
    config: CalibrationConfig,
    seed: int,
    make: Callable[[], dict[str, GramAccumulator]],
    max_bytes: int = KEPT,
) -> dict[str, GramAccumulator]:
    """The result of ``make``, cached on disk under a hash of everything that decides it.

    Args:
        homes: the layers, and where each is merged.
        max_bytes: that all of these caches may take together; 0 for no limit.
    """
    decides = {
        "base": base.fingerprint.exact,
        "adapter": content_hash(adapter) if adapter else None,
        "settings": config.model_dump(
            include={"prompts", "num_images", "num_inference_steps", "guidance_scale", "tokens_per_call"}
        ),
        "ordinary": [GENERIC_ADJECTIVES, GENERIC_NOUNS],
        "layers": sorted(homes),
        "size": base.size,
        "scheduler": json.loads(base.pipeline.scheduler.to_json_string()),
        "seed": seed,
        **({"dtype": str(base.dtype)} if base.dtype != torch.float32 else {}),  # a file may hold the same in both
        **({"words": len(adapter.tokens)} if adapter and len(adapter.tokens) > 1 else {}),
        **({"styles": adapter.styles} if adapter and adapter.styles else {}),  # they are asked for in things
        "format": 3 if "text_encoder_2" in base.models else 2,  # whose prompts are summed up at their end since
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(cache_folder()) / "activations" / f"{key}.safetensors"
    return cached(path, make, packed, partial(unpacked, homes=homes), WAIT, max_bytes)


def packed(grams: Mapping[str, GramAccumulator]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata to cache of the layers' inputs."""
    tensors = {name: (gram.matrix() if gram.is_raw else gram.gram()).cpu() for name, gram in grams.items()}
    return tensors, {"counts": json.dumps({name: gram.count for name, gram in grams.items()})}


def unpacked(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    homes: Mapping[str, torch.device] = MappingProxyType({}),
) -> dict[str, GramAccumulator]:
    """The inverse of :func:`packed`."""
    counts = parse_json(metadata["counts"])
    grams = {name: GramAccumulator(tensors[name].shape[1], device=homes.get(name, CPU)) for name in counts}
    for name, gram in grams.items():
        gram.restore(tensors[name], int(counts[name]))
    return grams
