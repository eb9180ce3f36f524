"""The training loop: a settled job in, an adapter out. ``Trainer.train`` reads from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.attach import AdapterSpec, inject_adapter, unloading
from ..adapters.formats.native import content_hash
from ..adapters.frozen import frozen_tensors, stored_part
from ..config.train import TrainConfig
from ..core.errors import Cancelled, NotFiniteError
from ..core.hooks import QUIET, Hooks
from ..core.machine import provenance
from ..core.precision import autocast, is_half, loss_scaler, resolve_mixed_precision, tf32
from ..data.folder import Concept
from ..data.samples import PhotoCrops
from ..linalg import kernel_size
from ..methods import Method, get_method
from ..models.attention_maps import attention_loss, capture_attention_maps
from ..models.base import Base
from ..models.offload import is_offloaded
from ..models.per_layer_tokens import cross_attention, per_layer_attention
from ..models.prompt_encoder import PromptEncoder
from ..models.split_linear import fused_layers
from ..models.targets import find_targets
from ..slots.ledger import Slot
from .batch import Batch, sample_batch
from .checkpoint import TrainingState, comparable_settings
from .continuation import slot_lr_scaling, start_hash
from .distributed import World, global_batch, microbatch, take_step
from .half_weights import half_weights, halves
from .losses import diffusion_loss, weighted_mse
from .optimizers import EMA, build_optimizer, lr_schedule
from .output_erasure import erase, erased_targets, other_prompts
from .overlap import EarlierSpaces, earlier_spaces, overlap_penalty
from .prior_images import make_prior_images
from .prior_preservation import (
    OTHER_TOKENS,
    PriorTargets,
    cut_mix,
    is_cut_mix_step,
    predict_both,
    predict_prior_targets,
)
from .readings import Readings
from .sharding import sharded
from .slow_steps import SlowSteps
from .validation import Validator


@dataclass(frozen=True)
class TrainingJob:
    """A training job: the concept, the base, and the path of its state. Everything in it is settled.

    Attributes:
        slot: the columns (or rows) that the concept has for itself; None for methods without a slot.
        state: where the state is saved on interval, on a stop and at the end; the caller removes it once the adapter
            is written.
        earlier: adapters whose directions the overlap penalty keeps this one out of.
        start_from: an adapter whose trained columns this one starts from, without a new decomposition.
        world: the processes that share the work; each takes its part of every batch.
        resume: go on from ``state`` if it exists; ``force``: even with other settings.
    """

    config: TrainConfig
    base: Base
    concept: Concept
    slot: Slot | None
    state: Path
    start_from: Adapter | None = None
    world: World = field(default_factory=World)
    resume: bool = False
    force: bool = False
    earlier: Sequence[Adapter] = ()

    @property
    def method(self) -> Method:
        """The fine-tuning method."""
        return get_method(self.config.method)

    @property
    def size(self) -> int:
        """The short edge of the photos in pixels."""
        return self.config.resolution or self.base.size

    @property
    def parts(self) -> int:
        """Into how many parts every batch is cut: by processes and by gradient accumulation."""
        return self.world.count * self.config.optimizer.gradient_accumulation_steps


def train(job: TrainingJob, hooks: Hooks = QUIET) -> Adapter:
    """Train one concept (DreamBooth style) into an adapter.

    Every random number is keyed by (seed, step, sample) and the state holds everything else, so that k steps, a stop
    and ``resume`` give the same bits as an unbroken run on a CPU.

    Raises:
        Cancelled: ``hooks.should_stop`` said so; the state is saved.
        NotFiniteError: NaN or infinity; the last good state is kept.
        UserError: the state belongs to other settings.
    """
    with ExitStack() as stack:
        return Trainer(job, hooks, stack).train()


class Trainer:
    """One training: networks with the adapter on them, data, optimizer and state.

    Args:
        stack: is closed by the caller; it takes the adapter off the networks again.
    """

    def __init__(self, job: TrainingJob, hooks: Hooks, stack: ExitStack) -> None:
        self.job, self.hooks, self.config, self.world = job, hooks, job.config, job.world
        self.base, self.denoiser, self.concept = job.base, job.base.denoiser, job.concept
        self.fingerprint = self.base.fingerprint  # before anything is attached to it
        self.whole = global_batch(self.config, job.parts)  # the settings of one process that takes a step at once
        self.precision = resolve_mixed_precision(self.config.mixed_precision, self.base.device, self.base.dtype)
        self._read_weights()
        # Several processes stop together, between steps.
        alone = hooks if self.world.count == 1 else Hooks(hooks.progress, hooks.notify)
        preserving = self.config.prior.loss_weight > 0
        self.prior_images = (
            make_prior_images(self.base, self.config, self.concept.nouns, job.size, alone) if preserving else None
        )
        erasing = self.config.interference.erasure_prob > 0
        self._enter(stack, OTHER_TOKENS if preserving or erasing else ())
        self._attach()
        whole = self.base.dtype == torch.float32 and not is_offloaded(self.denoiser.network)
        if whole and halves(self.base.device, self.precision, job.method):
            stack.enter_context(half_weights(self.denoiser.network, self.precision))
            self.validator.precision = self.precision
        self._optimize()
        self.state = TrainingState(
            job.state, self.config, self.trained, self.optimizer, self.adapter, self.ema, self.scaler, self.validator,
            self._belongs(), self.world.is_main,
        )  # fmt: skip
        resuming = job.resume and job.state.exists()
        self.start = self.state.restore(job.force, hooks) if resuming else 0
        with self.world.main_process_first():
            self.crops = PhotoCrops(self.concept, self.base, self.whole, job.size, Hooks(progress=hooks.progress))
        stack.enter_context(sharded(self.denoiser.network, self.world, self.config.shard_base))
        self.running_loss: float | None = self.validator.curve[-1][1] if self.validator.curve else None
        self.readings = Readings(self.base.device, self.config.steps)
        threads = torch.get_num_threads() if self.base.device.type == "cpu" else 1
        self.pace = SlowSteps(threads, hooks.notify)

    # ------------------------------------------------------------------ set-up

    def _read_weights(self) -> None:
        """Read from the weights all that the training needs of them, and keep none: they may move to another device."""
        targets, method = self.config.target_modules, self.job.method
        weights, self.sizes = self.base.weights(targets), self.base.sizes(targets)
        layers = find_targets(self.base.models, targets)
        self.kernels = {name: kernel for name, layer in layers.items() if (kernel := kernel_size(layer.weight))}
        spaces = earlier_spaces(self.job.earlier, weights)
        device = self.base.device
        self.earlier = {
            layer: EarlierSpaces(space.outputs.to(device), space.inputs.to(device), space.energy)
            for layer, space in spaces.items()
        }
        with self.world.main_process_first():
            self.frozen = self._frozen(weights)
        self.columns, self.lr_factors = (
            slot_lr_scaling(weights, self.frozen, self.config) if method.builds_on == "columns" else (None, {})
        )

    def _frozen(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The tensors that the method builds on, by layer."""
        job = self.job
        if job.start_from:
            assert job.method.continue_from is not None  # as the settings were checked
            return {
                layer: job.method.continue_from(job.start_from.parameters_of(layer), job.start_from.frozen_of(layer))
                for layer in job.start_from.layers
            }
        return frozen_tensors(job.method, weights, self.config.rank, job.slot, Hooks(progress=self.hooks.progress))

    def _enter(self, stack: ExitStack, other_tokens: tuple[str, ...]) -> None:
        """Put the tokens in place, and everything that is only for the time of training."""
        config, base, denoiser, size = self.config, self.base, self.denoiser, self.job.size
        layers = len(cross_attention(denoiser.network)) if config.per_layer_tokens else 0
        concept = self.concept
        encoder = PromptEncoder(base, concept, config.seed, size, other_tokens, layers, concept.joint)
        self.encode = stack.enter_context(encoder)
        stack.enter_context(unloading(base.models))
        stack.enter_context(tf32(base.device, config.allow_tf32))
        stack.enter_context(denoiser.fast_attention(is_half(self.precision, base.dtype), size))
        stack.enter_context(denoiser.gradient_checkpointing(config.gradient_checkpointing))
        stack.enter_context(denoiser.compiled(config.compile))
        uses_attention = config.objective.attention_loss_weight > 0
        self.maps = stack.enter_context(capture_attention_maps(denoiser.network, uses_attention))
        stack.enter_context(per_layer_attention(base, config.per_layer_tokens))
        self.validator = stack.enter_context(Validator(config, self.concept, base, self.hooks, self.world.is_main))
        self.other_prompts = other_prompts(config) if config.interference.erasure_prob else []
        if self.other_prompts and not base.tokenizers:  # now, while the text encoder is at hand
            self.encode(self.other_prompts)
        self.prior_targets = (
            predict_prior_targets(self.prior_images, denoiser, config, self.encode, Hooks(progress=self.hooks.progress))
            if self.prior_images
            else None
        )

    def _attach(self) -> None:
        """Inject the adapter; it and the token's rows are then all that is trainable."""
        config, method = self.config, self.job.method
        spec = AdapterSpec(method, config.rank, config.target_modules, config.seed, steps=config.steps)
        self.adapter = inject_adapter(self.base.models, spec, "concept", self.frozen, self.columns)
        for rows in self.encode.named_parameters().values():
            rows.requires_grad_(True)
        self.trained: dict[str, nn.Parameter] = {
            **self.encode.named_parameters(),
            **dict(self.adapter.named_parameters()),
        }

    def _optimize(self) -> None:
        """Optimizer, moving average and loss scaler."""
        self.optimizer, self.base_lrs = build_optimizer(self.adapter, self.encode, self.config, self.lr_factors)
        optimizer = self.config.optimizer
        self.lr_factor = lr_schedule(self.config.lr_scheduler, self.config.steps, optimizer.lr_warmup_steps)
        self.ema = EMA(self.trained, optimizer.ema_decay)
        self.scaler = loss_scaler(self.base.device, self.precision, self.base.dtype)

    def _belongs(self) -> dict[str, str]:
        """The hashes that a saved state must match."""
        job, revision = self.job, self.job.method.revision
        return {
            "base": self.fingerprint.exact,
            "slot": str(job.slot or ""),
            "start": start_hash(job.start_from),
            "concept": self.concept.digest(),
            **({"revision": str(revision)} if revision > 1 else {}),
            # Batches of all processes in all accumulations together, which decide the photos of a step.
            "parts": str(self.world.count * self.config.optimizer.gradient_accumulation_steps),
            **({"earlier": " ".join(map(content_hash, job.earlier))} if job.earlier else {}),
        }

    # ------------------------------------------------------------------ the loop

    def train(self) -> Adapter:
        """All steps, then the adapter."""
        for step in range(self.start, self.config.steps):
            if self.world.any_rank(self.hooks.should_stop()):
                self.save(step)
                raise Cancelled(f"Stopped at step {step} of {self.config.steps}; it can be resumed from there.")
            self.train_step(step)
            if self.report(step + 1):
                break
            if (step + 1) % self.config.checkpointing_steps == 0 and step + 1 < self.config.steps:
                self.save(step + 1)
        return self.finish()

    def save(self, step: int) -> None:
        """Save the state, unless something went wrong since the last reading."""
        self.read()
        self.state.save(step)

    def read(self) -> None:
        """Take in the losses of the steps since the last reading.

        Raises:
            NotFiniteError: a loss or a gradient was NaN or infinite.
        """
        losses, wrong = self.readings.read()
        if wrong is not None:
            state = self.job.state
            fallback = f"the last good state is kept in {state.name}" if state.exists() else "nothing was saved yet"
            raise NotFiniteError(f"Training met NaN or infinity at step {wrong}: lower the learning rate ({fallback}).")
        for loss in losses:
            self.running_loss = loss if self.running_loss is None else 0.95 * self.running_loss + 0.05 * loss

    def train_step(self, step: int) -> None:
        """One step of the optimizer."""
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = rate * self.lr_factor(step)
        batch, prior = self.next_batch(step)
        total = self.forward_backward_step(batch, prior)
        with self.encode.frozen_beyond_norm(self.config.max_embedding_norm_ratio):
            try:
                norm = take_step(self.optimizer, self.trained.values(), self.scaler, self.config.max_grad_norm)
            except torch.linalg.LinAlgError:  # LoRA's preconditioner met what an earlier step has made NaN
                self.read()
                raise
        self.adapter.on_step(step + 1)
        self.ema.update(step + 1)
        self.readings.add(step, total, norm)

    def next_batch(self, step: int) -> tuple[Batch, PriorTargets | None]:
        """The photos of a step, and the prior images beside them; in a Cut-Mix step both are in the same images."""
        batch = sample_batch(step, self.crops, self.concept, self.whole, self.denoiser)
        if self.prior_images and is_cut_mix_step(step, self.config):
            things = [index for index, token in enumerate(batch.tokens) if token not in self.concept.styles]
            if things:
                return cut_mix(batch, self.prior_images, step, self.whole, things), None
        if self.other_prompts:
            batch = erase(batch, self.other_prompts, step, self.whole)
        return batch, self.prior_targets.batch(step, self.whole, self.base.device) if self.prior_targets else None

    def forward_backward_step(self, batch: Batch, prior: PriorTargets | None) -> Tensor:
        """Gradients of the whole batch, in parts; returns its loss, over all processes."""
        for parameter in self.trained.values():
            parameter.grad = None
        total: Tensor = torch.zeros((), device=self.base.device)
        accumulate = self.config.optimizer.gradient_accumulation_steps
        for part in range(accumulate):
            number = self.world.rank * accumulate + part
            own_batch, share = microbatch(batch, number, self.job.parts)
            prior_part, prior_share = microbatch(prior, number, self.job.parts) if prior else (None, 0.0)
            if not own_batch.prompts:  # there are fewer pictures than parts
                if not self.config.shard_base:
                    continue
                own_batch, share = microbatch(batch, 0, self.job.parts)[0], 0.0  # the others need its shards
            loss = self.compute_loss(own_batch, share, prior_part, prior_share)
            if number == 0 and (penalty := self.adapter.penalty()) is not None:
                loss = loss + penalty
            if number == 0 and self.earlier:
                weight = self.config.interference.overlap_weight
                loss = loss + weight * overlap_penalty(self.adapter, self.earlier)
            self.scaler.scale(loss).backward()
            total = total + loss.detach()
        return self.world.all_reduce_gradients(self.trained.values(), total)

    def compute_loss(self, batch: Batch, share: float, prior: PriorTargets | None, prior_share: float) -> Tensor:
        """The loss of one part of a batch, in its share of the whole: diffusion, prior preservation, attention."""
        objective = self.config.objective
        noisy = self.denoiser.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = self.denoiser.target(batch.latents, batch.noise, batch.timesteps)
        if batch.erased:
            with autocast(self.base.device, self.precision):
                target = erased_targets(target, noisy, batch, self.base, self.encode)
        if self.maps:
            self.maps.begin()
        with autocast(self.base.device, self.precision):
            predicted, prior_predicted = predict_both(self.denoiser, self.encode, noisy, batch, prior)
        times = self.denoiser.timestep_weights(batch.timesteps, objective)
        loss = share * diffusion_loss(predicted, target, batch.weights, times, objective)
        if prior and prior_predicted is not None:
            prior_loss = weighted_mse(prior_predicted, prior.targets)
            loss = loss + prior_share * self.config.prior.loss_weight * prior_loss
        if self.maps and batch.masks is not None:
            inside = attention_loss(self.maps, self.encode.token_mask(batch.prompts), batch.masks)
            loss = loss + share * objective.attention_loss_weight * inside
        return loss

    def report(self, done: int) -> bool:
        """Validate and report after ``done`` steps; returns whether training stops early."""
        config = self.config
        if self.running_loss is None or self.readings.is_due(done) or self.validator.is_due(done):
            self.read()
        assert self.running_loss is not None
        rate = self.optimizer.param_groups[0]["lr"]
        metrics = self.validator(done, self.running_loss, rate, self.encode, self.adapter, self.ema)
        self.hooks.step("train", done, config.steps, **metrics)
        if config.validation.early_stopping_patience and self.world.any_rank(self.validator.plateau):
            grids = config.validation.early_stopping_patience
            self.hooks.notify(f"Note: identity has not improved for {grids} validation grids; done at step {done}.")
            return True
        self.pace.step(time.monotonic())
        return False

    def finish(self) -> Adapter:
        """The trained adapter; its state is saved until the caller has written it."""
        with self.ema.applied():
            self.adapter.prune()
            adapter = self.build_adapter()
            self.save(self.config.steps)
            self.validator.finish(adapter)
            return adapter

    def build_adapter(self) -> Adapter:
        """The trained adapter, with everything that its file records."""
        job, config, concept, layers = self.job, self.config, self.concept, self.adapter.layers
        return Adapter(
            name=concept.name,
            noun=concept.noun,
            token=concept.token,
            method=job.method,
            rank=config.rank,
            slot=job.slot,
            targets=config.target_modules,
            base=config.base,
            fingerprint=self.fingerprint,
            parameters=self.adapter.state_dict(),
            sizes={layer: self.sizes[layer] for layer in layers},
            fused=fused_layers(self.base.models),
            family=self.base.family.pipeline_class.__name__,
            kernels={layer: self.kernels[layer] for layer in layers if layer in self.kernels},
            frozen=stored_part(job.method, self.frozen),
            vectors=self.encode.vectors(),
            per_layer_vectors=self.encode.per_layer_vectors(),
            earlier=(job.start_from.tokens if job.start_from else {}) | self.encode.joint_vectors(),
            config=comparable_settings(config),
            provenance=provenance(),
        )
