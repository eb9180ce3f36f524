"""The training loop. It reads from top to bottom: concept and base in, adapter out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ..adapter import Adapter
from ..base import Base
from ..config import TrainConfig
from ..data.folder import Concept
from ..data.samples import encode_crops
from ..errors import NotFiniteError, UserError
from ..formats.native import content_hash, versions
from ..linalg import kernel_of, sides
from ..methods import get_method
from ..methods.attach import Attachment, attach, detaching
from ..methods.frozen import Frozen, frozen_tensors, stored_part
from ..methods.spectral_rotation import PREPARED_ON, prepare
from ..progress import Event, Progress, silent
from ..slots import Slot
from ..spectrum import spectrum_of
from .conditioning import Conditioner
from .draws import draw, target_of
from .preservation import OTHERS, cut_mix, draw_anchors, draw_ordinary, is_cut
from .state import check_settings, load_state, save_state

EXTRA = "extra|"  # before the names of what a method keeps beside its parameters


class Stopped(Exception):
    """Training was asked to stop; its state is saved and ``--resume`` goes on from there."""


def train(
    config: TrainConfig,
    base: Base,
    concept: Concept,
    slot: Slot | None,
    state: Path,
    resume: bool = False,
    progress: Progress = silent,
    should_stop: Callable[[], bool] = lambda: False,
    start_from: Adapter | None = None,
) -> Adapter:
    """Train one concept (DreamBooth style) into an adapter of ``base``.

    Every random draw is keyed by (seed, step, sample) and the state holds everything else, so that
    k steps, a stop and ``resume`` give the same bits as an unbroken run on a CPU.

    Args:
        slot: the columns (or rows) this concept has for itself; None for methods without a slot.
        start_from: an adapter whose rotated columns this one goes on from, without a new decomposition (Lemma 4.1).
        state: where to save the state on interval, on a stop and at the end; the caller removes it when the adapter
            is written.
        resume: go on from ``state`` if it is there.
        should_stop: asked before every step.

    Raises:
        Stopped: ``should_stop`` said so.
        NotFiniteError: NaN or infinity; the last good state is kept.
        UserError: the state belongs to other settings.
    """
    method = get_method(config.method)
    models, pipeline = base.models, base.pipeline
    base_fingerprint = base.fingerprint  # before anything is attached to it
    weights = base.weights(config.targets)
    frozen = continued(start_from) if start_from else frozen_tensors(method, weights, config.rank, slot, progress)
    size = config.resolution or base.size
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    preserving = config.preservation.weight > 0
    ordinary = draw_ordinary(base, config, concept.noun, size, progress) if preserving else None
    if base.device.type == "cpu":
        pipeline.unet.set_attn_processor(AttnProcessor())  # SDPA's backward is slow on CPU
    with Conditioner(base, concept, config.seed, size, OTHERS if preserving else ()) as condition, detaching(models):
        anchors = draw_anchors(ordinary, base, noise_schedule, config, condition) if ordinary else None
        columns, factors = weigh_slot(weights, frozen, config) if method.frozen == "band" else (None, {})
        attachment = attach(
            models,
            method,
            config.rank,
            concept.name,
            config.targets,
            frozen,
            config.seed,
            columns=columns,
            steps=config.steps,
        )
        for rows in condition.named_parameters().values():
            rows.requires_grad_(True)  # attaching froze everything but the adapter
        optimizer, rates = build_optimizer(attachment, condition, config, factors)
        trained = {**condition.named_parameters(), **dict(attachment.named_parameters())}
        belongs = {"base": base_fingerprint.exact, "slot": str(slot or ""), "start": start_hash(start_from)}
        start = 0
        if resume and state.exists():
            start = restore(state, optimizer, trained, config, attachment, belongs)
        latents = encode_crops(concept, pipeline.vae, config, size)
        running: float | None = None

        for step in range(start, config.steps):
            if should_stop():
                keep(state, trained, optimizer, step, config, attachment, belongs)
                raise Stopped(f"Stopped at step {step} of {config.steps}; --resume goes on from there.")
            fraction = 1 - step / config.steps if config.decay == "linear" else 1.0
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * fraction

            samples = draw(step, latents, concept, config, len(noise_schedule.alphas_cumprod))
            held = None
            if ordinary and is_cut(step, config):
                samples = cut_mix(samples, ordinary, concept.token, step, config)
            elif anchors:
                held = anchors.batch(step, config)
            noisy = noise_schedule.add_noise(samples.latents, samples.noise, samples.timesteps)
            timesteps, prompts = samples.timesteps, samples.prompts
            if held:
                noisy, timesteps = torch.cat([noisy, held.noisy]), torch.cat([timesteps, held.timesteps])
                prompts = prompts + held.prompts
            with torch.autocast(base.device.type, torch.bfloat16, enabled=config.autocast):
                predicted = pipeline.unet(noisy.to(base.dtype), timesteps, **condition(prompts)).sample.float()
            count = len(samples.prompts)
            loss = F.mse_loss(predicted[:count], target_of(noise_schedule, samples))
            if held:
                loss = loss + config.preservation.weight * F.mse_loss(predicted[count:], held.targets)

            penalty = attachment.penalty()
            if penalty is not None:
                loss = loss + penalty

            optimizer.zero_grad()
            loss.backward()
            condition.hold(config.embedding_norm)  # once the token has moved far enough (Mix-of-Show's limit)
            total = nn.utils.clip_grad_norm_(list(trained.values()), config.clip)
            if not torch.isfinite(loss) or not torch.isfinite(total):
                kept = f"the last good state is kept in {state.name}" if state.exists() else "nothing was saved yet"
                raise NotFiniteError(f"Training met NaN or infinity at step {step}: lower the learning rate ({kept}).")
            optimizer.step()
            attachment.after_step(step + 1)

            value = float(loss.detach())
            running = value if running is None else 0.95 * running + 0.05 * value
            progress(Event("train", step + 1, config.steps, {"loss": running}))
            if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                keep(state, trained, optimizer, step + 1, config, attachment, belongs)

        adapter = Adapter(
            name=concept.name,
            noun=concept.noun,
            token=concept.token,
            method=method,
            rank=config.rank,
            slot=slot,
            targets=config.targets,
            base=config.base,
            fingerprint=base_fingerprint,
            parameters=attachment.trained(),
            sizes={layer: sides(weights[layer]) for layer in attachment.layers},
            kernels={layer: kernel for layer in attachment.layers if (kernel := kernel_of(weights[layer]))},
            frozen=stored_part(method, frozen),
            vectors=condition.vectors(),
            earlier=start_from.tokens if start_from else {},
            config=comparable(config),
            versions=versions(),
        )
        keep(state, trained, optimizer, config.steps, config, attachment, belongs)  # until the adapter is written
        return adapter


def continued(adapter: Adapter) -> Frozen:
    """An adapter's band with the rotations it has learnt as the new start: U R_U and V R_V are orthonormal again.

    The new start's D = R − I is composed with what the new training adds; no decomposition is made.
    """
    out: Frozen = {}
    for layer in adapter.layers:
        held = adapter.frozen_of(layer)
        turned = prepare(adapter.parameters_of(layer), held)
        out[layer] = {**held, **{name: value for name, value in turned.items() if name in PREPARED_ON}}
    return out


def weigh_slot(
    weights: Mapping[str, Tensor], frozen: Frozen, config: TrainConfig
) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
    """How a slot's smaller singular values are made up for, as the settings ask.

    Returns the columns' scales s_max / S_b (r,) per layer for ``normalise``, else None, and per layer the factor
    (s_max / mean S_b) ^ ``slot_rate`` of the learning rate. s_max is the weight's largest singular value.
    """
    if not (config.normalise or config.slot_rate):
        return None, {}
    largest = {layer: band.S[0] for layer, band in spectrum_of(weights, 1).bands.items()}
    columns = {layer: largest[layer] / held["S"] for layer, held in frozen.items()} if config.normalise else None
    return columns, {
        layer: float((largest[layer] / held["S"].mean()) ** config.slot_rate) for layer, held in frozen.items()
    }


def build_optimizer(
    attachment: Attachment, condition: Conditioner, config: TrainConfig, factors: Mapping[str, float]
) -> tuple[torch.optim.Optimizer, list[float]]:
    """AdamW with a group per component and learning-rate factor; returns it and the groups' initial rates.

    ``factors`` multiplies the rate of single layers. Weight decay never touches what is not neutral at zero: the token,
    DoRA's magnitudes.
    """
    rates = {"unet": config.learning_rate}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for layer in attachment.layers:
        component = layer.split(".", 1)[0]
        rate = rates.get(component, config.text_encoder_learning_rate) * factors.get(layer, 1.0)
        for name, parameter in attachment.parameters(layer).items():
            decay = 0.0 if name in attachment.method.neutral else config.weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    listed: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()
    ]
    rows = list(condition.named_parameters().values())
    listed.append({"params": rows, "lr": config.embedding_learning_rate, "weight_decay": 0.0})
    return torch.optim.AdamW(listed), [group["lr"] for group in listed]


def comparable(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the result: all but where things lie and how often states are saved."""
    kept = config.model_dump(mode="json")
    for key in ("concept", "output", "save_every", "device", "continue_from"):
        kept.pop(key)
    return kept


