"""The queue of trainings: real ones on random weights, and stand-ins where only the queue is looked at."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from processes import client_of

from spectral_diffusion.app import estimates
from spectral_diffusion.app import jobs as jobs_module
from spectral_diffusion.app.adapters import adapter_rows, delete_adapter, workspace_adapters
from spectral_diffusion.app.charts import loss_curve
from spectral_diffusion.app.estimates import estimate_training, memory_estimate, span
from spectral_diffusion.app.jobs import QueueJob, last_error, trim
from spectral_diffusion.app.presets import preset_train_settings, presets, train_settings
from spectral_diffusion.app.queue import Queue
from spectral_diffusion.app.workspace import Workspace
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.files import read_tensors, write_text
from spectral_diffusion.slots.ledger import LEDGER, Ledger
from spectral_diffusion.training.run import state_path, train_to_file

QUICK: dict[str, Any] = {
    "rank": 2, "batch_size": 1, "crops_per_image": 1, "device": "cpu", "mixed_precision": "no",
    "prior": {"loss_weight": 0.0},
}  # fmt: skip
STAND_IN = """
import json, os, pathlib, signal, sys, time
status = pathlib.Path(sys.argv[sys.argv.index("--status") + 1])
said = {"state": "running", "stage": "train", "step": 5, "steps": 10, "pid": os.getpid(), "curve": [[5, 0.5]]}
def say(**more):
    said.update(more)
    status.with_suffix(".new").write_text(json.dumps(said))
    status.with_suffix(".new").rename(status)
def stop(*_):
    say(state="stopped", message="Stopped at step 5 of 10.")
    os._exit(130)
signal.signal(signal.SIGTERM, stop)
print("training", *sys.argv[2:], flush=True)
say()
while not status.with_name("end").exists():
    time.sleep(0.01)
word = status.with_name("end").read_text()
if word == "done":
    say(state="done", step=10)
elif word:
    print("Error: " + word, file=sys.stderr)
    say(state="failed", message=word)
"""


def until(met: Callable[[], Any], seconds: float = 180.0) -> None:
    """Look again and again whether something is so."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "workspace")
    for index, name in enumerate(("ann", "bob", "cid")):
        folder = workspace.concepts / name
        folder.mkdir(parents=True)
        Image.new("RGB", (20, 24), (80 * index, 100, 200)).save(folder / "1.png")
        (folder / "concept.yaml").write_text(f"name: {name}\nnoun: dog\n")
    return workspace


