"""A contrastive merge after LoRACLR (Simsar et al. 2025), in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ...config.settings import Settings
from ...linalg import Factors
from ..activations import GramAccumulator
from .gradient import mean_diagonal, solve
from .registry import Accumulator, Contribution, MergeContext, register_accumulator


class ContrastiveOptions(Settings):
    """How the problem is solved."""

    repulsion: float = Field(
        0.1, ge=0, lt=1, description="Weight of the others' outputs that a concept's inputs are kept away from."
    )
    ridge: float = Field(1e-6, gt=0, description="Ridge, as a share of the Gram matrices' mean diagonal.")


@register_accumulator(
    "contrastive",
    "Contrastive merge: each concept near its own adapter's outputs and away from the others'",
    options=ContrastiveOptions,
    paper="after Simsar et al. 2025 (LoRACLR), arXiv:2412.09622",
)
class ContrastiveFusion(Accumulator):
    """argmin over ΔW of Σ_i |(ΔW − λ_i ΔW_i) X_i|² − ν/(K−1) Σ_{j≠i} |(ΔW − λ_j ΔW_j) X_i|² + μ |ΔW X_0|² + ρ |ΔW|².

    LoRACLR repels outputs up to a margin and descends; without the margin, and with ν < 1, the problem stays convex:
    ΔW = (Σ_j λ_j ΔW_j (G_j − ν/(K−1) Σ_{i≠j} G_i)) ((1 − ν) Σ G_i + μ G_0 + ρ I)⁻¹. ν = 0 is gradient fusion.
    """

    def __init__(self, contributions: Sequence[Contribution], context: MergeContext) -> None:
        parts = [contribution.factors() for contribution in contributions]
        self.options = context.get(ContrastiveOptions)
        self.context = context
        self.up = torch.cat([part.up for part in parts], 1)
        self.downs = [c.scale * part.down for c, part in zip(contributions, parts, strict=True)]
        self.right = [torch.zeros_like(down) for down in self.downs]
        self.total: Tensor | None = None
        self.count, self.diagonal = 0, 0.0

    def add(self, index: int, inputs: GramAccumulator) -> None:
        gram, others = inputs.gram(), max(1, len(self.downs) - 1)
        for number, down in enumerate(self.downs):
            weight = 1.0 if number == index else -self.options.repulsion / others
            self.right[number] += weight * (down @ gram)
        self.total = gram if self.total is None else self.total.add_(gram)
        self.count += inputs.count
        self.diagonal += mean_diagonal([(inputs, 1.0)])

    def result(self) -> Factors:
        assert self.total is not None
        alone = len(self.downs) == 1
        total, prior = self.total * (1 if alone else 1 - self.options.repulsion), self.context.prior
        diagonal = self.diagonal
        if prior is not None and self.context.prior_weight > 0:
            weight = self.context.prior_weight * self.count / len(self.downs) / max(prior.count, 1)
            total = total + weight * prior.gram()
            diagonal += mean_diagonal([(prior, weight)])
        right = torch.cat(self.right)
        if diagonal <= 0:  # a layer that saw nothing but zeros
            return Factors(self.up, torch.zeros_like(right))
        return Factors(self.up, solve(total, right, self.options.ridge * diagonal))
