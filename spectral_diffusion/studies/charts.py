"""Curves as a picture, where matplotlib (the extra ``plots``) is installed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

WANTED = "the picture, for want of matplotlib (pip install 'spectral-diffusion[plots]')"
Curve = Sequence[tuple[float, float]]


def plotting() -> Any:
    """Matplotlib's pyplot without a screen; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def chart_image(figure: Any) -> Image.Image:
    """A figure as a picture; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plotting().close(figure)
    return Image.open(buffer).convert("RGB")


def curves(lines: Mapping[str, Curve], x: str, y: str, title: str = "", log: bool = False) -> Image.Image | None:
    """Named curves of (x, y) points; ``log`` is of the x axis. None without matplotlib."""
    pyplot = plotting()
    if pyplot is None:
        return None
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, points in lines.items():
        axes.plot([point[0] for point in points], [point[1] for point in points], marker="o", markersize=3, label=name)
    axes.set(xlabel=x, ylabel=y, title=title, xscale="log" if log else "linear")
    axes.legend(fontsize=8)
    return chart_image(figure)
