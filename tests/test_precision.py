"""Mixed precision is what the device does well; what is made says on which machine it was made."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_photos
from torch import nn

from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.settings import read_yaml
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core import machine, precision
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.core.precision import loss_scaler, resolve_mixed_precision
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.scenes.png_metadata import read_settings
from spectral_diffusion.training.run import state_path, train_to_file


def timed(bf16: float) -> None:
    machine.remember(precision.MEASURED, {"float32": 1.0, "bf16": bf16})


@pytest.fixture(autouse=True)
def forget_timings() -> object:
    yield
    timed(2.0)


def test_auto_on_a_cpu_follows_the_measurement() -> None:
    cpu = torch.device("cpu")
    for seconds, expected in ((2.0, "no"), (0.95, "no"), (0.5, "bf16")):
        timed(seconds)
        assert resolve_mixed_precision("auto", cpu) == expected
    assert resolve_mixed_precision("auto", cpu, torch.float16) == "no"  # the networks are in half precision already
    assert resolve_mixed_precision("fp16", cpu) == "fp16"
    assert resolve_mixed_precision("fp16", cpu, torch.float16) == "fp16"
    with pytest.raises(UserError, match="mixed_precision=bf16 does not fit networks in float16"):
        resolve_mixed_precision("bf16", cpu, torch.float16)


def test_auto_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_mixed_precision("auto", "cuda") == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve_mixed_precision("auto", "cuda") == "fp16"
    with pytest.raises(UserError, match="mixed_precision=fp16"):
        resolve_mixed_precision("bf16", "cuda")
    assert resolve_mixed_precision("auto", "mps") == "no"


def test_a_slow_precision_is_measured_once_and_briefly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path))
    asked: list[torch.dtype] = []
    monkeypatch.setattr(precision, "_seconds", lambda dtype, **_: asked.append(dtype) or len(asked))
    assert resolve_mixed_precision("auto", "cpu") == resolve_mixed_precision("auto", "cpu") == "no"
    assert asked == [torch.float32, torch.bfloat16]
    (tmp_path / machine.FILE).write_text("damaged")
    assert resolve_mixed_precision("auto", "cpu") == "no" and len(asked) == 4


def test_a_first_run_that_compiles_kernels_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor with AMX the first product in bfloat16 takes ten times as long as the second."""
    ticks = iter([t for taken in (1.0, 1.0, 1.0, 1.0, 10.0, 0.5, 0.5, 0.5) for t in (0.0, taken)])
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert precision.measure_cpu() == {"float32": 1.0, "bf16": 0.5}


def test_a_real_measurement_is_of_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path))
    found = machine.measured_once(precision.MEASURED, precision.measure_cpu)
    assert set(found) == {"float32", "bf16"} and min(found.values()) > 0
    assert json.loads((tmp_path / machine.FILE).read_text())[machine.machine_identity()][precision.MEASURED] == found


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_the_loss_is_scaled_wherever_float16_is(device: str) -> None:
    on = torch.device(device)
    assert loss_scaler(on, "no", torch.float16).is_enabled() or device == "cuda"  # torch turns it off without a card
    assert not loss_scaler(on, "no", torch.float32).is_enabled()
    assert not loss_scaler(on, "bf16", torch.float32).is_enabled()


def test_a_float16_base_on_a_cpu_loses_no_gradients() -> None:
    """A gradient of 1e-9 vanishes in float16 unless the loss is scaled."""
    layer = nn.Linear(4, 4).half()
    scaler = loss_scaler(torch.device("cpu"), "no", torch.float16)
    scaler.scale((layer(torch.full((1, 4), 1e-4).half()) * 1e-5).sum().float()).backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().min() > 0


def test_what_is_made_says_precision_and_machine(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    timed(0.5)
    output, notes = tmp_path / "rex.safetensors", list[str]()
    settings = {
        "concept": photos,
        "output": output,
        "base": str(tiny_base),
        "rank": 2,
        "steps": 2,
        "crops_per_image": 1,
    }
    train_to_file(TrainConfig(**settings), hooks=Hooks(notify=notes.append))
    adapter = load_adapter(output)
    assert adapter.config["mixed_precision"] == "bf16" and adapter.provenance["threads"] == "1"
    assert adapter.provenance["cpu"] == machine.cpu_name()
    assert any("bfloat16" in note for note in notes)
    text = output.with_suffix(".yaml").read_text(encoding="utf-8")
    assert machine.cpu_name() in text and read_yaml(output.with_suffix(".yaml"))["mixed_precision"] == "bf16"
    picture = tmp_path / "a.png"
    generate_to_file(Scene(base=str(tiny_base), prompt="a dog", output=picture, num_inference_steps=2))
    assert read_settings(picture)["mixed_precision"] == "bf16"


def test_a_resumed_run_keeps_its_precision(tiny_base: Path, tmp_path: Path) -> None:
    """On a machine that would choose another one, too."""
    timed(0.5)
    asked = {"concept": make_photos(tmp_path / "rex"), "output": tmp_path / "rex.safetensors", "base": str(tiny_base)}
    config = TrainConfig(**asked, rank=2, steps=4, crops_per_image=1)
    turns = iter([False, False, True])
    with pytest.raises(Cancelled):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(turns)))
    assert state_path(config.output).exists()
    timed(2.0)
    assert train_to_file(config, resume=True).config["mixed_precision"] == "bf16"


def test_tf32_is_set_on_purpose_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with precision.tf32(torch.device("cuda"), True):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before
    said: list[str] = []
    precision.precision_note("no", "no", torch.device("cuda"), False, said.append)
    assert said == ["TensorFloat-32 is off for float32 products (allow_tf32)."]


def test_a_measurement_on_a_busy_machine_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where threads wait for other work both precisions take the same time, which says nothing about the processor."""
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path))
    taken = iter([{"float32": 0.54, "bf16": 0.50}, {"float32": 0.003, "bf16": 0.001}])
    monkeypatch.setattr(precision, "measure_cpu", lambda: next(taken))
    assert not precision.cpu_is_quick_in_bf16()
    assert precision.cpu_is_quick_in_bf16() and precision.cpu_is_quick_in_bf16()
