"""A real Slurm: an array of trainings, with a node that dies, makes the same files as an unbroken run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_photos

from spectral_diffusion.core.files import read_tensors
from tools.slurm import LocalSlurm, missing_programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing_programs()), reason="There is no Slurm here: apt install slurmctld slurmd munge."),
]
NAMES = [f"thing{index:02d}" for index in range(12)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalSlurm]:
    slurm = LocalSlurm(tmp_path / "slurm", nodes=2)
    slurm.start()
    yield slurm
    slurm.stop()


def wait_for(condition: Callable[[], bool], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "It takes too long."
        time.sleep(0.3)


def test_an_array_survives_a_node(cluster: LocalSlurm, tiny_base: Path, tmp_path: Path) -> None:
    folders = [make_photos(tmp_path / name, seed=index) for index, name in enumerate(NAMES)]
    environment = {**cluster.environment, "OMP_NUM_THREADS": "1", "SPECTRAL_DIFFUSION_CACHE": str(tmp_path / "cache")}

    def program(*words: str) -> str:
        command = [sys.executable, "-m", "spectral_diffusion", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path.cwd())
        assert done.returncode == 0, done.stderr
        return done.stdout

    common = ["train", *map(str, folders), "--base", str(tiny_base), "--rank", "1", "--steps", "150", "--device", "cpu",
              "checkpointing_steps=20"]  # fmt: skip
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    said = program(*common, "-o", str(broken), "--executor", "slurm", "--cluster", "memory_gb=2", "--cluster", "cpus=1")
    assert "Submitted 12 jobs" in said

    def table() -> dict[str, dict[str, object]]:
        rows = json.loads(program("batch", "status", str(broken), "--json"))
        return {str(row["name"]): row for row in rows}

    def training_on(node: str) -> str | None:
        """A job that is past its first saved state on a node."""
        out = subprocess.run(
            ["squeue", "--noheader", "--array", "--states=RUNNING", f"--nodelist={node}", "--format=%F_%K"],
            env=cluster.environment, capture_output=True, text=True,
        ).stdout.split()  # fmt: skip
        ids = json.loads((broken / "batch" / "batch.json").read_text())["ids"]
        for name, job_id in ids.items():
            if job_id in out and (broken / f"{name}.state.safetensors").exists():
                return str(name)
        return None

    wait_for(lambda: training_on("node1") is not None)
    lost = training_on("node1")
    cluster.kill_node("node1")
    wait_for(lambda: training_on("node2") is not None)
    left = training_on("node2")
    assert left is not None and lost is not None
    job_id = json.loads((broken / "batch" / "batch.json").read_text())["ids"][left]
    # As before a time-out; scancel then tries in vain to signal it again, while it is being requeued.
    subprocess.run(["scancel", "--signal=USR2", job_id], env=cluster.environment, check=False)
    cluster.revive_node("node1")
    wait_for(lambda: all(row["state"] in ("done", "failed") for row in table().values()))
    found = table()
    assert {row["state"] for row in found.values()} == {"done"}, found
    assert found[lost]["starts"] == 2 and found[left]["starts"] == 2
    program(*common, "-o", str(whole), "--executor", "local")
    assert (broken / "slots.json").read_bytes() == (whole / "slots.json").read_bytes()
    for name in NAMES:
        one, other = (read_tensors(folder / f"{name}.safetensors")[0] for folder in (broken, whole))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert not list(broken.glob("*.state.safetensors"))
