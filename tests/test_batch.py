"""A batch of jobs: in order, side by side, resumable, on a cluster's queue; one that fails stops no other."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CLUSTER_COMMANDS, make_photos

from spectral_diffusion import cli
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.batch import slurm
from spectral_diffusion.batch.concepts import (
    Training,
    training_jobs,
    trainings,
    with_slots,
    without_done,
    write_configs,
)
from spectral_diffusion.batch.job import Batch, BatchFolder, Cluster, Job, Record, parse_cluster
from spectral_diffusion.batch.kubernetes import Pods, as_yaml, manifest, resource_name
from spectral_diffusion.batch.local import run_jobs
from spectral_diffusion.batch.prepare import prepare
from spectral_diffusion.batch.process import JobProcess, start
from spectral_diffusion.batch.submission import cancel, check_runs_here, restart, rows, share, submit
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.settings import to_yaml
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.files import read_tensors, write_text
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.parts import GENERIC, compute_parts, part_names
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.slots.ledger import Ledger
from spectral_diffusion.training.run import state_path, train_to_file
from spectral_diffusion.training.status import TrainingStatus, is_alive, now, status_path

# In place of a training: it works for a while, and stops on SIGTERM. Without torch, so at once.
WORKER = """
import json, os, pathlib, signal, sys, time
output, again = pathlib.Path(sys.argv[1]), sys.argv[2:]
def tell(state, **more):
    file = output.with_name(output.stem + ".tmp")
    file.write_text(json.dumps({"state": state, "pid": os.getpid(), "step": 1, "steps": 9, "loss": 0.5, **more}))
    file.rename(output.with_name(output.stem + ".status.json"))
    with open(output.parent / "events", "a") as events:
        events.write(" ".join([output.stem, state, *again]) + "\\n")
def stop(*_):
    output.with_name(output.stem + ".state.safetensors").write_text("state")
    tell("stopped", message="Stopped at step 1.")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
tell("running")
def all_run():
    return {"x running", "y running", "z running"} <= set((output.parent / "events").read_text().splitlines())
while output.stem in "xyz" and not all_run():
    time.sleep(0.01)
if output.stem == "crash":
    sys.exit("Segmentation fault")
if output.stem == "bad":
    tell("failed", message="bad holds no readable photo.", fixes=[{"option": "rank", "value": "4"}])
    sys.exit(2)
