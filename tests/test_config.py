"""What the docs say of settings is so, and which learning rates come out of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_diffusion import cli
from spectral_diffusion.cli.support import resolve
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.presets import settings_for, with_rates
from spectral_diffusion.config.settings import build, parse_overrides, read_yaml, to_yaml
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.assets import configs
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.files import write_tensors
from spectral_diffusion.training import run

DOCS = Path(__file__).parent.parent / "docs"


def settings_on(page: str) -> list[str]:
    """The ``key=value`` words of a page, Python code apart."""
    text = re.sub(r"```python.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"(?<![\w.-])([a-z_]+(?:\.[a-z_]+)?=[^\s`,;)]+)", text)


def test_every_setting_that_the_page_on_training_names_is_one() -> None:
    named = settings_on("training.md")
    assert len(named) > 25
    for pair in named:
        if (
            not pair.startswith(("key=", "config=")) and pair != "validation.early_stopping_patience=3"
        ):  # which needs grids
            build(TrainConfig, parse_overrides(["concept=a", "output=b", "prior.loss_weight=1", pair]))
    build(
        TrainConfig,
        parse_overrides(["concept=a", "output=b", "validation.every=100", "validation.early_stopping_patience=3"]),
    )


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
    "pair", ["data.flip=true", "noise_offset=true", "validation.every=true", "token=false", "rank=true"]
)
def test_true_and_false_are_no_numbers_and_no_words(tmp_path: Path, pair: str) -> None:
    files = {"concept": tmp_path, "output": tmp_path / "a.safetensors"}
    with pytest.raises(UserError, match="true and false are none of its values"):
        build(TrainConfig, parse_overrides([pair]), files)
    found = build(
        TrainConfig, parse_overrides(["data.shuffle_caption=yes", "per_layer_tokens=true", "mixed_precision=no"]), files
    )
    assert found.data.shuffle_caption and found.per_layer_tokens and found.mixed_precision == "no"


@pytest.mark.parametrize(
    ("words", "changes", "config"),
    [
        ([], {}, None),
        (["--steps", "7", "prior.num_images=5"], {"steps": 7, "prior": {"num_images": 5}}, None),
        (["--config", "sd15-12gb"], {}, "sd15-12gb"),
        (["--config", "sd15-12gb", "--base", "pocket"], {"base": "pocket"}, "sd15-12gb"),
        (["--base", "nowhere/base"], {"base": "nowhere/base"}, None),
        (["--config", "mine.yaml", "rank=3"], {"rank": 3}, "mine.yaml"),
    ],
)
def test_python_and_the_command_line_train_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], changes: dict[str, Any], config: str | None
) -> None:
    """The same words give the same settings: on the pocket base, by a preset's name and from a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rex").mkdir()
    (tmp_path / "mine.yaml").write_text("steps: 11\nprior: {loss_weight: 0.5}\n")
    asked: list[TrainConfig] = []
    monkeypatch.setattr(run, "train_to_file", lambda settings, *rest, **more: asked.append(settings))
    monkeypatch.setattr(sys, "argv", ["spectral-diffusion", "train", "rex", "-o", "rex.safetensors", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    where = {"concept": "rex", "output": "rex.safetensors"}
    assert asked == [settings_for(TrainConfig, "train", where, changes, config=config)]
    pocket = settings_for(TrainConfig, "train", where)
    assert pocket == build(TrainConfig, read_yaml(DOCS.parent / "configs" / "pocket.yaml")["train"], where)
    assert (asked[0] == pocket) is (not words)


def test_settings_of_python_know_every_verb(tmp_path: Path) -> None:
    fuse = settings_for(FuseConfig, "fuse", {"adapters": ["a"], "output": "b"})
    assert fuse.distill.guidance_scale == 2.0 and fuse.merge == "gradient"  # the pocket preset's
    elsewhere = settings_for(FuseConfig, "fuse", {"adapters": ["a"], "output": "b"}, base=str(tmp_path))
    assert elsewhere == FuseConfig(adapters=[Path("a")], output=Path("b"))
    with pytest.raises(UserError, match="is a preset for fuse, not for train"):
        settings_for(TrainConfig, "train", {"concept": "a", "output": "b"}, config="pocket-distilled")
    with pytest.raises(UserError, match=r"Unknown setting 'stesp' .*did you mean 'steps'"):
        settings_for(TrainConfig, "train", {"concept": "a", "output": "b", "stesp": 1})


def rates(**settings: Any) -> tuple[float, float, float]:
    config = with_rates(TrainConfig(concept=Path("a"), output=Path("a.safetensors"), **settings))
    return config.learning_rate, config.text_encoder_learning_rate, config.embedding_learning_rate


def test_rates_that_nobody_set_are_the_defaults_times_the_methods_scale() -> None:
    assert rates() == rates(method="lora") == (1e-4, 1e-5, 1e-3)
    assert rates(method="spectral-rotation") == (1e-3, 1e-4, 1e-3)
    assert rates(method="adalora", learning_rate=0.5) == (0.5, 3e-5, 1e-3)
    once = with_rates(TrainConfig(concept=Path("a"), output=Path("a.safetensors"), method="vera"))
    assert with_rates(once) == once


def test_a_strength_may_be_of_one_network_or_of_a_name_with_a_dot() -> None:
    words = ["scales.rex=0.8", "scales.rex.unet=0.5", "scales.v1.2=1", "distill.steps=3"]
    assert parse_overrides(words) == {
        "scales": {"rex": 0.8, "rex.unet": 0.5, "v1.2": 1}, "distill": {"steps": 3},
    }  # fmt: skip


def test_going_on_from_an_adapter_takes_the_rates_of_its_method(tmp_path: Path) -> None:
    start, file = tmp_path / "rex.safetensors", tmp_path / "more.yaml"
    write_tensors(start, {"x": torch.zeros(1)}, {"spectral.method": "spectral-rotation"})
    file.write_text(f"init_from_adapter: {start}\n")
    given = {"concept": "a", "output": "a.safetensors", "base": "pocket"}
    wanted = settings_for(TrainConfig, "train", given, {"method": "spectral-rotation"})
    for config in (
        settings_for(TrainConfig, "train", given, {"init_from_adapter": str(start)}),
        settings_for(TrainConfig, "train", {**given, "method": "spectral-rotation"}, config=str(file)),
    ):
        assert config.method == "spectral-rotation"
    assert settings_for(TrainConfig, "train", given, {"init_from_adapter": str(start)}).learning_rate == (
        wanted.learning_rate
    )
    from_file = settings_for(TrainConfig, "train", given, config=str(file))
    assert from_file.learning_rate == with_rates(TrainConfig(**given, method="spectral-rotation")).learning_rate
    missing = settings_for(TrainConfig, "train", given, {"init_from_adapter": str(tmp_path / "none.safetensors")})
    assert missing.method == TrainConfig(**given).method  # the training reports it


@pytest.mark.parametrize("preset", [path.stem for path in configs().glob("*.yaml") if read_yaml(path).get("train")])
def test_a_presets_rates_are_its_methods(preset: str) -> None:
    said = read_yaml(configs() / f"{preset}.yaml")["train"]

    def resolved(*words: str, **flags: Any) -> tuple[float, float]:
        where = {"concept": "a", "output": "a.safetensors"}
        config = resolve(TrainConfig, "train", preset, {**where, **flags}, list(words))
        return config.learning_rate, config.text_encoder_learning_rate

    own = said["learning_rate"], said["text_encoder_learning_rate"]
    assert resolved() == resolved("method=spectral-additive") == resolved(method="lora") == own
    assert resolved(method="spectral-rotation") == pytest.approx((10 * own[0], 10 * own[1]), rel=1e-9)
    assert resolved("method=svdiff", "learning_rate=0.5") == pytest.approx((0.5, 10 * own[1]), rel=1e-9)


def test_a_files_rates_are_its_methods_or_anybodys(tmp_path: Path) -> None:
    file, where = tmp_path / "own.yaml", {"concept": "a", "output": "a.safetensors"}
    for text, wanted in (("method: vera\nlearning_rate: 1e-2\n", 1e-3), ("learning_rate: 1e-2\n", 1e-2)):
        file.write_text(text)
        config = resolve(TrainConfig, "train", str(file), {**where, "method": "lora"}, [])
        assert config.learning_rate == pytest.approx(wanted, rel=1e-9)
    file.write_text(to_yaml(with_rates(TrainConfig(**where, method="vera"))))
    assert resolve(TrainConfig, "train", str(file), {}, []).learning_rate == 1e-3  # what came out is read back as it is
