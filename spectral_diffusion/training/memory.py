"""How much memory a training takes, computed before it starts: its phases are run with tensors that hold nothing."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..adapters.attach import AdapterSpec, inject_adapter
from ..adapters.frozen import Frozen, hollow_tensors
from ..config.train import TrainConfig
from ..core.errors import Fix, UserError
from ..core.precision import DTYPES, autocast, is_half, resolve_mixed_precision
from ..methods import get_method
from ..models.base import Base
from ..models.denoiser import Denoiser
from ..models.families import denoiser_of
from ..models.offload import is_offloaded
from ..models.per_layer_tokens import cross_attention
from ..models.quantization import block_bytes, quantized_bytes, working_bytes
from ..models.targets import find_targets, layer_shape
from ..models.vae import at_once, decode_batch, encoder_input, latent_channels, overflows, pixels_per_cell
from ..slots.ledger import Slot
from .half_weights import halvable, halves
from .prior_images import CHUNK as PICTURES_AT_ONCE

SMALL = 50_000_000  # parameters of a base below which the memory is not reported
STATES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}  # bytes of an optimizer's own numbers per trained one
MARGIN = 1.1  # what allocators lose between blocks
CONTEXT = {"cuda": 600 * 2**20, "cpu": 700 * 2**20}  # bytes of CUDA itself; of Python with its libraries

Models = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training: what is there all the time, and the peak of each phase on top of it."""

    weights: int
    adapter: int
    phases: dict[str, int]
    context: int

    @property
    def total(self) -> int:
        """The most at once."""
        return round((self.weights + self.adapter + max(self.phases.values())) * MARGIN) + self.context

    def summary(self) -> str:
        """The parts, for a person."""
        phases = ", ".join(f"{gib(size)} at most while {name}" for name, size in self.phases.items())
        return f"{gib(self.weights)} of weights, {gib(self.adapter)} of what learns and its optimizer, {phases}"


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.1f} GiB"


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at once, each storage once; ``most`` is their maximum."""

    def __init__(self, free: Iterator[Tensor]) -> None:
        """``free``: tensors that are there anyway and cost nothing more."""
        super().__init__()
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata: 0 for tensor in free}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.now += self.known[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


def hollow(models: Models, device: str, dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    """Copies of networks, with what is attached to them, whose tensors hold nothing, in another ``dtype`` if given.

    They are on the meta device, or inside a ``FakeTensorMode`` on any other.
    """
    memo: dict[int, Any] = {}
    for model in models.values():
        for parameter in model.parameters():
            empty = torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device=device)
            memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
        others = [leaf for module in model.modules() for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
        for tensor in (*model.buffers(), *others):  # some modules keep tables in plain attributes
            if id(tensor) not in memo:
                memo[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return copy.deepcopy(dict(models), memo)


def hollow_frozen_tensors(models: Models, config: TrainConfig) -> Frozen:
    """The frozen tensors of the config's method, layer by layer, without values."""
    method = get_method(config.method)
    slot = Slot.interval(0, config.rank) if method.slot else None
    layers = find_targets(dict(models), config.target_modules).items()
    return {layer: hollow_tensors(method, layer_shape(module), config.rank, slot) for layer, module in layers}


def estimate(models: Models, vae: nn.Module, config: TrainConfig, size: int, device: str = "cuda") -> Estimate:
    """Run every phase of a training with tensors that hold nothing, and count.

    Args:
        models: U-Net and text encoders, ``vae``: its autoencoder; they stay as they are and may be on the meta device.
        size: side of the training pictures in pixels.
        device: ``cuda`` or ``cpu``.
    """
    adapted, trained, frozen_apart = hollow_adapted(models, config)
    weights = tensor_bytes(p for model in (*models.values(), vae) for p in model.parameters())
    on_device, working = smaller_weights(models, config)
    with FakeTensorMode(allow_non_fake_inputs=True):  # on a pretended CPU, so that autocast acts as it does
        phases = TrainingPhases(adapted, vae, config, size, device)
        peaks = phases.measure()
        frozen = tensor_bytes(phases.resident) + phases.halved - weights - 4 * trained + frozen_apart
    per_parameter = 4 + STATES[config.optimizer.name] + (4 if config.optimizer.ema_decay else 0)
    peaks = {name: peak if name == "encoding photos" else peak + working for name, peak in peaks.items()}
    return Estimate(
        weights - on_device - phases.halved, max(0, frozen + trained * per_parameter), peaks, CONTEXT[device]
    )