time.sleep(60 if output.stem == "long" and not again else 0.2)
output.write_text("adapter")
tell("done", notes=["Skipped: x."] if output.stem == "noted" else [])
"""
PROGRAM = (sys.executable, "-S", "-c", WORKER)


def batch_in(folder: Path, *names: str, **more: Any) -> tuple[BatchFolder, Batch]:
    """A batch of jobs that the worker does."""
    place = BatchFolder(folder / "out")
    place.path.mkdir(parents=True, exist_ok=True)
    outputs = {name: folder / "out" / f"{name}.safetensors" for name in names}
    jobs = [
        Job(
            name=name,
            arguments=(str(output),),
            output=str(output),
            status=status_path(output),
            state=state_path(output),
        )
        for name, output in outputs.items()
    ]
    batch = Batch(jobs=jobs, started_in=str(folder), **more)
    place.write(batch)
    return place, batch


def run(folder: Path, *names: str, side_by_side: int = 1, **hooks: Any) -> tuple[BatchFolder, Batch]:
    place, batch = batch_in(folder, *names)
    run_jobs(place, batch, batch.jobs, side_by_side, Hooks(**hooks), PROGRAM)
    return place, batch


def events(folder: Path) -> list[str]:
    return (folder / "out" / "events").read_text().splitlines()


def states(place: BatchFolder, batch: Batch) -> list[str]:
    return [place.record(job).state for job in batch.jobs]


def test_one_after_the_other_and_side_by_side(tmp_path: Path) -> None:
    seen: list[Event] = []
    place, batch = run(tmp_path, "a", "b", "c", progress=seen.append)
    assert events(tmp_path) == [f"{name} {state}" for name in "abc" for state in ("running", "done")]
    assert {event.stage for event in seen} == {"a", "b", "c"} and seen[0].metrics == {"loss": 0.5}
    assert all(place.record(job).starts == 1 and (place.record(job).seconds or 0) >= 0 for job in batch.jobs)
    run(tmp_path, *"xyz", side_by_side=3)
    assert events(tmp_path).index("x done") > events(tmp_path).index("z running")


def test_the_notes_of_each_training_are_passed_on(tmp_path: Path) -> None:
    notes: list[str] = []
    run(tmp_path, "noted", "a", notify=notes.append)
    assert notes == ["noted: Skipped: x.", "noted: done", "a: done"]


def test_one_that_fails_stops_no_other_and_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, batch = batch_in(tmp_path, "bad", "a", "crash", "b")
    with pytest.raises(UserError, match=r"2 of 4 .* bad \(bad holds no readable photo\); crash \(Segmentation fault\)"):
        run_jobs(place, batch, batch.jobs, 2, program=PROGRAM)
    assert states(place, batch) == ["failed", "done", "failed", "done"]
    assert "Segmentation fault" in place.log(batch.job("crash")).read_text()
    table = {row.name: row for row in rows(place)}
    assert table["bad"].message == "bad holds no readable photo." and table["a"].starts == 1
    assert [fix.option for fix in table["bad"].fixes] == ["rank"]
    (tmp_path / "out" / "events").unlink()
    monkeypatch.setattr("spectral_diffusion.batch.submission.run_jobs", lambda *args: run_jobs(*args, program=PROGRAM))
    with pytest.raises(UserError, match="2 of 2 jobs failed: "):
        restart(place)
    # Neither had saved a state, so they begin anew, and what is done stays.
    assert events(tmp_path) == ["bad running", "bad failed", "crash running"]
    assert states(place, batch) == ["failed", "done", "failed", "done"] and place.record(batch.jobs[0]).starts == 2


def test_a_stopped_batch_goes_on_where_it_was(tmp_path: Path) -> None:
    def the_long_one_runs() -> bool:
        return (tmp_path / "out" / "events").exists() and "long running" in events(tmp_path)

    with pytest.raises(Cancelled, match="1 of 3 jobs done"):
        run(tmp_path, "a", "long", "b", should_stop=the_long_one_runs)
    assert events(tmp_path)[-1] == "long stopped" and "b running" not in events(tmp_path)
    place = BatchFolder(tmp_path / "out")
    batch = place.read()
    assert [job.name for job in place.unfinished(batch)] == ["long", "b"]
    run_jobs(place, batch, place.unfinished(batch), program=PROGRAM)
    assert events(tmp_path)[-4:] == ["long running --resume", "long done --resume", "b running", "b done"]


def test_shares_of_several_machines_are_every_job_once(tmp_path: Path) -> None:
    place, batch = batch_in(tmp_path, *"abcde", executor="manual")
    parts = [share(batch, f"{index}/3") for index in range(3)]
    assert sorted(job.name for part in parts for job in part) == list("abcde")
    for bad in ("3/3", "1", "a/2", "1/0"):
        with pytest.raises(UserError, match="A share is i/n"):
            share(batch, bad)
    run_jobs(place, batch, parts[1], program=PROGRAM)
    assert states(place, batch) == ["waiting", "done", "waiting", "waiting", "done"]


def config_of(folder: Path, name: str, **more: Any) -> Training:
    [one] = trainings(
        [folder / "photos" / name],
        folder / "out",
        lambda photos, output: TrainConfig(concept=photos, output=output, **more),
    )
    return one


def write_done(training: Training, **change: Any) -> None:
    output = training.config.output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("adapter")
    write_text(output.with_suffix(".yaml"), to_yaml(training.config.model_copy(update=change)))


def test_what_is_done_is_left_out(tmp_path: Path) -> None:
    rex, mug = config_of(tmp_path, "rex"), config_of(tmp_path, "mug")
    for training in (rex, mug):
        write_done(training)
    state_path(rex.config.output).write_text("a state")  # of a retraining that was stopped
    notes: list[str] = []
    assert without_done([rex, mug], False, Hooks(notify=notes.append)) == [rex] and notes == ["mug is done already."]
    changed = config_of(tmp_path, "mug", steps=7)
    with pytest.raises(UserError, match=r"mug\.safetensors was made with steps=1250, now it is 7"):
        without_done([changed], False)
    assert without_done([changed], True) == []
    budget = config_of(tmp_path, "a", param_budget=5000)
    write_done(budget, rank=3, slot_seed=5)  # which a training settles, so they are no difference
    assert without_done([budget], False) == []


def test_bad_batches_are_told(tmp_path: Path) -> None:
    def one_each(*names: str) -> list[Training]:
        folders = [tmp_path / "photos" / name for name in names]
        return trainings(folders, tmp_path / "out", lambda photos, output: TrainConfig(concept=photos, output=output))

    with pytest.raises(UserError, match="Two of the folders are called 'a'"):
        one_each("a", "x/../a")
    with pytest.raises(UserError, match="cannot be called 'prepare'"):
        one_each("prepare")
    write_text(tmp_path / "out", "")
    with pytest.raises(UserError, match="is a file"):
        one_each("a")
    (tmp_path / "out").unlink()
    place, batch = batch_in(tmp_path, "a")
    mine = {"state": "running", "pid": 1, "pid_started": None}  # the first process of a system is always there
    write_text(status_path(tmp_path / "out" / "a.safetensors"), json.dumps(mine))
    with pytest.raises(UserError, match="is being trained by process 1 already"):
        run_jobs(place, batch, batch.jobs, program=PROGRAM)
    place.file.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        place.read()
    write_text(status_path(tmp_path / "out" / "a.safetensors"), json.dumps({**mine, "pid": 2**22 + 1}))
    submit(place, batch.model_copy(update={"executor": "manual"}))  # which replaces the damaged one
    with pytest.raises(UserError, match=r"holds a batch with 1 jobs that are not done, such as a; .* batch run"):
        submit(place, batch.model_copy(update={"jobs": [batch.jobs[0].model_copy(update={"name": "b"})]}))
    with pytest.raises(UserError, match=r"has no executor: .* batch run"):
        restart(place)
    with pytest.raises(UserError, match="holds no batch"):
        rows(BatchFolder(tmp_path))


def test_a_job_goes_on_from_its_own_state_and_no_other(tmp_path: Path) -> None:
    place, batch = batch_in(tmp_path, "a")
    [job] = batch.jobs
    state = state_path(tmp_path / "out" / "a.safetensors")
    state.write_text("of another training")
    os.utime(state, (1e9, 1e9))
    for starts, saved, resumed in ((0, False, False), (1, False, False), (1, True, True)):
        if saved:
            state.touch()
        place.write_record(job, Record(state="stopped", starts=starts, first_start=time.time() if starts else 0.0))
        process = JobProcess(place, job, str(tmp_path), program=PROGRAM)
        assert process.wait().state == "done"
        assert events(tmp_path)[-1] == ("a done --resume" if resumed else "a done")


def test_a_job_is_taken_once(tmp_path: Path) -> None:
    place, batch = batch_in(tmp_path, "long", "a")
    first = start(place, batch.jobs[0], str(tmp_path), program=PROGRAM)
    assert first is not None and start(place, batch.jobs[0], str(tmp_path), program=PROGRAM) is None
    with pytest.raises(UserError, match=r"is being trained by process \d+ already"):
        run_jobs(place, batch, batch.jobs, program=PROGRAM)
    while not (tmp_path / "out" / "events").exists():
        time.sleep(0.01)
    os.kill(first.process.pid, signal.SIGKILL)
    record = first.wait()
    assert (record.state, record.message) == ("failed", "It was ended by SIGKILL, perhaps as memory was short.")


def test_a_lost_process_is_noticed_here_and_an_old_word_of_another_machine(tmp_path: Path) -> None:
    place, batch = batch_in(tmp_path, "a")
    [job] = batch.jobs
    gone = {"state": "running", "pid": 2**22 + 1, "pid_started": 5}
    place.write_record(job, Record(**gone, host=socket.gethostname()))
    assert place.record(job).state == "lost" and "started again" in place.record(job).message
    place.write_record(job, Record(**gone, host="another machine"))
    assert place.record(job).state == "running"
    silent = Record(**gone, host="another machine", updated="2020-01-01T00:00:00+00:00")
    write_text(place.record_path(job), silent.model_dump_json())
    assert place.record(job).state == "lost"
    status = TrainingStatus(**gone, host="another machine", updated=now())
    assert is_alive(status) and not is_alive(status.model_copy(update={"updated": "2020-01-01T00:00:00+00:00"}))


def test_all_slots_are_reserved_before_any_training(tiny_base: Path, tmp_path: Path) -> None:
    folders = [make_photos(tmp_path / name, seed=index) for index, name in enumerate(("dog", "mug", "cup"))]
    (tmp_path / "empty").mkdir()
    common: dict[str, Any] = {"base": str(tiny_base), "rank": 2, "device": "cpu", "slot": "next"}

    def settings(photos: Path, output: Path) -> TrainConfig:
        return TrainConfig(concept=photos, output=output, **common)

    batch = trainings([*folders, tmp_path / "empty"], tmp_path / "out", settings)
    settled, base = with_slots(batch)
    assert base is not None and [one.name for one in settled] == ["dog", "mug", "cup", "empty"]
    [taken] = Ledger(tmp_path / "out" / "slots.json").read().values()
    assert "empty" not in taken
    assert [str(taken[name]) for name in ("dog", "mug", "cup")] == ["0:2", "2:4", "4:6"]
    common["rank"] = 8  # of which this base has no five
    more = [make_photos(tmp_path / f"more{index}", seed=index) for index in range(5)]
    before = (tmp_path / "out" / "slots.json").read_bytes()
    with pytest.raises(UserError, match="past the"):
        with_slots(trainings(more, tmp_path / "out", settings))
    assert (tmp_path / "out" / "slots.json").read_bytes() == before  # all of them or none
    common |= {"slot": "sampled:6", "rank": 2}
    [one], _ = with_slots(trainings(more[:1], tmp_path / "out", settings))
    assert one.config.slot_seed is not None


def test_what_trainings_share_is_computed_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path / "cache"))
    names = {"dog1": "dog", "dog2": "dog", "cup1": "cup"}
    for index, (name, noun) in enumerate(names.items()):
        make_photos(tmp_path / name, seed=index)
        write_text(tmp_path / name / "concept.yaml", f"noun: {noun}\n")

    def settings(photos: Path, output: Path) -> TrainConfig:
        return TrainConfig(
            concept=photos,
            output=output,
            base=str(tiny_base),
            rank=2,
            device="cpu",
            prior={"num_images": 4, "loss_weight": 1.0},
        )  # type: ignore[arg-type]

    batch = trainings([tmp_path / name for name in names], tmp_path / "out", settings)
    place = BatchFolder(tmp_path / "out")
    settled, _ = with_slots(batch)
    write_configs(place, settled)
    asked: list[list[str]] = []
    import spectral_diffusion.training.prior_images as prior_images

    sample = prior_images.sample_prior_latents
    monkeypatch.setattr(
        prior_images,
        "sample_prior_latents",
        lambda base, requests, *rest: [asked.append([p for p, _ in requests]), sample(base, requests, *rest)][1],
    )
    prepare(place, Batch(jobs=training_jobs(place, settled)))
    # The images that show no own class once, and those of the class that two concepts have.
    assert [len(prompts) for prompts in asked] == [2, 2] and all(" dog" in prompt for prompt in asked[1])
    assert list((tmp_path / "cache" / "spectra").glob("*.safetensors"))
    made = sorted((tmp_path / "cache").rglob("*.safetensors"))
    prepare(place, Batch(jobs=training_jobs(place, settled)))
    assert len(asked) == 2 and made == sorted((tmp_path / "cache").rglob("*.safetensors"))


def test_an_array_is_submitted_and_followed(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "ARRAY", 2)
    asked = parse_cluster(["partition=gpu", "minutes=90", "account=lab", "mem-bind=local"], parallelism=2)
    place, batch = batch_in(
        tmp_path,
        *"abc",
        executor="slurm",
        prepare=Job(name="prepare", arguments=()),
        finish=Job(name="last", arguments=()),
        cluster=asked,
    )
    submit(place, batch)
    scripts = [(cluster / f"script{index}").read_text() for index in range(3)]
    assert "--dependency" not in scripts[0]
    for script in scripts:
        for line in (
            "--partition=gpu",
            "--time=90",
            "--account=lab",
            "--mem-bind=local",
            "--requeue",
            "--signal=USR2@90",
        ):
            assert f"#SBATCH {line}" in script
    assert "#SBATCH --dependency=afterany:70" in scripts[1]
    assert "#SBATCH --array=0-1%1" in scripts[1]  # two at once in both arrays together
    batch = place.read()
    assert batch.ids == {"prepare": "70", "a": "71_0", "b": "71_1", "c": "72", "last": "73"}
    assert "#SBATCH --dependency=afterany:71:72" in (cluster / "script3").read_text()
    place.write_record(batch.job("a"), Record(state="running", starts=1, host="node", pid=5))
    place.write_record(batch.job("b"), Record(state="done", starts=1))
    queue = cluster / "queue"
    queue.write_text("74|71_0|71|RUNNING\n72|72_N/A|72|PENDING\n70|70_N/A|70|COMPLETED\n73|73_N/A|73|PENDING\n")
    assert {row.name: row.state for row in rows(place)} == {
        "prepare": "lost", "a": "running", "b": "done", "c": "waiting", "last": "waiting"
    }  # fmt: skip
    for refused in (lambda: submit(place, batch), lambda: check_runs_here(place, batch)):
        with pytest.raises(UserError, match=r"still works on 3 jobs .* batch cancel|3 jobs of .* are in Slurm's queue"):
            refused()
    place.write_record(batch.job("a"), Record(state="failed", starts=1, message="killed"))
    assert {row.name: row.state for row in rows(place)}["a"] == "running"  # it is about to be started again
    queue.write_text("")
    assert {row.name: row.state for row in rows(place)} == {
        "prepare": "lost", "a": "failed", "b": "done", "c": "lost", "last": "lost"
    }  # fmt: skip
    assert restart(place) == ["prepare", "a", "c", "last"] and place.read().ids["a"] == "75_0"
    assert "#SBATCH --dependency=afterany:74" in (cluster / "script5").read_text()
    queue.write_text("95|75_0|75|RUNNING\n96|75_1|75|PENDING\n")
    write_text(tmp_path / "bin" / "squeue", '#!/bin/sh\necho "squeue: error: no controller" >&2; exit 1\n')
    (tmp_path / "bin" / "squeue").chmod(0o755)
    with pytest.raises(UserError, match="no controller"):
        rows(place)
    assert {row.name: row.state for row in rows(place, ask=False)}["b"] == "done"
    write_text(tmp_path / "bin" / "squeue", f"#!/bin/sh\n{CLUSTER_COMMANDS['squeue']}\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    assert cancel(place) == 2 and (cluster / "cancelled").read_text() == "--quiet 75\n"
    assert place.record(batch.job("c")).message == "It was cancelled."


def test_a_cluster_that_refuses_is_quoted(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "bin" / "sbatch", '#!/bin/sh\necho "sbatch: error: invalid partition" >&2; exit 1\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    place, batch = batch_in(tmp_path, *"ab", executor="slurm")
    with pytest.raises(UserError, match=r"Slurm did not take the batch: .*invalid partition"):
        submit(place, batch)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="There is no Slurm here"):
        submit(place, batch)
    with pytest.raises(UserError, match="is written KEY=VALUE"):
        parse_cluster(["partition"])
    with pytest.raises(UserError, match="The cluster's minutes=soon: "):
        parse_cluster(["minutes=soon"])
    assert Cluster(minutes=5).filled(Cluster(minutes=9, gpus=1)) == Cluster(minutes=5, gpus=1)


def test_a_job_of_the_cluster_saves_its_state_when_it_must_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, batch = batch_in(tmp_path, "long", executor="slurm")

    def with_fake(*args: Any) -> JobProcess:
        return JobProcess(*args, program=PROGRAM)

    monkeypatch.setattr(slurm, "JobProcess", with_fake)
    worker = slurm.Worker(str(tmp_path / "out"))
    worker.running = with_fake(place, batch.jobs[0], str(tmp_path))
    while not (tmp_path / "out" / "events").exists():
        time.sleep(0.01)
    os.kill(worker.running.process.pid, signal.SIGUSR2)  # Slurm sends it to every process of a job
    again = worker.checkpoint("long")
    record = place.record(batch.jobs[0])
    assert (record.state, record.message, record.starts) == ("stopped", "Stopped at step 1.", 1)
    assert again.function(*again.args) == "done" and events(tmp_path)[-1] == "long done --resume"
    assert again.function(*again.args) == "done" and place.record(batch.jobs[0]).starts == 2  # not a third time


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a", "nonsense", "-o", "x.safetensors"], "'nonsense' is neither a photo folder"),
        (["a", "b", "-o", "x.safetensors"], "need a folder for their adapters"),
        (["a", "b"], "need a folder for their adapters"),
        (["a", "b", "token=<x>", "-o", "out"], "token=<x> cannot apply to every concept"),
        (["steps=3"], "No photo folder is given"),
        (["a", "b", "-o", "out", "--status", "x.json"], "leave out --status"),
        (["a", "b", "-o", "out", "--cluster", "partition"], "is written KEY=VALUE"),
        (["a", "b", "-o", "out", "--executor", "slurm"], "There is no Slurm here"),
        (["a", "b", "-o", "out", "--jobs", "2", "interference.overlap_weight=1"], "--jobs 1 is needed"),
    ],
)
def test_the_command_line_tells_what_is_wrong(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PATH", "")
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

    assert "1 of 4 jobs failed, the others are done: empty (" in run()
    slots = [load_adapter(tmp_path / "out" / f"{folder.name}.safetensors").slot for folder in folders]
    assert list(map(str, slots)) == ["0:2", "2:4", "4:6"]
    [taken] = Ledger(tmp_path / "out" / "slots.json").read().values()
    assert len(taken) == 3 and not list((tmp_path / "out").glob("*.state.safetensors"))
    dog = tmp_path / "out" / "dog.safetensors"
    assert not state_path(dog).exists()
    before = dog.stat().st_mtime_ns
    run("--resume")
    assert before == dog.stat().st_mtime_ns


def unknown_fields(value: Any, kind: str, models: Any, where: str = "") -> list[str]:
    """The fields of a manifest that Kubernetes does not have, by the classes of its own client."""
    if kind.startswith("list["):
        return [text for item in value for text in unknown_fields(item, kind[5:-1], models, where)]
    model = getattr(models, kind, None)
    if model is None:
        return []
    fields = {own: model.openapi_types[name] for name, own in model.attribute_map.items()}
    found = [f"{where}.{key}" for key in value if key not in fields]
    for key in value.keys() & fields.keys():
        found += unknown_fields(value[key], fields[key], models, f"{where}.{key}")
    return found


def test_kubernetes_knows_every_field_of_the_manifest(tmp_path: Path) -> None:
    client = pytest.importorskip("kubernetes.client")
    from kubernetes.client.api_client import ApiClient

    place, batch = batch_in(tmp_path, *"abcde", executor="manual", cluster=Cluster(gpus=1, memory_gb=12, parallelism=9))
    made = yaml.safe_load(as_yaml(manifest(place, batch, Pods("image:1", "claim", 3, "team"))))
    assert unknown_fields(made, "V1Job", client) == [] and unknown_fields({"kid": 1}, "V1Job", client) == [".kid"]
    job = ApiClient()._ApiClient__deserialize(made, "V1Job")  # whose classes refuse what lacks a required field
    assert (job.spec.completions, job.spec.parallelism, job.spec.suspend) == (3, 3, True)
    [container] = job.spec.template.spec.containers
    assert container.command[-1] == "$(JOB_COMPLETION_INDEX)/3" and container.resources.limits["nvidia.com/gpu"] == "1"
    with pytest.raises(UserError, match="outside /elsewhere"):
        manifest(place, batch, Pods("image:1", "claim", mount="/elsewhere"))
    with pytest.raises(UserError, match="nobody works on yet"):
        manifest(place, batch.model_copy(update={"executor": "slurm"}), Pods("image:1", "claim"))
    assert resource_name("Meine Bilder_2/") == "spectral-meine-bilder-2" and len(resource_name("x" * 99)) == 50
    with pytest.raises(UserError, match="needs all the others"):
        manifest(place, batch.model_copy(update={"finish": batch.jobs[0]}), Pods("image:1", "claim"))


def test_the_parts_of_a_fusion_are_computed_apart_and_give_the_same_bits(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(tiny_base), "cpu")
    files = []
    for index, name in enumerate(("rex", "mug")):
        config = TrainConfig(
            concept=make_photos(tmp_path / name, 1, seed=index), output=tmp_path / "out" / f"{name}.safetensors",
            base=str(tiny_base), rank=1, steps=1, device="cpu",
        )  # fmt: skip
        train_to_file(config, base=base)
        files.append(config.output)
    small = {"num_images": 2, "num_prior_images": 2, "noises_per_image": 1, "steps": 1, "batch_size": 2}
    common: dict[str, Any] = {
        "adapters": files, "merge": "gradient", "base": str(tiny_base), "device": "cpu",
        "calibration": {"num_images": 1, "num_inference_steps": 2}, "scales": {"rex": 0.5},
    }  # fmt: skip
    whole = FuseConfig(output=tmp_path / "whole", distill=small, **common)
    shared = FuseConfig(output=tmp_path / "shared", distill={**small, "cache": True}, **common)
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path / "one"))
    fuse_to_folder(whole)
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path / "other"))
    names = part_names(shared, ["rex", "mug"])
    assert names == [GENERIC, "mug", "rex"]
    compute_parts(shared, names[1:])
    compute_parts(shared, names[:1])
    made = sorted((tmp_path / "other").rglob("*.safetensors"))
    assert [sum(path.parent.name == kind for path in made) for kind in ("activations", "teachers")] == [3, 3]
    fuse_to_folder(shared)
    assert made == sorted((tmp_path / "other").rglob("*.safetensors"))  # the fusion itself computed none
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        one, other = (read_tensors(config.output / part)[0] for config in (whole, shared))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(UserError, match="has no part 'tex'"):
        compute_parts(shared, ["tex"])
    for change in ({"calibration": {"cache": False}}, {"calibration": {"calibrate_on": "previous_stages"}}):
        with pytest.raises(UserError, match=r"meet in the cache|stage by stage"):
            part_names(FuseConfig(output=tmp_path / "x", **{**common, **change}), ["rex"])
    assert part_names(FuseConfig(output=tmp_path / "x", adapters=files), ["rex"]) == []  # nothing to share out


def test_every_verb_writes_its_jobs_and_the_batch_is_shown_and_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["spectral-diffusion", *arguments])
        with suppress(SystemExit):
            cli.main()
        found = capsys.readouterr()
        return found.out + found.err

    monkeypatch.chdir(tmp_path)
    said = program("experiment", "all", "--quick", "-o", "evidence", "--executor", "manual", "--jobs=2")
    assert "spectral-diffusion batch run evidence" in said
    jobs = {job.name: job.arguments for job in BatchFolder(Path("evidence")).read().jobs}
    assert jobs["rank"] == ("experiment", "rank", "--quick", "-o", "evidence") and len(jobs) > 10
    make_photos(tmp_path / "dog", 1)
    program("train", "dog", "-o", "out/dog.safetensors", "--steps", "3", "--executor", "manual", "--status", "auto")
    [job] = BatchFolder(Path("out")).read().jobs
    assert job.arguments == ("train", "dog", "-o", "out/dog.safetensors", "--steps", "3", "--status", "auto")
    assert job.state == (tmp_path / "out" / "dog.state.safetensors")
    entry = {"name": "mine", "adapters": "{concept}.safetensors"}
    write_text(tmp_path / "mine.yaml", yaml.safe_dump(entry))
    said = program("board", "run", "--entry", "mine.yaml", "-o", "board", "--executor", "manual", "--n", "2")
    [job] = BatchFolder(Path("board")).read().jobs
    assert job.arguments == ("board", "run", "-o", "board", "--n", "2", "--entry", "mine.yaml"), said

    place, batch = batch_in(tmp_path / "here", "a", "bad", executor="manual")
    monkeypatch.setattr("spectral_diffusion.batch.submission.run_jobs", lambda *args: run_jobs(*args, program=PROGRAM))
    assert "holds no batch" in program("batch", "status", "nowhere")
    assert "A share is i/n" in program("batch", "run", str(place.output), "--shard", "2/2")
    assert "Did 1 of 2 jobs" in program("batch", "run", str(place.output), "--shard", "0/2")
    said = program("batch", "run", str(place.output))
    assert "bad holds no readable photo" in said and "--rank 4" not in said.splitlines()[0]
    shown = program("batch", "status", str(place.output))
    assert "1 done, 1 failed" in shown and "Use --rank 4" in " ".join(shown.split())
    assert [row["state"] for row in json.loads(program("batch", "status", str(place.output), "--json"))] == [
        "done", "failed"
    ]  # fmt: skip
    assert "stop its process with Ctrl-C" in program("batch", "cancel", str(place.output))
    assert states(place, batch) == ["done", "failed"]
    made = program("batch", "kubernetes", str(place.output), "--image", "image:1", "--claim", "work")
    assert yaml.safe_load(made)["spec"]["completions"] == 2
