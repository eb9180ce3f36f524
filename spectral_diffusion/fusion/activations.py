"""What a layer sees, streamed: a float64 Gram matrix, or the rows themselves while they are few."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Activations:
    """Rows x (n,) that a layer was given, summed up so that memory does not depend on how many there were.

    While there are fewer rows than inputs the rows are kept (the dual form is exact and small); after that only
    G = Σ x xᵀ (n, n) in float64.
    """

    size: int
    rows: list[Tensor] = field(default_factory=list)
    count: int = 0
    _gram: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take rows (m, n)."""
        x = x.detach().to("cpu", torch.float64)
        self.count += len(x)
        if self._gram is None and self.count < self.size:
            self.rows.append(x)
            return
        if self._gram is None:
            self._gram = torch.zeros(self.size, self.size, dtype=torch.float64)
            for held in self.rows:
                self._gram.addmm_(held.mT, held)
            self.rows = []
        self._gram.addmm_(x.mT, x)

    @property
    def few(self) -> bool:
        """Whether the rows themselves are kept."""
        return self._gram is None

    def matrix(self) -> Tensor:
        """The kept rows (m, n)."""
        return torch.cat(self.rows) if self.rows else torch.zeros(0, self.size, dtype=torch.float64)

    def gram(self) -> Tensor:
        """G (n, n) in float64."""
        if self._gram is not None:
            return self._gram
        rows = self.matrix()
        return rows.mT @ rows

    def times(self, down: Tensor) -> Tensor:
        """down · G, (k, n), without forming G where the rows are few."""
        if self._gram is not None:
            return down @ self._gram
        rows = self.matrix()
        return (down @ rows.mT) @ rows

    def restore(self, tensor: Tensor, count: int) -> None:
        """Take back what ``matrix`` (few rows) or ``gram`` gave."""
        self.count = count
        if count < self.size:
            self.rows, self._gram = [tensor], None
        else:
            self.rows, self._gram = [], tensor
