"""A batch of concepts: in order, side by side, resumable, and one that fails stops no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import make_photos

from spectral_diffusion import cli
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.settings import to_yaml
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.files import write_text
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.slots.ledger import Ledger
from spectral_diffusion.training.multi_concept import BatchJob, batch_jobs, run_batch
from spectral_diffusion.training.run import state_path
from spectral_diffusion.training.status import status_path

# Stands for a training: it takes its slot after a while, works, and stops on SIGTERM. Without torch, so at once.
WORKER = """
import json, os, pathlib, shutil, signal, sys, time
output, settings = map(pathlib.Path, sys.argv[1:3])
def tell(state, **more):
    file = output.with_name(output.stem + ".tmp")
    file.write_text(json.dumps({"state": state, "pid": os.getpid(), "step": 1, "steps": 9, "loss": 0.5, **more}))
    file.rename(output.with_name(output.stem + ".status.json"))
    with open(output.parent / "events", "a") as events:
        events.write(f"{output.stem} {state}\\n")
def stop(*_):
    tell("stopped", message="Stopped at step 1.")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
tell("starting")
time.sleep(0.15)
tell("running")
if output.stem == "crash":
    sys.exit("Segmentation fault")
if output.stem == "bad":
    tell("failed", message="bad holds no readable photo.")
    sys.exit(2)
