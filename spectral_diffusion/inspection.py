"""Say what a file or folder of this program holds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from .adapter import Adapter
from .errors import UserError
from .formats.native import load_adapter
from .fusion.recipe import load_adapters, overlaps, read_recipe
from .generation.pipeline import read_settings
from .linalg import cosine_between


def inspect_path(path: Path) -> dict[str, Any]:
    """A JSON-able description of an adapter, a fused folder or a generated picture.

    Raises:
        UserError: none of these, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        recipe = read_recipe(path)
        if recipe is None:
            raise UserError(f"{path} is not a fused folder: it holds no recipe.json.")
        return {"kind": "fusion", **recipe, **_together(path)}
    if not path.exists():
        raise UserError(f"No such file: {path}.")
    if path.suffix.lower() == ".png":
        return {"kind": "picture", **read_settings(path)}
    adapter = load_adapter(path)
    return {
        "kind": "adapter",
        "concept": adapter.name,
        "noun": adapter.noun,
        "token": adapter.token,
        "vectors": len(next(iter(adapter.vectors.values()), [])),
        "method": adapter.method.name,
        "rank": adapter.rank,
        "columns": str(adapter.slot) if adapter.slot else None,
        "targets": adapter.targets,
        "layers": len(adapter.layers),
        "trained": adapter.count(),
        "norm": _rounded(adapter.norm()),
        "base": adapter.base,
        "base_fingerprint": adapter.fingerprint.exact,
        "config": adapter.config,
        "versions": adapter.versions,
    }


def _together(folder: Path) -> dict[str, Any]:
    """Norms, pairwise cosines and warnings of the adapters inside a fused folder."""
    adapters = load_adapters(folder)
    told = [adapter for adapter in adapters if not adapter.needs_base]
    return {
        "norms": {adapter.name: _rounded(adapter.norm()) for adapter in adapters},
        "cosines": {f"{a.name} · {b.name}": round(cosine(a, b), 6) for a, b in itertools.combinations(told, 2)},
        "warnings": overlaps(adapters),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def cosine(left: Adapter, right: Adapter) -> float:
    """Mean over the shared layers of ⟨ΔW₁, ΔW₂⟩ / (|ΔW₁| |ΔW₂|)."""
    shared = [layer for layer in left.layers if layer in right.layers]
    if not shared:
        return 0.0
    return sum(cosine_between(left.factors(layer), right.factors(layer)) for layer in shared) / len(shared)
