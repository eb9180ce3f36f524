"""The targets of distillation: images of every adapter's concept, and what that adapter predicts for them.

An image with guidance g follows e + g (c − e), where e is the prediction for the empty prompt. Every adapter has its
own e, and the fused network can have but one: the base's e₀. So the target for a concept's prompts is not the adapter's
c but c − (1 − 1/g) (e − e₀), which with e₀ gives the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.apply import Strength, enabled_adapters
from ..adapters.formats.native import content_hash
from ..config.fuse import DistillConfig
from ..config.train import GENERIC_ADJECTIVES, GENERIC_NOUNS, GENERIC_TEMPLATES, generic_subject, in_style
from ..core.cache import WAIT, cache_folder, cached
from ..core.errors import Fix, UserError
from ..core.files import parse_json
from ..core.hooks import QUIET, Event, Hooks
from ..core.rng import keyed_generator, keyed_random
from ..models.base import Base

CHUNK = 16  # images generated, and predictions made, together; fewer where a batch is smaller, as memory may be short
STEPS = 10  # inference steps of each image


@dataclass(frozen=True)
class TeacherTargets:
    """Noised images (n, c, h, w) of one concept, or of generic subjects, with the targets to predict there.

    They are on the CPU; a batch goes to the base's device.
    """

    prompts: list[str]
    noisy: Tensor
    timesteps: Tensor
    targets: Tensor


@dataclass(frozen=True)
class DistillTargets:
    """The targets of each concept, and those of generic subjects, which keep the rest of the base."""

    concepts: list[TeacherTargets]
    prior: TeacherTargets


def prepare_targets(
    base: Base,
    adapters: Sequence[Adapter],
    strengths: Mapping[str, Strength],
    config: DistillConfig,
    seed: int,
    hooks: Hooks = QUIET,
) -> DistillTargets:
    """All targets, from the untouched base with every adapter's token in it; it is as it was afterwards.

    Raises:
        UserError: an adapter has no token.
        Cancelled: ``hooks.should_stop`` said so.
    """
    check_words(adapters)
    # Also the tokens of what an adapter was trained on top of.
    count = sum(len(adapter.tokens) for adapter in adapters) + 1
    concepts: list[TeacherTargets] = []
    for adapter in adapters:
        concepts += adapter_targets(base, adapter, strengths.get(adapter.name, 1.0), config, seed, hooks)
        hooks.progress(Event("teacher images", len(concepts), count))
    prior = generic_targets(base, config, seed, hooks)
    hooks.progress(Event("teacher images", count, count))
    return DistillTargets(concepts, prior)


def check_words(adapters: Sequence[Adapter]) -> None:
    """Refuse to distill an adapter without a token.

    Raises:
        UserError: there is one.
    """
    for adapter in adapters:
        if not adapter.tokens:
            raise UserError(
                f"'{adapter.name}' has no word of its own: it changes generic prompts, which distillation would take "
                "away again.",
                Fix("distill.steps", "0"),
            )


def adapter_targets(
    base: Base, adapter: Adapter, strength: Strength, config: DistillConfig, seed: int, hooks: Hooks = QUIET
) -> list[TeacherTargets]:
    """The targets of each of an adapter's tokens; other adapters make no difference to them."""
    out = []
    for token in adapter.tokens:
        subjects = [token] * config.num_images
        if token in adapter.styles:
            random = keyed_random("styled", token, seed)
            subjects = [in_style(random.choice(generic_subjects(config)), token) for _ in subjects]
        out.append(cached_targets(base, adapter, subjects, config, seed, strength, hooks))
    return out


def generic_targets(base: Base, config: DistillConfig, seed: int, hooks: Hooks = QUIET) -> TeacherTargets:
    """The targets of the untouched base, on generic subjects."""
    random, subjects = keyed_random("ordinary", seed), generic_subjects(config)
    chosen = [random.choice(subjects) for _ in range(config.num_prior_images)]
    return cached_targets(base, None, chosen, config, seed, hooks=hooks)


def generic_subjects(config: DistillConfig) -> list[str]:
    """The subjects of generic images."""
    return config.prior_subjects or [generic_subject(a, n) for a in GENERIC_ADJECTIVES for n in GENERIC_NOUNS]


