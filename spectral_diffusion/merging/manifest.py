"""A fused folder on disk: its adapters, manifest and merged factors, and when one may replace another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.formats.native import load_adapter
from ..config.fuse import FuseConfig
from ..core.errors import ELSEWHERE, UserError
from ..core.files import exists, is_file, is_folder, parse_json, read_tensors, read_text, write_json, write_tensors
from ..core.machine import provenance
from ..core.outputs import check_only, check_replaceable, holds
from ..core.paths import is_full, located_base, portable_base
from ..linalg import Factors
from ..models.loading import quiet_loading
from ..pocket import is_pocket

WHERE = ("_name_or_path", "name_or_path")  # in configs: the folder that a part was loaded from
MANIFEST, MERGED, ADAPTERS, SETTINGS = "manifest.json", "merged.safetensors", "adapters", "settings.yaml"


def adapters_in_fusion(path: Path) -> list[Adapter]:
    """The adapter of a file, or those inside a fused folder.

    Raises:
        UserError: neither.
    """
    return [load_adapter(file) for file in files_in_fusion(path)]


def files_in_fusion(path: Path) -> list[Path]:
    """The files of the adapters inside a fused folder, or the file itself.

    Raises:
        UserError: a folder that is no fusion.
    """
    if not is_folder(path):
        return [Path(path)]
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{path} is not a fused folder: it holds no {MANIFEST}.")
    files = []
    for concept in manifest["concepts"].values():
        file = (Path(path) / str(concept["file"])).resolve()
        if not file.is_relative_to(Path(path).resolve()):
            raise UserError(f"{path}/{MANIFEST} names a file outside the folder; fuse the adapters again.")
        files.append(file)
    return files


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a diffusers folder that does not say where on this machine its parts were loaded from."""
    with quiet_loading():
        pipeline.save_pretrained(folder)
    for file in [*folder.glob("*.json"), *folder.glob("*/*.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        known = {key: config[key] for key in WHERE if isinstance(config, dict) and is_full(str(config.get(key)))}
        if known:
            write_json(file, {key: value for key, value in config.items() if key not in known})


def write_merged(path: Path, merged: Mapping[str, Factors]) -> None:
    """Write merged factors beside the weights, so that the fusion can be exported as one LoRA."""
    tensors = {
        f"{layer}.{part}": t.float() for layer, factors in merged.items() for part, t in factors._asdict().items()
    }
    write_tensors(path, tensors)


def read_merged(folder: Path) -> dict[str, Factors]:
    """The merged factors of a fused folder by layer.

    Raises:
        UserError: it holds none, because its merge gave dense changes.
    """
    path = Path(folder) / MERGED
    if not path.is_file():
        raise UserError(
            f"{folder} was merged into dense changes, which no LoRA holds; export it as folder or checkpoint."
        )
    tensors, _ = read_tensors(path)
    layers = sorted({name.rpartition(".")[0] for name in tensors})
    return {layer: Factors(tensors[f"{layer}.up"], tensors[f"{layer}.down"]) for layer in layers}


def base_name_of(path: Path) -> str:
    """The base that an adapter file or a fused folder names.

    Raises:
        UserError: it is neither.
    """
    manifest = read_manifest(path) if is_folder(path) else None
    return str(manifest["base"]) if manifest else adapters_in_fusion(path)[0].base


def lasting(base: str) -> str:
    """A base's name that means the same from any folder: local paths in full."""
    return str(Path(base).resolve()) if exists(base) and not is_pocket(base) else base


def check_fusion_output(output: Path) -> None:
    """Refuse to write over anything but an earlier fusion with nothing else in it.

    Raises:
        UserError: it is something else, or holds something else.
    """
    if not output.exists():
        return
    if not (output / MANIFEST).is_file():
        raise UserError(f"{output} exists and is not a fused folder.", ELSEWHERE)
    check_replaceable(output, {MANIFEST, MERGED, SETTINGS, ADAPTERS})
    try:
        concepts = (read_manifest(output) or {})["concepts"].values()
    except UserError:  # a damaged manifest does not say which adapters are its own
        return
    check_only(output / ADAPTERS, {Path(str(concept["file"])).name for concept in concepts})


def check_not_base(output: Path, base: str) -> None:
    """Refuse to write a fusion over the base that it is built on.

    Raises:
        UserError: the output is that base, or holds it.
    """
    if not is_pocket(base) and output.exists() and holds(output, base):
        raise UserError(f"{output} is the base that is built on, and would be lost.", ELSEWHERE)


def manifest_of(
    config: FuseConfig, adapters: list[Adapter], files: dict[str, str], fingerprint: str | None
) -> dict[str, Any]:
    """The manifest of a fusion, as JSON; ``fingerprint`` is the base's exact one, if known."""
    settings = config.model_dump(mode="json", exclude={"adapters", "output", "base", "device", "scales"})
    return {
        "format_version": 2,
        "base": portable_base(config.base or adapters[0].base, fingerprint or "", config.output),
        **({"base_fingerprint": fingerprint} if fingerprint else {}),
        "merge": config.merge,
        "settings": settings,
        "scales": config.scales,
        "concepts": {
            adapter.name: {
                "token": adapter.token,
                "noun": adapter.noun,
                "method": adapter.method.name,
                "columns": str(adapter.slot) if adapter.slot else None,
                "scale": config.scales.get(adapter.name, 1.0),
                "file": files[adapter.name],
            }
            for adapter in sorted(adapters, key=lambda adapter: adapter.name)
        },
        "provenance": provenance(),
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a fused folder; None if it is not one.

    Raises:
        UserError: the manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    if not is_file(path):
        return None
    try:
        manifest = parse_json(read_text(path))
        if manifest["format_version"] != 2 or not isinstance(manifest["concepts"], dict):
            raise ValueError
        if not isinstance(manifest["settings"], dict) or not isinstance(manifest["scales"], dict):
            raise ValueError
        if not all(isinstance(manifest[key], str) for key in ("base", "merge")):
            raise ValueError
        for concept in manifest["concepts"].values():
            if not all(isinstance(concept[key], str) for key in ("file", "method", "token")):
                raise ValueError
            float(concept["scale"])
        int(manifest["settings"]["distill"]["steps"])
        manifest["base"] = located_base(manifest["base"], manifest.get("base_fingerprint", ""), path.parent)
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged; fuse the adapters again.") from error
    return manifest
