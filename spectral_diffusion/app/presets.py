"""The shipped presets, and the training settings under one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .. import pocket
from ..config.presets import preset_part, rates_for
from ..config.settings import build, read_yaml
from ..config.train import TrainConfig
from ..core import assets as resources
from ..core.errors import UserError, nearest
from .bases import base_path
from .concepts import concept_folder
from .workspace import Workspace, filled

GRIDS = 4  # sample grids during a training, the last at the end


@cache
def presets() -> dict[str, str]:
    """The shipped presets that train, the pocket base's first, with their descriptions."""
    descriptions = {}
    for path in sorted(resources.configs().glob("*.yaml"), key=lambda path: (path.stem != "pocket", path.stem)):
        if read_yaml(path).get("train"):
            descriptions[path.stem] = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return descriptions


@cache
def generate_parts() -> dict[str, Mapping[str, Any]]:
    """What each shipped preset says on generating, by the preset's name."""
    parts = {name: preset_part(name, "generate") for name in presets()}
    return {name: part for name, part in parts.items() if part}


def suited_bases() -> dict[str, str]:
    """The bases that this computer has room for, each with the preset that fits it best."""
    from ..doctor import this_computer  # imports torch, which a page need not wait for

    parts = {name: generate_parts().get(name, {}) for name in this_computer()[1]}
    return {str(part["base"]): name for name, part in parts.items() if part.get("base")}


def preset_of_base(workspace: Workspace, base: str | None) -> str | None:
    """The preset to generate with a base, or a fusion on it, on this computer; None without one.

    Raises:
        UserError: no such fused folder, or a damaged one.
    """
    from ..merging.manifest import read_manifest  # imports torch, which a page need not wait for

    path = base_path(workspace, base)
    manifest = read_manifest(Path(path)) if Path(path).is_dir() else None
    return resources.preset_of(path) or suited_bases().get(str(manifest["base"]) if manifest else path)


def preset_train_settings(name: str, verb: str) -> dict[str, Any]:
    """A shipped preset's part for ``train`` or ``generate``.

    Raises:
        UserError: no such preset.
    """
    known = presets()
    if name not in known:
        raise UserError(f"Unknown preset '{str(name)[:60]}'{nearest(str(name), known)}; use one of {', '.join(known)}.")
    return preset_part(name, verb)


def train_settings(workspace: Workspace, concept: str | None, preset: str, changes: dict[str, Any]) -> TrainConfig:
    """The training settings of a listed concept under a preset, with the filled-in changes.

    The change ``samples`` adds a few sample grids where the preset has none.

    Raises:
        UserError: anything the user can fix.
    """
    folder = concept_folder(workspace, concept)
    given = filled(changes)
    samples = given.pop("samples", False)
    layers = [rates_for(preset_train_settings(preset, "train"), given.get("method")), given]
    output = workspace.adapters / f"{folder.name}.safetensors"
    settings = build(TrainConfig, *layers, {"concept": folder.absolute(), "output": output.absolute()})
    if samples and not settings.validation.every:
        validation = {"every": math.ceil(settings.steps / GRIDS), "num_inference_steps": 12}
        settings = build(TrainConfig, settings.model_dump(), {"validation": validation})
    base = Path(base_path(workspace, settings.base))
    if not pocket.is_pocket(settings.base) and base.exists():  # another server may be started in another folder
        settings = settings.model_copy(update={"base": str(base.absolute())})
    return settings
