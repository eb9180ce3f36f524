"""Means, shares and paired differences with bootstrap intervals.

Pictures, seeds or trainings of one concept are not independent draws: what varies is the concept. So where values come
in clusters, whole clusters are resampled with replacement (cluster bootstrap), all values of one together. A bootstrap
of two or three clusters covers far less than it says, so of few the range is shown, in parentheses.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
FEW = 5  # clusters below which the range is shown
Clusters = Sequence[str] | None  # what each value is of; shorter than the values it starts again; None: each is its own


def interval(values: Sequence[float], clusters: Clusters = None) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of ``values`` (n,)."""
    array = np.asarray(values, float)
    return _ratio_interval(array, np.ones_like(array), clusters)


def spread(values: Sequence[float], clusters: Clusters = None) -> tuple[float, float, bool]:
    """The interval of the mean of ``values`` (n,); of few clusters the range of their means, and True."""
    array = np.asarray(values, float)
    return _spread(array, np.ones_like(array), clusters)


def mean_text(values: Sequence[float], clusters: Clusters = None, digits: int = 2) -> str:
    """``0.71 [0.65, 0.77]``: the mean and its interval; ``0.71 (0.65 to 0.77)``: the mean and range of few clusters."""
    array = np.asarray(values, float)
    return f"{array.mean():.{digits}f}{_spread_text(array, np.ones_like(array), clusters, digits)}"


def difference_text(first: Sequence[float], second: Sequence[float], clusters: Clusters = None, digits: int = 2) -> str:
    """``+0.05 [0.01, 0.09]``: the mean of first − second, value by value, and its interval or range."""
    gaps = np.asarray([a - b for a, b in zip(first, second, strict=True)], float)
    return f"{gaps.mean():+.{digits}f}{_spread_text(gaps, np.ones_like(gaps), clusters, digits)}"


def share_text(parts: Sequence[float], wholes: Sequence[float], clusters: Clusters = None, digits: int = 2) -> str:
    """Σ parts / Σ wholes and its interval or range, pairs kept together; a dash where a whole may be 0."""
    part, whole = np.asarray(parts, float), np.asarray(wholes, float)
    if whole.sum() <= 0:
        return "—"
    spread = _spread_text(part, whole, clusters, digits)
    return "—" if spread is None else f"{part.sum() / whole.sum():.{digits}f}{spread}"


def rank_correlation_text(first: np.ndarray, second: np.ndarray, digits: int = 2) -> str:
    """``0.91 [0.80, 0.98]``: Spearman's rank correlation of the rows' means of two (rows, clusters) arrays.

    The interval resamples the clusters, the columns of both arrays together; of few clusters there is none.
    """
    from scipy.stats import spearmanr

    def correlation(columns: np.ndarray) -> float:
        return float(spearmanr(first[:, columns].mean(1), second[:, columns].mean(1)).statistic)

    clusters = first.shape[1]
    text = f"{correlation(np.arange(clusters)):.{digits}f}"
    if clusters < FEW:
        return text
    draws = np.random.default_rng(0).integers(clusters, size=(RESAMPLES, clusters))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows that are all alike in a resample have no order
        values = [correlation(columns) for columns in draws]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def leading(text: object) -> float:
    """The mean in front of an interval, where more is better; minus infinity for a dash: no share could be formed."""
    first = str(text).split()[0]
    return float("-inf") if first == "—" else float(first)


def _ratio_interval(parts: np.ndarray, wholes: np.ndarray, clusters: Clusters) -> tuple[float, float]:
    """The interval of Σ parts / Σ wholes over clusters; not finite where too many resamples have a whole of 0."""
    from scipy.stats import bootstrap

    part, whole = (_sums(values, clusters) for values in (parts, wholes))
    if len(part) < 2:  # one value does not vary
        return (float(part[0] / whole[0]),) * 2

    def ratio(part: np.ndarray, whole: np.ndarray, axis: int = -1) -> np.ndarray:
        below = whole.sum(axis)
        return np.divide(part.sum(axis), below, out=np.full_like(below, np.inf), where=below > 0)

    with np.errstate(invalid="ignore"):  # of infinite ratios it also wants the deviation
        interval = bootstrap(
            (part, whole), ratio, paired=True, vectorized=True, method="percentile", n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE, rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def _sums(values: np.ndarray, clusters: Clusters) -> np.ndarray:
    """The sum of each cluster's values; one cluster alone is taken apart, since it would not vary."""
    labels = list(islice(cycle(clusters), len(values))) if clusters else []
    names = sorted(set(labels))
    if len(names) < 2:
        return values
    return np.array(
        [sum(value for value, label in zip(values, labels, strict=True) if label == name) for name in names]
    )


def _spread(parts: np.ndarray, wholes: np.ndarray, clusters: Clusters) -> tuple[float, float, bool]:
    """The interval of Σ parts / Σ wholes; of few clusters the range of their shares, and True. It may be infinite."""
    part, whole = _sums(parts, clusters), _sums(wholes, clusters)
    if len(part) >= FEW:
        return (*_ratio_interval(parts, wholes, clusters), False)
    shares = np.divide(part, whole, out=np.full_like(part, np.inf), where=whole > 0)
    return float(shares.min()), float(shares.max()), True


def _spread_text(parts: np.ndarray, wholes: np.ndarray, clusters: Clusters, digits: int) -> str | None:
    """The interval in brackets or the range in parentheses, nothing of one cluster; None where it is not finite."""
    if len(_sums(parts, clusters)) < 2:
        return ""
    low, high, is_range = _spread(parts, wholes, clusters)
    if not np.isfinite((low, high)).all():
        return None
    return f" ({low:.{digits}f} to {high:.{digits}f})" if is_range else f" [{low:.{digits}f}, {high:.{digits}f}]"
