"""Training state on disk: everything a run needs to go on exactly where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..adapters.attach import InjectedAdapter
from ..config.train import TrainConfig, ValidationConfig
from ..core.cache import DIGEST, digest
from ..core.errors import Fix, UserError
from ..core.files import parse_json, read_header, read_tensors, write_tensors
from ..core.hooks import QUIET, Hooks

if TYPE_CHECKING:
    from .optimizers import EMA
    from .validation import Validator

EXTRA, AVERAGE = "extra|", "average|"  # before the names of what a method keeps, and of moving averages
# Settings that decide which tensors there are, or what they mean: a state of others is of no use.
FIXED = (
    "base",
    "method",
    "rank",
    "param_budget",
    "target_modules",
    "slot",
    "slot_seed",
    "per_layer_tokens",
    "optimizer.name",
)
ANEW = Fix("force", "true", "to start anew", also=Fix("resume", "false"))
KEPT = ("betas", "eps", "weight_decay", "d_coef")  # of an optimizer's groups: from the settings, not the state
PARTS = ("config", "belongs", "extra", "validation", "scaler")  # of what is kept beside the tensors
APART = (
    "concept",
    "output",
    "ledger",
    "checkpointing_steps",
    "device",
    "shard_base",
    "init_from_adapter",
    "validation",
)  # settings that decide no result


Changes = Mapping[str, tuple[Any, Any]]  # a setting's dotted name to its earlier and its present value


class Stateful(Protocol):
    """The part of an optimizer that is saved."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


def save_state(path: Path, tensors: Mapping[str, Tensor], optimizer: Stateful, meta: dict[str, Any]) -> None:
    """Write parameters, optimizer moments and ``meta`` (JSON-able) into one safetensors file."""
    packed = {f"tensor.{name}": value for name, value in tensors.items()}
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        inner = [value for value in entries.values() if isinstance(value, dict)]  # bitsandbytes wraps its numbers
        for key, value in {**entries, **{k: v for nested in inner for k, v in nested.items()}}.items():
            if isinstance(value, Tensor):
                packed[f"optimizer.{index}.{key}"] = value
            elif not isinstance(value, dict):
                scalars.setdefault(str(index), {})[key] = value
    pointers: set[int] = set()
    for name, value in packed.items():  # bitsandbytes shares tensors among parameters, the file's format does not
        if value.data_ptr() in pointers:
            packed[name] = value.clone()
        pointers.add(value.data_ptr())
    header = {"state": json.dumps({"meta": meta, "groups": state["param_groups"], "scalars": scalars})}
    write_tensors(path, packed, {**header, DIGEST: digest(packed, header)})


