"""Gradient fusion (Gu et al. 2023, Mix-of-Show) in closed form, with a prior on generic prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...adapters.adapter import Adapter
from ...config.fuse import MergeConfig
from ...config.settings import Settings
from ...core.errors import Fix, UserError
from ...linalg import Factors
from ..activations import GramAccumulator
from .registry import Accumulator, Contribution, MergeContext, register_accumulator


class GradientOptions(Settings):
    """How the least squares problem is solved."""

    solver: Literal["closed", "lbfgs"] = Field(
        "closed",
        description="The exact minimum, or Mix-of-Show's own steps from the mean change, without ridge and prior.",
    )
    iterations: int = Field(50, ge=1, le=10_000, description="Steps of L-BFGS.")
    ridge: float = Field(1e-6, ge=0, description="Ridge, as a share of the Gram matrices' mean diagonal.")
    ridge_to: Literal["zero", "mean"] = Field(
        "zero", description="Where directions without activations go: no change, or the mean change."
    )


def solver_fits_prior(adapters: Sequence[Adapter], config: MergeConfig) -> None:
    """Only the closed form has a prior term.

    Raises:
        UserError: Mix-of-Show's own solver with a prior.
    """
    if GradientOptions(**config.options).solver == "lbfgs" and config.calibration.prior_weight > 0:
        raise UserError(
            "Mix-of-Show's own solver knows no prior on generic prompts.",
            Fix("calibration.prior_weight", "0"),
            Fix("options.solver", "closed"),
        )


@register_accumulator(
    "gradient",
    "Gradient Fusion in closed form: every concept as its own adapter generates it",
    options=GradientOptions,
    check=solver_fits_prior,
    paper="Gu et al. 2023 (Mix-of-Show), arXiv:2305.18292",
)
class GradientFusion(Accumulator):
    """argmin over ΔW of Σ_i |(ΔW − λ_i ΔW_i) X_i|² + μ |ΔW X_0|² + ρ |ΔW − T|².

    X_i (n, rows) is the layer's inputs while adapter i generates its concept, X_0 those on generic prompts, T is
    0 or the mean change. With G = X Xᵀ the answer is ΔW = (Σ λ_i ΔW_i G_i + ρ T)(Σ G_i + μ G_0 + ρ I)⁻¹, which is
    low-rank: up = [up_1 … up_K], down = [λ_i down_i (G_i + ρ/K I)]_i (Σ G_i + μ G_0 + ρ I)⁻¹.

    Σ G_i and the thin λ_i down_i G_i are summed up adapter by adapter. While there are fewer rows than inputs in all,
    the rows themselves are kept, for the dual form.
    """

    def __init__(self, contributions: Sequence[Contribution], context: MergeContext) -> None:
        parts = [contribution.factors() for contribution in contributions]
        self.options = context.get(GradientOptions)
        self.up = torch.cat([part.up for part in parts], 1)
        self.downs = [c.scale * part.down for c, part in zip(contributions, parts, strict=True)]
        self.prior = context.prior if context.prior_weight > 0 else None
        self.prior_weight = context.prior_weight
        self.kept: list[GramAccumulator] = []  # all so far, while they are few
        self.total: Tensor | None = None
        self.right: list[Tensor] = []
        self.count, self.diagonal = 0, 0.0

    def add(self, index: int, inputs: GramAccumulator) -> None:
        self.count += inputs.count
        self.diagonal += mean_diagonal([(inputs, 1.0)])
        rows = self.count + (self.prior.count if self.prior else 0)
        raw = inputs.is_raw and (self.prior is None or self.prior.is_raw)
        if self.total is None and raw and rows < inputs.size:
            self.kept.append(inputs)
            return
        for earlier, gram in enumerate(self.kept):
            self._sum_up(self.downs[earlier], gram)
        self.kept = []
        self._sum_up(self.downs[index], inputs)

    def _sum_up(self, down: Tensor, inputs: GramAccumulator) -> None:
        gram = inputs.gram()
        self.right.append(inputs.matmul(down) if inputs.is_raw else down @ gram)
        self.total = gram if self.total is None else self.total.add_(gram)

    def result(self) -> Factors:
        # The prior counts as ``prior_weight`` concepts do, however many rows were recorded.
        share = self.count / len(self.downs) / max(self.prior.count, 1) if self.prior else 0.0
        prior = [(self.prior, self.prior_weight * share)] if self.prior else []
        ridge = self.options.ridge * (self.diagonal + mean_diagonal(prior))
        toward = ridge / len(self.downs) if self.options.ridge_to == "mean" else 0.0
        if self.options.solver == "lbfgs":
            return self._descend()
        if self.total is None:
            return Factors(self.up, dual(self.downs, [*((gram, 1.0) for gram in self.kept), *prior], ridge, toward))
        total = self.total
        for gram, weight in prior:
            total = total + weight * gram.gram()
        right = torch.cat([right + toward * down for right, down in zip(self.right, self.downs, strict=True)])
        return Factors(self.up, solve(total, right, ridge))

    def _descend(self) -> Factors:
        """Some steps of L-BFGS from the mean change, as Mix-of-Show's code takes, without prior and ridge.

        Every iterate's columns are in those of ``up``. With Q their orthonormal basis, ΔW = Q Z has the same inner
        products as Z, so L-BFGS on the small Z takes the steps that it takes on ΔW but for the first one's length.
        """
        for earlier, gram in enumerate(self.kept):
            self._sum_up(self.downs[earlier], gram)
        self.kept = []
        assert self.total is not None
        basis, inside = torch.linalg.qr(self.up)
        mean, right = self.total / self.count, inside @ torch.cat(self.right) / self.count
        answer = (inside @ torch.cat(self.downs) / len(self.downs)).clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [answer], max_iter=self.options.iterations, history_size=25, line_search_fn="strong_wolfe",
            tolerance_grad=1e-16, tolerance_change=1e-16,
        )  # fmt: skip

        def loss() -> Tensor:
            optimizer.zero_grad()
            product = answer @ mean
            value = ((product - 2 * right) * answer).sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        return Factors(basis, answer.detach())


def mean_diagonal(sources: Sequence[tuple[GramAccumulator, float]]) -> float:
    """The mean diagonal entry of the weighted Gram matrices' sum."""
    return sum((weight * gram.trace() / gram.size for gram, weight in sources), start=0.0)


