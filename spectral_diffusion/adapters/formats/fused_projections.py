"""Changes of a fused layer's parts as one change of the whole, exactly: up is block-diagonal, down is stacked.

Adapters see the parts of a fused layer (:mod:`...models.split_linear`), each with factors of its own. Other programs
know the whole only, and FLUX.2's original code also fuses what diffusers keeps apart: queries, keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ...linalg import Factors

# FLUX.2: a path of diffusers to the original's, and the part of it that the layer is.
ORIGINAL = (
    (r"transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"double_blocks.\1.img_attn.qkv", r"\2"),
    (r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj", r"double_blocks.\1.txt_attn.qkv", r"\2"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj", ""),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj", ""),
    (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0", ""),
    (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2", ""),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0", ""),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2", ""),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1", ""),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2", ""),
)
NETWORK = "transformer."


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


def original_flux2(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """FLUX.2's layers under the original's names, queries, keys and values fused; the others as they are."""
    out: dict[str, Factors] = {}
    parts: dict[str, dict[str, Factors | None]] = {}
    for layer, change in factors.items():
        name, part = original_name(layer)
        if part:
            parts.setdefault(name, dict.fromkeys("qkv"))[part] = change
        else:
            out[name] = change
    for name, changes in parts.items():
        side = next(len(change.up) for change in changes.values() if change is not None)
        out[name] = stack_rows(changes, dict.fromkeys("qkv", side))
    return out


def original_name(layer: str) -> tuple[str, str]:
    """The original's name of a layer of FLUX.2's transformer, and the part of the layer of that name; else empty."""
    path = layer.removeprefix(NETWORK)
    for pattern, name, part in ORIGINAL:
        if layer.startswith(NETWORK) and (match := re.fullmatch(pattern, path)):
            return NETWORK + match.expand(name), match.expand(part)
    return layer, ""
