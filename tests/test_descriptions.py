"""Every setting of every verb says what it is: `--help`, the JSON schema and the documentation read it."""

from __future__ import annotations

import pytest

from spectral_diffusion.config.control import ControlConfig
from spectral_diffusion.config.fuse import CalibrationConfig, DistillConfig, FuseConfig
from spectral_diffusion.config.settings import Settings
from spectral_diffusion.config.train import (
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PriorPreservationConfig,
    TrainConfig,
    ValidationConfig,
)
from spectral_diffusion.evaluation.settings import EvaluateConfig
from spectral_diffusion.merging.merges import all_merges
from spectral_diffusion.scenes.scene import ControlImage, Region, Scene

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
