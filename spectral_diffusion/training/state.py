"""Training state on disk: everything a run needs to go on exactly where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..errors import UserError
from ..files import read_tensors, write_tensors


def save_state(path: Path, tensors: Mapping[str, Tensor], optimizer: Optimizer, meta: dict[str, Any]) -> None:
    """Write parameters, optimiser moments and ``meta`` (JSON-able) into one safetensors file."""
    packed = {f"tensor.{name}": value for name, value in tensors.items()}
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                packed[f"optimizer.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    header = {"meta": meta, "groups": state["param_groups"], "scalars": scalars}
    write_tensors(path, packed, {"state": json.dumps(header)})


def load_state(path: Path, optimizer: Optimizer | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state written by :func:`save_state`; fills the optimiser, returns tensors and meta.

    Raises:
        UserError: the file is missing, damaged, or of a differently built optimiser.
    """
    packed, metadata = read_tensors(path)
    try:
        header = json.loads(metadata["state"])
        meta, groups = header["meta"], header["groups"]
        if optimizer is not None:
            moments: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in header["scalars"].items()}
            for name, value in packed.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".", 2)
                    moments.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a training state of this run; remove it or train without --resume.") from error
    return {name[7:]: value for name, value in packed.items() if name.startswith("tensor.")}, meta


def check_settings(path: Path, meta: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a state that was made with other settings than ``now``.

    Raises:
        UserError: it was; the sentence names the first difference.
    """
    before = meta.get("config", {})
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(
                f"{path} was made with {key}={before.get(key)}, now it is {value}; resume with the same settings, or "
                "train without --resume."
            )
