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
from ..formats.native import versions
from ..methods import get_method
from ..methods.attach import Attachment, attach, detach
from ..progress import Event, Progress, silent
from ..slots import Slot
from ..spectrum import bands_of, spectrum_of
from ..tokens import NewTokenEmbedding, embedding_of, expand, initial_vectors, random_vectors
from .draws import draw, target_of
from .preservation import OTHERS, cut_mix, draw_anchors, draw_ordinary, is_cut
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
    bands = bands_of(weights, slot, progress) if slot else None
    size = config.resolution or base.size
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    preserving = config.preservation.weight > 0
    ordinary = draw_ordinary(base, config, concept.noun, size, progress) if preserving else None
    if base.device.type == "cpu":
        pipeline.unet.set_attn_processor(AttnProcessor())  # SDPA's backward is slow on CPU
    embedding = embedding_of(models["text_encoder"])
    tokens = NewTokenEmbedding(
        embedding,
        concept.token,
        initial_vectors(pipeline.tokenizer, models["text_encoder"], concept.noun, concept.token, config.seed),
        OTHERS if preserving else (),
        random_vectors(models["text_encoder"], len(OTHERS), config.seed, "others", concept.token),
    )

    def encode(prompts: list[str]) -> Tensor:
        return encode_prompts(pipeline, tokens, prompts)

    models["text_encoder"].set_input_embeddings(tokens)  # type: ignore[operator]
    try:
        anchors = draw_anchors(ordinary, base, noise_schedule, config, encode) if ordinary else None
        references = reference_values(weights) if bands and (config.normalise or config.slot_rate) else {}
        columns = {layer: references[layer] / bands[layer].S for layer in bands} if bands and config.normalise else None
        attachment = attach(
            models, method, config.rank, concept.name, config.targets, bands, config.seed, columns=columns
        )
        factors = (
            {layer: float((references[layer] / bands[layer].S.mean()) ** config.slot_rate) for layer in references}
            if bands
            else {}
        )
        optimizer, rates = build_optimizer(attachment, tokens, config, factors)
        trained = {"token": tokens.vectors, **dict(attachment.named_parameters())}
        start = 0
        if resume and state.exists():
            start = restore(state, optimizer, trained, config)
        latents = encode_crops(concept, pipeline.vae, config, size)
        norm_limit = config.embedding_norm * float(embedding.weight.float().norm(dim=1).mean())
        running: float | None = None

        for step in range(start, config.steps):
            if should_stop():
                save_state(state, trained, optimizer, {"step": step, "config": comparable(config)})
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
                predicted = pipeline.unet(noisy.to(base.dtype), timesteps, encode(prompts)).sample.float()
            count = len(samples.prompts)
            loss = F.mse_loss(predicted[:count], target_of(noise_schedule, samples))
            if held:
                loss = loss + config.preservation.weight * F.mse_loss(predicted[count:], held.targets)

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
            parameters=attachment.trained(),
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


def reference_values(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The largest singular value of every weight."""
    return {layer: band.S[0] for layer, band in spectrum_of(weights, 1).bands.items()}


def build_optimizer(
    attachment: Attachment, tokens: NewTokenEmbedding, config: TrainConfig, factors: Mapping[str, float]
) -> tuple[torch.optim.Optimizer, list[float]]:
    """AdamW with a group per component and learning-rate factor; returns it and the groups' initial rates.

    ``factors`` multiplies the rate of single layers. The token's neutral value is not zero, so weight decay never
    touches it.
    """
    rates = {"unet": config.learning_rate}
    groups: dict[float, list[nn.Parameter]] = {}
    for layer in attachment.layers:
        component = layer.split(".", 1)[0]
        rate = rates.get(component, config.text_encoder_learning_rate) * factors.get(layer, 1.0)
        groups.setdefault(rate, []).extend(attachment.parameters(layer).values())
    listed: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": config.weight_decay} for rate, parameters in groups.items()
    ]
    listed.append({"params": [tokens.vectors], "lr": config.embedding_learning_rate, "weight_decay": 0.0})
    return torch.optim.AdamW(listed), [group["lr"] for group in listed]


def encode_prompts(pipeline: Any, tokens: NewTokenEmbedding, prompts: list[str]) -> Tensor:
    """Prompts to text features (n, length, width); new words get the ids behind the vocabulary, in their order."""
    tokenizer = pipeline.tokenizer
    first = tokens.base.num_embeddings
    rows = []
    for prompt in prompts:
        ids: list[int] = []
        for part in split_keep(expand(prompt, {tokens.words[0]: len(tokens.vectors)}), tokens.words):
            if part in tokens.words:
                ids.append(first + tokens.words.index(part))
            else:
                ids += tokenizer(part, add_special_tokens=False).input_ids
        ids = [tokenizer.bos_token_id, *ids[: tokenizer.model_max_length - 2], tokenizer.eos_token_id]
        rows.append(ids + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids)))
    return pipeline.text_encoder(torch.tensor(rows, device=tokens.vectors.device))[0]


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
