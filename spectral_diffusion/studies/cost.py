"""What does every method cost? Preparation, step, activations, file, merging: the paper's Fig. 7 and more."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ..adapters.attach import AdapterSpec, inject_adapter, remove_adapters
from ..adapters.frozen import Frozen, frozen_tensors, stored_part, with_weight
from ..core.hooks import Hooks
from ..linalg import matrix_shape
from ..methods import all_methods, get_method
from ..models.architectures import build_meta
from ..models.targets import find_targets
from ..slots.ledger import Slot
from .registry import Findings, Row, Table, study
from .runner import Figures, StudyRunner, TimeOver

TARGETS = "unet-attention"
ROUNDS = 3
RANKS = {"oft": 64, "svdiff": 1}  # of methods whose rank means something else; others take 8
MIB = 2**20
RATIO = "step, of LoRA's"


@dataclass
class CostSubject:
    """A U-Net to adapt and one batch for it."""

    unet: Any
    latents: Tensor
    text: Tensor

    def forward(self, latents: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Its prediction for the batch."""
        x, context = self.latents if latents is None else latents, self.text if text is None else text
        prediction: Tensor = self.unet(x, torch.tensor([500]), context).sample
        return prediction


@dataclass
class MethodCost:
    """A method's rank, frozen tensors and figures, and its measured seconds a step."""

    rank: int
    frozen: Frozen
    figures: Figures
    steps: list[float] = field(default_factory=list)


def sd15() -> CostSubject:
    """A U-Net of Stable Diffusion 1.5's size with random weights, at 256² pixels and batch 1."""
    unet: Any = build_meta("sd15")["unet"].to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    unet.set_attn_processor(AttnProcessor())
    return CostSubject(unet.requires_grad_(False), torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768))


def pocket(lab: StudyRunner) -> CostSubject:
    """The studies' own U-Net with their training batch."""
    base = lab.fresh()
    unet = base.pipeline.unet
    unet.set_attn_processor(AttnProcessor())
    batch, side = int(lab.settings["train"]["batch_size"]), int(unet.config.sample_size)
    latents = torch.randn(batch, unet.config.in_channels, side, side)
    return CostSubject(unet.requires_grad_(False), latents, torch.randn(batch, 32, unet.config.cross_attention_dim))


def saved_bytes(net: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward saves for backward, without parameters and frozen tensors, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers())}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # keeps its address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(seen.values())


def kept_bytes(subject: CostSubject) -> int:
    """Bytes that a forward saves with gradients for latents and text, as when the text encoder is trained too."""
    inputs = subject.latents.clone().requires_grad_(), subject.text.clone().requires_grad_()
    return saved_bytes(subject.unet, lambda: subject.forward(*inputs))


def prepare_method(subject: CostSubject, name: str) -> MethodCost:
    """Compute the method's frozen tensors without a cache, and measure its bytes and its merging."""
    method = get_method(name)
    weights = {layer: m.weight.detach() for layer, m in find_targets({"unet": subject.unet}, TARGETS).items()}
    shapes = [matrix_shape(weight) for weight in weights.values()]
    allowed = method.ranks(shapes)
    rank = min(allowed, key=lambda allowed_rank: abs(allowed_rank - RANKS.get(name, 8)))
    begun = time.perf_counter()
    frozen = frozen_tensors(method, weights, rank, Slot.interval(0, rank) if method.slot else None, cached=False)
    seconds = time.perf_counter() - begun
    injected = inject_adapter({"unet": subject.unet}, AdapterSpec(method, rank, TARGETS, steps=100), frozen=frozen)
    kept, trained = kept_bytes(subject), injected.state_dict()
    count = injected.count()
    remove_adapters({"unet": subject.unet})
    stored = sum(t.numel() for tensors in stored_part(method, frozen).values() for t in tensors.values())
    begun = time.perf_counter()
    with torch.no_grad():
        for layer, weight in weights.items():
            parameters = {key: trained[f"{layer}.{key}"] for key in method.shapes(*matrix_shape(weight), rank)}
            weight + method.delta(parameters, with_weight(method, frozen[layer], weight)).delta().view(weight.shape)
    figures = {
        "trained": count,
        "spectrum, s": seconds,
        "kept, MiB": kept / MIB,
        "file, MiB": 4 * (sum(t.numel() for t in trained.values()) + stored) / MIB,
        "merge, s": time.perf_counter() - begun,
    }
    return MethodCost(rank, frozen, figures)


