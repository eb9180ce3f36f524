"""NP-LoRA (Chen et al. 2025): contents keep off the directions that a style reads most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from ...adapters.adapter import Adapter
from ...config.fuse import MergeConfig
from ...config.settings import Settings
from ...core.errors import Fix, UserError
from ...linalg import Factors, row_space, to_float64
from .registry import Contribution, MergeContext, register_merge, weighted_sum


class NullSpaceOptions(Settings):
    """What is kept whole, and how much the rest keeps off it."""

    styles: list[str] = Field(
        [], description="Names of the adapters that are kept whole. Default: those with the class noun style."
    )
    mu: float = Field(1.0, ge=0, description="How strongly contents keep off a style's directions; 0 is the sum.")
    directions: int | None = Field(
        None, ge=1, description="How many of a style's strongest directions count. Default: all."
    )


def has_style(adapters: Sequence[Adapter], config: MergeConfig) -> None:
    """Only adapters with a style among them.

    Raises:
        UserError: no adapter is a style, or a named one is none of these.
    """
    styles, names = NullSpaceOptions(**config.options).styles, [adapter.name for adapter in adapters]
    if unknown := [name for name in styles if name not in names]:
        raise UserError(f"options.styles names '{unknown[0]}', but the adapters are {', '.join(names)}.")
    if not styles and not any(adapter.is_style for adapter in adapters):
        raise UserError(
            "np-lora needs a style: an adapter with the class noun style, or one that is named.",
            Fix("options.styles", so="to name it"),
        )


@register_merge(
    "np-lora",
    "NP-LoRA: contents keep off the strongest directions of styles, which stay whole",
    options=NullSpaceOptions,
    check=has_style,
    name_options=("styles",),
    paper="Chen et al. 2025, arXiv:2511.11051",
)
def np_lora(contributions: Sequence[Contribution], context: MergeContext) -> Factors:
    """ΔW = Σ_s λ_s ΔW_s + Σ_c λ_c ΔW_c (I − μ/(1+μ) V Vᵀ).

    V (in, k) are the strongest right singular vectors of the styles' sum. ΔW_c (I + μ V Vᵀ)⁻¹ minimizes
    |X − ΔW_c|² + μ |X V|²: μ = 0 is the sum, μ → ∞ the projection on the style's null space.
    """
    options = context.get(NullSpaceOptions)
    is_style = [c.name in options.styles if options.styles else c.is_style for c in contributions]
    whole = weighted_sum(contributions, [c.scale for c in contributions])
    styles = [c for c, style in zip(contributions, is_style, strict=True) if style]
    V = strongest_inputs(weighted_sum(styles, [c.scale for c in styles]), options.directions)
    share = options.mu / (1 + options.mu)
    down = []
    for contribution, style in zip(contributions, is_style, strict=True):
        own = contribution.factors().down
        down.append(own if style else own - share * (own @ V) @ V.mT)
    return Factors(whole.up, torch.cat(down))


def strongest_inputs(factors: Factors, count: int | None) -> torch.Tensor:
    """The ``count`` strongest right singular vectors (in, k) of a change, strongest first; by default all."""
    Q = row_space(factors)
    _, _, Vh = torch.linalg.svd(to_float64(factors.up) @ (to_float64(factors.down) @ Q), full_matrices=False)
    return Q @ Vh[:count].mT
