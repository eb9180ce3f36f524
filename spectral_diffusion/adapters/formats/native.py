"""The native adapter file: one safetensors with factors, what they are built on, token vectors and metadata.

Tensors: ``delta.<component>.<layer>.<parameter>``, ``frozen.<component>.<layer>.<name>``, ``token.<text encoder>``,
``layerwise.<text encoder>`` of a token whose vectors differ by cross-attention layer (``token`` is their mean), and
``earlier.<n>.<text encoder>`` of concepts it was trained on top of or jointly with. A band is stored, never derived
again: one flipped sign would change everything. A hash over tensors and metadata reveals damaged or edited files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePath

from torch import Tensor

from ...core.cache import DIGEST, digest
from ...core.errors import UserError, reason
from ...core.files import parse_json, read_header, read_tensors, write_tensors
from ...core.names import check_name, check_token
from ...core.paths import located_base, portable_base, without_folders
from ...linalg import flatten
from ...methods import get_method
from ...models.fingerprint import fingerprint_json, parse_fingerprint
from ...slots.ledger import read_columns
from ..adapter import Adapter, check_finite

FORMAT = "spectral_diffusion"
FORMAT_VERSION = "3"
LARGEST = 2**17  # features of a layer: beyond any model, and a file that claims more would fill the memory
LARGEST_RANDOM = 2**15  # where they alone decide the size of random matrices


def content_hash(adapter: Adapter) -> str:
    """A hash of an adapter's content, independent of where its file and its base are."""
    return digest(*_contents(adapter, PurePath(adapter.base).name))


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write an adapter atomically. Paths in it are relative to its folder, or names alone: people share it."""
    base = portable_base(adapter.base, adapter.fingerprint.exact, Path(path).parent)
    tensors, metadata = _contents(adapter, base)
    write_tensors(Path(path), tensors, {**metadata, DIGEST: digest(tensors, metadata)})


def _contents(adapter: Adapter, base: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors and its metadata but for the hash; ``base`` is its name there."""
    tensors = {f"delta.{name}": value for name, value in adapter.parameters.items()}
    for layer, frozen in adapter.frozen.items():
        tensors |= {f"frozen.{layer}.{name}": value for name, value in frozen.items()}
    tensors |= {f"token.{encoder}": value for encoder, value in adapter.vectors.items()}
    tensors |= {f"layerwise.{encoder}": value for encoder, value in adapter.per_layer_vectors.items()}
    for index, vectors in enumerate(adapter.earlier.values()):
        tensors |= {f"earlier.{index}.{encoder}": value for encoder, value in vectors.items()}
    tensors = {name: value.detach().cpu().float().contiguous() for name, value in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spectral.concept": json.dumps({"name": adapter.name, "noun": adapter.noun, "token": adapter.token}),
        "spectral.method": adapter.method.name,
        "spectral.rank": str(adapter.rank),
        "spectral.columns": str(adapter.slot) if adapter.slot else "",
        "spectral.targets": adapter.targets,
        "spectral.sizes": json.dumps(adapter.sizes, sort_keys=True),
        "spectral.kernels": json.dumps(adapter.kernels, sort_keys=True),
        **({"spectral.fused": json.dumps(adapter.fused)} if adapter.fused else {}),
        **({"spectral.family": adapter.family} if adapter.family else {}),
        "spectral.earlier": json.dumps(list(adapter.earlier)),
        "spectral.base": base,
        "spectral.base_fingerprint": fingerprint_json(adapter.fingerprint),
        "spectral.config": json.dumps(without_folders(adapter.config), sort_keys=True),
        "spectral.versions": json.dumps(adapter.provenance, sort_keys=True),
    }
    if adapter.method.revision > 1:
        metadata["spectral.revision"] = str(adapter.method.revision)
    return tensors, metadata


def is_native(path: Path) -> bool:
    """Whether a file claims to be an adapter of this program.

    Raises:
        UserError: it is no safetensors file at all.
    """
    return read_header(Path(path))[1].get("format") == FORMAT


def load_adapter(path: Path) -> Adapter:
    """Read and validate a native adapter file.

    Raises:
        UserError: missing, damaged, of another kind or a newer format.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    _check_header(path, tensors, metadata)
    try:
        adapter = _adapter_of(tensors, metadata, path.parent)
        _check_shapes(adapter)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise UserError(f"{path} is a damaged adapter ({reason(error)}); train or copy it again.") from error
    check_finite(adapter)
    return adapter


def _check_header(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Refuse a file of another program, of another version of the format or of its method, or with another hash.

    Raises:
        UserError: it is one.
    """
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path} is a safetensors file but not an adapter of this program; another program's LoRA becomes one by "
            f"spectral-diffusion import {path}."
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {metadata.get('format_version')}; this program reads {FORMAT_VERSION}."
        )
    if metadata.get(DIGEST) != digest(tensors, metadata):
        raise UserError(f"{path} is damaged or was edited: its hash is not the one it was written with; copy it again.")
    try:
        name, revision = metadata["spectral.method"], int(metadata.get("spectral.revision", "1"))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is a damaged adapter ({reason(error)}); train or copy it again.") from error
    if revision != get_method(name).revision:
        raise UserError(
            f"{path} was trained by another version of {name}, in which its numbers mean something else; "
            "train it again."
        )


