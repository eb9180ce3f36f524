"""Which weights an adapter changes: presets over the layers of a base."""

from __future__ import annotations

import re

from torch import nn

from ..errors import UserError, nearest

# Per component, a pattern over module names. The reference adapts exactly these attention projections.
PRESETS: dict[str, dict[str, str]] = {
    "attention": {
        "unet": r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        "text_encoder": r".*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    },
    "cross-attention": {
        "unet": r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)",
        "text_encoder": r".*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    },
    "key-value": {
        "unet": r".*\.attn2\.(to_k|to_v)",
        "text_encoder": r".*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    },
    "unet-attention": {"unet": r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"},
}


def find_targets(models: dict[str, nn.Module], preset: str = "attention") -> dict[str, nn.Linear]:
    """Name (``component.module.path``) to layer, in a fixed order.

    Adapted layers are found through their adapters too: the names do not change by attaching.

    Raises:
        UserError: unknown preset, or a base in which it matches nothing.
    """
    if preset not in PRESETS:
        raise UserError(f"Unknown targets '{preset}'{nearest(preset, PRESETS)}; known: {', '.join(PRESETS)}.")
    found: dict[str, nn.Linear] = {}
    for component, pattern in PRESETS[preset].items():
        model = models.get(component)
        if model is None:
            continue
        for name, module in model.named_modules():
            if re.fullmatch(pattern, name):
                layer = getattr(module, "base_layer", module)
                if isinstance(layer, nn.Linear):
                    found[f"{component}.{name}"] = layer
    if not found:
        raise UserError(f"The targets '{preset}' match no layer of this base.")
    return found
