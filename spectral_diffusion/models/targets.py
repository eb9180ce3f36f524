"""Which weights an adapter changes: presets over the layers of a base, joined by ``+``, or a pattern."""

from __future__ import annotations

import math
import re

from torch import nn

from ..core.errors import UserError, nearest, reason, short_repr
from ..linalg import matrix_shape

EVERYTHING = "re:.*"  # every linear layer and convolution, also those that no preset has
LENGTH = 64  # of a layer's name
MOST_WORK = 2e7  # steps for one name: a network has some hundreds
UNET = r"unet\..*"
BLOCKS = r"transformer\.transformer_blocks\.\d+"  # of FLUX.2 with two streams, of Krea 2 and Qwen-Image-2.1 with one
LAYERS = r"transformer\.layers\.\d+"  # of Z-Image
SINGLE = r"transformer\.single_transformer_blocks\.\d+"
TEXT = r"text_encoder(_2)?\..*"
FUSED = "quantized"  # the name of a quantized layer beside its parts (see ``split_linear.py``), which are the targets

# Patterns over ``component.module.path``. The reference adapts exactly the attention projections.
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": (
        UNET + r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        TEXT + r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
        BLOCKS + r"\.attn\.(to_q|to_k|to_v|to_gate|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
        SINGLE + r"\.attn\.(to_qkv_mlp_proj\.[qkv]|to_out)",
        LAYERS + r"\.attention\.(to_q|to_k|to_v|to_out\.0)",
    ),
    "unet-attention": (UNET + r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",),
    "cross-attention": (
        UNET + r"\.attn2\.(to_q|to_k|to_v|to_out\.0)",
        TEXT + r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    ),
    "key-value": (UNET + r"\.attn2\.(to_k|to_v)", TEXT + r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"),
    "feed-forward": (
        UNET + r"\.ff\.net\.(0\.proj|2)",
        TEXT + r"\.mlp\.(fc1|fc2)",
        BLOCKS + r"\.(ff|ff_context)\.linear_(in|out)",
        BLOCKS + r"\.(ff\.(gate|up|down)|img_mlp\.(proj|out|gate_layer))",
        SINGLE + r"\.attn\.to_qkv_mlp_proj\.(mlp_gate|mlp_value)",
        LAYERS + r"\.feed_forward\.w[123]",
    ),
    "projection": (UNET + r"\.(proj_in|proj_out)",),
    # Never conv_in and conv_out: they have four singular values.
    "conv": (
        UNET + r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut)",
        UNET + r"\.(downsamplers|upsamplers)\.\d+\.conv",
    ),
}


def patterns_of(targets: str) -> list[re.Pattern[str]]:
    """The patterns that ``attention+conv``, or ``re:`` and a regular expression, stand for.

    Raises:
        UserError: an unknown preset or a broken expression.
    """
    if targets.startswith("re:"):
        if work(targets[3:]) > MOST_WORK:
            raise UserError(
                f"The targets {short_repr(targets)} could take too long to match; repeat no group, use fewer of *+?{{|."
            )
        try:
            return [re.compile(targets[3:])]
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"The targets {short_repr(targets)} are not a regular expression: {reason(error)}."
            ) from error
    found = []
    for name in targets.split("+"):
        if name not in PRESETS:
            raise UserError(
                f"Unknown targets '{name}'{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}, joined by +, "
                "or re: and a pattern."
            )
        found += [re.compile(pattern) for pattern in PRESETS[name]]
    return found


def work(pattern: str) -> float:
    """An upper bound of the steps in which a regular expression is matched against a layer's name; roughly.

    Every repetition multiplies them by the name's length, every alternative by their number. A group that is repeated
    may take exponentially many. The targets of an adapter from elsewhere are such a pattern too.
    """
    plain = re.sub(r"\\.", "a", pattern)  # escapes, then sets, then what stands after "(?", then lazy repetitions
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "a", plain)
    plain = re.sub(r"\(\?(P?<\w+>|<?[=!]|[:>])", "(", plain)
    plain = re.sub(r"([*+?}])[?+]", r"\1", plain)
    plain, optional = re.subn(r"\)\?", ")", plain)
    if re.search(r"\)[*+{]", plain):
        return math.inf
    steps = 2.0 ** min(optional, 100) * LENGTH ** min(len(re.findall(r"[*+?{]", plain)), 20)
    for alternatives in re.findall(r"[^()]+", plain):
        steps *= 1 + alternatives.count("|")
    return steps


def find_targets(models: dict[str, nn.Module], targets: str = "attention") -> dict[str, nn.Linear | nn.Conv2d]:
    """Name (``component.module.path``) to layer, in a fixed order.

    Adapted layers are found through their adapters too: the names do not change by attaching.

    Raises:
        UserError: unknown targets, or a base in which they match nothing.
    """
    patterns = patterns_of(targets)
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for component, model in models.items():
        for path, module in model.named_modules():
            name = f"{component}.{path}"
            if path.endswith(f".{FUSED}"):
                continue
            if any(pattern.fullmatch(name) for pattern in patterns):
                layer = module
                while hasattr(layer, "base_layer"):
                    layer = layer.base_layer
                if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
                    found[name] = layer
    if not found:
        raise UserError(f"The targets '{targets}' match no layer of this base.")
    return found


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns of a layer's weight as a matrix, also of a quantized one, which keeps it in another shape."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return matrix_shape(layer.weight)  # type: ignore[arg-type]