def timed_step(subject: CostSubject, name: str, cost: MethodCost) -> float:
    """Seconds of forward, backward and AdamW after one warm-up step; the method is injected and removed again."""
    spec = AdapterSpec(get_method(name), cost.rank, TARGETS, steps=100)
    injected = inject_adapter({"unet": subject.unet}, spec, frozen=cost.frozen)
    optimizer = torch.optim.AdamW([p for _, p in injected.named_parameters()], lr=1e-4)
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        subject.forward().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - begun
    remove_adapters({"unet": subject.unet})
    return seconds


def measure_methods(subject: CostSubject, names: Sequence[str], rounds: int, hooks: Hooks) -> dict[str, Figures]:
    """Every method's figures. Steps are timed in rounds of alternating order, so that drift affects all methods alike.

    The ratio to LoRA's step is the median over rounds of the ratio within a round.
    """
    frozen_bytes = kept_bytes(subject)
    costs: dict[str, MethodCost] = {}
    for name in names:
        costs[name] = prepare_method(subject, name)
        hooks.notify(f"{name}: {costs[name].figures['spectrum, s']:.1f} s to prepare")
    for index in range(rounds):
        for name in names if index % 2 else names[::-1]:
            costs[name].steps.append(timed_step(subject, name, costs[name]))
        hooks.notify(f"round {index + 1} of {rounds}")
    first = costs["lora"].steps if "lora" in costs else None
    out = {}
    for name, cost in costs.items():
        ratios = [mine / theirs for mine, theirs in zip(cost.steps, first, strict=True)] if first else []
        out[name] = {
            **cost.figures,
            "step, s": statistics.median(cost.steps),
            RATIO: statistics.median(ratios) if ratios else None,
            "kept, of the frozen network's": cost.figures["kept, MiB"] * MIB / frozen_bytes,
        }
    return out


COLUMNS = (
    "trained", "spectrum, s", "step, s", RATIO, "kept, MiB", "kept, of the frozen network's", "file, MiB",
    "merge, s",
)  # fmt: skip


def cost_rows(measured: Mapping[str, Figures]) -> list[Row]:
    """One row per method, the columns in reading order."""
    return [{"method": name, **{column: figures[column] for column in COLUMNS}} for name, figures in measured.items()]


@study(
    "cost",
    "Fig. 7, App. E",
    "A spectral adapter costs no more than LoRA but for the spectrum, which is computed once.",
    (25, 0.1),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """The costs of every method on the pocket U-Net and on one of Stable Diffusion 1.5's size."""
    names = ["spectral-additive", "spectral-rotation", "lora"] if quick else sorted(all_methods())
    sizes: dict[str, Callable[[], CostSubject]] = {"pocket": lambda: pocket(lab)}
    if not quick:
        sizes["Stable Diffusion 1.5"] = sd15
    tables: list[Table] = []
    missing: list[str] = []
    sentences: list[str] = []
    for size, make in sizes.items():

        def compute(make: Callable[[], CostSubject] = make) -> Figures:
            return measure_methods(make(), names, 1 if quick else ROUNDS, Hooks(notify=lab.note))

        try:
            key = {"size": size, "methods": names, "threads": torch.get_num_threads()}
            measured = lab.cell("cost", key, compute, timed=True)
        except TimeOver:
            missing.append(size)
            continue
        tables.append(Table(f"The U-Net's attention projections, {size} size", cost_rows(measured)))
        sentences.append(verdict(size, measured))
    return Findings(tables, " ".join(sentences), missing=missing)


def verdict(size: str, measured: Mapping[str, Figures]) -> str:
    """The two spectral methods compared with LoRA."""
    ours = ", ".join(
        f"{name} takes {measured[name][RATIO]:.2f} of LoRA's step and {measured[name]['spectrum, s']:.1f} s for "
        "the spectrum"
        for name in ("spectral-additive", "spectral-rotation")
    )
    return f"{size} size: {ours}."
