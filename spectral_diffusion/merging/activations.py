"""A layer's inputs, streamed: a float64 Gram matrix, or the rows themselves while they are few."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.machine import CPU

BLOCK = 256  # columns of a Gram matrix that are added together


@dataclass
class GramAccumulator:
    """Rows x (n,) that a layer was given, summed up so that memory does not depend on how many there were.

    While there are fewer rows than inputs the rows are kept (the dual form is exact and small); after that only
    G = Σ x xᵀ (n, n) in float64.

    Attributes:
        device: where they are summed up; it has float64.
    """

    size: int
    rows: list[Tensor] = field(default_factory=list)
    count: int = 0
    device: torch.device = CPU
    _lower: Tensor | None = None  # of the Gram matrix nothing above the diagonal's blocks is kept up

    def add(self, x: Tensor) -> None:
        """Take rows (m, n)."""
        x = x.detach().to(self.device).double()  # one after the other: Apple's GPUs know no float64
        self.count += len(x)
        if self._lower is None and self.count < self.size:
            self.rows.append(x)
            return
        if self._lower is None:
            self._lower = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
            for rows in self.rows:
                self._add_products(rows)
            self.rows = []
        self._add_products(x)

    def _add_products(self, x: Tensor) -> None:
        """G += xᵀ x, block row by block row up to the diagonal: half of the work."""
        assert self._lower is not None
        for start in range(0, self.size, BLOCK):
            stop = min(start + BLOCK, self.size)
            self._lower[start:stop, :stop].addmm_(x[:, start:stop].mT, x[:, :stop])

    @property
    def is_raw(self) -> bool:
        """Whether the rows themselves are kept."""
        return self._lower is None

    def matrix(self) -> Tensor:
        """The kept rows (m, n)."""
        if not self.rows:
            return torch.zeros(0, self.size, dtype=torch.float64, device=self.device)
        return torch.cat(self.rows)

    def gram(self) -> Tensor:
        """G (n, n) in float64."""
        if self._lower is not None:
            lower = self._lower.tril()
            return lower + lower.tril(-1).mT
        rows = self.matrix()
        return rows.mT @ rows

    def trace(self) -> float:
        """The sum of G's diagonal, without forming G."""
        if self._lower is not None:
            return float(self._lower.diagonal().sum())
        return float(self.matrix().square().sum())

    def matmul(self, down: Tensor) -> Tensor:
        """down · G, (k, n), without forming G where the rows are few."""
        if not self.is_raw:
            return down @ self.gram()
        rows = self.matrix()
        return (down @ rows.mT) @ rows

    def restore(self, tensor: Tensor, count: int) -> None:
        """Take back what ``matrix`` (few rows) or ``gram`` gave."""
        self.count, tensor = count, tensor.to(self.device)
        if count < self.size:
            self.rows, self._lower = [tensor], None
        else:
            self.rows, self._lower = [], tensor