@pytest.fixture
def queue(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    """A queue whose trainings are stand-ins, looked after only when the test says so."""
    monkeypatch.setattr(Queue, "start", lambda self: None)
    queue = Queue(workspace, (sys.executable, "-S", "-c", STAND_IN))
    yield queue
    for job in queue.jobs():
        if job.alive:  # whatever a test has written into its record
            os.kill(job.record.pid, signal.SIGKILL)


def states(queue: Queue) -> dict[str, str]:
    queue.tick()
    return {job.record.concept: job.record.state for job in queue.jobs()}


def training(queue: Queue, name: str) -> QueueJob:
    """The running job once it has said that it trains."""
    until(lambda: (found := queue.job(name).own_status) and found.stage == "train")
    return queue.job(name)


def say_end(queue: Queue, name: str, word: str) -> None:
    """Tell a stand-in how to end."""
    write_text(queue.workspace.jobs / name / "end", word)


def end(queue: Queue, name: str, word: str = "done") -> None:
    """Let a stand-in end, and see it noted."""
    training(queue, name)
    say_end(queue, name, word)
    until(lambda: states(queue) and queue.job(name).record.state != "running")


# --- the queue, with stand-ins --------------------------------------------------------------------------------


def test_jobs_run_in_turn(queue: Queue) -> None:
    first, said = queue.enqueue("ann")
    assert "has started" in said
    second, said = queue.enqueue("bob")
    assert "waits for 1 before it" in said
    assert states(queue) == {"ann": "running", "bob": "waiting"}
    end(queue, first)
    assert states(queue) == {"ann": "done", "bob": "running"}
    told = queue.job(second)
    assert training(queue, told.id).as_json()["step"] == 5
    end(queue, second)
    assert states(queue) == {"bob": "done", "ann": "done"} and queue.tick() is False
    assert "--resume" not in queue.job(first).log.read_text()
    assert queue.clear().startswith("Removed 2 finished") and queue.jobs() == []


def test_stop_goes_on_with_the_next_and_resume_queues_again(queue: Queue) -> None:
    first, _ = queue.enqueue("ann")
    second, _ = queue.enqueue("bob")
    training(queue, first)
    assert "Resume goes on" in queue.stop(first)
    until(lambda: states(queue) == {"bob": "running", "ann": "stopped"})
    assert queue.job(first).line() == "stopped at step 5 of 450"
    assert "waits for 1 before it" in queue.resume(first)
    queue.stop(second)
    until(lambda: states(queue) == {"ann": "running", "bob": "stopped"})
    training(queue, first)
    assert "--resume" in queue.job(first).log.read_text().splitlines()[-1]
    with pytest.raises(UserError, match="resume it once it has stopped"):
        queue.resume(first)
    with pytest.raises(UserError, match="only a running one"):
        queue.stop(second)


def test_a_second_stop_ends_what_the_first_does_not(queue: Queue, workspace: Workspace) -> None:
    slow = STAND_IN.replace("def stop(*_):", "def stop(number, _):\n    if number == signal.SIGTERM:\n        return")
    slow = slow.replace("SIGTERM, stop)", "SIGTERM, stop)\nsignal.signal(signal.SIGINT, stop)")
    queue = Queue(workspace, (sys.executable, "-c", slow))
    first, _ = queue.enqueue("ann")
    job = training(queue, first)
    assert "after the present step" in queue.stop(first)
    assert job.alive
    assert "stops at once; Resume begins anew" in queue.stop(first)
    until(lambda: states(queue) == {"ann": "stopped"})


def test_an_adapter_that_is_trained_anew_is_kept_in_the_trash(queue: Queue, workspace: Workspace) -> None:
    workspace.adapters.mkdir(parents=True, exist_ok=True)
    (workspace.adapters / "ann.safetensors").write_bytes(b"an older one")
    first, _ = queue.enqueue("ann")
    training(queue, first)
    (workspace.adapters / "new").write_bytes(b"a newer one")
    (workspace.adapters / "new").replace(workspace.adapters / "ann.safetensors")
    [kept] = workspace.trash.iterdir()
    assert "-ann-" in kept.name and (kept / "ann.safetensors").read_bytes() == b"an older one"
    end(queue, first, "Odd.")
    queue.resume(first)
    training(queue, first)
    assert [folder.name for folder in workspace.trash.iterdir()] == [kept.name]  # not again at every launch


def test_an_adapter_that_cannot_be_kept_is_not_replaced(queue: Queue, workspace: Workspace) -> None:
    workspace.adapters.mkdir(parents=True, exist_ok=True)
    (workspace.adapters / "ann.safetensors").write_bytes(b"an older one")
    workspace.trash.write_bytes(b"a file where the trash belongs")
    with pytest.raises(UserError, match=r"folder \.trash: File exists; look at what is in its place"):
        queue.enqueue("ann")
    assert states(queue) == {"ann": "failed"}
    workspace.trash.unlink()
    [job] = queue.jobs()
    queue.resume(job.id)
    training(queue, job.id)
    [kept] = workspace.trash.iterdir()
    assert (kept / "ann.safetensors").read_bytes() == b"an older one"


def test_pause_holds_the_queue_until_resume(queue: Queue) -> None:
    first, _ = queue.enqueue("ann")
    queue.enqueue("bob")
    training(queue, first)
    queue.pause(first)
    assert queue.job(first).line() == "pausing …"
    until(lambda: states(queue) == {"ann": "paused", "bob": "waiting"})
    assert queue.tick() is False and states(queue)["bob"] == "waiting"
    _, said = queue.enqueue("cid")
    assert "until the paused training of 'ann'" in said
    assert "has started" in queue.resume(first)
    assert states(queue) == {"ann": "running", "bob": "waiting", "cid": "waiting"}


def test_a_stopped_pause_frees_the_queue(queue: Queue) -> None:
    first, _ = queue.enqueue("ann")
    queue.enqueue("bob")
    training(queue, first)
    queue.pause(first)
    until(lambda: states(queue)["ann"] == "paused")
    queue.stop(first)
    assert states(queue) == {"bob": "running", "ann": "stopped"}


def test_a_killed_training_is_told_and_the_queue_goes_on(queue: Queue) -> None:
    first, _ = queue.enqueue("ann")
    queue.enqueue("bob")
    os.kill(training(queue, first).record.pid, signal.SIGKILL)
    until(lambda: states(queue) == {"bob": "running", "ann": "failed"})
    assert "killed, or out of memory" in queue.job(first).record.message


def test_failures_are_said_in_the_trainings_own_words(queue: Queue) -> None:
    first, _ = queue.enqueue("ann")
    end(queue, first, "The photos are odd; take others.")
    assert queue.job(first).record.message == "The photos are odd; take others."
    assert last_error(queue.job(first).log) == "The photos are odd; take others."


def test_two_queues_start_nothing_twice_and_adopt_what_runs(queue: Queue, workspace: Workspace) -> None:
    others = [Queue(workspace, queue.program) for _ in range(4)]
    first, _ = queue.enqueue("ann")
    queue.enqueue("bob")
    looks = [threading.Thread(target=other.refresh) for other in others for _ in range(3)]
    for look in looks:
        look.start()
    for look in looks:
        look.join()
    job = training(others[0], first)
    assert job.record.launches == 1 and job.log.read_text().count("training") == 1
    assert not any(other.trouble for other in others)
    end(others[1], first)
    assert states(others[2]) == {"ann": "done", "bob": "running"}


def test_a_server_killed_while_launching_is_made_up_for(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = queue.enqueue("ann")
    pid = training(queue, first).record.pid
    queue.job(first).write(pid=0, pid_started=None)  # as if it had been killed before it could note the process
    assert states(queue) == {"ann": "running"} and queue.job(first).record.pid == pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: not queue.job(first).alive)
    queue.job(first).write(pid=0, pid_started=None, launched=time.time())
    assert states(queue) == {"ann": "running"}, "it may be about to say which process it is"
    monkeypatch.setattr("spectral_diffusion.app.launchers.LAUNCH", 0.0)
    assert states(queue) == {"ann": "failed"}


def test_a_reused_pid_is_not_taken_for_the_training(queue: Queue) -> None:
    first, _ = queue.enqueue("ann")
    os.kill(training(queue, first).record.pid, signal.SIGKILL)
    queue.job(first).write(pid=os.getpid(), pid_started=1)
    assert states(queue) == {"ann": "failed"}


def test_deleted_photos_are_told_and_the_next_runs(queue: Queue, workspace: Workspace) -> None:
    first, _ = queue.enqueue("ann")
    second, _ = queue.enqueue("bob")
    queue.enqueue("cid")
    shutil.rmtree(workspace.concepts / "bob")
    end(queue, first)
    assert states(queue) == {"cid": "running", "bob": "failed", "ann": "done"}
    assert "photos of 'bob' are gone" in queue.job(second).record.message


def test_damaged_files_are_told_and_the_queue_goes_on(queue: Queue, workspace: Workspace) -> None:
    first, _ = queue.enqueue("ann")
    second, _ = queue.enqueue("bob")
    third, _ = queue.enqueue("cid")
    training(queue, first).status_file.write_text("{")
    os.kill(queue.job(first).record.pid, signal.SIGKILL)
    (queue.job(second).folder / "job.json").write_bytes(b"\x00\xff")
    queue.job(third).settings.write_text("steps: [")
    until(lambda: states(queue) == {"cid": "failed", "bob": "failed", "ann": "failed"})
    assert "status file is damaged" in queue.job(first).record.message
    assert "job.json is missing or damaged" in queue.job(second).record.message
    assert "not valid YAML" in queue.job(third).record.message
    assert json.dumps([job.as_json() for job in queue.jobs()])
    for name in (first, second, third):
        queue.remove(name, sure=True)
    assert queue.jobs() == []


def test_a_full_disk_is_a_sentence(queue: Queue, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = queue.enqueue("ann")
    before = states(queue)

    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("tempfile.mkstemp", full)
        patched.setattr("tempfile.mkdtemp", full)
        with pytest.raises(UserError, match="Cannot write to the workspace's folder jobs: No space left"):
            queue.enqueue("bob")
        os.kill(training(queue, first).record.pid, signal.SIGKILL)
        until(lambda: not queue.job(first).alive)
        queue.refresh()
        assert "No space left" in queue.trouble
        assert {job.record.concept: job.record.state for job in queue.jobs()} == before
    monkeypatch.setattr(jobs_module, "FULL", 10**30)
    queue.refresh()
    assert queue.trouble == "" and "disk is full" in queue.job(first).record.message


def test_one_training_per_adapter(queue: Queue, workspace: Workspace) -> None:
    first, _ = queue.enqueue("ann")
    with pytest.raises(UserError, match="running already"):
        queue.enqueue("ann")
    training(queue, first)
    workspace.adapters.mkdir()
    state = state_path(workspace.adapters / "ann.safetensors")
    state.write_bytes(b"state")
    queue.stop(first)
    until(lambda: states(queue) == {"ann": "stopped"})
    with pytest.raises(UserError, match=r"unfinished training of 'ann' .step 5 of 450.: resume it, or remove"):
        queue.enqueue("ann")
    with pytest.raises(UserError, match="sure"):
        queue.remove(first)
    assert state.exists() and queue.job(first)
    assert queue.resume_concept("ann")[0] == first
    training(queue, first)
    with pytest.raises(UserError, match="stop it first"):
        queue.remove(first, sure=True)
    queue.stop(first)
    until(lambda: states(queue) == {"ann": "stopped"})
    queue.remove(first, sure=True)
    assert not state.exists() and queue.jobs() == []
    with pytest.raises(UserError, match="no stopped training of 'ann'"):
        queue.resume_concept("ann")


def test_a_new_training_takes_the_place_of_one_that_left_nothing(queue: Queue) -> None:
    first, _ = queue.enqueue("ann")
    end(queue, first, "Odd.")
    second, _ = queue.enqueue("ann")
    assert [job.id for job in queue.jobs()] == [second]


def test_a_training_that_left_no_state_begins_anew_over_an_older_adapter(queue: Queue, workspace: Workspace) -> None:
    """--resume would keep the older adapter, or refuse it for its other settings."""
    workspace.adapters.mkdir(parents=True, exist_ok=True)
    (workspace.adapters / "ann.safetensors").write_bytes(b"an older one")
    first, _ = queue.enqueue("ann")
    end(queue, first, "Odd.")
    queue.resume(first)
    training(queue, first)
    assert "--resume" not in queue.job(first).log.read_text()
    queue.stop(first)
    until(lambda: states(queue) == {"ann": "stopped"})
    state_path(workspace.adapters / "ann.safetensors").write_bytes(b"state")
    queue.resume(first)
    training(queue, first)
    until(lambda: "--resume" in queue.job(first).log.read_text())


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "ann/..", "", None])
def test_names_are_looked_up_never_joined(queue: Queue, workspace: Workspace, name: str | None) -> None:
    with pytest.raises(UserError, match="oncept"):
        queue.enqueue(name)
    for ask in (queue.stop, queue.pause, queue.resume, queue.remove):
        with pytest.raises(UserError, match="No training"):
            ask(name)  # type: ignore[operator]
    with pytest.raises(UserError, match="No adapter"):
        delete_adapter(workspace, name)
    with pytest.raises(UserError, match="Unknown preset"):
        queue.enqueue("ann", name or "")
    assert [job.id for job in queue.jobs()] == []