def start_hash(adapter: Adapter | None) -> str:
    """Which adapter training goes on from."""
    return content_hash(adapter) if adapter else ""


def keep(
    state: Path,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    config: TrainConfig,
    attachment: Attachment,
    belongs: Mapping[str, str],
) -> None:
    """Save everything that the run needs to go on exactly here."""
    extra, patterns = attachment.extra_state()
    tensors = {**trained, **{f"{EXTRA}{name}": value for name, value in extra.items()}}
    meta = {"step": step, "config": comparable(config), "extra": patterns, "belongs": dict(belongs)}
    save_state(state, tensors, optimizer, meta)


def restore(
    state: Path,
    optimizer: torch.optim.Optimizer,
    trained: Mapping[str, nn.Parameter],
    config: TrainConfig,
    attachment: Attachment,
    belongs: Mapping[str, str],
) -> int:
    """Load a saved state into place; returns the step to go on with.

    Raises:
        UserError: it was made with other settings, or by another concept or base.
    """
    held, meta = load_state(state, optimizer)
    check_settings(state, meta, comparable(config))
    if meta.get("belongs") != belongs:
        raise UserError(f"{state} was made on another base, slot or start; train without --resume.")
    tensors = {name: value for name, value in held.items() if not name.startswith(EXTRA)}
    if set(tensors) != set(trained) or any(tensors[n].shape != trained[n].shape for n in trained):
        raise UserError(f"{state} belongs to another concept or base; train without --resume.")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    extra = {name.removeprefix(EXTRA): value for name, value in held.items() if name.startswith(EXTRA)}
    attachment.load_extra_state(extra, meta.get("extra", {}))
    return int(meta["step"])
