"""Trainings of the app as jobs of a cluster: one that only notes what it is asked, and a real Slurm."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_photos

from spectral_diffusion.app import launchers
from spectral_diffusion.app.queue import TRAIN, Queue
from spectral_diffusion.app.workspace import Workspace
from spectral_diffusion.batch.job import BatchFolder, Record
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.files import read_tensors
from tools.slurm import LocalSlurm, missing_programs

ASKED = "partition=gpu minutes=90"


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A queue that is looked after only when the test says so, and whose local trainings sleep."""
    pytest.importorskip("submitit")
    monkeypatch.setattr(Queue, "start", lambda self: None)
    monkeypatch.setattr(launchers, "ASK_EVERY", 0.0)
    workspace = Workspace(tmp_path / "workspace")
    for seed, name in enumerate(("ann", "bob", "cid")):
        make_photos(workspace.concepts / name, seed=seed)
    return Queue(workspace, ("sleep",))


def line(queue: Queue, name: str) -> str:
    queue.tick()
    return queue.job(name).line()


def test_the_cluster_takes_several_at_once(queue: Queue, cluster: Path) -> None:
    first, said = queue.enqueue("ann", executor="slurm", cluster=ASKED)
    assert said == "The training of 'ann' has started."
    second, _ = queue.enqueue("bob", executor="slurm")
    script = (cluster / "script0").read_text()
    assert "#SBATCH --partition=gpu" in script and "#SBATCH --time=90" in script
    assert "#SBATCH --time=240" in (cluster / "script1").read_text()  # nothing is known of it
    (cluster / "queue").write_text("70|70_N/A|70|RUNNING\n71|71_N/A|71|PENDING\n")
    folder = BatchFolder(queue.job(first).folder)
    [task] = folder.read().jobs
    assert task.arguments[0] == "train" and task.status == queue.job(first).status_file
    folder.write_record(task, Record(state="running", starts=1, host="node7"))
    assert line(queue, first) == "runs on node7" and line(queue, second) == "waits in the cluster's queue"
    assert queue.job(first).as_json()["executor"] == "slurm"

    # One fails, the other is stopped while it waits.
    (cluster / "queue").write_text("71|71_N/A|71|PENDING\n")
    folder.write_record(task, Record(state="failed", starts=1, message="The photos are gone."))
    assert line(queue, first) == "failed"
    assert queue.job(first).record.message == "The photos are gone. Resume begins anew."
    assert "bob" in queue.stop(second)
    (cluster / "queue").write_text("")
    assert (cluster / "cancelled").read_text() == "--quiet 71\n"
    assert line(queue, second) == "stopped"

    # It is started again, and is done.
    queue.resume(first)
    assert len(list(cluster.glob("script*"))) == 3
    folder.write_record(task, Record(state="done", starts=1))
    assert line(queue, first) == "done"


def test_an_earlier_submission_says_nothing_of_a_new_launch(queue: Queue, cluster: Path) -> None:
    name, _ = queue.enqueue("ann", executor="slurm")
    (cluster / "queue").write_text("")  # the cluster has ended it
    launcher, job = queue.launchers[launchers.CLUSTER], queue.job(name)
    launcher.ask(job)
    assert not launcher.is_alive(job)
    again = job.write(launches=job.record.launches + 1, launched=time.time() + 5)  # and it is being submitted again
    assert launcher.is_alive(again)
    launcher.ask(again)
    assert launcher.is_alive(again)


def test_this_computer_trains_beside_the_cluster(queue: Queue, cluster: Path) -> None:
    here, _ = queue.enqueue("ann")
    there, _ = queue.enqueue("bob", executor="slurm")
    (cluster / "queue").write_text("70|70_N/A|70|RUNNING\n")
    _, said = queue.enqueue("cid", executor="slurm")
    assert "has started" in said and {job.record.state for job in queue.jobs()} <= {"running", "failed"}
    assert queue.job(here).record.executor == "local" and queue.job(there).record.launches == 1


