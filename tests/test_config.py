"""What the docs say of settings is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spectral_diffusion.config import FuseConfig, TrainConfig, build, parse_overrides, read_yaml
from spectral_diffusion.errors import UserError

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


def test_columns_are_no_number_of_base_60(tmp_path: Path) -> None:
    given = parse_overrides(["slot=16:24", "rank=8", "data.flip=0.5"])
    assert given == {"slot": "16:24", "rank": 8, "data": {"flip": 0.5}}
    path = tmp_path / "a.yaml"
    path.write_text("slot: 16:24\nlearning_rate: 1.5e-3\nsteps: 1_000\n")
    assert read_yaml(path) == {"slot": "16:24", "learning_rate": 1.5e-3, "steps": 1000}
    files = {"concept": tmp_path, "output": tmp_path / "a.safetensors"}
    assert build(TrainConfig, parse_overrides(["slot=3"]), files).slot == "3"


@pytest.mark.parametrize(
    "pair", ["data.flip=true", "noise_offset=true", "watch.every=true", "token=false", "rank=true"]
)
def test_true_and_false_are_no_numbers_and_no_words(tmp_path: Path, pair: str) -> None:
    files = {"concept": tmp_path, "output": tmp_path / "a.safetensors"}
    with pytest.raises(UserError, match="true and false are none of its values"):
        build(TrainConfig, parse_overrides([pair]), files)
    found = build(TrainConfig, parse_overrides(["data.shuffle=yes", "layerwise=true", "mixed_precision=no"]), files)
    assert found.data.shuffle and found.layerwise and found.mixed_precision == "no"
