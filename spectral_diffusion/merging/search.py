"""Search the scales (and the prior weight) of a fusion on held-out prompts.

No encoder is used: the fused networks' predictions are compared with those of each adapter alone on its own concept,
and with the base's on generic prompts, on noised images that those generated themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, check_base
from ..adapters.apply import add_words, enabled_adapters
from ..config.fuse import DistillConfig, MergeConfig
from ..config.train import GENERIC_ADJECTIVES, GENERIC_NOUNS, generic_subject
from ..core.errors import UserError
from ..core.hooks import QUIET, Event, Hooks
from ..core.rng import keyed_generator, keyed_random
from ..models.base import Base
from ..models.targets import find_targets
from .fuse import check_together, fuse_adapters
from .merges.registry import get_merge
from .teacher_targets import predict

HELD_OUT = ("a drawing of {}", "{} in the garden", "a small picture of {}", "{} by the window")  # not for calibration
SCALES = (0.5, 0.65, 0.8, 0.9, 1.0)
NOISE = (0.3, 0.6, 0.9)  # of the schedule


@dataclass
class Reference:
    """Noised images of one concept (None: generic ones) and the right predictions there."""

    name: str | None
    inputs: dict[str, Any]
    target: Tensor
    base_prediction: Tensor

    @property
    def effect(self) -> float:
        """The mean squared difference that the adapter makes to the base's prediction."""
        return float((self.target - self.base_prediction).square().mean())


@dataclass(frozen=True)
class Candidate:
    """One setting and how far its fusion is from right: 0 is every adapter alone and the base untouched."""

    scale: float
    prior_weight: float
    concepts: float  # mean over concepts of |fused − alone|² / |alone − base|²
    drift: float  # |fused − base|² on generic prompts, over the mean |alone − base|²

    @property
    def score(self) -> float:
        """The objective: concepts and drift weigh alike."""
        return self.concepts + self.drift


@torch.no_grad()
def make_reference(base: Base, adapter: Adapter | None, config: MergeConfig) -> Reference:
    """Generate held-out prompts with one adapter (or with none), noise the images, and predict."""
    random = keyed_random("tune", adapter.name if adapter else "ordinary", config.seed)
    prompts = []
    tokens = list(adapter.tokens) if adapter and adapter.tokens else [None]
    for token, prompt in itertools.product(tokens, HELD_OUT):
        subject = generic_subject(random.choice(GENERIC_ADJECTIVES), random.choice(GENERIC_NOUNS))
        prompts.append(base.spell(prompt.replace("{}", token or subject)))
    denoiser = base.denoiser
    steps = torch.tensor([int(share * (denoiser.num_timesteps - 1)) for share in NOISE])

    with enabled_adapters(base, [(adapter, 1.0)] if adapter else []):
        generators = [keyed_generator("tune", config.seed, i) for i in range(len(prompts))]
        latents = denoiser.sample_latents(
            prompts, generators, config.calibration.num_inference_steps, config.calibration.guidance_scale
        )
        latents = latents.repeat_interleave(len(steps), 0)
        timesteps = steps.repeat(len(prompts)).to(base.device)
        noise = torch.randn(latents.shape, generator=keyed_generator("tune", "noise", config.seed)).to(latents)
        inputs: dict[str, Any] = {
            "prompts": [prompt for prompt in prompts for _ in steps],
            "noisy": denoiser.add_noise(latents, noise, timesteps),
            "timesteps": timesteps,
        }
        target = predict(base, **inputs)
    return Reference(adapter.name if adapter else None, inputs, target, predict(base, **inputs) if adapter else target)


@contextmanager
def untouched(base: Base, adapters: Sequence[Adapter]) -> Iterator[None]:
    """Restore the target weights when the context ends."""
    layers = {name: layer for adapter in adapters for name, layer in find_targets(base.models, adapter.targets).items()}
    originals = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(originals[name])


def changed_by(config: MergeConfig, adapters: Sequence[Adapter], scale: float, prior_weight: float) -> MergeConfig:
    """The settings of one candidate."""
    each = {adapter.name: scale * config.scales.get(adapter.name, 1.0) for adapter in adapters}
    calibration = config.calibration.model_copy(update={"prior_weight": prior_weight})
    return config.model_copy(update={"scales": {**config.scales, **each}, "calibration": calibration})


def search_scales(
    base: Base,
    adapters: list[Adapter],
    config: MergeConfig,
    scales: Sequence[float] = SCALES,
    prior_weights: Sequence[float] = (),
    hooks: Hooks = QUIET,
) -> list[Candidate]:
    """Try every scale (and prior weight, for merges with activations), best first; the base is as it was afterwards.

    A scale multiplies what ``config.scales`` says of every concept. Tune on other concepts than those that are
    reported, and only then fuse those.

    Raises:
        UserError: no scale is given, an adapter does not belong on this base, two share a name or a token, or the merge
            is not for them.
    """
    if not scales:
        raise UserError("There is no scale to try.")
    check_together(adapters, config.scales)
    config = config.model_copy(update={"distill": DistillConfig()})  # merges are compared, before any distillation
    grid = [
        (scale, prior_weight, changed_by(config, adapters, scale, prior_weight))
        for scale, prior_weight in itertools.product(scales, prior_weights or (config.calibration.prior_weight,))
    ]
    for _, _, changed in grid:
        get_merge(config.merge).accept(adapters, changed)
    for adapter in adapters:
        check_base(adapter, base, config.allow_base)
    for adapter in adapters:
        add_words(base, adapter)
    references = [make_reference(base, adapter, config) for adapter in (*adapters, None)]
    effect = sum(reference.effect for reference in references[:-1]) / len(adapters)
    tried = []
    for index, (scale, prior_weight, changed) in enumerate(grid, 1):
        with untouched(base, adapters):
            fuse_adapters(base, adapters, changed, install=False, hooks=hooks)
            with torch.no_grad():
                errors = [
                    float((predict(base, **reference.inputs) - reference.target).square().mean())
                    for reference in references
                ]
        own = [max(reference.effect, 1e-12) for reference in references[:-1]]
        concepts = sum(a / b for a, b in zip(errors[:-1], own, strict=True)) / len(adapters)
        tried.append(Candidate(scale, prior_weight, concepts, errors[-1] / max(effect, 1e-12)))
        hooks.raise_if_stopped()
        hooks.progress(Event("tune", index, len(grid), {"score": tried[-1].score}))
    return sorted(tried, key=lambda candidate: candidate.score)