def test_an_adapter_in_training_keeps_its_columns(queue: Queue, workspace: Workspace) -> None:
    workspace.adapters.mkdir(parents=True, exist_ok=True)
    (workspace.adapters / "ann.safetensors").write_bytes(b"an older one")
    other, _ = queue.enqueue("bob")
    job, _ = queue.enqueue("ann")  # waits
    with pytest.raises(UserError, match="'ann' is in training or waits for it; stop that"):
        delete_adapter(workspace, "ann")
    queue.remove(job, sure=True)
    queue.stop(other)
    assert "free again" in delete_adapter(workspace, "ann")


def test_wrong_settings_are_told_before_anything_is_queued(queue: Queue) -> None:
    with pytest.raises(UserError, match="did you mean 'lora'"):
        queue.enqueue("ann", method="lara")
    with pytest.raises(UserError, match="steps"):
        queue.enqueue("ann", steps=0)
    with pytest.raises(UserError, match="No fused folder"):
        queue.enqueue("ann", base="fused/nothing")
    assert queue.jobs() == []


def test_the_thread_works_without_a_page_and_ends(workspace: Workspace) -> None:
    queue = Queue(workspace, (sys.executable, "-S", "-c", STAND_IN))
    names = [queue.enqueue(name)[0] for name in ("ann", "bob")]
    thread = queue._thread
    assert thread is not None
    for name in names:
        say_end(queue, name, "done")
    until(lambda: not thread.is_alive())
    assert [job.record.state for job in queue.jobs()] == ["done", "done"]