def solve(total: Tensor, right: Tensor, ridge: float) -> Tensor:
    """right (total + ρ I)⁻¹ by Cholesky; by eigenvalues where the matrix is singular and there is no ridge."""
    shifted = total + ridge * torch.eye(len(total), dtype=total.dtype, device=total.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    diagonal = factor.diagonal()
    if not failed and float(diagonal.min()) > 1e-7 * float(diagonal.max()):
        return torch.cholesky_solve(right.mT, factor).mT
    values, vectors = torch.linalg.eigh(shifted)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    inverse = torch.where(kept, 1 / values.where(kept, torch.ones_like(values)), torch.zeros_like(values))
    return ((right @ vectors) * inverse) @ vectors.mT


def dual(
    downs: Sequence[Tensor], sources: Sequence[tuple[GramAccumulator, float]], ridge: float, toward: float
) -> Tensor:
    """The same answer from the rows themselves: with fewer rows than inputs the Gram matrix is singular.

    With X the weighted rows stacked (m, n), (XᵀX + ρ I)⁻¹ Xᵀ = Xᵀ (X Xᵀ + ρ I)⁻¹, and what is orthogonal to all rows
    keeps only the ridge's target.
    """
    rows = torch.cat([weight**0.5 * gram.matrix() for gram, weight in sources])
    targets = []
    for index, down in enumerate(downs):
        block = torch.zeros(len(down), len(rows), dtype=torch.float64, device=rows.device)
        start = sum(len(gram.matrix()) for gram, _ in sources[:index])
        own = sources[index][0].matrix()
        block[:, start : start + len(own)] = down @ own.mT
        targets.append(block)
    answers = torch.cat(targets)  # what each row should become, (k, m)
    goal = torch.cat(list(downs)) * (toward / ridge) if toward else None
    if goal is not None:
        answers = answers - goal @ rows.mT
    solution = solve(rows @ rows.mT, answers, ridge) @ rows
    return solution if goal is None else solution + goal
