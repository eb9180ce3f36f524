"""Networks in training: their optimizer, moving averages of their weights, and the state that a later piece needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_diffusion.core.files import write_json
from spectral_diffusion.training.checkpoint import load_state, save_state

from .art import PACKAGES, PRETRAINING
from .batches import Batch
from .compute import Compute
from .loop import Progress, Rates

HEAD = "head."  # before the names of a head's weights, which may come and go


@dataclass(frozen=True)
class AveragedRecipe(Rates):
    """How weights follow the loss."""

    ema: tuple[int, ...] = (30_000, 150_000)  # samples that each moving average looks back
    timestep_power: float = 0.55  # timesteps are 1000 u^power: below 1, more of them at high noise
    object_weight: float = 2.5  # added to the loss where things are
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    clip: float = 1.0
    maps: float = 0.0  # weight of an added loss: which class and colour is where (see map_heads.py)


@dataclass
class AveragedTraining(ABC):
    """The networks with their optimizer, moving averages and progress; a subclass says what the loss is."""

    trainee: Any  # the networks
    compute: Compute
    recipe: Any
    progress: Progress = field(default_factory=Progress)
    about: dict[str, Any] = field(default_factory=dict)  # how the weights came about
    head: Any = field(init=False, default=None)  # reads those maps, where the recipe has their loss
    averages: list[list[Tensor]] = field(init=False)
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.trainee.to(self.compute.device)
        named = list(self.trainee.named_parameters())
        if self.recipe.maps:
            self.head = self.build_head().to(self.compute.device)
            named += [(f"{HEAD}{name}", parameter) for name, parameter in self.head.named_parameters()]
        self.names = [name for name, _ in named]
        self.parameters: list[nn.Parameter] = [parameter for _, parameter in named]
        self.averages = [[p.detach().clone() for p in self.parameters] for _ in self.recipe.ema]
        self.optimizer = self.build_optimizer()

    def build_optimizer(self) -> Any:
        """The optimizer of ``parameters``, which ``names`` names; a group may have a share of the rate of its own."""
        recipe = self.recipe
        return torch.optim.AdamW(
            self.parameters, lr=recipe.rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """What a step makes smaller."""

    @abstractmethod
    def build_head(self) -> nn.Module:
        """The head that reads maps of classes and colours from the trainee's features."""

    def map_loss(self, batch: Batch) -> Tensor | float:
        """The weighted loss on maps for the last forward pass; 0 without a head."""
        return self.recipe.maps * self.head.loss(batch.labels) if self.head else 0.0

    def spread_timesteps(self, count: int, last: int, generator: torch.Generator) -> Tensor:
        """Timesteps (n,), one per equal stretch of u in 0…1, so that a step's loss is steadier."""
        device = self.compute.device
        spread = torch.rand(count, generator=generator, device=device)
        spots = (torch.arange(count, device=device) + spread) / count
        return (spots**self.recipe.timestep_power * last).long().clamp_max(last - 1)

    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.progress.rate(self.recipe)

    def step(self, batch: Batch) -> Tensor:
        """One optimizer step; returns the loss, which stays on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate() * group.get("rate_share", 1.0)
        loss = self.loss(batch)
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

    def averaged_weights(self, average: int) -> dict[str, Tensor]:
        """One of the moving averages by the parameters' names."""
        return dict(zip(self.names, self.averages[average], strict=True))

    def write_about(self, folder: Path) -> None:
        """Write how the weights came about into ``folder/pretraining.json``."""
        artwork = {name: PACKAGES[name] for name in PRETRAINING}
        write_json(folder / "pretraining.json", {"artwork": artwork, "progress": asdict(self.progress), **self.about})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from a saved state."""
        tensors, meta = load_state(path)
        self.progress, self.about = Progress(**meta["progress"]), meta["about"]
        if {f"raw.{name}" for name in self.names} == {name for name in tensors if name.startswith("raw.")}:
            load_state(path, self.optimizer)
            for group in self.optimizer.param_groups:
                group["weight_decay"] = self.recipe.weight_decay
                if "betas" in group:
                    group["betas"] = self.recipe.betas
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
        every: list[tuple[int, list[Any]]] = [(-1, list(self.parameters)), *enumerate(self.averages)]
        for index, values in every:
            part = parts.get(f"ema{index}", parts["raw"])
            for name, value in zip(self.names, values, strict=True):
                if name in part or not name.startswith(HEAD):
                    value.copy_(part[name])


def object_weights(batch: Batch, weight: float, height: int) -> Tensor:
    """Weights (n, 1, height, w) of the loss, of mean 1: more where things are."""
    side = batch.where.shape[-2] // height
    where = torch.nn.functional.avg_pool2d(batch.where, side) if side > 1 else batch.where
    weights = 1 + weight * where
    return weights / weights.mean()
