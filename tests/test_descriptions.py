"""Every setting of every verb says what it is: `--help`, the JSON schema and the documentation read it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from spectral_diffusion.cli import app
from spectral_diffusion.config.control import ControlConfig
from spectral_diffusion.config.evaluate import EvaluateConfig
from spectral_diffusion.config.fuse import CalibrationConfig, DistillConfig, FuseConfig
from spectral_diffusion.config.scene import ControlImage, Region, Scene
from spectral_diffusion.config.settings import Settings
from spectral_diffusion.config.train import (
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PriorPreservationConfig,
    TrainConfig,
    ValidationConfig,
)
from spectral_diffusion.merging.merges import all_merges
from tools import figures_in_text, settings_page

MODELS: list[type[Settings]] = [
    TrainConfig, PriorPreservationConfig, DataConfig, ObjectiveConfig, OptimizerConfig, ValidationConfig, FuseConfig,
    CalibrationConfig, DistillConfig, ControlConfig, Scene, Region, ControlImage, EvaluateConfig,
    *dict.fromkeys(merge.options for merge in all_merges().values()),
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_setting_is_described(model: type[Settings]) -> None:
    for name, field in model.model_fields.items():
        text = field.description or ""
        assert (text.endswith((".", "…")) and text[0] == text[0].upper()) or text.startswith(("auto", "pocket", "λ")), (
            name
        )


def test_the_page_of_settings_is_current() -> None:
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page(), "run: python -m tools.settings_page"


@pytest.mark.parametrize(
    ("verb", "model"),
    [("train", TrainConfig), ("fuse", FuseConfig), ("generate", Scene), ("evaluate", EvaluateConfig),
     ("train-control", ControlConfig)],
)  # fmt: skip
def test_help_lists_every_setting_with_its_description(verb: str, model: type[Settings]) -> None:
    done = CliRunner().invoke(app, [verb, "--help"], terminal_width=10_000)
    own = {"concept", "folder", "adapters", "regions", "controls", "scales", "options"}  # with a syntax of their own
    own |= {"only_seed", "joint_concepts"}  # of a picture's own settings, and --joint's
    assert done.exit_code == 0
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            assert all(f"{name}.{inner}=" in done.output for inner in field.annotation.model_fields)
        elif name not in own:
            assert (field.description or "?")[:60] in done.output, name


def test_a_flag_is_a_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr(
        "spectral_diffusion.training.run.train_to_file", lambda config, *args, **more: seen.append(config)
    )
    words = [
        "train",
        str(tmp_path),
        "-o",
        str(tmp_path / "rex.safetensors"),
        "--learning-rate",
        "0.5",
        "--budget",
        "50k",
    ]
    words += ["--no-normalize", "--templates", "a {}", "--templates", "{}", "--lr-scheduler", "cosine", "seed=3"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    [config] = seen
    assert (config.learning_rate, config.param_budget, config.normalize, config.seed) == (0.5, 50_000, False, 3)
    assert config.templates == ["a {}", "{}"] and config.lr_scheduler == "cosine"
    wrong = CliRunner().invoke(app, [*words, "--lr-scheduler", "step"])
    assert "'lr_scheduler' cannot be 'step'" in str(wrong.exception)


@pytest.mark.parametrize("page", figures_in_text.PAGES)
def test_figures_in_the_text_are_those_of_the_records(page: str) -> None:
    text = (figures_in_text.ROOT / page).read_text(encoding="utf-8")
    assert figures_in_text.MARK.search(text)
    assert text == figures_in_text.filled(text), "run: python -m tools.figures_in_text"
