"""The base's state in small files, for a machine that only a few megabytes can be sent to and fetched from.

Weights and moving averages travel in float16, in files of at most 15 MB. The optimizer's numbers stay behind: they
begin anew, and the learning rate warms up again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.files import read_tensors, write_json, write_tensors

from .base import Training
from .loop import Progress

LIMIT = 15_000_000  # bytes of one file
TOTAL = 60_000_000
STATE_JSON = "state.json"


def pack(training: Training, folder: Path, averages: bool = True) -> None:
    """Write the weights in small files, and if wanted the moving averages: the longest first, as many as fit."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Tensor]] = {"raw": list(training.parameters)}
    size = 2 * sum(parameter.numel() for parameter in training.parameters)
    for index in reversed(range(len(training.averages) if averages else 0)):
        if size * (len(parts) + 1) <= TOTAL:
            parts[f"ema{index}"] = training.averages[index]
    files: list[str] = []
    for part, values in parts.items():
        block: dict[str, Tensor] = {}
        blocks = [block]
        for name, value in zip(training.names, values, strict=True):
            if sum(t.numel() for t in block.values()) * 2 + value.numel() * 2 > LIMIT:
                block = {}
                blocks.append(block)
            block[name] = value.detach().to("cpu", torch.float16)
        for number, block in enumerate(blocks):
            files.append(f"{part}-{number}.safetensors")
            write_tensors(folder / files[-1], block)
    write_json(folder / STATE_JSON, {"progress": asdict(training.progress), "files": files, "about": training.about})


@torch.no_grad()
def unpack(training: Training, folder: Path) -> None:
    """Go on from packed files; a moving average that did not travel begins with the weights.

    Raises:
        UserError: the folder holds no packed state, or one of other networks.
    """
    file = folder / STATE_JSON
    if not file.is_file():
        raise UserError(f"{folder} holds no packed state ({STATE_JSON}); make one with `pack`.")
    header = json.loads(file.read_text())
    parts: dict[str, dict[str, Tensor]] = {}
    for name in header["files"]:
        parts.setdefault(name.rpartition("-")[0], {}).update(read_tensors(folder / name)[0])
    training.progress = Progress(**header["progress"])
    training.progress.warmed = training.progress.samples
    try:
        training.fill(parts)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder} holds the state of other networks; give their sizes with --sizes.") from error
    training.about = header["about"]
