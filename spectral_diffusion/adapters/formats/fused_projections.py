"""Changes of a fused layer's parts as one change of the whole, exactly: up is block-diagonal, down is stacked.

Adapters see the parts of a fused layer (:mod:`...models.split_linear`), each with factors of its own. Other programs
know the whole only, and FLUX.2's original code also fuses what diffusers keeps apart: queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ...linalg import Factors

OriginalLayer = Callable[[str], tuple[str, str]]


def join_parts(factors: Mapping[str, Factors], fused: Mapping[str, Mapping[str, int]]) -> dict[str, Factors]:
    """The factors with those of every fused layer's parts as one of the whole.

    Args:
        fused: layer to its parts' names and rows, in order; a part without factors does not change.
    """
    out = dict(factors)
    for layer, rows in fused.items():
        parts = {name: out.pop(f"{layer}.{name}", None) for name in rows}
        if any(part is not None for part in parts.values()):
            out[layer] = stack_rows(parts, rows)
    return out


def split_parts(factors: Mapping[str, Factors], fused: Mapping[str, Mapping[str, int]]) -> dict[str, Factors]:
    """The inverse: a change of a whole layer as changes of its parts; a part that does not change is left out."""
    out = dict(factors)
    for layer, rows in fused.items():
        if (whole := out.pop(layer, None)) is not None and len(whole.up) == sum(rows.values()):
            blocks = zip(rows, whole.up.split(list(rows.values())), strict=True)
            out |= {f"{layer}.{name}": Factors(block, whole.down) for name, block in blocks if bool(block.any())}
        elif whole is not None:
            out[layer] = whole
    return out


def stack_rows(parts: Mapping[str, Factors | None], rows: Mapping[str, int]) -> Factors:
    """Factors of blocks of rows as factors of the whole, of the sum of their ranks."""
    present = [part for part in parts.values() if part is not None]
    empty = present[0].up.new_zeros
    ups = [part.up if part is not None else empty(rows[name], 0) for name, part in parts.items()]
    return Factors(torch.block_diag(*ups), torch.cat([part.down for part in present]))


def original_layers(factors: Mapping[str, Factors], original: OriginalLayer) -> dict[str, Factors]:
    """A network's layers under the original code's names, with the parts fused that it fuses; others as they are.

    Args:
        original: a path in the network to the original's, and the part of that layer (q, k or v; else empty).
    """
    out: dict[str, Factors] = {}
    parts: dict[str, dict[str, Factors | None]] = {}
    for layer, change in factors.items():
        component, _, path = layer.partition(".")
        renamed, part = original(path)
        name = f"{component}.{renamed}"
        if part:
            parts.setdefault(name, dict.fromkeys("qkv"))[part] = change
        else:
            out[name] = change
    for name, changes in parts.items():
        side = next(len(change.up) for change in changes.values() if change is not None)
        out[name] = stack_rows(changes, dict.fromkeys("qkv", side))
    return out
