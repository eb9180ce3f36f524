"""The headers of the workspace's adapters, read without their tensors, and the concepts they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..core.errors import UserError, reason
from ..core.files import parse_json
from ..slots.ledger import Slot, read_columns
from .adapters import workspace_adapters
from .workspace import Workspace, sentence_of


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter's header.

    ``kind`` is what its slot consists of, ``columns`` or ``rows``; None for a method without slots. ``capacity`` is
    their number in the narrowest adapted weight.
    """

    path: Path
    name: str
    noun: str
    token: str
    method: str
    kind: str | None
    slot: Slot | None
    base: str
    fingerprint: str
    capacity: int


def adapter_headers(workspace: Workspace) -> tuple[list[AdapterInfo], list[str]]:
    """The headers of all readable adapters, and a sentence for each unreadable file."""
    adapters, problems = [], []
    for path in workspace_adapters(workspace).values():
        try:
            seen = path.stat()
            adapters.append(_label(path, seen.st_mtime_ns, seen.st_size))
        except Exception as error:  # one bad file must not hide the others
            problems.append(sentence_of(error))
    return adapters, problems


@lru_cache(maxsize=256)
def _label(path: Path, changed: int, size: int) -> AdapterInfo:
    """One header; a file is read again only when it has changed.

    Only the header is read: a page must not wait for tensors, nor for the libraries of a base.

    Raises:
        UserError: it is not a complete adapter file.
    """
    from ..methods import get_method  # imports torch, which a page need not wait for

    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
        concept, sizes = parse_json(metadata["spectral.concept"]), parse_json(metadata["spectral.sizes"])
        columns = metadata["spectral.columns"]
        method = get_method(metadata["spectral.method"])
        return AdapterInfo(
            path, str(concept["name"]), str(concept["noun"]), str(concept["token"]).lower(), method.name, method.slot,
            read_columns(columns) if columns else None, Path(metadata["spectral.base"]).name,
            str(parse_json(metadata["spectral.base_fingerprint"])["exact"]), min(min(size) for size in sizes.values()),
        )  # fmt: skip
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a readable adapter ({reason(error)}).") from error


def owner_of_adapter(label: AdapterInfo, concepts: Mapping[str, tuple[str, str, str]]) -> str | None:
    """The concept that an adapter was trained from: by its file's name, else its name, else its token.

    Args:
        concepts: folder name to (name, noun, token).
    """
    if label.path.stem in concepts:
        return label.path.stem
    for part, mine in ((0, label.name), (2, label.token)):
        for folder, details in concepts.items():
            if mine and details[part] == mine:
                return folder
    return None
