"""Memory of calibration and distillation in a fusion, computed before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..adapters.attach import inject_adapter
from ..config.fuse import CalibrationConfig, DistillConfig
from ..core.errors import Fix
from ..core.precision import MixedPrecision, autocast, is_half
from ..models.base import Base
from ..models.families import denoiser_of
from ..models.targets import EVERYTHING, find_targets
from ..training.memory import CONTEXT, Estimate, Models, Peak, base_kind, fitting, hollow, hollow_prediction
from .calibration import CHUNK
from .student import correction_spec
from .teacher_targets import CHUNK as TOGETHER

Layers = Mapping[str, nn.Linear | nn.Conv2d]  # by name


def calibration_memory(sizes: Mapping[str, tuple[int, int]], kept: int, config: CalibrationConfig) -> int:
    """The most bytes of what these layers see, (out, in) each, on ``kept`` sets of prompts at once.

    A layer keeps its sampled rows or a Gram matrix; one adapter's exist twice while they are written to disk.
    """
    rows = math.ceil(config.num_images / CHUNK) * config.num_inference_steps * config.tokens_per_call
    once = sum(8 * inside * min(inside, rows) for _, inside in sizes.values())
    return once * (kept + config.cache)


def distillation_memory(
    models: Models,
    vae: nn.Module,
    layers: Layers,
    config: DistillConfig,
    size: int,
    device: str = "cuda",
    precision: MixedPrecision = "bf16",
) -> Estimate:
    """Sample targets and take a step with fake tensors, and count.

    Args:
        models: U-Net and text encoders, ``vae``: its autoencoder; they stay as they are and may be on the meta device.
        layers: those of their layers that learn, by name.
        size: side of the pictures in pixels.
        device: ``cuda`` or ``cpu``.
        precision: in which the networks work during distillation.
    """
    weights = sum(p.numel() * p.element_size() for model in (*models.values(), vae) for p in model.parameters())
    students, trained = hollow_students(models, layers, config.rank)
    with FakeTensorMode(allow_non_fake_inputs=True):  # on a pretended CPU, so that autocast acts as it does
        copies = hollow(students, "cpu")
        denoiser = denoiser_of(copies, vae)
        denoiser.set_lean_attention(device, is_half(precision, denoiser.dtype), size)
        if config.gradient_checkpointing:
            denoiser.network.enable_gradient_checkpointing()

        tensors = [tensor for model in copies.values() for tensor in (*model.parameters(), *model.buffers())]
        with Peak(iter(tensors)) as sampling, torch.no_grad():
            hollow_prediction(denoiser, 2 * min(TOGETHER, config.batch_size), size)
        with Peak(iter(tensors)) as step, autocast(torch.device("cpu"), precision):
            for _ in range(min(config.gradient_accumulation_steps, 2)):  # the second finds the first one's gradients
                (hollow_prediction(denoiser, config.batch_size, size).float() ** 2).mean().backward()
    # The optimizer's step needs the gradients and one more number each.
    phases = {"sampling targets": sampling.most, "distilling": max(step.most, 2 * 4 * trained)}
    factors = 4 * trained if config.rank else 0
    return Estimate(weights, 2 * 4 * trained + factors, phases, CONTEXT[device])


def hollow_students(models: Models, layers: Layers, rank: int) -> tuple[dict[str, nn.Module], int]:
    """Copies of networks on the meta device in which these layers learn, and how many numbers do."""
    copies = hollow(models, "meta")
    for model in copies.values():
        model.requires_grad_(False)
    if rank:
        return copies, inject_adapter(copies, correction_spec(rank, layers)).count()
    found = find_targets(copies, EVERYTHING)
    for layer in layers:
        found[layer].weight.requires_grad_(True)
    return copies, sum(found[layer].weight.numel() for layer in layers)


def check_distillation_memory(base: Base, layers: Layers, config: DistillConfig, precision: MixedPrecision) -> str:
    """A sentence on the memory that distillation takes and that is free.

    Raises:
        UserError: it clearly does not fit.
    """
    estimate = distillation_memory(
        base.models, base.pipeline.vae, layers, config, config.resolution or base.size, base_kind(base), precision
    )
    fewer = max(2, config.batch_size // 2)
    batches = config.gradient_accumulation_steps * (config.batch_size // fewer)
    smaller = Fix("distill.batch_size", str(fewer), also=Fix("distill.gradient_accumulation_steps", str(batches)))
    return fitting(
        estimate,
        base,
        "Distillation",
        *([] if config.gradient_checkpointing else [Fix("distill.gradient_checkpointing", "true")]),
        *([smaller] if fewer < config.batch_size else []),
        *([] if config.rank else [Fix("distill.rank", "16", "to learn corrections in place of whole weights")]),
        Fix("distill.resolution", str(base.size // 2), "for smaller pictures"),
        Fix("distill.target_modules", "null", "to distill the adapted layers only"),
        Fix("distill.steps", "0"),
    )