time.sleep(60 if output.stem == "long" else 0.3)
output.write_text("adapter")
shutil.copy(settings, output.with_suffix(".yaml"))
tell("done", notes=["Skipped: x."] if output.stem == "noted" else [])
"""


def command(job: BatchJob, settings: Path) -> list[str]:
    return [sys.executable, "-S", "-c", WORKER, str(job.output), str(settings)]


def jobs(folder: Path, *names: str, **more: object) -> list[BatchJob]:
    def settings(photos: Path, output: Path) -> TrainConfig:
        return TrainConfig(concept=photos, output=output, **more)  # type: ignore[arg-type]

    return batch_jobs([folder / "photos" / name for name in names], folder / "out", settings)


def events(folder: Path) -> list[str]:
    return (folder / "out" / "events").read_text().splitlines()


def test_one_after_the_other_and_side_by_side(tmp_path: Path) -> None:
    seen: list[Event] = []
    run_batch(jobs(tmp_path, "a", "b", "c"), command, hooks=Hooks(progress=seen.append))
    assert events(tmp_path) == [f"{name} {state}" for name in "abc" for state in ("starting", "running", "done")]
    assert {event.stage for event in seen} == {"a", "b", "c"} and seen[0].metrics == {"loss": 0.5}
    (tmp_path / "out" / "events").unlink()
    run_batch(jobs(tmp_path, "a", "b", "c"), command, side_by_side=3)
    order = events(tmp_path)
    # Each starts as soon as the one before has its slot, and none before that.
    assert [line for line in order if not line.endswith("done")] == [
        f"{name} {state}" for name in "abc" for state in ("starting", "running")
    ]
    assert order.index("b starting") < order.index("a done")
    assert not list((tmp_path / "out").glob(".*.yaml")) and not list((tmp_path / "out").glob("*.log"))


def test_the_notes_of_each_training_are_passed_on(tmp_path: Path) -> None:
    notes: list[str] = []
    run_batch(jobs(tmp_path, "noted", "a"), command, hooks=Hooks(notify=notes.append))
    assert notes == ["noted: Skipped: x.", "noted: done", "a: done"]


def test_one_that_fails_stops_no_other_and_is_told(tmp_path: Path) -> None:
    batch = jobs(tmp_path, "bad", "a", "crash", "b")
    with pytest.raises(UserError, match=r"2 of 4 .* bad \(bad holds no readable photo\); crash \(Segmentation fault\)"):
        run_batch(batch, command, side_by_side=2)
    assert [job.state for job in batch] == ["failed", "done", "failed", "done"]
    assert (tmp_path / "out" / "crash.log").is_file()


def test_a_stopped_batch_goes_on_where_it_was(tmp_path: Path) -> None:
    def the_long_one_runs() -> bool:
        return (tmp_path / "out" / "events").exists() and "long running" in events(tmp_path)

    with pytest.raises(Cancelled, match="1 of 3 concepts done"):
        run_batch(jobs(tmp_path, "a", "long", "b"), command, hooks=Hooks(should_stop=the_long_one_runs))
    assert events(tmp_path)[-1] == "long stopped" and "b starting" not in events(tmp_path)
    (tmp_path / "out" / "events").unlink()
    notes: list[str] = []
    run_batch(jobs(tmp_path, "a", "b"), command, resume=True, hooks=Hooks(notify=notes.append))
    assert notes[0] == "a is done already." and events(tmp_path)[0] == "b starting"
    with pytest.raises(UserError, match=r"a\.safetensors was made with steps=1250, now it is 7"):
        run_batch(jobs(tmp_path, "a", steps=7), command, resume=True)
    run_batch(jobs(tmp_path, "a", steps=7), command, resume=True, force=True)
    assert "a starting" not in events(tmp_path)


def test_a_retraining_that_was_stopped_is_not_taken_for_done(tmp_path: Path) -> None:
    run_batch(jobs(tmp_path, "rex", "mug"), command)
    state_path(tmp_path / "out" / "rex.safetensors").write_text("a state")
    notes: list[str] = []
    run_batch(jobs(tmp_path, "rex", "mug"), command, resume=True, hooks=Hooks(notify=notes.append))
    assert "mug is done already." in notes and "rex is done already." not in notes


def test_settings_that_a_training_settles_are_no_difference(tmp_path: Path) -> None:
    [job] = jobs(tmp_path, "a", param_budget=5000)
    job.output.parent.mkdir(parents=True)
    job.output.write_text("adapter")
    write_text(job.output.with_suffix(".yaml"), to_yaml(job.config.model_copy(update={"rank": 3, "slot_seed": 5})))
    run_batch([job], command, resume=True)
    assert job.state == "done"


def test_bad_batches_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Two of the folders are called 'a'"):
        jobs(tmp_path, "a", "x/../a")
    write_text(tmp_path / "out", "")
    with pytest.raises(UserError, match="is a file"):
        jobs(tmp_path, "a")
    (tmp_path / "out").unlink()
    [job] = jobs(tmp_path, "a")
    mine = {"state": "running", "pid": 1, "pid_started": None}  # the first process of a system is always there
    write_text(status_path(job.output), json.dumps(mine))
    with pytest.raises(UserError, match="is being trained by process 1 already"):
        run_batch([job], command)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a", "nonsense", "-o", "x.safetensors"], "'nonsense' is neither a photo folder"),
        (["a", "b", "-o", "x.safetensors"], "need a folder for their adapters"),
        (["a", "b"], "need a folder for their adapters"),
        (["a", "b", "token=<x>", "-o", "out"], "token=<x> cannot apply to every concept"),
        (["steps=3"], "No photo folder is given"),
        (["a", "b", "-o", "out", "--status", "x.json"], "leave out --status"),
    ],
)
def test_the_command_line_tells_what_is_wrong(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "argv", ["spectral-diffusion", "train", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.slow
def test_real_concepts_get_a_slot_each_and_resume(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_photos(tmp_path / name, seed=index) for index, name in enumerate(("dog", "mug", "cup"))]
    (tmp_path / "empty").mkdir()
    places = [*folders, tmp_path / "empty", "-o", tmp_path / "out", "--base", tiny_base]
    words = ["train", *map(str, places), "--device", "cpu", "--rank", "2", "--steps", "3", "--jobs", "2"]

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["spectral-diffusion", *words, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "1 of 4 concepts failed, the others are done: empty (" in run()
    slots = [load_adapter(tmp_path / "out" / f"{folder.name}.safetensors").slot for folder in folders]
    assert list(map(str, slots)) == ["0:2", "2:4", "4:6"]
    [taken] = Ledger(tmp_path / "out" / "slots.json").read().values()
    assert len(taken) == 3 and not list((tmp_path / "out").glob("*.state.safetensors"))
    dog = tmp_path / "out" / "dog.safetensors"
    assert not state_path(dog).exists()
    before = dog.stat().st_mtime_ns
    run("--resume")
    assert before == dog.stat().st_mtime_ns
