"""What is kept on disk to save time: read, refused, waited for, let go of."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from spectral_diffusion.core.cache import cached, load, restored


def pack(made: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    return {"value": made}, {"kind": "one"}


def unpack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Tensor:
    return {"one": tensors["value"]}[metadata["kind"]]


class Maker:
    """Makes 0, 1, 2, … and so tells how often it was asked."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.asked, self.then = 0, then

    def __call__(self) -> Tensor:
        self.then()
        self.asked += 1
        return torch.full((3,), float(self.asked - 1))


@pytest.mark.parametrize("wait", [0.0, 5.0])
def test_it_is_made_once(tmp_path: Path, wait: float) -> None:
    make, path = Maker(), tmp_path / "new" / "a.safetensors"
    first = cached(path, make, pack, unpack, wait)
    os.utime(path, (0, 0))
    second = cached(path, make, pack, unpack, wait)
    assert make.asked == 1 and torch.equal(first, second) and path.stat().st_mtime > 0
    assert len(list(path.parent.glob("*.safetensors"))) == 1


def test_what_is_damaged_is_made_again_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, path = Maker(), tmp_path / "a.safetensors"
    cached(path, make, pack, unpack)
    path.write_bytes(path.read_bytes()[:-1])
    assert cached(path, make, pack, unpack)[0] == 1 and f"{path} is damaged" in caplog.text
    assert cached(path, make, pack, unpack)[0] == 1


@pytest.mark.parametrize("error", [KeyError, IndexError, ValueError, TypeError])
def test_what_is_refused_is_made_again(tmp_path: Path, error: type[Exception]) -> None:
    make, path = Maker(), tmp_path / "a.safetensors"
    cached(path, make, pack, unpack)

    def refuse(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Tensor:
        raise error("another's")

    assert restored(path, refuse) is None and restored(tmp_path / "none.safetensors", unpack) is None
    assert cached(path, make, pack, refuse)[0] == 1
    assert cached(path, make, pack, unpack)[0] == 1  # written anew


@pytest.mark.parametrize("wait", [0.0, 5.0])
def test_a_folder_that_cannot_be_made_costs_time_only(tmp_path: Path, wait: float) -> None:
    (tmp_path / "file").write_text("in the way")
    make, path = Maker(), tmp_path / "file" / "a.safetensors"
    assert [int(cached(path, make, pack, unpack, wait, max_bytes=1)[0]) for _ in range(2)] == [0, 1]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached(tmp_path / "a.safetensors", Maker(fail), pack, unpack, 5.0)
    assert cached(tmp_path / "a.safetensors", Maker(), pack, unpack, 0.1)[0] == 0  # the lock is free


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    both, path = threading.Barrier(2), tmp_path / "a.safetensors"
    make = Maker(lambda: time.sleep(0.3))

    def one(_: int) -> Tensor:
        both.wait()
        return cached(path, make, pack, unpack, 30.0)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, range(2))
    assert make.asked == 1 and torch.equal(first, second)


def test_who_hangs_is_not_waited_for_longer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, path = Maker(), tmp_path / "a.safetensors"
    with FileLock(f"{path}.lock"), caplog.at_level(logging.WARNING):
        assert cached(path, make, pack, unpack, 0.2)[0] == 0 and "Waiting for another process" in caplog.text
        assert load(path) and cached(path, make, pack, unpack, 0.2)[0] == 0


def test_a_full_folder_lets_go_of_what_was_not_used_for_the_longest(tmp_path: Path) -> None:
    for age, name in enumerate(("old", "used")):
        cached(tmp_path / f"{name}.safetensors", Maker(), pack, unpack)
        os.utime(tmp_path / f"{name}.safetensors", (age, age))
    size = (tmp_path / "old.safetensors").stat().st_size
    cached(tmp_path / "old.safetensors", Maker(), pack, unpack, max_bytes=2 * size)  # counts as used now
    cached(tmp_path / "new.safetensors", Maker(), pack, unpack, max_bytes=2 * size)
    assert {path.stem for path in tmp_path.iterdir()} == {"old", "new"}
