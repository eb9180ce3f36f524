"""Watching a training: the status file that outlives it, sample grids that change nothing, trackers, the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import AdapterSpec, inject_adapter
from spectral_diffusion.adapters.frozen import frozen_tensors
from spectral_diffusion.cli import main
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.linalg import matrix_shape
from spectral_diffusion.methods import get_method
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.slots.ledger import Slot
from spectral_diffusion.training.card import SIZE
from spectral_diffusion.training.run import train_to_file
from spectral_diffusion.training.slow_steps import SlowSteps
from spectral_diffusion.training.status import (
    POINTS,
    Reporter,
    process_start,
    read_status,
    reporting,
    status_path,
)
from spectral_diffusion.training.validation import at_strength


def settings(photos: Path, tiny_base: Path, output: Path, **more: object) -> TrainConfig:
    values = {"concept": photos, "output": output, "base": str(tiny_base), "rank": 2, "steps": 6, "device": "cpu"}
    return TrainConfig(**{**values, **more})  # type: ignore[arg-type]


def events(reporter: Reporter, first: int, last: int, steps: int) -> None:
    for step in range(first, last + 1):
        reporter.progress(Event("train", step, steps, {"loss": 1 / step}))


def test_the_curve_is_thinned_and_ends_with_the_last_step(tmp_path: Path) -> None:
    path = tmp_path / "a.status.json"
    reporter = Reporter(path)
    events(reporter, 1, 3001, 5000)
    reporter.end("stopped", "Stopped.")
    status = read_status(path)
    assert status and status.state == "stopped" and status.step == 3001 and status.steps == 5000
    assert len(status.curve) <= POINTS and len(status.curve) > POINTS // 3
    assert status.curve[-1] == (3001, 1 / 3001) and status.curve[0][0] == 1
    assert [s for s, _ in status.curve] == sorted({s for s, _ in status.curve})
    assert json.loads(path.read_text())["loss"] == status.loss


def test_a_slow_step_does_not_move_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("spectral_diffusion.training.status.time.monotonic", lambda: clock[0])
    reporter = Reporter()
    left = {}
    for step in range(1, 41):
        clock[0] += 300.0 if step == 20 else 0.5  # the machine slept
        reporter.progress(Event("train", step, 100, {"loss": 1.0}))
        left[step] = reporter.status.eta
    assert left[1] is None and left[2] == 49.0
    assert left[20] == 40.0 and left[40] == 30.0
    for step in range(41, 100):  # a lasting change counts
        clock[0] += 2.0
        reporter.progress(Event("train", step, 100, {"loss": 1.0}))
    assert reporter.status.eta == 2.0


def test_steps_that_become_slow_are_told_once() -> None:
    def notes(threads: int, *seconds: float) -> list[str]:
        found: list[str] = []
        pace, clock = SlowSteps(threads, found.append), 0.0
        for each in seconds:
            clock += each
            pace.step(clock)
        return found

    quick, slow = [0.3] * 30, [3.0] * 30
    [note] = notes(2, *quick, *slow, *quick, *slow)
    assert "10 times as long" in note and "2 threads" in note and "OMP_NUM_THREADS=1" in note
    assert not notes(1, *quick, *slow)  # nobody to wait for
    assert not notes(2, *quick, 60.0, 60.0, *quick)  # a grid of samples
    assert not notes(2, *slow, *quick, *[0.9] * 30)


def test_a_resumed_run_goes_on_with_the_curve(tmp_path: Path) -> None:
    path = tmp_path / "a.status.json"
    first = Reporter(path)
    events(first, 1, 9, 20)  # killed at 9, its last state was of step 5
    first.write()
    second = Reporter(path)
    second.begin(TrainConfig(concept=tmp_path, output=tmp_path / "a.safetensors"), tmp_path / "a.safetensors", True)
    events(second, 6, 7, 20)
    second.end("stopped")
    status = read_status(path)
    assert status and [step for step, _ in status.curve] == list(range(1, 8))


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (None, "done", ""),
        (Cancelled("Stopped at step 3 of 6; it can be resumed."), "stopped", "Stopped at step 3"),
        (UserError("No such folder: x."), "failed", "No such folder: x."),
        (RuntimeError("out of luck"), "failed", "RuntimeError: out of luck."),
        (KeyboardInterrupt(), "stopped", "Stopped."),
    ],
)
def test_how_it_ended_is_told(tmp_path: Path, error: BaseException | None, state: str, message: str) -> None:
    path = tmp_path / "a.status.json"
    try:
        with reporting(path):
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    status = read_status(path)
    assert status and status.state == state and status.message.startswith(message)


def test_a_dead_process_is_lost_and_a_reused_pid_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.status.json"
    Reporter(path).write()
    status = read_status(path)
    assert status and status.state == "starting" and status.pid == os.getpid()
    status.state = "running"
    if process_start(os.getpid()) is not None:
        other = status.model_copy(update={"pid_started": (status.pid_started or 0) + 1})
        path.write_text(other.model_dump_json())
        assert (found := read_status(path)) and found.state == "lost"
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    path.write_text(status.model_copy(update={"pid": int(gone.stdout), "pid_started": None}).model_dump_json())
    assert (found := read_status(path)) and found.state == "lost" and "can be resumed" in found.message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "x"}'])
def test_a_file_that_is_no_status_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.status.json"
    assert read_status(path) is None
    path.write_text(text)
    assert read_status(path) is None


def test_a_full_disk_stops_nothing(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise UserError("No space left on device.")

    monkeypatch.setattr("spectral_diffusion.training.status.write_text", full)
    with reporting(tmp_path / "a.status.json") as reporter:
        train_to_file(
            settings(photos, tiny_base, tmp_path / "a.safetensors", steps=2), hooks=Hooks(progress=reporter.progress)
        )
    assert (tmp_path / "a.safetensors").is_file() and not (tmp_path / "a.status.json").exists()


def test_the_command_line_keeps_a_status(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "rex.safetensors"
    words = ["train", photos, "-o", output, "--base", tiny_base, "--device", "cpu", "--rank", "2", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["spectral-diffusion", *map(str, words), "--status", "auto"])
    with pytest.raises(SystemExit):
        main()
    status = read_status(status_path(output))
    assert status and status.state == "done" and status.stage == "train" and (status.step, status.steps) == (3, 3)
    assert status.output == str(output) and status.config["rank"] == 2 and len(status.curve) == 3
    assert any("Concept 'rex'" in note for note in status.notes)
    monkeypatch.setattr(sys, "argv", ["spectral-diffusion", *map(str, words), "rnak=3", "--status", "auto"])
    with pytest.raises(SystemExit):
        main()
    status = read_status(status_path(output))
    assert status and status.state == "failed" and "Unknown setting 'rnak'" in status.message


# --- sample grids, likeness, trackers, the card --------------------------------------------------------------


def same(one: Adapter, two: Adapter) -> bool:
    return all(torch.equal(value, two.parameters[name]) for name, value in one.parameters.items()) and all(
        torch.equal(rows, two.vectors[name]) for name, rows in one.vectors.items()
    )


WATCH = {"every": 2, "num_inference_steps": 2, "prompts": ["a photo of {}", "{} on the beach"], "model_card": True}


@pytest.mark.parametrize(
    "more",
    [
        {"method": "adalora", "rank": 4, "steps": 8},
        {"method": "spectral-rotation", "gradient_checkpointing": True, "optimizer": {"ema_decay": 0.9}},
        {"method": "dora", "prior": {"loss_weight": 0.5, "batch_size": 1, "num_images": 2}, "mixed_precision": "bf16"},
    ],
    ids=lambda more: more["method"],
)
def test_watching_changes_no_bit(photos: Path, tiny_base: Path, tmp_path: Path, more: dict) -> None:
    base = load_base(str(tiny_base), "cpu")
    plain = train_to_file(settings(photos, tiny_base, tmp_path / "a" / "rex.safetensors", **more), base=base)
    before = torch.random.get_rng_state()
    config = settings(photos, tiny_base, tmp_path / "b" / "rex.safetensors", validation=WATCH, **more)
    with reporting(tmp_path / "status.json") as reporter:
        watched = train_to_file(config, base=base, hooks=Hooks(progress=reporter.progress))
    assert same(plain, watched) and torch.equal(before, torch.random.get_rng_state())
    files = sorted((tmp_path / "b" / "rex-samples").iterdir())
    assert [file.name for file in files] == [f"step-{step:06d}.png" for step in range(2, config.steps + 1, 2)]
    status = read_status(tmp_path / "status.json")
    assert status and [sample.file for sample in status.samples] == list(map(str, files))
    text = (tmp_path / "b" / "rex.md").read_text()
    assert "rex-curve.png" in text and f"rex-samples/{files[-1].name}" in text and f"rank: {config.rank}" in text
    with Image.open(tmp_path / "b" / "rex-curve.png") as curve, Image.open(files[-1]) as grid:
        assert curve.size == SIZE and grid.width == 3 * 96 + 8


@pytest.mark.parametrize("method", ["spectral-additive", "adalora", "vera", "oft", "dora"])
def test_strengths_go_from_the_base_to_the_adapter(photos: Path, tiny_base: Path, method: str) -> None:
    base, of = load_base(str(tiny_base), "cpu"), get_method(method)
    weights = base.weights()
    rank = of.ranks([matrix_shape(weight) for weight in weights.values()])[1]
    slot = Slot.interval(0, rank) if of.slot else None
    words, latents = torch.randn(1, 6, 24), torch.randn(1, 4, 8, 8)

    def predict() -> torch.Tensor:
        with torch.no_grad():
            return base.pipeline.unet(latents, 5, words).sample

    plain = predict()
    frozen = frozen_tensors(of, weights, rank, slot, cached=False)
    on = inject_adapter(base.models, AdapterSpec(of, rank, steps=10), frozen=frozen)
    with torch.no_grad():
        for _, parameter in on.named_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    full = predict()
    assert not torch.allclose(full, plain, atol=1e-4)
    with at_strength(on, 0.0):
        assert torch.allclose(predict(), plain, atol=1e-6)
    with at_strength(on, 0.7):
        between = predict()
    assert float((between - full).norm()) < float((plain - full).norm())
    assert float((between - plain).norm()) < float((plain - full).norm())
    assert torch.equal(predict(), full)


def test_a_plateau_of_likeness_ends_the_training(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder knows the pocket base's world alone; here it is made to see a rise, then a rest."""
    seen = iter([0.2, 0.5, 0.5, 0.501, 0.9])
    monkeypatch.setattr("spectral_diffusion.training.validation.identity_score", lambda *_: torch.tensor([next(seen)]))
    notes: list[str] = []
    watch = {**WATCH, "every": 1, "early_stopping_patience": 2, "num_inference_steps": 1, "prompts": ["{}"]}
    config = settings(
        photos, tiny_base, tmp_path / "rex.safetensors", validation=watch, steps=20, checkpointing_steps=1
    )
    base = load_base(str(tiny_base), "cpu")
    train_to_file(config.model_copy(update={"steps": 1}), base=base, hooks=Hooks(notify=notes.append))
    assert any("only the pocket bases have an identity encoder" in note for note in notes)
    base.name = "pocket"
    asked = iter(range(100))
    with pytest.raises(Cancelled):
        train_to_file(config, base=base, hooks=Hooks(should_stop=lambda: next(asked) >= 3))
    train_to_file(config, base=base, resume=True, hooks=Hooks(notify=notes.append))
    assert "done at step 4" in notes[-1] and config.output.is_file()
    assert "0.501 at the end" in config.output.with_suffix(".md").read_text()
    with pytest.raises(ValueError, match=r"validation\.every"):
        TrainConfig(concept=photos, output=photos, validation={"early_stopping_patience": 2})  # type: ignore[arg-type]


def test_tensorboard_gets_the_loss(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = settings(photos, tiny_base, tmp_path / "rex.safetensors", validation={"log_with": "tensorboard"}, steps=3)
    train_to_file(config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "rex-log" / "rex"))
    read.Reload()
    assert [one.step for one in read.Scalars("loss")] == [1, 2, 3] and "rate" in read.Tags()["scalars"]


def test_a_missing_tracker_is_told(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="swanlab is not installed"):
        train_to_file(settings(photos, tiny_base, tmp_path / "a.safetensors", validation={"log_with": "swanlab"}))


def test_samples_that_cannot_be_written_stop_nothing(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "rex-samples").write_text("in the way")
    notes: list[str] = []
    config = settings(photos, tiny_base, tmp_path / "rex.safetensors", validation={**WATCH, "every": 6})
    train_to_file(config, hooks=Hooks(notify=notes.append))
    assert any("samples of step 6 could not be written" in note for note in notes)