def load_state(path: Path, optimizer: Stateful | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state written by :func:`save_state`; fills the optimizer, returns tensors and meta.

    Raises:
        UserError: the file is missing, damaged, or of a differently built optimizer.
    """
    packed, metadata = read_tensors(path)
    if metadata.get(DIGEST) != digest(packed, metadata):
        raise UserError(f"{path} is not a training state of this run, or damaged, and has to be removed.")
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
        raise UserError(f"{path} is not a training state of this run, and has to be removed.") from error
    return {name[7:]: value for name, value in packed.items() if name.startswith("tensor.")}, meta


def step_of(path: Path) -> int | None:
    """The step of a saved state; None if it cannot be read."""
    try:
        return int(header_of(path)["meta"]["step"])
    except (UserError, KeyError, ValueError, TypeError):
        return None


def header_of(path: Path) -> dict[str, Any]:
    """A saved state's metadata.

    Raises:
        UserError: the file is missing, damaged, or no state.
    """
    try:
        header: dict[str, Any] = json.loads(read_header(path)[1]["state"])
        return header
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a training state, and has to be removed.") from error


def flat_settings(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= flat_settings(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return out


def written(value: Any) -> str:
    """A setting's value as ``key=value`` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted names of settings that differ, with their earlier and their present value.

    One that an earlier version did not have, and that is off now, is no difference.
    """
    old, new = flat_settings(before), flat_settings(now)
    return {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value and (key in old or value)}


def refuse_changed_settings(path: Path, meta: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a state that was made with other settings than ``now``.

    Raises:
        UserError: it was; the sentence names the first difference.
    """
    for key, (old, new) in differences(meta.get("config", {}), now).items():
        raise UserError(
            f"{path} was made with {key}={old}, now it is {new}; to start anew, that file has to be removed.",
            Fix(key, written(old), "to go on as it was"),
        )


def comparable_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the result: all but paths, what is shown and how often states are saved."""
    settings = config.model_dump(mode="json", exclude=set(APART))
    settings["data"].pop("latents_cache_dir")
    # Validation shows and records, but for when it stops the training.
    stopping = config.validation.early_stopping_patience
    shown = {"early_stopping_patience", "log_with", "model_card"} if stopping else set(ValidationConfig.model_fields)
    deciding = config.validation.model_dump(mode="json", exclude=shown)
    settings["validation"] = {"early_stopping_patience": stopping, **deciding}
    settings["interference"]["earlier_adapters"] = [path.name for path in config.interference.earlier_adapters]
    settings["joint_concepts"] = [folder.name for folder in config.joint_concepts]
    return settings


@dataclass
class TrainingState:
    """The state of a training that changes with its steps, and its identity.

    Attributes:
        path: of the saved state.
        parameters: everything that is trained, by name.
        belongs: hashes of the base, the slot, the adapter that training goes on from, and what the concept is.
    """

    path: Path
    config: TrainConfig
    parameters: Mapping[str, nn.Parameter]
    optimizer: Stateful
    injected: InjectedAdapter
    average: EMA
    scaler: torch.amp.GradScaler
    validator: Validator
    belongs: Mapping[str, str]
    writes: bool = True  # of several processes one does

    def save(self, step: int) -> None:
        """Save everything that the run needs to go on exactly here."""
        if not self.writes:
            return
        extra, patterns = self.injected.extra_state()
        tensors = {
            **self.parameters,
            **{f"{EXTRA}{name}": value for name, value in extra.items()},
            **{f"{AVERAGE}{name}": value for name, value in self.average.averages.items()},
        }
        meta = {
            "step": step,
            "config": comparable_settings(self.config),
            "extra": patterns,
            "belongs": dict(self.belongs),
            "scaler": self.scaler.state_dict(),
            "validation": self.validator.state(),
        }
        save_state(self.path, tensors, self.optimizer, meta)

    def restore(self, force: bool = False, hooks: Hooks = QUIET) -> int:
        """Load the saved state into place; returns the step to go on with.

        Args:
            force: go on although settings have changed, and note which.

        Raises:
            UserError: it was made with other settings, or by another concept or base.
        """
        tensors, meta = load_state(self.path)
        changed = differences(meta.get("config", {}), comparable_settings(self.config))
        self._check_fitting(tensors, meta, changed)
        self._check_wanted(meta, changed, force, hooks)
        built = [dict(group) for group in self.optimizer.param_groups]
        load_state(self.path, self.optimizer)
        for group, fresh in zip(self.optimizer.param_groups, built, strict=True):
            group.update({key: fresh[key] for key in KEPT if key in fresh})
        try:
            self._take(tensors, meta)
            return int(meta["step"])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{self.path} is not a training state of this run.", ANEW) from error

    def _check_fitting(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], changed: Changes) -> None:
        """Refuse a state that cannot be loaded here, whatever is forced.

        Raises:
            UserError: it is of another base, slot, method, optimizer …; the sentence names the setting.
        """
        own = {name: value.shape for name, value in tensors.items() if not name.startswith((EXTRA, AVERAGE))}
        free = ("concept", "parts")  # :meth:`_check_wanted` looks at these
        fixed = {key: value for key, value in self.belongs.items() if key not in free}
        groups = [len(group["params"]) for group in header_of(self.path)["groups"]]
        if (
            {key: value for key, value in meta.get("belongs", {}).items() if key not in free} == fixed
            and own == {name: parameter.shape for name, parameter in self.parameters.items()}
            and groups == [len(group["params"]) for group in self.optimizer.state_dict()["param_groups"]]
            and "optimizer.name" not in changed
        ):
            return
        causes = [key for key in FIXED if key in changed] or list(changed)
        if causes:
            old, new = changed[causes[0]]
            raise UserError(
                f"{self.path} was made with {causes[0]}={old} and cannot go on with {new}.",
                Fix(causes[0], written(old), "to go on as it was"),
                ANEW,
            )
        if fixed.get("earlier") != meta.get("belongs", {}).get("earlier"):
            raise UserError(f"{self.path} was made with other adapters to keep off, which could be put back.", ANEW)
        if self._other_concept(meta):
            raise UserError(f"{self.path} was made with other photos, captions or words.", ANEW)
        raise UserError(
            f"{self.path} was made on another base, slot or start, or by another version of its method.", ANEW
        )

    def _other_concept(self, meta: Mapping[str, Any]) -> bool:
        """Whether a state was made with other photos, captions or words."""
        return bool(meta.get("belongs", {}).get("concept") != self.belongs["concept"])

    def _check_wanted(self, meta: Mapping[str, Any], changed: Changes, force: bool, hooks: Hooks) -> None:
        """Refuse to go on with other settings or photos unless that is forced, and past the last step ever.

        Raises:
            UserError: so it is.
        """
        if int(meta["step"]) > self.config.steps:
            raise UserError(
                f"{self.path} is at step {meta['step']} already, past steps={self.config.steps}.",
                Fix("steps", str(meta["step"]), "or more"),
                ANEW,
            )
        differences = ", ".join(f"{key}={old}, now it is {new}" for key, (old, new) in list(changed.items())[:3])
        if changed and not force:
            raise UserError(
                f"{self.path} was made with {differences}.",
                *(
                    Fix(key, written(old), "to go on as it was")
                    for key, (old, _) in changed.items()
                    if len(changed) == 1
                ),
                Fix("force", "true", "to go on with the new settings"),
                ANEW,
            )
        parts = [hashes.get("parts", "1") for hashes in (meta.get("belongs", {}), self.belongs)]
        if parts[0] != parts[1] and "optimizer.gradient_accumulation_steps" not in changed:
            batches = (
                f"{self.path.name} was made with {parts[0]} batches a step over all processes, now it is {parts[1]}"
            )
            if not force:
                raise UserError(
                    f"{batches}; as many processes go on as it was.",
                    Fix("force", "true", "to go on with these"),
                    ANEW,
                )
            hooks.notify(f"Note: {batches}; going on because force is set.")
        other = self._other_concept(meta)
        if other and not force:
            raise UserError(
                f"{self.path} was made with other photos, captions or words, which could be put back.",
                Fix("force", "true", "to go on with these"),
                ANEW,
            )
        if other:
            hooks.notify(
                f"Note: {self.path.name} was made with other photos, captions or words; going on because force is set."
            )
        if changed:
            hooks.notify(f"Note: {self.path.name} was made with {differences}; going on because force is set.")

    @torch.no_grad()
    def _take(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        own = {name: value for name, value in tensors.items() if not name.startswith((EXTRA, AVERAGE))}
        for name, parameter in self.parameters.items():
            parameter.copy_(own[name])
        averages = {name.removeprefix(AVERAGE): value for name, value in tensors.items() if name.startswith(AVERAGE)}
        self.average.load(averages or own)  # force may enable an average that the run had not
        extra = {name.removeprefix(EXTRA): value for name, value in tensors.items() if name.startswith(EXTRA)}
        self.injected.load_extra_state(extra, meta.get("extra", {}))
        if meta.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(meta["scaler"])
        self.validator.load_state(meta.get("validation", {}))
