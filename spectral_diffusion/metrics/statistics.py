"""Means, shares and paired differences with bootstrap intervals.

Pictures, seeds or trainings of one concept are not independent draws: what varies is the concept. So where values come
in clusters, whole clusters are drawn with replacement (cluster bootstrap), all values of a drawn one together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np

DRAWS = 2000
Clusters = Sequence[str] | None  # what each value is of; shorter than the values it starts again; None: each is its own


def interval(values: Sequence[float], clusters: Clusters = None, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of ``values`` (n,)."""
    array = np.asarray(values, float)
    counts = _drawn(len(array), clusters)
    return _percentiles(counts @ array / counts.sum(1), confidence)


def told(values: Sequence[float], clusters: Clusters = None, digits: int = 2) -> str:
    """``0.71 [0.65, 0.77]``: the mean and its 95 % bootstrap interval."""
    return _text(float(np.mean(values)), interval(values, clusters), digits)


def difference(first: Sequence[float], second: Sequence[float], clusters: Clusters = None, digits: int = 2) -> str:
    """``+0.05 [0.01, 0.09]``: the mean of first − second, value by value, and its 95 % bootstrap interval."""
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    return f"{float(np.mean(gaps)):+.{digits}f} {_text(0.0, interval(gaps, clusters), digits).partition(' ')[2]}"


def share(parts: Sequence[float], wholes: Sequence[float], clusters: Clusters = None, digits: int = 2) -> str:
    """Σ parts / Σ wholes and its 95 % bootstrap interval, pairs drawn together; a dash where the whole is nothing."""
    part, whole = np.asarray(parts, float), np.asarray(wholes, float)
    if whole.sum() <= 0:
        return "—"
    counts = _drawn(len(whole), clusters)
    sums = counts @ whole
    if np.quantile(sums, 0.025) <= 0:
        return "—"
    ends = _percentiles(counts @ part / np.maximum(sums, 1e-9), 0.95)
    return _text(float(part.sum() / whole.sum()), ends, digits)


def _drawn(count: int, clusters: Clusters, seed: int = 0) -> np.ndarray:
    """How often each value is drawn in every bootstrap sample (draws, count); one cluster alone does not vary."""
    labels = list(islice(cycle(clusters), count)) if clusters else []
    names = sorted(set(labels))
    if len(names) < 2:
        labels, names = [str(index) for index in range(count)], [str(index) for index in range(count)]
    chosen = np.random.default_rng(seed).integers(0, len(names), (DRAWS, len(names)))
    times = np.stack([(chosen == index).sum(1) for index in range(len(names))], 1)
    return times[:, [names.index(label) for label in labels]]


def _percentiles(found: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _text(value: float, ends: tuple[float, float], digits: int) -> str:
    return f"{value:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
