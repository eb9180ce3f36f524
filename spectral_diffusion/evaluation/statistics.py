"""Means, and shares of means, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def interval(values: Sequence[float], share: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of the mean: ``values`` (n,) drawn with replacement, percentiles of the means."""
    array = np.asarray(values, float)
    chosen = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    low, high = np.quantile(array[chosen].mean(1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def told(values: Sequence[float], digits: int = 2) -> str:
    """``0.71 [0.65, 0.77]``: the mean and its 95 % bootstrap interval."""
    low, high = interval(values)
    return f"{np.mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def share(parts: Sequence[float], wholes: Sequence[float], digits: int = 2, draws: int = 2000, seed: int = 0) -> str:
    """Σ parts / Σ wholes and its 95 % bootstrap interval, pairs drawn together; a dash where the whole is nothing."""
    pairs = np.stack([np.asarray(parts, float), np.asarray(wholes, float)])
    if pairs[1].sum() <= 0:
        return "—"
    chosen = np.random.default_rng(seed).integers(0, pairs.shape[1], (draws, pairs.shape[1]))
    sums = pairs[:, chosen].sum(2)
    if np.quantile(sums[1], 0.025) <= 0:
        return "—"
    low, high = np.quantile(sums[0] / np.maximum(sums[1], 1e-9), [0.025, 0.975])
    return f"{pairs[0].sum() / pairs[1].sum():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