def test_a_silent_cluster_ends_nothing(queue: Queue, cluster: Path, tmp_path: Path) -> None:
    name, _ = queue.enqueue("ann", executor="slurm")
    (tmp_path / "bin" / "squeue").write_text('#!/bin/sh\necho "squeue: error: no controller" >&2; exit 1\n')
    queue.refresh()
    assert "no controller" in queue.trouble and queue.job(name).record.state == "running"
    here, said = queue.enqueue("bob")
    assert "has started" in said and queue.job(here).record.launches == 1  # which needs no cluster


def test_a_hanging_cluster_keeps_nobody_waiting(queue: Queue, cluster: Path, tmp_path: Path) -> None:
    name, _ = queue.enqueue("ann", executor="slurm")
    asked, go = tmp_path / "asked", tmp_path / "go"
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\ntouch {asked}\nuntil [ -f {go} ]; do sleep 0.05; done\n")
    thread = threading.Thread(target=queue.tick)
    thread.start()
    try:
        while not asked.exists():
            time.sleep(0.01)
        _, said = queue.enqueue("bob")  # meanwhile
        assert "has started" in said and thread.is_alive()
        assert queue.job(name).record.state == "running"
    finally:
        go.touch()
        thread.join()


def test_what_cannot_be_submitted_is_a_sentence(
    queue: Queue, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more, sentence in (
        ({"executor": "moon"}, "runs on local or slurm, not on 'moon'"),
        ({"executor": "slurm", "cluster": "gpu"}, "is written KEY=VALUE"),
    ):
        with pytest.raises(UserError, match=sentence):
            queue.enqueue("ann", **more)  # type: ignore[arg-type]
    assert queue.jobs() == []
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/sh\necho "sbatch: error: invalid partition" >&2; exit 1\n')
    with pytest.raises(UserError, match=r"Slurm did not take the batch: .*invalid partition"):
        queue.enqueue("ann", executor="slurm", cluster=ASKED)
    [job] = queue.jobs()
    assert job.record.state == "failed" and str(tmp_path) not in job.record.message
    monkeypatch.setenv("PATH", "")
    assert not launchers.cluster_is_here()
    with pytest.raises(UserError, match="There is no Slurm here"):
        queue.enqueue("bob", executor="slurm")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalSlurm]:
    real = LocalSlurm(tmp_path / "slurm", nodes=1)
    real.start()
    for key, value in real.environment.items():
        monkeypatch.setenv(key, value)
    yield real
    real.stop()


def until(met: Callable[[], Any], seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_programs()), reason="There is no Slurm here: apt install slurmctld slurmd munge.")
def test_a_real_cluster_trains_the_same_adapter(slurm: LocalSlurm, queue: Queue, tiny_base: Path) -> None:
    quick: dict[str, Any] = {
        "base": str(tiny_base), "rank": 1, "steps": 4, "batch_size": 1, "crops_per_image": 1, "device": "cpu",
        "prior": {"loss_weight": 0.0},
    }  # fmt: skip
    queue.launchers["local"] = launchers.Here(TRAIN)
    name, _ = queue.enqueue("ann", executor="slurm", cluster="memory_gb=2 cpus=1", **quick)
    until(lambda: (queue.tick(), queue.job(name).record.state)[1] in {"done", "failed"})
    assert queue.job(name).record.state == "done", queue.job(name).record.message
    adapter = queue.workspace.adapters / "ann.safetensors"
    there, _ = read_tensors(adapter)
    shutil.rmtree(queue.workspace.adapters)
    queue.remove(name)
    name, _ = queue.enqueue("ann", **quick)
    until(lambda: (queue.tick(), queue.job(name).record.state)[1] in {"done", "failed"})
    here, _ = read_tensors(adapter)
    assert there.keys() == here.keys() and all((there[key] == here[key]).all() for key in there)
