"""How long a training takes here: measured once, kept only if nothing else ran."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from spectral_diffusion.core import machine
from spectral_diffusion.training import speed
from spectral_diffusion.training.speed import BATCH, Timing, seconds_per_picture, timed

CPU = torch.device("cpu")


def test_time_without_the_processor_does_not_count() -> None:
    timing = timed(lambda: time.sleep(0.02), CPU)
    assert timing.seconds < 0.01 and timing.share < 0.5


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_a_disturbed_measurement_is_not_kept(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "pocket_step", lambda device, precision: Timing(0.5, share))
    assert seconds_per_picture("pocket", CPU, "bf16") == 0.5 / BATCH
    monkeypatch.setattr(speed, "pocket_step", lambda device, precision: Timing(0.3, share))
    assert seconds_per_picture("pocket", CPU, "bf16") == (0.5 if share == 1 else 0.3) / BATCH
    assert ("time-pocket-cpu-bf16" in machine._kept().get(machine.machine_identity(), {})) == (share == 1)
