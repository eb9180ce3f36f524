"""What the docs say of settings is so."""

from __future__ import annotations

import re
from pathlib import Path

from spectral_diffusion.config import FuseConfig, TrainConfig, build, parse_overrides

DOCS = Path(__file__).parent.parent / "docs"


def settings_on(page: str) -> list[str]:
    """The ``key=value`` words of a page."""
    return re.findall(r"(?<![\w.-])([a-z_]+(?:\.[a-z_]+)?=[^\s`,;)]+)", (DOCS / page).read_text(encoding="utf-8"))


def test_every_setting_that_the_page_on_training_names_is_one() -> None:
    named = settings_on("training.md")
    assert len(named) > 25
    for pair in named:
        if not pair.startswith("key=") and pair != "watch.patience=3":  # which needs grids
            build(TrainConfig, parse_overrides(["concept=a", "output=b", "preservation.weight=1", pair]))
    build(TrainConfig, parse_overrides(["concept=a", "output=b", "watch.every=100", "watch.patience=3"]))


def test_every_setting_that_the_page_on_fusing_names_is_one() -> None:
    named = [pair for pair in settings_on("fusing.md") if not pair.startswith(("key=", "rex"))]
    assert len(named) > 12
    for pair in named:
        build(FuseConfig, {"adapters": ["a"]}, parse_overrides(["output=b", pair]))