def smaller_weights(models: Models, config: TrainConfig) -> tuple[int, int]:
    """By how many bytes quantization and offloading shrink the networks, and what their computation adds to it."""
    network, kind = list(models.values())[-1], config.quantization  # text encoders come first
    whole = tensor_bytes(network.parameters())
    if config.shard_base:  # a share of every weight, one block whole, and the next one on its way
        return whole - whole // processes(), 2 * largest_block(network)
    size = whole if kind == "none" else quantized_bytes(network, kind)
    if kind == "none" and not config.layer_offload:
        return 0, 0
    # In the backward pass two weights may be there at once: the next one is made before the last one is freed.
    return max(whole - size, block_bytes(network) if config.layer_offload else 0), 2 * working_bytes(network)


def processes() -> int:
    """How many processes share a base: as many as a launcher started, else two."""
    count = os.environ.get("WORLD_SIZE", "")
    return max(2, int(count) if count.isdecimal() else 2)


def largest_block(network: nn.Module) -> int:
    """The bytes of the largest block of a network."""
    blocks = [block for parent in network.modules() if isinstance(parent, nn.ModuleList) for block in parent]
    return max(tensor_bytes(block.parameters()) for block in blocks)


def hollow_adapted(models: Models, config: TrainConfig) -> tuple[dict[str, nn.Module], int, int]:
    """Copies of networks on the meta device, with the adapter of a training attached.

    Returns:
        The copies, the number of trained parameters, and the bytes of frozen tensors that the copies lack.
    """
    method, copies, frozen = get_method(config.method), hollow(models, "meta"), hollow_frozen_tensors(models, config)
    frozen_apart = 0
    if method.builds_on == "full_svd":  # attaching would decompose weights without values: a LoRA takes its place
        frozen_apart = tensor_bytes(tensor for tensors in frozen.values() for tensor in tensors.values())
        method, frozen = get_method("lora"), {}
    spec = AdapterSpec(method, config.rank, config.target_modules, config.seed, steps=config.steps)
    adapter = inject_adapter(copies, spec, "adapter", frozen)
    return copies, adapter.count(), frozen_apart


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class TrainingPhases:
    """The phases of a training, run with hollow networks to measure the peak memory of each.

    It is made and used inside a ``FakeTensorMode``.

    Attributes:
        resident: the tensors that stay in memory during every phase: networks with the adapter, and autoencoder.
        halved: the bytes by which the frozen weights shrink before the first step.
    """

    halved = 0

    def __init__(self, models: Models, vae: nn.Module, config: TrainConfig, size: int, device: str) -> None:
        self.config, self.size, self.device = config, size, device
        copies: Any = hollow({**models, "vae": vae}, "cpu")
        self.vae = copies.pop("vae")
        self.models: Models = copies
        self.denoiser = denoiser_of(copies, self.vae)
        self.dtype = self.denoiser.dtype
        self.encodings = len(cross_attention(self.denoiser.network)) if config.per_layer_tokens else 1
        self.precision = resolve_mixed_precision(config.mixed_precision, device, self.dtype)
        self.denoiser.set_lean_attention(device, is_half(self.precision, self.dtype), size)
        networks = (*self.models.values(), self.vae)
        self.resident: list[Tensor] = [t for model in networks for t in (*model.parameters(), *model.buffers())]

    def measure(self) -> dict[str, int]:
        """The peak of every phase that the settings ask for, in bytes beyond what is resident."""
        config = self.config
        peaks = {"encoding photos": self.peak_of(self.encode_photos)}
        if config.prior.loss_weight and not config.data.class_images_dir:
            peaks["generating prior images"] = self.peak_of(self.generate_prior_images)
        whole = self.dtype == torch.float32 and not config.layer_offload
        if whole and halves(self.device, self.precision, get_method(config.method)):
            self.halve()
            peaks = {name: peak + self.halved for name, peak in peaks.items()}
        if config.validation.every:
            peaks["generating samples"] = self.peak_of(self.generate_samples)
        peaks["training"] = self.peak_of(self.train_step)
        return peaks

    def halve(self) -> None:
        """Shrink the frozen weights as :func:`.half_weights.half_weights` does."""
        whole = tensor_bytes(self.resident)
        for parameter in halvable(self.denoiser.network):
            parameter.data = torch.empty(parameter.shape, dtype=DTYPES[self.precision])
        networks = (*self.models.values(), self.vae)
        self.resident = [t for model in networks for t in (*model.parameters(), *model.buffers())]
        self.halved = whole - tensor_bytes(self.resident)

    def peak_of(self, phase: Callable[[], None]) -> int:
        """Run a phase once; returns the most bytes that it takes at any time."""
        with Peak(iter(self.resident)) as peak, autocast(torch.device("cpu"), self.precision):
            phase()
        return peak.most

    @torch.no_grad()
    def encode_photos(self) -> None:
        """Encode as many crops of a photo as go through the autoencoder together."""
        vae, crops = self.working_vae(), min(at_once(self.size, self.size), self.config.crops_per_image)
        vae.encode(encoder_input(vae, torch.empty(crops, 3, self.size, self.size, dtype=next(vae.parameters()).dtype)))

    @torch.no_grad()
    def generate_prior_images(self) -> None:
        """Predict for the prior images of one chunk, with and without guidance."""
        self.predict(2 * min(PICTURES_AT_ONCE, self.config.prior.num_images))

    @torch.no_grad()
    def generate_samples(self) -> None:
        """Predict for the validation prompts, with and without guidance, and decode one picture."""
        self.predict(2 * len(self.config.validation.prompts))
        vae = self.working_vae() if self.denoiser.decodes_latents else self.vae  # as diffusers' pipelines do
        side = self.size // pixels_per_cell(vae)
        decode_batch(vae, torch.empty(1, latent_channels(vae), side, side))

    def train_step(self) -> None:
        """Predict and backpropagate for one batch of photos and prior images."""
        config = self.config
        if config.gradient_checkpointing:
            self.denoiser.network.enable_gradient_checkpointing()
        prior = config.prior.batch_size if config.prior.loss_weight else 0
        (self.predict(config.batch_size + prior).float() ** 2).mean().backward()

    def predict(self, batch: int) -> Tensor:
        """The network's predictions for a batch of latents without values."""
        return hollow_prediction(self.denoiser, batch, self.size, self.encodings)

    def working_vae(self) -> Any:
        """The autoencoder as it encodes: a float32 copy where its own precision overflows."""
        return hollow({"vae": self.vae}, "cpu", torch.float32)["vae"] if overflows(self.vae) else self.vae


