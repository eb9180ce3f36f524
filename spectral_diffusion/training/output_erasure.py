"""Randomized output erasure: for other prompts the adapter's output is trained to be nothing.

After BlockLoRA (arXiv:2503.08575). A random share of a step's photos is shown under the prompt of another subject,
and the target is what the base itself predicts there. Unlike prior preservation it generates no pictures, and asks for
the base's prediction at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters.attach import disabled_adapters
from ..config.train import TrainConfig, generic_subject
from ..core.rng import keyed_generator
from ..models.base import Base
from ..models.prompt_encoder import PromptEncoder
from .batch import Batch
from .prior_preservation import OTHER_TOKENS

POOL = 128  # other prompts


def erase(batch: Batch, others: Sequence[str], step: int, config: TrainConfig) -> Batch:
    """A batch in which a random share of the photos has another subject's prompt, some with another concept's token."""
    prompts, erased = list(batch.prompts), [False] * len(batch.prompts)
    for sample in range(len(prompts)):
        generator = keyed_generator(config.seed, "erase", step, sample)
        erased[sample] = float(torch.rand((), generator=generator)) < config.interference.erasure_prob
        if erased[sample]:
            prompts[sample] = others[int(torch.randint(len(others), (), generator=generator))]
    weights = batch.weights
    if weights is not None:  # there the whole picture counts
        weights = weights.clone()
        weights[[sample for sample, is_erased in enumerate(erased) if is_erased]] = 1.0
    return replace(batch, prompts=prompts, erased=erased, weights=weights)


def other_prompts(config: TrainConfig) -> list[str]:
    """Prompts of generic subjects, as prior images have them: few enough that their encodings can be kept."""
    return [other_prompt(config, keyed_generator(config.seed, "other", index)) for index in range(POOL)]


def other_prompt(config: TrainConfig, generator: torch.Generator) -> str:
    """One of them."""

    def pick(options: list[str] | tuple[str, ...]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    prior = config.prior
    noun = pick(prior.nouns)
    subject = generic_subject(pick(prior.adjectives), noun)
    if float(torch.rand((), generator=generator)) < prior.other_token_prob:
        subject = f"{pick(OTHER_TOKENS)} {noun}"
    return pick(prior.scenes).replace("{}", subject)


@torch.no_grad()
def erased_targets(target: Tensor, noisy: Tensor, batch: Batch, base: Base, encode: PromptEncoder) -> Tensor:
    """The targets (n, c, h, w), those of the erased samples replaced by the base's own predictions."""
    rows = [row for row, erased in enumerate(batch.erased or []) if erased]
    if not rows:
        return target
    prompts = [batch.prompts[row] for row in rows]
    with disabled_adapters(base.models):
        predicted = base.denoiser.predict(noisy[rows], batch.timesteps[rows], encode(prompts, noisy.shape[-2:]))
    replaced = target.clone()
    replaced[rows] = predicted.to(target.dtype)
    return replaced
