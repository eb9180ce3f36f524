"""How much memory a training takes, computed before it starts: its phases are run with tensors that hold nothing."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..adapters.attach import AdapterSpec, inject_adapter
from ..adapters.frozen import Frozen, hollow_tensors
from ..config.train import TrainConfig
from ..core.errors import Fix, UserError
from ..core.precision import autocast, is_half, resolve_mixed_precision
from ..linalg import matrix_shape
from ..methods import Method, get_method
from ..models.base import ENCODERS, Base
from ..models.denoiser import plain_attention_is_faster
from ..models.per_layer_tokens import cross_attention
from ..models.targets import find_targets
from ..models.vae import at_once, overflows
from ..slots.ledger import Slot
from .prior_images import CHUNK as PICTURES_AT_ONCE

SMALL = 50_000_000  # parameters of a base below which nobody needs to be told
STATES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}  # bytes of an optimiser's own numbers per trained one
MARGIN = 1.1  # what allocators lose between blocks
CONTEXT = {"cuda": 600 * 2**20, "cpu": 700 * 2**20}  # bytes of CUDA itself; of Python with its libraries
WORDS = 77  # that a text encoder reads

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

    def told(self) -> str:
        """The parts, for a person."""
        phases = ", ".join(f"{gib(size)} at most while {name}" for name, size in self.phases.items())
        return f"{gib(self.weights)} of weights, {gib(self.adapter)} of what learns and its optimiser, {phases}"


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


class LeanAttention(AttnProcessor):
    """Attention that keeps no matrix of scores, as CUDA's does."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        out = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
        return attn.to_out[0](out.transpose(1, 2).flatten(2).to(hidden_states.dtype))


def hollow(models: Models, device: str, dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    """Copies of networks, with what is attached to them, whose tensors hold nothing, in another ``dtype`` if given.

    They are on the meta device, or inside a ``FakeTensorMode`` on any other.
    """
    memo: dict[int, Any] = {}
    for model in models.values():
        for parameter in model.parameters():
            empty = torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device=device)
            memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(dict(models), memo)


def hollow_frozen(method: Method, models: Models, config: TrainConfig) -> Frozen:
    """The shapes of what a method is built on, layer by layer."""
    slot = Slot.interval(0, config.rank) if method.slot else None
    layers = find_targets(dict(models), config.target_modules).items()
    return {layer: hollow_tensors(method, matrix_shape(module.weight), config.rank, slot) for layer, module in layers}


def estimate(models: Models, vae: nn.Module, config: TrainConfig, size: int, device: str = "cuda") -> Estimate:
    """Run every phase of a training with tensors that hold nothing, and count.

    Args:
        models: U-Net and text encoders, ``vae``: its autoencoder; they stay as they are and may be on the meta device.
        size: side of the training pictures in pixels.
        device: ``cuda`` or ``cpu``.
    """
    method, scale = get_method(config.method), 2 ** (len(vae.config.block_out_channels) - 1)  # type: ignore[union-attr, arg-type]
    weights = sum(p.numel() * p.element_size() for model in (*models.values(), vae) for p in model.parameters())
    phases: dict[str, int] = {}
    attached, built_on = hollow(models, "meta"), hollow_frozen(method, models, config)
    apart = 0
    if method.builds_on == "full_svd":  # attaching would decompose what is not there: a LoRA stands for it
        apart = sum(tensor.nbytes for held in built_on.values() for tensor in held.values())
        method, built_on = get_method("lora"), {}
    spec = AdapterSpec(method, config.rank, config.target_modules, config.seed, steps=config.steps)
    attachment = inject_adapter(attached, spec, "adapter", built_on)
    trained = attachment.count()
    with FakeTensorMode(allow_non_fake_inputs=True):  # on a pretended CPU, so that autocast acts as it does
        copies = hollow({**attached, "vae": vae}, "cpu")
        empty_vae: Any = copies.pop("vae")
        unet: Any = copies["unet"]
        side, channels = size // scale, unet.config.in_channels
        dtype = next(unet.parameters()).dtype
        precision = resolve_mixed_precision(config.mixed_precision, device, dtype)
        plain = plain_attention_is_faster(device, is_half(precision, dtype), side)
        unet.set_attn_processor(AttnProcessor() if plain else LeanAttention())
        there = [t for m in (*copies.values(), empty_vae) for t in (*m.parameters(), *m.buffers())]
        layers = len(cross_attention(unet)) if config.per_layer_tokens else 1
        frozen = sum(t.numel() * t.element_size() for t in there) - weights - 4 * trained + apart
        adapter = frozen + trained * (4 + STATES[config.optimizer.name] + (4 if config.optimizer.ema_decay else 0))

        def measure(name: str, work: Callable[[], Any]) -> None:
            with Peak(iter(there)) as peak, autocast(torch.device("cpu"), precision):
                work()
            phases[name] = peak.most

        def predict(batch: int) -> Tensor:
            noisy = torch.empty(batch, channels, side, side, dtype=dtype)
            predicted: Tensor = unet(noisy, torch.zeros(batch, dtype=torch.long), **words(copies, batch, layers)).sample
            return predicted

        def step() -> None:
            unet.enable_gradient_checkpointing() if config.gradient_checkpointing else None
            anchors = config.prior.batch_size if config.prior.loss_weight else 0
            (predict(config.batch_size + anchors).float() ** 2).mean().backward()

        with torch.no_grad():
            pixels = (min(at_once(size, size), config.crops_per_image), 3, size, size)

            def working() -> Any:
                """The autoencoder as it works, which may be a copy in float32."""
                return hollow({"vae": empty_vae}, "cpu", torch.float32)["vae"] if overflows(empty_vae) else empty_vae

            def encode() -> None:
                there = working()
                there.encode(torch.empty(pixels, dtype=next(there.parameters()).dtype))

            def draw() -> None:
                predict(2 * len(config.validation.prompts))
                there = working() if "text_encoder_2" in models else empty_vae  # diffusers' pipeline for XL does so too
                latents = (1, empty_vae.config.latent_channels, side, side)
                there.decode(torch.empty(latents, dtype=next(there.parameters()).dtype))

            measure("encoding photos", encode)
            if config.prior.loss_weight and not config.data.class_images_dir:
                count = 2 * min(PICTURES_AT_ONCE, config.prior.num_images)
                measure("drawing ordinary pictures", lambda: predict(count))
            if config.validation.every:
                measure("drawing samples", draw)
        measure("training", step)
    return Estimate(weights, max(0, adapter), phases, CONTEXT[device])


