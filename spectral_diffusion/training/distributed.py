"""Several processes that train together (``accelerate launch``), mixed precision and gradient checkpointing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config.train import TrainConfig
from .optimizers import Optimizer

Value = TypeVar("Value")
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class World:
    """The processes of a training; one, unless a launcher started several. ``state`` is accelerate's."""

    rank: int = 0
    count: int = 1
    state: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let the main process go first; the others may then find in caches what it has computed."""
        if self.count == 1:
            yield
        else:
            with self.state.main_process_first():
                yield

    def broadcast(self, value: Value) -> Value:
        """The main process's value, in all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values, from_process=0)
        return values[0]

    def any_rank(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.count == 1:
            return flag
        total = torch.tensor([float(flag)], device=self.state.device)
        self._sum(total)
        return bool(total.item())

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum gradients over the processes, in place; returns the sum of their losses."""
        if self.count == 1:
            return loss
        parameters = list(parameters)
        # A parameter that no process used has no gradient anywhere; the samples decide that, so it is communicated.
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=loss.device)
        self._sum(used)
        trained = [p for p, users in zip(parameters, used.tolist(), strict=True) if users]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([loss.detach().reshape(1), *(part.reshape(-1) for part in parts)])
        self._sum(flat)
        for parameter, part in zip(trained, flat[1:].split([part.numel() for part in parts]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        return flat[0]

    def _sum(self, tensor: Tensor) -> None:
        from accelerate.utils import reduce

        tensor.copy_(reduce(tensor.clone(), "sum"))


def is_main_process() -> bool:
    """Whether this process is the one that notifies and writes, without accelerate."""
    return os.environ.get("RANK", "0") == "0" or int(os.environ.get("WORLD_SIZE", "1")) < 2


def current_world(device: str = "auto") -> World:
    """This process among those that ``accelerate launch`` or ``torchrun`` started."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return World()
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate reads it again for every state
    from accelerate import PartialState

    state = PartialState(cpu=on_cpu)
    return World(state.process_index, state.num_processes, state)


def device_of(config: TrainConfig, world: World) -> str:
    """The device of this process: of several, each has a GPU of its own."""
    return str(world.state.device) if world.count > 1 and config.device in {"auto", "cuda"} else config.device


def global_batch(config: TrainConfig, parts: int) -> TrainConfig:
    """The settings of a step whose batch is not in parts: ``parts`` times the images."""
    if parts == 1:
        return config
    preservation = config.prior.model_copy(update={"batch_size": config.prior.batch_size * parts})
    return config.model_copy(update={"batch_size": config.batch_size * parts, "prior": preservation})


def microbatch(batch: Batch, part: int, parts: int) -> tuple[Batch, float]:
    """One of ``parts`` even parts of a dataclass of lists and tensors over samples, and its share of the whole.

    The last parts are shorter, or empty, where the samples do not go up.
    """
    if parts == 1:
        return batch, 1.0
    count = len(batch.prompts)  # type: ignore[attr-defined]
    size = -(-count // parts)
    chosen = slice(part * size, min((part + 1) * size, count))
    cut = {
        field.name: value[chosen] if isinstance(value, Tensor | list) else value
        for field in dataclasses.fields(batch)  # type: ignore[arg-type]
        for value in [getattr(batch, field.name)]
    }
    return type(batch)(**cut), max(0, chosen.stop - chosen.start) / count


def take_step(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], scaler: torch.amp.GradScaler, clip: float
) -> Tensor:
    """Clip the gradients and take a step; returns their norm before, without waiting for it.

    Where the loss is scaled, the scaler leaves out a step whose gradients overflow and lowers the scale. While it can,
    their norm counts as 0.
    """
    scaler.unscale_(optimizer)  # type: ignore[arg-type]
    norm = nn.utils.clip_grad_norm_(list(parameters), clip)
    if scaler.is_enabled() and (scale := scaler._scale) is not None:
        norm = torch.where(torch.isfinite(norm) | (scale <= 1), norm, 0.0)
    scaler.step(optimizer)  # type: ignore[arg-type]
    scaler.update()
    return norm
