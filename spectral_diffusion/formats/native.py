"""The native adapter file: one safetensors with factors, band, token vectors and metadata.

Tensors: ``delta.<component>.<layer>.<parameter>``, ``band.<component>.<layer>.{U,S,V}``,
``token.<text encoder>``. The band is stored, never derived again: one flipped sign would change everything. A hash
over tensors and metadata tells a damaged or edited file from a whole one.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter, check_finite
from ..base import fingerprint_json, parse_fingerprint
from ..errors import UserError, reason
from ..files import read_tensors, write_tensors
from ..linalg import Band, flatten
from ..methods import get_method
from ..slots import read_columns
from ..tokens import check_token

FORMAT = "spectral_diffusion"
FORMAT_VERSION = "2"
DIGEST = "spectral.digest"
LIBRARIES = ("spectral-diffusion", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "scipy")


def versions() -> dict[str, str]:
    """The installed versions of the libraries that make an adapter."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "unknown"
    return found


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write an adapter atomically."""
    tensors = {f"delta.{name}": value for name, value in adapter.parameters.items()}
    for layer, band in adapter.bands.items():
        tensors |= {f"band.{layer}.{part}": value for part, value in band._asdict().items()}
    tensors |= {f"token.{encoder}": value for encoder, value in adapter.vectors.items()}
    tensors = {name: value.detach().cpu().float().contiguous() for name, value in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spectral.concept": json.dumps({"name": adapter.name, "noun": adapter.noun, "token": adapter.token}),
        "spectral.method": adapter.method.name,
        "spectral.rank": str(adapter.rank),
        "spectral.columns": str(adapter.slot) if adapter.slot else "",
        "spectral.targets": adapter.targets,
        "spectral.base": adapter.base,
        "spectral.base_fingerprint": fingerprint_json(adapter.fingerprint),
        "spectral.config": json.dumps(adapter.config, sort_keys=True),
        "spectral.versions": json.dumps(adapter.versions, sort_keys=True),
    }
    write_tensors(Path(path), tensors, {**metadata, DIGEST: digest(tensors, metadata)})


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over names, shapes, values and metadata, whatever their order in the file."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    total.update(json.dumps({key: metadata[key] for key in sorted(metadata) if key != DIGEST}).encode())
    return total.hexdigest()


def load_adapter(path: Path) -> Adapter:
    """Read and validate a native adapter file.

    Raises:
        UserError: missing, damaged, of another kind or a newer format.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file but not an adapter of this program.")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {metadata.get('format_version')}; this program reads {FORMAT_VERSION}."
        )
    if metadata.get(DIGEST) != digest(tensors, metadata):
        raise UserError(f"{path} is damaged or was edited: its hash is not the one it was written with; copy it again.")
    try:
        concept = json.loads(metadata["spectral.concept"])
        columns = metadata["spectral.columns"]
        bands: dict[str, dict] = {}
        for name, tensor in tensors.items():
            if name.startswith("band."):
                layer, _, part = name.removeprefix("band.").rpartition(".")
                bands.setdefault(layer, {})[part] = tensor
        adapter = Adapter(
            name=str(concept["name"]),
            noun=str(concept["noun"]),
            token=check_token(concept["token"]),
            method=get_method(metadata["spectral.method"]),
            rank=int(metadata["spectral.rank"]),
            slot=read_columns(columns) if columns else None,
            targets=metadata["spectral.targets"],
            base=metadata["spectral.base"],
            fingerprint=parse_fingerprint(metadata["spectral.base_fingerprint"]),
            parameters=dict(sorted((n[6:], t) for n, t in tensors.items() if n.startswith("delta."))),
            bands={layer: Band(**parts) for layer, parts in sorted(bands.items())},
            vectors={n[6:]: t for n, t in tensors.items() if n.startswith("token.")},
            config=json.loads(metadata["spectral.config"]),
            versions=json.loads(metadata["spectral.versions"]),
        )
        _check_shapes(adapter)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise UserError(f"{path} is a damaged adapter ({reason(error)}); train or copy it again.") from error
    check_finite(adapter)
    return adapter


def _check_shapes(adapter: Adapter) -> None:
    """Every layer complete and of the shapes its method says, or ValueError."""
    if not adapter.layers or adapter.rank < 1:
        raise ValueError("no layers")
    if adapter.method.banded != bool(adapter.slot) or (adapter.slot and adapter.slot.rank != adapter.rank):
        raise ValueError("slot and rank disagree")
    if adapter.method.banded and set(adapter.bands) != set(adapter.layers):
        raise ValueError("bands and layers disagree")
    if any(v.dim() != 2 or not 1 <= len(v) <= 64 for v in adapter.vectors.values()):
        raise ValueError("token vectors have a wrong shape")
    for layer in adapter.layers:
        parameters, band = adapter.parameters_of(layer), adapter.bands.get(layer)
        factors = adapter.factors(layer)
        out_features, in_features = factors.up.shape[0], factors.down.shape[1]
        shapes = adapter.method.shapes(out_features, in_features, adapter.rank)
        if any(tuple(flatten(parameters[name]).shape) != shape for name, shape in shapes.items()):
            raise ValueError(f"{layer} has a wrong shape")
        sides = ((out_features, adapter.rank), (adapter.rank,), (in_features, adapter.rank))
        if band is not None and any(tuple(t.shape) != side for t, side in zip(band, sides, strict=True)):
            raise ValueError(f"the band of {layer} has a wrong shape")
    known = {f"{layer}.{name}" for layer in adapter.layers for name in adapter.method.shapes(1, 1, 1)}
    if set(adapter.parameters) != known:
        raise ValueError("unknown parameters")
