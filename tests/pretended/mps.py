"""Which aten operations have a kernel for MPS, by the table of the installed torch."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torchgen
import yaml

FALLS_BACK = {"aten::embedding_renorm_", "aten::linalg_svd", "aten::_linalg_svd", "aten::col2im"}  # torch's own list


@lru_cache
def table() -> dict[str, Any]:
    """torch's native functions by name."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return {f"aten::{entry['func'].split('(')[0]}": entry for entry in yaml.load(path.read_text(), loader)}


@lru_cache
def has_kernel(name: str) -> bool:
    """Whether MPS can run an operation; one that is not in the table is not torch's own.

    Operations made for the CPU stand for those that MPS has in their place.
    """
    entry = table().get(name)
    if entry is None or name in FALLS_BACK or "_for_cpu" in name:
        return True
    if "structured_delegate" in entry:
        return has_kernel(f"aten::{entry['structured_delegate']}")
    keys = {key.strip() for listed in entry.get("dispatch") or {} for key in listed.split(",")}
    return not keys or "MPS" in keys or any(key.startswith("Composite") for key in keys)
