"""Changes of a fused layer's parts as one change of the whole, exactly: up is block-diagonal, down is stacked.

Adapters see the parts of a fused layer (:mod:`...models.split_linear`), each with factors of its own. Other programs
know the whole only, and original code also fuses what diffusers keeps apart: queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...linalg import Factors
from ...models.original_names import OriginalNames


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
    """Factors of blocks of rows as factors of the whole.

    Its rank is the sum of the parts' ranks; parts with the same ``down`` share it.
    """
    present = [part for part in parts.values() if part is not None]
    downs: list[Tensor] = []
    for each in present:
        if not any(torch.equal(down, each.down) for down in downs):
            downs.append(each.down)
    bands = []
    for name, part in parts.items():
        own = [part is not None and torch.equal(down, part.down) for down in downs]
        blocks = [
            part.up if part is not None and here else present[0].up.new_zeros(rows[name], len(down))
            for here, down in zip(own, downs, strict=True)
        ]
        bands.append(torch.cat(blocks, 1))
    return Factors(torch.cat(bands), torch.cat(downs))


def original_layers(factors: Mapping[str, Factors], names: OriginalNames) -> dict[str, Factors]:
    """The layers under the original's names, queries, keys and values fused; one without such a name keeps its own."""
    out: dict[str, Factors] = {}
    thirds: dict[str, dict[str, Factors | None]] = {}
    for layer, change in factors.items():
        component, _, path = layer.partition(".")
        name, part = names.find(path) or (path, "")
        if part:
            thirds.setdefault(f"{component}.{name}", dict.fromkeys("qkv"))[part] = change
        else:
            out[f"{component}.{name}"] = change
    for name, changes in thirds.items():
        side = next(len(change.up) for change in changes.values() if change is not None)
        out[name] = stack_rows(changes, dict.fromkeys("qkv", side))
    return out


def trimmed(factors: Factors) -> Factors:
    """The same change without columns of ``up`` and rows of ``down`` that are zero, as block-diagonal factors have."""
    used = factors.up.any(0) & factors.down.any(1)
    used[0] |= not bool(used.any())
    return Factors(factors.up[:, used], factors.down[used])
