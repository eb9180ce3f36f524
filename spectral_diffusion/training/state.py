"""Training state on disk: everything a run needs to go on exactly where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..cache import DIGEST, digest
from ..config import TrainConfig
from ..errors import UserError
from ..files import parse_json, read_tensors, write_tensors
from ..methods.attach import Attachment

if TYPE_CHECKING:
    from .optimisers import Average
    from .watch import Watcher

EXTRA, AVERAGE = "extra|", "average|"  # before the names of what a method keeps, and of moving averages
KEPT = ("betas", "eps", "weight_decay", "d_coef")  # of an optimiser's groups: as the settings say, not the state
PARTS = ("config", "belongs", "extra", "watch", "scaler")  # of what is kept beside the tensors
APART = ("concept", "output", "save_every", "device", "continue_from", "watch")  # settings that decide no result


class Stopped(Exception):
    """Training was asked to stop; its state is saved and ``--resume`` goes on from there."""


class Stateful(Protocol):
    """What is saved of an optimiser."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


def save_state(path: Path, tensors: Mapping[str, Tensor], optimizer: Stateful, meta: dict[str, Any]) -> None:
    """Write parameters, optimiser moments and ``meta`` (JSON-able) into one safetensors file."""
    packed = {f"tensor.{name}": value for name, value in tensors.items()}
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        inner = [value for value in entries.values() if isinstance(value, dict)]  # bitsandbytes wraps its numbers
        for key, value in {**entries, **{k: v for one in inner for k, v in one.items()}}.items():
            if isinstance(value, Tensor):
                packed[f"optimizer.{index}.{key}"] = value
            elif not isinstance(value, dict):
                scalars.setdefault(str(index), {})[key] = value
    seen: set[int] = set()
    for name, value in packed.items():  # bitsandbytes shares tensors among parameters, the file's format does not
        if value.data_ptr() in seen:
            packed[name] = value.clone()
        seen.add(value.data_ptr())
    header = {"state": json.dumps({"meta": meta, "groups": state["param_groups"], "scalars": scalars})}
    write_tensors(path, packed, {**header, DIGEST: digest(packed, header)})


