"""Describe the files and folders of this program."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .adapters.adapter import Adapter
from .adapters.formats.native import load_adapter
from .core.errors import UserError
from .core.files import exists, is_folder
from .linalg import cosine_between, frobenius_norm, row_space
from .merging.fuse import overlaps
from .merging.manifest import adapters_in_fusion, read_manifest
from .merging.scales import scale_of
from .scenes.png_metadata import read_settings
from .slots.picture import slot_map


def inspect_paths(paths: Sequence[Path]) -> dict[str, Any]:
    """A JSON-able description of an adapter, a fused folder or a picture; of several adapters, their interference.

    Raises:
        UserError: none of these, or damaged.
    """
    if len(paths) == 1:
        return inspect_path(paths[0])
    adapters = [adapter for path in paths for adapter in adapters_in_fusion(path)]
    concepts = {
        adapter.name: {
            "token": adapter.token,
            "noun": adapter.noun,
            "method": adapter.method.name,
            "columns": str(adapter.slot) if adapter.slot else None,
            "base": adapter.base,
        }
        for adapter in adapters
    }
    return {"kind": "adapters", "concepts": concepts, **_together(adapters)}


def inspect_path(path: Path) -> dict[str, Any]:
    """A JSON-able description of an adapter, a fused folder or a generated picture.

    Raises:
        UserError: none of these, or damaged.
    """
    path = Path(path)
    if is_folder(path):
        manifest = read_manifest(path)
        if manifest is None:
            raise UserError(f"{path} is not a fused folder: it holds no manifest.json.")
        scales = {str(name): float(value) for name, value in manifest["scales"].items()}
        return {"kind": "fusion", **manifest, **_together(adapters_in_fusion(path), scales)}
    if not exists(path):
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
        "per_layer_tokens": len(next(iter(adapter.per_layer_vectors.values()), [])),  # layers with vectors of their own
        "method": adapter.method.name,
        "rank": adapter.rank,
        "columns": str(adapter.slot) if adapter.slot else None,
        "targets": adapter.targets,
        "layers": len(adapter.layers),
        "trained": adapter.count(),
        "norm": _rounded(adapter.norm()),
        "layer_norms": layer_norms(adapter),
        "base": adapter.base,
        "base_fingerprint": adapter.fingerprint.exact,
        "config": adapter.config,
        "provenance": adapter.provenance,
    }


def _together(adapters: Sequence[Adapter], scales: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Norms, pairwise cosines, expected interference and warnings of adapters that act together."""
    comparable = [adapter for adapter in adapters if not adapter.needs_base]
    shares = interference(comparable, scales or {})
    return {
        "norms": {adapter.name: _rounded(adapter.norm()) for adapter in adapters},
        "layer_norms": {adapter.name: layer_norms(adapter) for adapter in comparable},
        "cosines": {f"{a.name} · {b.name}": round(cosine(a, b), 6) for a, b in itertools.combinations(comparable, 2)},
        "interference": {name: round(value, 4) for name, value in shares.items()},
        "warnings": [*overlaps(list(adapters)), *slot_clashes_between(adapters)],
    }


def slot_clashes_between(adapters: Sequence[Adapter]) -> list[str]:
    """A sentence for every two adapters of different bases, or of one name or token."""
    sentences = []
    for a, b in itertools.combinations(adapters, 2):
        if not a.fingerprint.same_rounded(b.fingerprint):
            sentences.append(f"'{a.name}' was trained on '{a.base}' and '{b.name}' on another base, '{b.base}'.")
        if a.name == b.name:
            sentences.append(
                f"Two adapters are called '{a.name}'; fuse refuses that, unless one is trained under another name."
            )
        others = {token.lower() for token in b.tokens}  # a tokenizer ignores case
        for token in sorted(token for token in a.tokens if token.lower() in others):
            sentences.append(f"'{a.name}' and '{b.name}' share the token {token}; train one with another token.")
    return sentences


def layer_norms(adapter: Adapter) -> dict[str, float]:
    """|ΔW| of every layer; empty where it needs the base."""
    if adapter.needs_base:
        return {}
    return {layer: round(frobenius_norm(adapter.factors(layer)), 6) for layer in adapter.layers}


def blocks(norms: Mapping[str, float]) -> dict[str, float]:
    """Layer norms added up by block: ``unet.down_blocks.0``, ``unet.mid_block``, ``text_encoder.layers.3``."""
    out: dict[str, float] = {}
    for layer, norm in norms.items():
        component, *path = layer.removesuffix(".weight").split(".")
        path = [part for part in path if part not in {"text_model", "encoder"}]
        name = ".".join([component, *path[: 2 if len(path) > 1 and path[1].isdigit() else 1]])
        out[name] = math.hypot(out.get(name, 0.0), norm)
    return {name: round(value, 6) for name, value in out.items()}


def interference(adapters: Sequence[Adapter], scales_of: Mapping[str, float]) -> dict[str, float]:
    """How strongly the others act on the inputs of a concept's change, relative to the change itself.

    √(Σ |Σ_{j≠i} λ_j ΔW_j Q_i|² / Σ |λ_i ΔW_i|²) over layers, Q_i an orthonormal basis of the inputs that ΔW_i reads: 0
    without interference, 1 where the others weigh as much as the concept itself.
    """
    scaled = [
        {layer: scale_of(scales_of, adapter.name, layer) for layer in adapter.layers} for adapter in adapters
    ]  # λ by adapter and layer
    out = {}
    for index, adapter in enumerate(adapters):
        own = others = 0.0
        for layer in adapter.layers:
            mine = adapter.factors(layer)
            basis = row_space(mine)
            own += (scaled[index][layer] * frobenius_norm(mine)) ** 2
            acting = torch.zeros(len(mine.up), basis.shape[1], dtype=torch.float64)
            for other, each in zip(adapters, scaled, strict=True):
                if other is not adapter and other.sizes.get(layer) == adapter.sizes[layer]:
                    up, down = other.factors(layer)
                    acting += each[layer] * (up.double() @ (down.double() @ basis))
            others += float(acting.square().sum())
        out[adapter.name] = math.sqrt(others / own) if own else 0.0
    return out


def slot_picture(adapters: Sequence[Adapter]) -> Image.Image:
    """The slot map of these adapters."""
    sizes = [min(size) for adapter in adapters for size in adapter.sizes.values()]
    return slot_map(
        {adapter.name: adapter.slot for adapter in adapters},
        {adapter.name: adapter.norm() for adapter in adapters},
        min(sizes),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def cosine(left: Adapter, right: Adapter) -> float:
    """Mean over the shared layers of ⟨ΔW₁, ΔW₂⟩ / (|ΔW₁| |ΔW₂|)."""
    shared = [layer for layer in left.layers if right.sizes.get(layer) == left.sizes[layer]]
    if not shared:
        return 0.0
    return sum(cosine_between(left.factors(layer), right.factors(layer)) for layer in shared) / len(shared)
