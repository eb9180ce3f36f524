"""The script of `make gpu-check`, on the CPU with small shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"


@pytest.mark.slow
def test_the_whole_check_writes_its_page(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "-o", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent.parent, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    [page], [record] = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    sections = json.loads(record.read_text())
    assert {
        "machine",
        "spectrum",
        "pocket base",
        "steps of sd15",
        "steps of klein-4b",
        "steps of sdxl",
        "tests",
    } == set(sections)
    for arch in ("sd15", "klein-4b", "sdxl"):
        trained = {row["method"]: row["trained"] for row in sections[f"steps of {arch}"]}
        assert trained["lora"] == trained["lora, as diffusers' scripts"] == trained["spectral-additive"]
    assert page.read_text().count("## ") == 6


@pytest.mark.slow
def test_without_a_gpu_it_says_so() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 2 and "There is no CUDA device here" in ran.stderr