def load_state(path: Path, optimizer: Stateful | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state written by :func:`save_state`; fills the optimiser, returns tensors and meta.

    Raises:
        UserError: the file is missing, damaged, or of a differently built optimiser.
    """
    packed, metadata = read_tensors(path)
    if metadata.get(DIGEST) != digest(packed, metadata):
        raise UserError(f"{path} is not a training state of this run, or damaged; remove it or train without --resume.")
    try:
        header = parse_json(metadata["state"])
        meta, groups = header["meta"], header["groups"]
        if not all(isinstance(part, dict) for part in (meta, *(meta.get(key, {}) for key in PARTS))):
            raise TypeError("not a state's parts")
        if optimizer is not None:
            moments: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in header["scalars"].items()}
            for name, value in packed.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".", 2)
                    moments.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} is not a training state of this run; remove it or train without --resume.") from error
    return {name[7:]: value for name, value in packed.items() if name.startswith("tensor.")}, meta


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return out


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted names of settings that differ, with their earlier and their present value."""
    old, new = flat(before), flat(now)
    return {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value}


def check_settings(path: Path, meta: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a state that was made with other settings than ``now``.

    Raises:
        UserError: it was; the sentence names the first difference.
    """
    for key, (old, new) in differences(meta.get("config", {}), now).items():
        raise UserError(
            f"{path} was made with {key}={old}, now it is {new}; resume with the same settings, or train without "
            "--resume."
        )


def comparable(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the result: all but where things lie, what is shown and how often states are saved."""
    kept = config.model_dump(mode="json", exclude=set(APART))
    kept["data"].pop("cache")
    return kept


@dataclass
class Run:
    """What of a training changes with its steps, and which training it is.

    Attributes:
        path: of the saved state.
        parameters: everything that is trained, by name.
        belongs: hashes of the base, the slot, the adapter that training goes on from, and what the concept is.
    """

    path: Path
    config: TrainConfig
    parameters: Mapping[str, nn.Parameter]
    optimiser: Stateful
    attachment: Attachment
    average: Average
    scaler: torch.amp.GradScaler
    watcher: Watcher
    belongs: Mapping[str, str]
    writes: bool = True  # of several processes one does

    def keep(self, step: int) -> None:
        """Save everything that the run needs to go on exactly here."""
        if not self.writes:
            return
        extra, patterns = self.attachment.extra_state()
        tensors = {
            **self.parameters,
            **{f"{EXTRA}{name}": value for name, value in extra.items()},
            **{f"{AVERAGE}{name}": value for name, value in self.average.held.items()},
        }
        meta = {
            "step": step,
            "config": comparable(self.config),
            "extra": patterns,
            "belongs": dict(self.belongs),
            "scaler": self.scaler.state_dict(),
            "watch": self.watcher.state(),
        }
        save_state(self.path, tensors, self.optimiser, meta)

    def restore(self, force: bool = False, note: Callable[[str], None] = lambda text: None) -> int:
        """Load the saved state into place; returns the step to go on with.

        Args:
            force: go on although settings have changed, and note which.

        Raises:
            UserError: it was made with other settings, or by another concept or base.
        """
        _, meta = load_state(self.path)
        # A state of an earlier version has no word on later settings, whose defaults change nothing.
        defaults = comparable(TrainConfig(concept=self.config.concept, output=self.config.output))
        before = {**flat(defaults), **flat(meta.get("config", {}))}
        changed = differences(before, comparable(self.config))
        told = ", ".join(f"{key}={old}, now it is {new}" for key, (old, new) in list(changed.items())[:3])
        if changed and not force:
            raise UserError(
                f"{self.path} was made with {told}; resume with the same settings, go on with the new ones by --force, "
                "or train without --resume."
            )
        held = {"concept": self.belongs["concept"], **meta.get("belongs", {})}  # which early states do not say
        if held["concept"] != self.belongs["concept"]:
            if not force:
                raise UserError(
                    f"{self.path} was made with other photos, captions or words; put them back, go on with these by "
                    "--force, or train without --resume."
                )
            note(f"Note: {self.path.name} was made with other photos, captions or words; going on because of --force.")
            held["concept"] = self.belongs["concept"]
        if held != self.belongs:
            raise UserError(
                f"{self.path} was made on another base, slot or start, or by another version of its method; train "
                "without --resume."
            )
        if "optimiser.name" in changed:
            raise UserError(f"{self.path} was made with another optimiser, whose numbers this one cannot take over.")
        if changed:
            note(f"Note: {self.path.name} was made with {told}; going on because of --force.")
        built = [dict(group) for group in self.optimiser.param_groups]
        held, _ = load_state(self.path, self.optimiser)
        for group, fresh in zip(self.optimiser.param_groups, built, strict=True):
            group.update({key: fresh[key] for key in KEPT if key in fresh})
        try:
            self._take(held, meta)
            return int(meta["step"])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{self.path} is not a training state of this run; train without --resume.") from error

    @torch.no_grad()
    def _take(self, held: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        own = {name: value for name, value in held.items() if not name.startswith((EXTRA, AVERAGE))}
        if set(own) != set(self.parameters) or any(own[n].shape != p.shape for n, p in self.parameters.items()):
            raise UserError(f"{self.path} belongs to another concept or base; train without --resume.")
        for name, parameter in self.parameters.items():
            parameter.copy_(own[name])
        averages = {name.removeprefix(AVERAGE): value for name, value in held.items() if name.startswith(AVERAGE)}
        self.average.load(averages or own)  # --force may ask for an average that the run had not
        extra = {name.removeprefix(EXTRA): value for name, value in held.items() if name.startswith(EXTRA)}
        self.attachment.load_extra_state(extra, meta.get("extra", {}))
        if meta.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(meta["scaler"])
        self.watcher.load_state(meta.get("watch", {}))
