"""Pretrain the pocket base: text encoder, U-Net and T2I-Adapters together.

The training goes on in pieces: a constant learning rate until told otherwise, then a decay over a given number of
samples. Every draw is keyed by the step, so a piece that goes on from a saved state sees what an unbroken run sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from spectral_diffusion.training.checkpoint import load_state, save_state

from .batches import Batch
from .compute import Compute
from .loop import Progress, Rates
from .models import MapHead, Trainee, build_scheduler
from .sprites import NOUNS, TINTS

HEAD = "head."  # before the names of its weights


@dataclass(frozen=True)
class Recipe(Rates):
    """How the networks are trained on what the batches show."""

    ema: tuple[int, ...] = (30_000, 150_000)  # samples that each moving average looks back
    timestep_power: float = 0.55  # timesteps are 1000 u^power: below 1, more of them at high noise
    object_weight: float = 2.5  # added to the loss where things are
    snr: float = 5.0  # the loss is weighted by 1 / (1 + SNR / snr)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    clip: float = 1.0
    maps: float = 0.0  # weight of an added loss: which class and colour is where (see MapHead)


@dataclass
class Training:
    """The networks with their optimizer, moving averages and progress."""

    trainee: Trainee
    compute: Compute
    recipe: Recipe
    progress: Progress = field(default_factory=Progress)
    about: dict[str, Any] = field(default_factory=dict)  # how the weights came about
    averages: list[list[Tensor]] = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.trainee.to(self.compute.device)
        if self.compute.device.type == "cuda":
            self.trainee.unet.set_attn_processor(AttnProcessor2_0())
        named = list(self.trainee.named_parameters())
        self.head: MapHead | None = None
        if self.recipe.maps:
            self.head = MapHead(self.trainee.unet, (len(NOUNS) + 1, len(TINTS) + 1)).to(self.compute.device)
            named += [(f"{HEAD}{name}", parameter) for name, parameter in self.head.named_parameters()]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.averages = [[p.detach().clone() for p in self.parameters] for _ in self.recipe.ema]
        self.alphas = build_scheduler().alphas_cumprod.to(self.compute.device)
        recipe = self.recipe
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )

    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.progress.rate(self.recipe)

    def step(self, batch: Batch) -> Tensor:
        """One optimizer step; returns the loss, which stays on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss = velocity_loss(self, batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        samples = batch.samples
        self.progress.step += 1
        self.progress.samples += samples
        since = self.progress.samples
        with torch.no_grad():
            for average, length in zip(self.averages, self.recipe.ema, strict=True):
                # Early on, an average looks back over a tenth of what there was.
                weight = samples / min(length, max(samples, since / 10))
                torch._foreach_lerp_(average, list(self.parameters), weight)
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write everything that a later piece needs, at once."""
        tensors: dict[str, Tensor] = dict(zip((f"raw.{n}" for n in self.names), self.parameters, strict=True))
        for index, average in enumerate(self.averages):
            tensors |= dict(zip((f"ema{index}.{n}" for n in self.names), average, strict=True))
        meta = {"progress": asdict(self.progress), "recipe": asdict(self.recipe), "about": self.about}
        save_state(path, tensors, self.optimizer, meta)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from a saved state."""
        tensors, meta = load_state(path)
        self.progress, self.about = Progress(**meta["progress"]), meta["about"]
        if {f"raw.{name}" for name in self.names} == {name for name in tensors if name.startswith("raw.")}:
            load_state(path, self.optimizer)
            for group in self.optimizer.param_groups:
                group.update(betas=self.recipe.betas, weight_decay=self.recipe.weight_decay)
        else:  # a head was added or dropped
            self.progress.warmed = self.progress.samples
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        self.fill(parts)

    @torch.no_grad()
    def fill(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the weights (part raw) and the moving averages (ema0, …) by name; a head may be missing.

        Raises:
            KeyError: a weight of the networks is missing.
        """
        every: list[tuple[int, list[Tensor]]] = [(-1, list(self.parameters)), *enumerate(self.averages)]
        for index, values in every:
            part = parts.get(f"ema{index}", parts["raw"])
            for name, value in zip(self.names, values, strict=True):
                if name in part or not name.startswith(HEAD):
                    value.copy_(part[name])


@torch.no_grad()
def changed(training: Training, change: Callable[[Trainee], Trainee]) -> Training:
    """The same training with its networks changed, moving averages too; the optimizer begins anew."""
    old = training.trainee

    def fresh(trainee: Trainee) -> Trainee:
        torch.manual_seed(0)
        return change(trainee)

    new = Training(fresh(old.cpu()), training.compute, training.recipe, training.progress, training.about)
    new.progress.warmed = new.progress.samples
    for index, average in enumerate(training.averages):
        shown = Trainee(old.sizes, old.downscale)
        shown.load_state_dict(dict(zip(training.names, average, strict=True)), strict=False)
        for value, parameter in zip(new.averages[index], fresh(shown).parameters()):  # a head begins anew
            value.copy_(parameter)
    return new


def velocity_loss(training: Training, batch: Batch) -> Tensor:
    """v-prediction error, weighted by 1 / (1 + SNR / 5) and by where the things are."""
    recipe, compute = training.recipe, training.compute
    generator = compute.generator(training.progress.step)
    latents, count = batch.latents, len(batch.latents)
    noise = torch.randn(latents.shape, generator=generator, device=compute.device)
    # Stratified timesteps: one per equal stretch, so that a step's loss is steadier. More of them at high noise,
    # where the class decides the shape: measured, a wrong class word costs six times more at 950 than at 500.
    spread = torch.rand(count, generator=generator, device=compute.device)
    spots = (torch.arange(count, device=compute.device) + spread) / count
    top = len(training.alphas)
    timesteps = (spots**recipe.timestep_power * top).long().clamp_max(top - 1)
    alpha = training.alphas[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    with compute.autocast():
        predicted = training.trainee(noisy, timesteps, batch)
        maps = training.head.loss(batch.labels) if training.head else 0.0
    snr = alpha / (1 - alpha)
    where = 1 + recipe.object_weight * batch.where
    error = ((predicted.float() - target).square() * where / (1 + snr / recipe.snr)).mean() / where.mean()
    return error + recipe.maps * maps