def cached_targets(
    base: Base,
    adapter: Adapter | None,
    subjects: Sequence[str],
    config: DistillConfig,
    seed: int,
    strength: Strength = 1.0,
    hooks: Hooks = QUIET,
) -> TeacherTargets:
    """:func:`targets_of`, cached under a hash of all that decides it if ``config.cache`` says so."""

    def make() -> TeacherTargets:
        return targets_of(base, adapter, subjects, config, seed, strength, hooks)

    if not config.cache:
        return make()
    decides = {
        "base": base.fingerprint.exact,
        "form": [str(base.dtype), base.device.type, base.quantization, base.size],
        "adapter": content_hash(adapter) if adapter else None,
        "strength": strength,
        "subjects": list(subjects),
        "templates": GENERIC_TEMPLATES,
        "settings": config.model_dump(
            include={"batch_size", "resolution", "noises_per_image", "empty_prompt_prob", "guidance_scale"}
        ),
        "scheduler": json.loads(base.pipeline.scheduler.to_json_string()),
        "seed": seed,
        "format": 2,
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:32]
    path = cache_folder() / "teachers" / f"{key}.safetensors"
    return cached(path, make, packed_targets, unpacked_targets, WAIT)


def packed_targets(targets: TeacherTargets) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata to cache."""
    tensors = {"noisy": targets.noisy, "timesteps": targets.timesteps, "targets": targets.targets}
    return tensors, {"prompts": json.dumps(targets.prompts)}


def unpacked_targets(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> TeacherTargets:
    """The inverse of :func:`packed_targets`."""
    prompts = [str(text) for text in parse_json(metadata["prompts"])]
    if len(prompts) != len(tensors["noisy"]):
        raise ValueError("There are more or fewer prompts than images.")
    return TeacherTargets(prompts, tensors["noisy"], tensors["timesteps"], tensors["targets"])


@torch.no_grad()
def targets_of(
    base: Base,
    adapter: Adapter | None,
    subjects: Sequence[str],
    config: DistillConfig,
    seed: int,
    strength: Strength = 1.0,
    hooks: Hooks = QUIET,
) -> TeacherTargets:
    """Images by an adapter (None: the base alone) of each subject, noised, with the targets to predict there."""
    who, denoiser = adapter.name if adapter else "ordinary", base.denoiser
    templates = itertools.cycle(GENERIC_TEMPLATES)
    prompts = [base.spell(next(templates).replace("{}", subject)) for subject in subjects]
    active, together = [(adapter, strength)] if adapter else [], min(CHUNK, config.batch_size)
    with enabled_adapters(base, active):
        latents = sample_latents(base, prompts, who, config, seed, hooks).repeat_interleave(config.noises_per_image, 0)
    random, generator = keyed_random("lesson", who, seed), keyed_generator("noise", who, seed)
    empty = 0.0 if adapter else config.empty_prompt_prob
    repeated = [prompt for prompt in prompts for _ in range(config.noises_per_image)]
    asked = ["" if random.random() < empty else prompt for prompt in repeated]
    last = denoiser.num_timesteps
    timesteps = (last * torch.rand(len(latents), generator=generator) ** 0.5).long().clamp(max=last - 1)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noisy = denoiser.add_noise(latents, noise, timesteps)

    def predictions(texts: list[str]) -> Tensor:
        parts = (slice(start, start + together) for start in range(0, len(texts), together))
        return torch.cat([predict(base, texts[part], noisy[part], timesteps[part]).cpu() for part in parts])

    unconditional, share = [""] * len(asked), 1 - 1 / denoiser.effective_guidance(config.guidance_scale)
    with enabled_adapters(base, active):
        targets = predictions(asked)
        if adapter and share:
            targets -= share * predictions(unconditional)
    if adapter and share:
        targets += share * predictions(unconditional)
    return TeacherTargets(asked, noisy, timesteps, targets)


def predict(base: Base, prompts: Sequence[str], noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The network's predictions (n, c, h, w) float32 for noised latents and prompts."""
    denoiser = base.denoiser
    height, width = (side * denoiser.vae_scale for side in noisy.shape[-2:])
    conditioning = denoiser.encode(prompts, (height, width))
    return denoiser.predict(noisy.to(base.device), timesteps.to(base.device), conditioning)


def sample_latents(
    base: Base, prompts: list[str], who: str, config: DistillConfig, seed: int, hooks: Hooks = QUIET
) -> Tensor:
    """The latents (n, c, h, w) of an image for each prompt, on the CPU."""

    def check(step: int, latents: Tensor) -> None:
        hooks.raise_if_stopped()

    out, together = [], min(CHUNK, config.batch_size)
    for start in range(0, len(prompts), together):
        chunk = prompts[start : start + together]
        generators = [keyed_generator("lesson", who, seed, start + i) for i in range(len(chunk))]
        latents = base.denoiser.sample_latents(
            chunk, generators, STEPS, config.guidance_scale, config.resolution, on_step=check
        )
        out.append(latents.cpu())
    return torch.cat(out)
