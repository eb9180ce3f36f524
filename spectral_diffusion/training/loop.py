"""The training loop. It reads from top to bottom: concept and base in, adapter out."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.attach import inject_adapter, unloading
from ..adapters.frozen import frozen_tensors, stored_part
from ..config.train import TrainConfig
from ..core.errors import NotFiniteError
from ..core.hooks import Event, Progress, silent
from ..core.machine import provenance
from ..core.precision import autocast, is_half, loss_scaler, resolve_mixed_precision, tf32
from ..data.folder import Concept
from ..data.samples import PhotoCrops
from ..linalg import kernel_size, matrix_shape
from ..methods import get_method
from ..models.attention_maps import attention_loss, capture_attention_maps
from ..models.base import Base
from ..models.per_layer_tokens import cross_attention, per_layer_attention
from ..models.prompt_encoder import PromptEncoder
from ..slots.ledger import Slot
from .batch import sample_batch, target_of
from .checkpoint import Stopped, TrainingState, comparable_settings
from .continuation import continued_triplets, slot_lr_scaling, start_hash
from .distributed import World, checkpointing, global_batch, microbatch, quick_attention, take_step
from .losses import diffusion_loss, timestep_weights, weighted_mse
from .optimizers import EMA, build_optimizer, lr_factor
from .prior_images import make_prior_images
from .prior_preservation import OTHER_TOKENS, cut_mix, is_cut_mix_step, predict, predict_prior_targets
from .slow_steps import SlowSteps
from .validation import Validator


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
    note: Callable[[str], None] = lambda text: None,
    force: bool = False,
    among: World | None = None,
) -> Adapter:
    """Train one concept (DreamBooth style) into an adapter of ``base``.

    Every random draw is keyed by (seed, step, sample) and the state holds everything else, so that
    k steps, a stop and ``resume`` give the same bits as an unbroken run on a CPU.

    Args:
        slot: the columns (or rows) this concept has for itself; None for methods without a slot.
        state: where to save the state on interval, on a stop and at the end; the caller removes it when the adapter
            is written.
        resume: go on from ``state`` if it is there; ``force``: even with other settings.
        should_stop: asked before every step.
        start_from: an adapter whose rotated columns this one goes on from, without a new decomposition (Lemma 4.1).
        among: the processes that share the work; each takes its part of every batch.

    Raises:
        Stopped: ``should_stop`` said so.
        NotFiniteError: NaN or infinity; the last good state is kept.
        UserError: the state belongs to other settings.
    """
    method, among = get_method(config.method), among or World()
    models, unet = base.models, base.pipeline.unet
    base_fingerprint = base.fingerprint  # before anything is attached to it
    weights = base.weights(config.target_modules)
    size = config.resolution or base.size
    noise_schedule = DDPMScheduler.from_config(base.pipeline.scheduler.config)
    preserving = config.prior.loss_weight > 0
    layers = len(cross_attention(unet)) if config.per_layer_tokens else 0
    precision = resolve_mixed_precision(config.mixed_precision, base.device, base.dtype)
    parts = among.count * config.optimizer.gradient_accumulation_steps
    whole = global_batch(config, parts)  # the settings of one process that takes a step at once
    with among.main_process_first():
        frozen = (
            continued_triplets(start_from)
            if start_from
            else frozen_tensors(method, weights, config.rank, slot, progress)
        )
    alone = should_stop if among.count == 1 else lambda: False  # several stop together, between steps
    ordinary = make_prior_images(base, config, concept.noun, size, progress, alone, note) if preserving else None
    with (
        PromptEncoder(base, concept, config.seed, size, OTHER_TOKENS if preserving else (), layers) as condition,
        unloading(models),
        tf32(base.device, config.allow_tf32),
        quick_attention(base, is_half(precision, base.dtype), size),
        checkpointing(base, config.gradient_checkpointing),
        capture_attention_maps(unet, config.objective.attention_loss_weight > 0) as maps,
        per_layer_attention(base, config.per_layer_tokens),
        Validator(config, concept, base, note, among.is_main) as watcher,
    ):
        anchors = (
            predict_prior_targets(ordinary, base, noise_schedule, config, condition, progress) if ordinary else None
        )
        columns, factors = slot_lr_scaling(weights, frozen, config) if method.builds_on == "band" else (None, {})
        attachment = inject_adapter(
            models, method, config.rank, "concept", config.target_modules, frozen, config.seed, columns=columns,
            steps=config.steps,
        )  # fmt: skip
        for rows in condition.named_parameters().values():
            rows.requires_grad_(True)  # attaching froze everything but the adapter
        trained = {**condition.named_parameters(), **dict(attachment.named_parameters())}
        optimiser, rates = build_optimizer(attachment, condition, config, factors)
        average, scaler = EMA(trained, config.optimizer.ema_decay), loss_scaler(base.device, precision, base.dtype)
        belongs = {
            "base": base_fingerprint.exact, "slot": str(slot or ""), "start": start_hash(start_from),
            "concept": concept.digest(), **({"revision": str(method.revision)} if method.revision > 1 else {}),
        }  # fmt: skip
        run = TrainingState(
            state, config, trained, optimiser, attachment, average, scaler, watcher, belongs, among.is_main
        )
        start = run.restore(force, note) if resume and state.exists() else 0
        with among.main_process_first():
            crops = PhotoCrops(concept, base, whole, size, progress)
        running: float | None = watcher.curve[-1][1] if watcher.curve else None
        pace = SlowSteps(torch.get_num_threads() if base.device.type == "cpu" else 1, note)

        for step in range(start, config.steps):
            if among.any_rank(should_stop()):
                run.save(step)
                raise Stopped(f"Stopped at step {step} of {config.steps}; --resume goes on from there.")
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * lr_factor(step, config)

            samples, held = sample_batch(step, crops, concept, whole, len(noise_schedule.alphas_cumprod)), None
            if ordinary and is_cut_mix_step(step, config):
                samples = cut_mix(samples, ordinary, concept.token, step, whole)
            elif anchors:
                held = anchors.batch(step, whole)

            for parameter in trained.values():
                parameter.grad = None
            total: Tensor = torch.zeros((), device=base.device)
            for part in range(config.optimizer.gradient_accumulation_steps):
                number = among.rank * config.optimizer.gradient_accumulation_steps + part
                mine, share = microbatch(samples, number, parts)
                anchor, anchor_share = microbatch(held, number, parts) if held else (None, 0.0)
                if not mine.prompts:  # there are fewer pictures than parts
                    continue
                noisy = noise_schedule.add_noise(mine.latents, mine.noise, mine.timesteps)
                if maps:
                    maps.begin()
                with autocast(base.device, precision):
                    predicted, anchored = predict(unet, base.dtype, condition, noisy, mine, anchor)
                times = timestep_weights(noise_schedule, mine.timesteps, config.objective.snr_gamma)
                target = target_of(noise_schedule, mine)
                loss = share * diffusion_loss(predicted, target, mine.weights, times, config.objective)
                if anchor and anchored is not None:
                    held_to = weighted_mse(anchored, anchor.targets)
                    loss = loss + anchor_share * config.prior.loss_weight * held_to
                if maps and mine.masks is not None:
                    inside = attention_loss(maps, condition.token_mask(mine.prompts), mine.masks)
                    loss = loss + share * config.objective.attention_loss_weight * inside
                penalty = attachment.penalty() if number == 0 else None
                if penalty is not None:
                    loss = loss + penalty
                scaler.scale(loss).backward()
                total = total + loss.detach()
            total = among.all_reduce_gradients(trained.values(), total)

            condition.freeze_beyond_norm(
                config.max_embedding_norm_ratio
            )  # once the token has moved far enough (Mix-of-Show's limit)
            if not torch.isfinite(total) or not take_step(optimiser, trained.values(), scaler, config.max_grad_norm):
                kept = f"the last good state is kept in {state.name}" if state.exists() else "nothing was saved yet"
                raise NotFiniteError(f"Training met NaN or infinity at step {step}: lower the learning rate ({kept}).")
            attachment.on_step(step + 1)
            average.update(step + 1)

            value = float(total)
            running = value if running is None else 0.95 * running + 0.05 * value
            figures = watcher(step + 1, running, optimiser.param_groups[0]["lr"], condition, attachment, average)
            progress(Event("train", step + 1, config.steps, figures))
            if config.validation.early_stopping_patience and among.any_rank(watcher.plateau):
                note(
                    f"Note: the likeness has not risen for {config.validation.early_stopping_patience} grids; done at step {step + 1}."
                )
                break
            pace.step(time.monotonic())
            if (step + 1) % config.checkpointing_steps == 0 and step + 1 < config.steps:
                run.save(step + 1)

        with average.applied():
            attachment.prune()
            adapter = Adapter(
                name=concept.name,
                noun=concept.noun,
                token=concept.token,
                method=method,
                rank=config.rank,
                slot=slot,
                targets=config.target_modules,
                base=config.base,
                fingerprint=base_fingerprint,
                parameters=attachment.state_dict(),
                sizes={layer: matrix_shape(weights[layer]) for layer in attachment.layers},
                kernels={layer: kernel for layer in attachment.layers if (kernel := kernel_size(weights[layer]))},
                frozen=stored_part(method, frozen),
                vectors=condition.vectors(),
                per_layer_vectors=condition.per_layer_vectors(),
                earlier=start_from.tokens if start_from else {},
                config=comparable_settings(config),
                provenance=provenance(),
            )
        run.save(config.steps)  # until the adapter is written
        watcher.finish(adapter)
        return adapter