def _adapter_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], folder: Path) -> Adapter:
    """The adapter in a file in ``folder``; whatever is wrong with it is no UserError yet."""
    concept = parse_json(metadata["spectral.concept"])
    columns = metadata["spectral.columns"]
    kernels = parse_json(metadata["spectral.kernels"])
    sizes, tokens = parse_json(metadata["spectral.sizes"]), parse_json(metadata["spectral.earlier"])
    frozen: dict[str, dict[str, Tensor]] = {}
    earlier: list[dict[str, Tensor]] = [{} for _ in tokens]
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "frozen":
            layer, _, part = rest.rpartition(".")
            frozen.setdefault(layer, {})[part] = tensor
        elif kind == "earlier":
            index, _, encoder = rest.partition(".")
            earlier[int(index)][encoder] = tensor
    made_for = parse_fingerprint(metadata["spectral.base_fingerprint"])
    return Adapter(
        name=check_name(str(concept["name"])),
        noun=str(concept["noun"]),
        token=check_token(concept["token"]) if concept["token"] else "",
        method=get_method(metadata["spectral.method"]),
        rank=int(metadata["spectral.rank"]),
        slot=read_columns(columns) if columns else None,
        targets=metadata["spectral.targets"],
        base=located_base(metadata["spectral.base"], made_for.exact, folder),
        fingerprint=made_for,
        parameters=dict(sorted((n[6:], t) for n, t in tensors.items() if n.startswith("delta."))),
        sizes={layer: (int(out), int(inside)) for layer, (out, inside) in sorted(sizes.items())},
        kernels={layer: (int(a), int(b), int(c)) for layer, (a, b, c) in sorted(kernels.items())},
        fused={
            layer: {part: int(rows) for part, rows in parts.items()}
            for layer, parts in parse_json(metadata.get("spectral.fused", "{}")).items()
        },
        family=metadata.get("spectral.family", ""),
        frozen=dict(sorted(frozen.items())),
        earlier={check_token(token): rows for token, rows in zip(tokens, earlier, strict=True)},
        vectors={n[6:]: t for n, t in tensors.items() if n.startswith("token.")},
        per_layer_vectors={n[10:]: t for n, t in tensors.items() if n.startswith("layerwise.")},
        config=parse_json(metadata["spectral.config"]),
        provenance=parse_json(metadata["spectral.versions"]),
    )


def _check_shapes(adapter: Adapter) -> None:
    """Every layer complete and of the shapes its method says, or ValueError."""
    method, rank = adapter.method, adapter.rank
    if not adapter.layers or rank < 1:
        raise ValueError("no layers")
    if (method.slot is not None) != bool(adapter.slot) or (adapter.slot and adapter.slot.rank != rank):
        raise ValueError("slot and rank disagree")
    for vectors in adapter.tokens.values():
        if any(v.dim() != 2 or not 1 <= len(v) <= 64 for v in vectors.values()):
            raise ValueError("token vectors have a wrong shape")
    for encoder, rows in adapter.per_layer_vectors.items():
        if rows.dim() != 3 or not 1 <= len(rows) <= 1000 or rows.shape[1:] != adapter.vectors[encoder].shape:
            raise ValueError("layer-wise token vectors have a wrong shape")
    if any(
        layer not in adapter.sizes or math.prod(k) != adapter.sizes[layer][1] for layer, k in adapter.kernels.items()
    ):
        raise ValueError("a kernel has a wrong shape")
    known = set()
    for layer, (out, inside) in adapter.sizes.items():
        most = LARGEST_RANDOM if method.builds_on == "random" else LARGEST
        if not (0 < out <= most and 0 < inside <= most):
            raise ValueError(f"{layer} has a wrong size")
        for name, shape in method.shapes(out, inside, rank).items():
            known.add(f"{layer}.{name}")
            if flat(adapter.parameters[f"{layer}.{name}"], len(shape)) != shape:
                raise ValueError(f"{layer} has a wrong shape")
        frozen, small = adapter.frozen.get(layer, {}), min(out, inside)
        expected: dict[str, tuple[int, ...]] = {}
        if method.builds_on == "columns":
            expected = {"U": (out, rank), "S": (rank,), "V": (inside, rank)}
            start = {"D_U": (rank, rank), "D_V": (rank, rank), "c": (rank,)}
            expected |= {name: shape for name, shape in start.items() if name in frozen}
        elif method.builds_on == "full_svd":
            expected = {"S": (small,)}
        if {name: tuple(t.shape) for name, t in frozen.items()} != expected:
            raise ValueError(f"what {layer} is built on has a wrong shape")
    if set(adapter.parameters) != known or not set(adapter.frozen) <= set(adapter.sizes):
        raise ValueError("unknown tensors")


def flat(tensor: Tensor, dimensions: int) -> tuple[int, ...]:
    """A parameter's shape, a 4-D factor of a convolution seen as a matrix; DoRA's magnitude as a vector."""
    return tuple((tensor.reshape(-1) if dimensions == 1 else flatten(tensor)).shape)
