"""The training loop. It reads from top to bottom: concept and base in, adapter out."""

from __future__ import annotations

from collections.abc import Callable
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
from ..data.samples import encode_crops, keyed_generator, photo_of
from ..errors import NotFiniteError, UserError
from ..formats.native import versions
from ..methods import get_method
from ..methods.attach import Attachment, attach, detach
from ..progress import Event, Progress, silent
from ..slots import Slot
from ..spectrum import spectrum_of
from ..tokens import NewTokenEmbedding, embedding_of, expand, initial_vectors, words
from .state import load_state, save_state


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
) -> Adapter:
    """Train one concept (DreamBooth style) into an adapter of ``base``.

    Every random draw is keyed by (seed, step, sample) and the state holds everything else, so that
    k steps, a stop and ``resume`` give the same bits as an unbroken run on a CPU.

    Args:
        slot: the columns of the spectrum this concept trains; None for methods without a slot.
        state: where to save the state on interval and on a stop; removed at the end.
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
    bands = spectrum_of(weights, slot.stop, progress=progress).slot(slot.start, slot.stop) if slot else None
    attachment = attach(models, method, config.rank, concept.name, config.targets, bands, config.seed)
    embedding = embedding_of(models["text_encoder"])
    tokens = NewTokenEmbedding(
        embedding, initial_vectors(pipeline.tokenizer, models["text_encoder"], concept.noun, config.seed)
    )
    models["text_encoder"].set_input_embeddings(tokens)  # type: ignore[operator]
    if base.device.type == "cpu":
        pipeline.unet.set_attn_processor(AttnProcessor())  # SDPA's backward is slow on CPU
    try:
        optimizer, rates = build_optimizer(attachment, tokens, config)
        trained = {"token": tokens.vectors, **dict(attachment.named_parameters())}
        start = 0
        if resume and state.exists():
            start = restore(state, optimizer, trained, config)
        latents = encode_crops(concept, pipeline.vae, config, config.resolution or base.size)
        noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        norm_limit = config.embedding_norm * float(embedding.weight.float().norm(dim=1).mean())
        running: float | None = None

        for step in range(start, config.steps):
            if should_stop():
                save_state(state, trained, optimizer, {"step": step, "config": comparable(config)})
                raise Stopped(f"Stopped at step {step} of {config.steps}; --resume goes on from there.")
            fraction = 1 - step / config.steps if config.decay == "linear" else 1.0
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * fraction

            batch, noise, timesteps, prompts = draw(step, latents, concept, config, len(noise_schedule.alphas_cumprod))
            with torch.autocast(base.device.type, torch.bfloat16, enabled=config.autocast):
                text = encode_prompts(pipeline, tokens, concept, prompts)
                noisy = noise_schedule.add_noise(batch, noise, timesteps)
                predicted = pipeline.unet(noisy.to(base.dtype), timesteps, text).sample
            loss = F.mse_loss(predicted.float(), target_of(noise_schedule, batch, noise, timesteps))

            optimizer.zero_grad()
            loss.backward()
            if tokens.vectors.detach().norm(dim=1).mean() >= norm_limit:
                tokens.vectors.grad = None  # the token has moved far enough (Mix-of-Show's limit)
            total = nn.utils.clip_grad_norm_(list(trained.values()), config.clip)
            if not torch.isfinite(loss) or not torch.isfinite(total):
                kept = f"the last good state is kept in {state.name}" if state.exists() else "nothing was saved yet"
                raise NotFiniteError(f"Training met NaN or infinity at step {step}: lower the learning rate ({kept}).")
            optimizer.step()

            value = float(loss.detach())
            running = value if running is None else 0.95 * running + 0.05 * value
            progress(Event("train", step + 1, config.steps, {"loss": running}))
            if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                save_state(state, trained, optimizer, {"step": step + 1, "config": comparable(config)})

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
            parameters={name: value.detach().cpu().clone() for name, value in attachment.named_parameters()},
            bands=bands or {},
            vectors={"text_encoder": tokens.vectors.detach().cpu().clone()},
            config=comparable(config),
            versions=versions(),
        )
        state.unlink(missing_ok=True)
        return adapter
    finally:
        models["text_encoder"].set_input_embeddings(embedding)  # type: ignore[operator]
        detach(models)


def build_optimizer(
    attachment: Attachment, tokens: NewTokenEmbedding, config: TrainConfig
) -> tuple[torch.optim.Optimizer, list[float]]:
    """AdamW with one group per component; returns it and the groups' initial rates.

    The token's neutral value is not zero, so weight decay never touches it.
    """
    by_component: dict[str, list[nn.Parameter]] = {"unet": [], "text_encoder": []}
    for name, parameter in attachment.named_parameters():
        by_component[name.split(".", 1)[0]].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": by_component["unet"], "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {
            "params": by_component["text_encoder"],
            "lr": config.text_encoder_learning_rate,
            "weight_decay": config.weight_decay,
        },
        {"params": [tokens.vectors], "lr": config.embedding_learning_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups), [group["lr"] for group in groups]


def draw(
    step: int, latents: Tensor, concept: Concept, config: TrainConfig, timesteps: int
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """What one step trains on: latents (n, c, h, w), noise, timesteps (n,), prompts."""
    batch, noises, times, prompts = [], [], [], []
    for sample in range(config.batch):
        generator = keyed_generator(config.seed, "step", step, sample)
        photo = photo_of(step, sample, len(latents), config)
        crop, template = (int(torch.randint(n, (), generator=generator)) for n in (config.crops, len(config.templates)))
        spot = torch.rand((), generator=generator) ** config.timestep_power
        times.append((spot * timesteps).long().clamp_max(timesteps - 1))
        noise = torch.randn(latents.shape[2:], generator=generator)
        noise += config.noise_offset * torch.randn(latents.shape[2], 1, 1, generator=generator)
        batch.append(latents[photo, crop])
        noises.append(noise)
        prompts.append(concept.prompt(concept.photos[photo].caption or config.templates[template]))
    device = latents.device
    return torch.stack(batch), torch.stack(noises).to(device), torch.stack(times).to(device), prompts


def target_of(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """ε or v, as the base's scheduler says.

    Raises:
        UserError: it says something else.
    """
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    raise UserError(f"This base predicts '{kind}'; only epsilon and v_prediction can be trained.")


def encode_prompts(pipeline: Any, tokens: NewTokenEmbedding, concept: Concept, prompts: list[str]) -> Tensor:
    """Prompts to text features (n, length, width); the concept's words get ids behind the vocabulary."""
    tokenizer = pipeline.tokenizer
    count, first = len(tokens.vectors), tokens.base.num_embeddings
    names = words(concept.token, count)
    rows = []
    for prompt in prompts:
        ids: list[int] = []
        for part in split_keep(expand(prompt, {concept.token: count}), names):
            if part in names:
                ids.append(first + names.index(part))
            else:
                ids += tokenizer(part, add_special_tokens=False).input_ids
        ids = [tokenizer.bos_token_id, *ids[: tokenizer.model_max_length - 2], tokenizer.eos_token_id]
        rows.append(ids + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids)))
    device = tokens.vectors.device
    return pipeline.text_encoder(torch.tensor(rows, device=device))[0]


def split_keep(text: str, names: list[str]) -> list[str]:
    """Cut a text at the given words, keeping them as parts of their own."""
    import re

    longest_first = sorted(names, key=len, reverse=True)
    return [p.strip() for p in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if p.strip()]


def comparable(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the result: all but where things lie and how often states are saved."""
    kept = config.model_dump(mode="json")
    for key in ("concept", "output", "save_every", "device"):
        kept.pop(key)
    return kept


def restore(
    state: Path, optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], config: TrainConfig
) -> int:
    """Load a saved state into place; returns the step to go on with."""
    tensors, meta = load_state(state, optimizer)
    before, now = meta.get("config", {}), comparable(config)
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise UserError(
            f"{state} was made with {changed[0]}={before.get(changed[0])}, now it is {now[changed[0]]}; "
            "resume with the same settings, or train without --resume."
        )
    if set(tensors) != set(trained) or any(tensors[n].shape != trained[n].shape for n in trained):
        raise UserError(f"{state} belongs to another concept or base; train without --resume.")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    return int(meta["step"])
