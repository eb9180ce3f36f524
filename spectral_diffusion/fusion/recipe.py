"""Fuse adapters into a diffusers folder that stock diffusers opens, and remember how it was made."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter, check_base
from ..base import Base, load_base, quiet
from ..config import FuseConfig, to_yaml
from ..errors import UserError, nearest
from ..files import atomic_folder, write_json, write_text
from ..formats.native import load_adapter, save_adapter, versions
from ..methods.targets import find_targets
from ..progress import Event, Progress, silent
from .registry import Contribution, get_merge

RECIPE = "recipe.json"


def fuse_adapters(
    base: Base,
    adapters: list[Adapter],
    merge: str = "spectral",
    form: str = "sum",
    strength: dict[str, float] | None = None,
    progress: Progress = silent,
) -> None:
    """Add the adapters' merged ΔW to the weights of ``base`` and their tokens to its tokenizer, in place.

    Adapters act in canonical order (by name), so the result does not depend on how they were listed; sums are
    formed in float64 and rounded once.

    Raises:
        UserError: two adapters share a name or a token, or a strength names none of them.
    """
    strength = strength or {}
    adapters = sorted(adapters, key=lambda adapter: adapter.name)
    for one, other in itertools.combinations(adapters, 2):
        if one.name == other.name:
            raise UserError(f"Two adapters are called '{one.name}'; train one of them again with another name=.")
        for token in one.tokens:
            if token in other.tokens:
                raise UserError(
                    f"'{one.name}' and '{other.name}' share the token {token}; train one with another token=."
                )
    names = [adapter.name for adapter in adapters]
    for name in strength:
        if name not in names:
            raise UserError(
                f"--strength names '{name}'{nearest(name, names)}, but the adapters are {', '.join(names)}."
            )
    combine = get_merge(merge)
    targets: dict[str, torch.nn.Linear | torch.nn.Conv2d] = {}
    for adapter in adapters:
        targets |= find_targets(base.models, adapter.targets)
    layers = [layer for layer in targets if any(layer in adapter.layers for adapter in adapters)]
    for index, layer in enumerate(layers, 1):
        weight = targets[layer].weight
        contributions = [
            Contribution(
                adapter.name,
                adapter.method,
                adapter.parameters_of(layer),
                adapter.frozen_of(layer, weight.detach().cpu()),
                adapter.slot,
                strength.get(adapter.name, 1.0),
            )
            for adapter in adapters
            if layer in adapter.layers
        ]
        with torch.no_grad():
            delta = combine(contributions, form).to(weight.device)
            weight.copy_((weight.double() + delta.view(weight.shape)).to(weight.dtype))
        progress(Event("fuse", index, len(layers), {"layer": layer}))
    for adapter in adapters:
        for token, vectors in adapter.tokens.items():
            base.install(token, vectors)


def overlaps(adapters: list[Adapter]) -> list[str]:
    """A sentence for every two adapters whose slots share columns."""
    return [
        f"'{a.name}' ({a.slot}) and '{b.name}' ({b.slot}) share {a.slot.shared(b.slot)} columns; they will disturb "
        "each other."
        for a, b in itertools.combinations(adapters, 2)
        if a.slot and b.slot and a.slot.overlaps(b.slot)
    ]


def fuse_to_folder(config: FuseConfig, progress: Progress = silent) -> list[str]:
    """Fuse the config's adapters and write the folder; returns warnings to show.

    The folder is a float32 diffusers pipeline with every token in its tokenizer, ``recipe.json``, the
    resolved settings, and the adapters themselves in ``adapters/``. An older fusion there is replaced whole.

    Raises:
        UserError: see :func:`fuse_adapters` and the loading rule.
    """
    output = config.output
    if output.exists() and not (output / RECIPE).is_file():
        raise UserError(f"{output} exists and is not a fused folder; choose another output with -o.")
    adapters = [load_adapter(path) for path in config.adapters]
    base = load_base(config.base or adapters[0].base, config.device)
    warnings = [text for adapter in adapters if (text := check_base(adapter, base, config.allow_base))]
    warnings += overlaps(adapters)
    fuse_adapters(base, adapters, config.merge, config.form, config.strength, progress)
    with atomic_folder(output) as new:
        with quiet():
            base.pipeline.to("cpu").save_pretrained(new)
        files = {}
        for adapter in adapters:
            files[adapter.name] = f"adapters/{adapter.name}.safetensors"
            save_adapter(adapter, new / files[adapter.name])
        write_json(new / RECIPE, recipe_of(config, base, adapters, files))
        write_text(new / "settings.yaml", to_yaml(config))
    return warnings


def recipe_of(config: FuseConfig, base: Base, adapters: list[Adapter], files: dict[str, str]) -> dict[str, Any]:
    """What went into a fusion, as JSON."""
    return {
        "format_version": 1,
        "base": config.base or adapters[0].base,
        "merge": config.merge,
        "form": config.form,
        "concepts": {
            adapter.name: {
                "token": adapter.token,
                "noun": adapter.noun,
                "method": adapter.method.name,
                "columns": str(adapter.slot) if adapter.slot else None,
                "strength": config.strength.get(adapter.name, 1.0),
                "file": files[adapter.name],
            }
            for adapter in sorted(adapters, key=lambda adapter: adapter.name)
        },
        "versions": versions(),
    }


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of a fused folder; None if it is not one.

    Raises:
        UserError: a recipe is there but damaged.
    """
    path = Path(folder) / RECIPE
    if not path.is_file():
        return None
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        if recipe["format_version"] != 1 or not isinstance(recipe["concepts"], dict):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged; fuse the adapters again.") from error
    return recipe
