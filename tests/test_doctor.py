"""The verb that looks at the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spectral_diffusion import doctor
from spectral_diffusion.cli import app
from spectral_diffusion.core import machine
from spectral_diffusion.core.assets import configs
from spectral_diffusion.core.precision import MEASURED
from spectral_diffusion.doctor import fitting_presets, this_computer


def test_a_bug_report_has_what_matters_and_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "ann"
    cache = home / ".cache" / "spectral_diffusion"
    (cache / "spectra").mkdir(parents=True)
    (cache / "spectra" / "a.safetensors").write_bytes(bytes(2**20))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(cache))
    machine.remember(MEASURED, {"float32": 0.5, "bf16": 0.1})
    machine.remember("time-pocket-cpu-bf16", [0.08, 1.0])
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert str(home) not in result.output
    assert found["caches"] == {"folder": "~/.cache/spectral_diffusion", "mib": {"spectra": 1.0}}
    assert found["precision"]["auto"] == found["settings"]["mixed_precision"] == "bf16"
    assert found["speed"]["pocket_step_seconds"] == 0.09
    assert found["versions"]["torch"] and found["versions"]["python"] and found["system"]["threads"] == 1


def test_for_a_person_it_is_a_table() -> None:
    machine.remember("time-pocket-cpu-no", [0.08, 1.0])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[0] for line in result.output.splitlines()}
    assert {"Processor", "Quickest settings", "Caches", "A training step", "bfloat16 on the CPU"} <= lines


def test_what_is_missing_comes_with_its_command() -> None:
    assert doctor.missing(lambda name: True) == []
    found = doctor.missing(lambda name: name != "gradio")
    assert found == [{"package": "gradio", "for": "the app", "install": "pip install 'spectral-diffusion[ui]'"}]


def test_a_damaged_measurement_is_made_again_or_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_diffusion.core.precision import cpu_is_quick_in_bf16

    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path))
    for damaged in ("damaged", {"float32": "x"}, None):
        machine.remember(MEASURED, damaged)
        assert not cpu_is_quick_in_bf16()


def test_presets_fit_the_memory_of_a_card() -> None:
    assert fitting_presets(3.0) == []
    small = fitting_presets(7.8)  # a card of 8 GB has less
    assert "sd15-8gb" in small and "klein-8gb" in small and not any("12gb" in name or "24gb" in name for name in small)
    large = fitting_presets(22.2)
    assert {"sd15-24gb", "sdxl-12gb", "klein-24gb", "z-image-24gb"} <= set(large)
    assert not any(name.endswith("2x16gb") for name in large)  # two cards


def test_this_computer_is_named_with_its_presets() -> None:
    device, presets = this_computer()
    assert device and presets and all((configs() / f"{name}.yaml").is_file() for name in presets)
