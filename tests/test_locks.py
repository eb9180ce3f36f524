"""Locks between processes, where the file system has locks and where it has none."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from spectral_diffusion.core import locks
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.locks import VARIABLE, locked
from spectral_diffusion.slots.ledger import Ledger, SlotRequest

fork = pytest.mark.skipif(sys.platform == "win32", reason="These processes are forks.")


def count_up(counter: Path, times: int) -> None:
    for _ in range(times):
        with locked(counter.with_name("lock"), 60):
            value = int(counter.read_text())
            time.sleep(0.001)  # in which another process would read the same
            counter.write_text(str(value + 1))


def hold(folder: Path) -> None:
    with locked(folder / "lock", 60):
        (folder / "has it").touch()
        time.sleep(600)


@fork
@pytest.mark.parametrize("kind", ["flock", "lease"])
def test_one_process_at_a_time(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, kind)
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_up, args=(counter, 10)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert counter.read_text() == "30"


@fork
def test_the_claim_of_a_dead_process_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "lease")
    monkeypatch.setattr(locks, "LEASE", 2.0)
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    process.start()
    while not (tmp_path / "has it").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="Another process has locked"), locked(tmp_path / "lock", 0.1):
        pass  # it lives and refreshes its claim, however long that is
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(tmp_path / "lock", 30):
        pass


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    seen = []
    with locked(tmp_path / "lock", 5):
        seen = [path.name for path in tmp_path.iterdir()]
    assert "lock.lease" in seen and not (tmp_path / "lock.lease").exists()
    ledger = Ledger(tmp_path / "slots.json")
    assert str(ledger.reserve("base", "rex", SlotRequest(2, "next", 8))) == "0:2"


def test_another_word_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nfs")
    with pytest.raises(UserError, match="is flock or lease, not 'nfs'"), locked(tmp_path / "lock", 1):
        pass
