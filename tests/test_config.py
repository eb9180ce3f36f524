"""What the docs say of settings is so."""

from __future__ import annotations

import re
from pathlib import Path

from spectral_diffusion.config import TrainConfig, build, parse_overrides


def test_every_setting_that_the_page_on_training_names_is_one() -> None:
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w.-])([a-z_]+(?:\.[a-z_]+)?=[^\s`,;)]+)", text)
    assert len(named) > 25
    for pair in named:
        if not pair.startswith("key=") and pair != "watch.patience=3":  # which needs grids
            build(TrainConfig, parse_overrides(["concept=a", "output=b", "preservation.weight=1", pair]))
    build(TrainConfig, parse_overrides(["concept=a", "output=b", "watch.every=100", "watch.patience=3"]))