def words(models: Models, batch: int, layers: int = 1) -> dict[str, Any]:
    """A U-Net's conditioning by prompts that hold nothing, through the text encoders, once for every layer."""
    ids = torch.zeros(batch * layers, WORDS, dtype=torch.long)
    encoders: list[Any] = [models[name] for name in ENCODERS if name in models]
    length = [min(WORDS, encoder.config.max_position_embeddings) for encoder in encoders]
    outputs = [encoder(ids[:, :n], output_hidden_states=True) for encoder, n in zip(encoders, length, strict=True)]
    if len(outputs) == 1:
        return {"encoder_hidden_states": outputs[0][0][:batch]}  # what a layer reads of them
    return {
        "encoder_hidden_states": torch.cat([output.hidden_states[-2] for output in outputs], -1),
        "added_cond_kwargs": {"text_embeds": outputs[1][0], "time_ids": torch.zeros(batch, 6)},
    }


def available(device: torch.device) -> int | None:
    """Bytes that a training may still take on a device; None where that cannot be told."""
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
    found = estimate(base.models, base.pipeline.vae, config, size, base_kind(base))
    fixes = [
        *([] if config.gradient_checkpointing else [Fix("gradient_checkpointing", "true")]),
        *([Fix("batch_size", str(config.batch_size // 2))] if config.batch_size > 1 else []),
        *([Fix("dtype", "bfloat16")] if config.dtype == "float32" else []),
        Fix("resolution", so="for smaller pictures"),
        Fix("config", so="to take a preset for less memory"),
    ]
    return fitting(found, base, "This training", *fixes)


def is_large(base: Base) -> bool:
    """Whether its owner needs to be told what it takes."""
    return sum(p.numel() for model in base.models.values() for p in model.parameters()) >= SMALL


def base_kind(base: Base) -> str:
    """The kind of device that a base is on, as estimates tell them apart."""
    return "cpu" if base.device.type == "cpu" else "cuda"


def fitting(found: Estimate, base: Base, what: str, *fixes: Fix) -> str:
    """A sentence of what work on a loaded ``base`` takes and what is there.

    Raises:
        UserError: it clearly does not fit; ``what`` it is and the ``fixes`` are told.
    """
    free = available(base.device)
    text = f"Memory: about {gib(found.total)} at most ({found.told()})"
    if free is None:
        return f"{text}."
    room = free + found.weights + found.context  # the base is loaded already
    if found.total > 1.15 * room:
        raise UserError(f"{what} needs about {gib(found.total)} and there are {gib(room)}.", *fixes)
    return f"{text}; {gib(room)} are there."
