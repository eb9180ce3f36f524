"""A report on this machine: versions, devices, precisions, memory, caches, missing packages, suitable settings."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .core import assets as resources
from .core.cache import cache_folder
from .core.files import folder_size
from .core.machine import machine_properties, measured_once, provenance
from .core.precision import MEASURED, cuda_has_bf16, is_clear, measure_cpu, resolve_mixed_precision
from .training.memory import available
from .training.speed import seconds_per_picture

GIB = 2**30
PICTURES = 9  # of a step of the preset pocket: photos and prior images
# What an optional feature needs: the module, what it is for, and the extra that installs it.
OPTIONAL = (
    ("gradio", "the app", "ui"),
    ("prodigyopt", "the optimizer Prodigy", "optim"),
    ("bitsandbytes", "8-bit AdamW", "optim"),
    ("tensorboard", "TensorBoard logs", "log"),
    ("skimage", "sketches of photos", "conditions"),
    ("mediapipe", "skeletons of photos", "keypose"),
    ("matplotlib", "figures of the studies", "plots"),
)
CARD = re.compile(r"-(\d+)gb$")  # a preset for one GPU, by its GB
USABLE = 0.92  # of what a GPU is sold with, at least


@dataclass(frozen=True)
class Check:
    """The report. Folders in the user's home begin with ``~``."""

    versions: dict[str, str]
    system: dict[str, Any]
    devices: list[dict[str, Any]]
    precision: dict[str, Any]
    speed: dict[str, Any]
    caches: dict[str, Any]
    missing: list[dict[str, str]]
    settings: dict[str, str]
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        """The report, JSON-able."""
        return asdict(self)


def examine() -> Check:
    """Examine this machine; measurements take some seconds the first time and are cached."""
    device = best_device()
    precision = resolve_mixed_precision("auto", device)
    timings = measured_once(MEASURED, measure_cpu, is_clear)
    pace = seconds_per_picture("pocket", device, precision)
    made = provenance()
    machine = machine_properties()
    return Check(
        versions={name: made[name] for name in made if name not in machine} | {"python": platform.python_version()},
        system={"platform": platform.platform(), **machine, "cores": os.cpu_count(), **free_memory()},
        devices=devices(),
        precision={"auto": precision, "cpu_seconds": timings, "tf32": torch.backends.cuda.matmul.allow_tf32},
        speed={"device": device.type, "pocket_step_seconds": round(PICTURES * pace, 4)},
        caches=caches(),
        missing=missing(),
        settings=suited(device, precision),
        problems=problems(),
    )


def best_device() -> torch.device:
    """The device that ``auto`` means."""
    from .core.machine import parse_device

    return parse_device("auto")


def free_memory() -> dict[str, float]:
    """The machine's free memory in GiB, where the system reports it."""
    free = available(torch.device("cpu"))
    return {} if free is None else {"memory_free_gib": round(free / GIB, 1)}


def devices() -> list[dict[str, Any]]:
    """Every accelerator with its memory and bfloat16 support."""
    rows: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        free = torch.cuda.mem_get_info(index)[0]
        rows.append(
            {
                "device": f"cuda:{index}", "name": about.name, "memory_gib": round(about.total_memory / GIB, 1),
                "free_gib": round(free / GIB, 1), "bf16": cuda_has_bf16(), "capability": f"{about.major}.{about.minor}",
            }
        )  # fmt: skip
    if torch.backends.mps.is_available():
        rows.append({"device": "mps", "name": "Apple GPU", "bf16": False})
    return rows


def caches() -> dict[str, Any]:
    """The cache folder and the MiB of each of its parts."""
    folder = cache_folder()
    parts = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return {"folder": shared_name(folder), "mib": {part.name: round(folder_size(part) / 2**20, 1) for part in parts}}


def shared_name(path: Path) -> str:
    """A path for a bug report: without the user's home."""
    try:
        return str(Path("~") / path.resolve().relative_to(Path.home().resolve()))
    except (ValueError, RuntimeError):
        return str(path)


def missing(has: Callable[[str], Any] = find_spec) -> list[dict[str, str]]:
    """Optional packages that are not installed, what each is for, and the command that installs it."""
    return [
        {"package": package, "for": use, "install": f"pip install 'spectral-diffusion[{extra}]'"}
        for package, use, extra in OPTIONAL
        if not has(package)
    ]


def suited(device: torch.device, precision: str) -> dict[str, str]:
    """The quickest settings for this machine."""
    out = {"device": device.type, "mixed_precision": precision}
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        out["preset"] = ", ".join(fitting_presets(total)) or "pocket"
        return out
    out["preset"] = "pocket"
    cores = os.cpu_count() or 1
    if device.type == "cpu" and torch.get_num_threads() < cores:
        out["threads"] = f"{torch.get_num_threads()} of {cores} cores (OMP_NUM_THREADS={cores} takes all)"
    return out


def fitting_presets(memory: float) -> list[str]:
    """The largest preset of each kind that a GPU with so much memory (GiB) has room for."""
    best: dict[str, tuple[int, str]] = {}
    for path in sorted(resources.configs().glob("*.yaml")):
        if (match := CARD.search(path.stem)) and USABLE * int(match[1]) <= memory:
            kind = path.stem[: match.start()]
            best[kind] = max(best.get(kind, (0, "")), (int(match[1]), path.stem))
    return [name for _, name in best.values()]


def this_computer() -> tuple[str, list[str]]:
    """The device that runs here by default, in a few words, and the presets that suit it."""
    device = best_device()
    if device.type != "cuda":
        return ("Apple GPU" if device.type == "mps" else "no GPU"), ["pocket"]
    card = torch.cuda.get_device_properties(device)
    memory = card.total_memory / GIB
    return f"{card.name}, {memory:.0f} GB", fitting_presets(memory) or ["pocket"]


def problems() -> list[str]:
    """Likely problems, a sentence each, with its fix."""
    sentences = []
    if not torch.cuda.is_available() and find_spec("nvidia") is None and _has_nvidia_card():
        sentences.append(
            "An NVIDIA GPU is here, but this PyTorch is built for CPUs; install one with CUDA (see pytorch.org)."
        )
    folder = cache_folder()
    if folder.exists() and not os.access(folder, os.W_OK):
        sentences.append(
            f"The cache folder {shared_name(folder)} cannot be written, so decompositions are computed every time; "
            "set SPECTRAL_DIFFUSION_CACHE to another folder."
        )
    return sentences


def _has_nvidia_card() -> bool:
    return Path("/proc/driver/nvidia/version").exists()