def test_logs_stay_small(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with log.open("ab") as writer:
        writer.write(b"a line of a chatty training\n" * 100_000)
        writer.flush()
        trim(log)
        assert log.stat().st_size <= 64_000 and log.read_bytes().startswith(b"a line")
        writer.write(b"the last\n")
    assert log.read_bytes().endswith(b"training\nthe last\n")


# --- what is said before, and shown meanwhile -----------------------------------------------------------------


def test_presets_begin_with_the_pocket_base() -> None:
    assert next(iter(presets())) == "pocket" and all(presets().values())
    for name in presets():
        assert preset_train_settings(name, "train")


def test_estimates(workspace: Workspace, tiny_base: Path, queue: Queue) -> None:
    pocket = train_settings(workspace, "ann", "pocket", {})
    assert estimate_training(pocket).trained == "510,464" and "short measurement" in estimate_training(pocket).note
    assert memory_estimate(pocket) == ("about 0.8 GiB", "")
    large = train_settings(workspace, "ann", "sd15-8gb", {})
    assert estimate_training(large).trained == "2,184,192" and "not on this machine" in estimate_training(large).note
    here = train_settings(workspace, "ann", "pocket", {"base": str(tiny_base), "rank": 2})
    assert "not on this machine" not in estimate_training(here).note
    with pytest.raises(UserError, match="cannot have rank"):
        estimate_training(train_settings(workspace, "ann", "pocket", {"rank": 4000}))
    assert span(20, 50) == "20 to 50 s" and span(70, 250) == "1 to 5 min" and span(9000, 40000) == "2 to 12 h"


def test_the_time_is_taken_from_a_training_here(queue: Queue, workspace: Workspace) -> None:
    config = train_settings(workspace, "bob", "pocket", {})
    first, _ = queue.enqueue("ann")
    end(queue, first)
    file = queue.job(first).status_file
    held = json.loads(file.read_text()) | {
        "config": {"base": "pocket", "batch_size": config.batch_size},
        "started": "2025-01-01T00:00:00+00:00",
        "updated": "2025-01-01T00:01:00+00:00",
    }
    for steps, seconds in ((20, None), (200, 0.3)):
        file.write_text(json.dumps(held | {"step": steps, "steps": steps}))
        assert estimates.seconds_per_step(queue.jobs(), config) == seconds
    assert estimate_training(config, queue.jobs()).time == "about 3 min"
    other = config.model_copy(update={"batch_size": config.batch_size + 1})
    assert estimates.seconds_per_step(queue.jobs(), other) is None


def test_the_time_follows_the_training_that_runs(queue: Queue, workspace: Workspace) -> None:
    config = train_settings(workspace, "bob", "pocket", {})
    first, _ = queue.enqueue("ann")
    file = training(queue, first).status_file
    held = json.loads(file.read_text()) | {"config": {"base": "pocket", "batch_size": config.batch_size}, "eta": 2.5}
    file.write_text(json.dumps(held))  # five steps are left
    found = estimate_training(config, queue.jobs())
    assert found.time == f"about {round(0.5 * config.steps / 60)} min" and "runs now" in found.note
    file.write_text(json.dumps(held | {"stage": "prior images"}))
    assert "short measurement" in estimate_training(config, queue.jobs()).note


def test_the_line_counts_what_comes_before_the_first_step(queue: Queue) -> None:
    first, _ = queue.enqueue("ann")
    file = training(queue, first).status_file
    held = json.loads(file.read_text()) | {"stage": "prior images", "step": 8, "steps": 36, "curve": []}
    file.write_text(json.dumps(held))
    assert queue.job(first).line() == "preparing, prior images: 8 of 36"
    file.write_text(json.dumps(held | {"steps": 0}))
    assert queue.job(first).line() == "preparing, prior images"
    assert "stops before its first step; Resume begins anew" in queue.stop(first)


def test_the_memory_of_a_large_base_is_counted(
    workspace: Workspace, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "SMALL", 0)
    estimates.base_shape.cache_clear()
    config = train_settings(workspace, "ann", "pocket", {**QUICK, "base": str(tiny_base)})
    assert memory_estimate(config)[0].startswith("about 0.7 GiB")
    monkeypatch.setattr("spectral_diffusion.training.memory.available", lambda device: 1000)
    assert "0.0 GiB are free here" in memory_estimate(config)[1]
    estimates.base_shape.cache_clear()


def test_the_loss_curve_is_a_picture_of_the_points() -> None:
    picture = loss_curve([(1, 1.0), (50, 0.25), (100, 0.5)], 200)
    assert picture.startswith("<svg") and picture.count("<polyline") == 1
    assert "0.5" in picture and "200" in picture and "<title>" in picture
    assert "polyline" not in loss_curve([], 100)
    assert "nan" not in loss_curve([(1, float("nan")), (2, 0.5), (3, float("inf"))], 3).lower()


# --- the adapters ---------------------------------------------------------------------------------------------


def test_a_broken_adapter_is_one_line(workspace: Workspace) -> None:
    assert adapter_rows(workspace) == ([], [])
    workspace.adapters.mkdir(parents=True)
    (workspace.adapters / "bad.safetensors").write_bytes(b"garbage")
    (workspace.adapters / "rex.state.safetensors").write_bytes(b"garbage")
    (workspace.adapters / "away.safetensors").symlink_to("/etc/passwd")
    assert set(workspace_adapters(workspace)) == {"bad"}
    found, problems = adapter_rows(workspace)
    assert not found and len(problems) == 1 and "bad.safetensors" in problems[0] and "\n" not in problems[0]
    assert "Deleted the adapter 'bad'" in delete_adapter(workspace, "bad")
    assert adapter_rows(workspace) == ([], [])


# --- the tab --------------------------------------------------------------------------------------------------


@pytest.fixture
def part() -> Any:
    pytest.importorskip("gradio")
    from spectral_diffusion.app.tabs import job_list as trainings_part

    return trainings_part


def test_the_tab_shows_what_has_changed_and_nothing_else(queue: Queue, workspace: Workspace, part: Any) -> None:
    import gradio as gr

    names = [one.name for one in fields(part.List)]
    assert part.List.__dataclass_fields__.keys() == {*names}

    def look(seen: dict[str, Any], chosen: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        updates, seen = part.shown_jobs(workspace, queue.refresh(), queue.trouble, chosen, seen)
        changed = zip(names, updates, strict=True)
        return {name: update for name, update in changed if update != gr.skip()}, seen

    empty, seen = look({})
    assert empty["hint"]["visible"] and not empty["timer"]["active"] and empty["start"]["value"] == "Start training"
    first, _ = queue.enqueue("ann")
    queue.enqueue("bob")
    training(queue, first)
    running, seen = look(seen)
    assert running["timer"]["active"] and running["start"]["value"] == "Add to queue"
    assert running["jobs"]["choices"][0] == ("▶ ann · step 5 of 10", first) and running["jobs"]["value"] == first
    assert "<polyline" in running["curve"]["value"] and 'aria-valuenow="1"' in running["progress"]["value"]
    assert running["pause"]["visible"] and running["stop"]["value"] == "Run the next one first"
    assert (
        running["strip"]["visible"] and "ann</b> is being trained · step 5 of 10 · 1 more" in running["strip"]["value"]
    )
    assert look(seen) == ({}, seen), "what is as it was is left alone"
    queue.pause(first)
    until(lambda: states(queue)["ann"] == "paused")
    paused, seen = look(seen)
    assert not paused["timer"]["active"] and paused["resume"]["visible"] and not paused["pause"]["visible"]
    assert "ann</b> paused" in paused["strip"]["value"]
    second = queue.jobs()[1].id
    assert look(seen, second)[0]["jobs"]["value"] == second
    assert look(seen, "no such job")[1]["chosen"] == first, "the first is shown instead"


def test_samples_are_shown_from_the_workspace_only(queue: Queue, workspace: Workspace, part: Any) -> None:
    first, _ = queue.enqueue("ann")
    job = training(queue, first)
    inside, outside = workspace.adapters / "ann-samples", workspace.root.parent / "elsewhere"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "step-1.png")
    (inside / "link.png").symlink_to(outside / "step-1.png")
    (inside / "broken.png").write_bytes(b"no picture")
    files = [outside / "step-1.png", inside / ".." / ".." / ".." / "elsewhere" / "step-1.png", inside / "link.png"]
    files += [inside / "gone.png", inside / "broken.png", inside / "step-1.png"]
    held = json.loads(job.status_file.read_text())
    held["samples"] = [{"step": step, "file": str(file)} for step, file in enumerate(files)]
    job.status_file.write_text(json.dumps(held))
    assert [text for _, text in part.samples(workspace, queue.job(first))] == ["step 5", "step 4"]
    part.shown_jobs(workspace, queue.jobs(), "", first, {})  # a broken one is a blank picture, not an error


def test_the_page_goes_on_with_the_next_training(queue: Queue, workspace: Workspace, part: Any) -> None:
    (first, _), (second, _) = queue.enqueue("ann"), queue.enqueue("bob")
    queue.job(first).write(state="running")
    _, seen = part.shown_jobs(workspace, queue.jobs(), "", first, {})
    queue.job(first).write(state="done")
    queue.job(second).write(state="running")
    _, seen = part.shown_jobs(workspace, queue.jobs(), "", first, seen)
    assert seen["chosen"] == second
    _, seen = part.shown_jobs(workspace, queue.jobs(), "", first, seen)
    assert seen["chosen"] == first  # a finished one that is clicked stays


def test_what_is_written_into_the_page_is_escaped(queue: Queue, workspace: Workspace, part: Any) -> None:
    first, _ = queue.enqueue("ann")
    named = queue.job(first).write(concept="<img src=x>")  # a record that somebody has written by hand
    assert "<img" not in part.strip_of([named]) and "&lt;img" in part.strip_of([named])
    named.write(concept="ann")
    job = training(queue, first).write(state="failed", message="<img src=x onerror=alert(1)>")
    assert "<img" not in part.progress(job) and "&lt;img" in part.progress(job)
    job.write(state="running", message="")


def test_a_client_trains_waits_and_stops(workspace: Workspace, part: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    from spectral_diffusion.app.server import build_app, launch

    program = (sys.executable, "-S", "-c", STAND_IN)
    monkeypatch.setattr("spectral_diffusion.app.tabs.train.Queue", lambda workspace: Queue(workspace, program))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks = build_app(workspace.root)
    launch(blocks, port, prevent_thread_lock=True, quiet=True)
    try:
        client = client_of(f"http://127.0.0.1:{port}")

        def job() -> dict[str, Any]:
            found: list[dict[str, Any]] = client.predict(api_name="/jobs")
            return next(one for one in found if one["id"] == name)

        name, said = client.predict("ann", steps=10, seed=3, api_name="/train")
        assert "has started" in said
        until(lambda: job()["step"] == 5)
        assert job()["steps"] == 10 and job()["state"] == "running"
        with pytest.raises(Exception, match=r"No concept 'anna'.*did you mean 'ann'"):
            client.predict("anna", api_name="/train")
        with pytest.raises(Exception, match=r"No training '\.\./x'"):
            client.predict("../x", api_name="/stop")
        assert "keeps its state" in client.predict(name, api_name="/stop")
        until(lambda: job()["state"] == "stopped")
        assert client.predict("ann", resume=True, api_name="/train")[0] == name
        until(lambda: job()["state"] == "running" and job()["step"] == 5)
        write_text(workspace.jobs / name / "end", "done")
        until(lambda: job()["state"] == "done")
        assert job()["adapter"] == "ann"
    finally:
        blocks.close()


# --- real trainings -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)  # three processes that import torch and diffusers
def test_stopped_and_resumed_is_the_same_to_the_bit(workspace: Workspace, tiny_base: Path) -> None:
    """Two are queued: the first is adopted by another server, stopped and resumed; the second is killed meanwhile."""
    changes = {**QUICK, "base": str(tiny_base), "steps": 100, "checkpointing_steps": 1}
    queue = Queue(workspace)
    first, _ = queue.enqueue("ann", **changes)
    second, _ = queue.enqueue("bob", **changes)
    pid = training(queue, first).record.pid

    queue = Queue(workspace)  # the server was started again
    queue.start()
    assert queue.job(first).record.pid == pid and queue.job(first).alive
    queue.stop(first)
    until(lambda: queue.job(first).record.state == "stopped")
    assert 0 < queue.job(first).steps_done < 100 and workspace_adapters(workspace) == {}
    queue.resume(first)

    training(queue, second)
    until(lambda: state_path(workspace.adapters / "bob.safetensors").exists())
    os.kill(queue.job(second).record.pid, signal.SIGKILL)
    until(lambda: queue.job(second).record.state == "failed")
    assert "killed, or out of memory" in queue.job(second).record.message
    assert "Resume goes on from its last state" in queue.job(second).record.message
    queue.remove(second, sure=True)

    until(lambda: not queue.job(first).active)
    job = queue.job(first)
    assert (job.record.state, job.record.launches, job.steps_done) == ("done", 2, 100), job.record.message
    whole = workspace.root / "unbroken" / "ann.safetensors"
    config = train_settings(workspace, "ann", "pocket", changes)
    train_to_file(TrainConfig(**{**config.model_dump(), "output": whole}))
    broken, unbroken = read_tensors(workspace.adapters / "ann.safetensors")[0], read_tensors(whole)[0]
    assert set(broken) == set(unbroken) and all(broken[name].equal(unbroken[name]) for name in broken)

    ledger = Ledger(workspace.adapters / LEDGER)
    rows, problems = adapter_rows(workspace)
    assert problems == [] and [row[:2] + row[4:5] for row in rows] == [["ann", "<ann>", "0:2"]]
    assert [set(held) for held in ledger.read().values()] == [{"ann"}], "a removed training frees its slot"
    delete_adapter(workspace, "ann")
    assert not any(ledger.read().values())