def hollow_prediction(denoiser: Denoiser, batch: int, size: int, encodings: int = 1) -> Tensor:
    """The predictions (n, c, h, w) of hollow networks for pictures of that side, in pixels."""
    side = size // denoiser.vae_scale
    noisy = torch.empty(batch, denoiser.latent_channels, side, side, dtype=denoiser.dtype)
    conditioning = denoiser.hollow_conditioning(batch, encodings)
    return denoiser.hollow_predict(noisy, torch.zeros(batch, dtype=torch.long), conditioning)


def available(device: torch.device) -> int | None:
    """Bytes that a training may still take on a device; None where that is unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # this process keeps it ready
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def memory_note(base: Base, config: TrainConfig, size: int) -> str | None:
    """What a training will take beside what is there; None for a small base.

    Raises:
        UserError: it clearly does not fit.
    """
    if not is_large(base):
        return None
    offloaded = is_offloaded(base.denoiser.network)
    away = {
        "quantization": base.quantization, "layer_offload": offloaded and not config.shard_base,
        "shard_base": offloaded and config.shard_base,
    }  # fmt: skip
    models = base.stored.models if base.stored else base.models
    config = config.model_copy(update=away)  # a pipeline that was loaded elsewhere decides for itself
    found = estimate(models, base.pipeline.vae, config, size, base_kind(base))
    fixes = [
        *([] if config.gradient_checkpointing else [Fix("gradient_checkpointing", "true")]),
        *([Fix("batch_size", str(config.batch_size // 2))] if config.batch_size > 1 else []),
        *([Fix("dtype", "bfloat16")] if config.dtype == "float32" else []),
        *([Fix("quantization", "nf4")] if base.family.quantizable and config.quantization == "none" else []),
        Fix("resolution", so="for smaller pictures"),
        Fix("config", so="to take a preset for less memory"),
    ]
    return fitting(found, base, "This training", *fixes)


def is_large(base: Base) -> bool:
    """Whether a base is large enough to report its memory."""
    models = base.stored.models if base.stored else base.models
    return sum(p.numel() for model in models.values() for p in model.parameters()) >= SMALL


def base_kind(base: Base) -> str:
    """The kind of device that a base is on, as estimates tell them apart."""
    return "cpu" if base.device.type == "cpu" else "cuda"


def fitting(found: Estimate, base: Base, what: str, *fixes: Fix) -> str:
    """A sentence of what work on a loaded ``base`` takes and what is there.

    Raises:
        UserError: it clearly does not fit; ``what`` it is and the ``fixes`` are in the sentence.
    """
    free = available(base.device)
    text = f"Memory: about {gib(found.total)} at most ({found.summary()})"
    if free is None:
        return f"{text}."
    room = free + found.weights + found.context  # the base is loaded already
    if found.total > 1.15 * room:
        raise UserError(f"{what} needs about {gib(found.total)} and there are {gib(room)}.", *fixes)
    return f"{text}; {gib(room)} are there."
