"""This machine: its processor, its threads, and measurements of it that are made once and kept.

Results on a CPU depend on the processor and on the number of threads in their last bits, so both are recorded beside
everything that is made.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache import cache_folder
from .errors import Fix, UserError
from .files import write_json

CPU = torch.device("cpu")
FILE = "machine.json"
LIBRARIES = ("spectral-diffusion", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "scipy")


def parse_device(name: str) -> torch.device:
    """A torch device; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"Device '{name}' is not available here.", Fix("device", "cpu")) from error
    return device


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Model", "Processor"} and value.strip():
                return value.strip()
    if platform.system() == "Darwin":
        with suppress(OSError, subprocess.SubprocessError):
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
            if name:
                return name
    return platform.processor() or platform.machine() or "unknown"


def machine_properties() -> dict[str, Any]:
    """The properties of this machine that decide a result's last bits, JSON-able: processor, vector unit, threads."""
    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def provenance() -> dict[str, str]:
    """The provenance of a result: versions of the libraries, processor, vector unit and number of threads."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "unknown"
    return versions | {name: str(value) for name, value in machine_properties().items()}


@cache
def _commit() -> str:
    """The checkout's commit when it is first asked for, which the running code is of; empty without a checkout."""
    root = Path(__file__).parent.parent.parent
    if (root / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "rev-parse", "HEAD"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()[:12]
    return ""


def record_provenance() -> dict[str, str]:
    """The provenance of a record of figures: also the day, and the commit of a checkout (a wheel has its version)."""
    commit = _commit()
    return {**provenance(), "date": date.today().isoformat(), **({"commit": commit} if commit else {})}


def cell_provenance() -> dict[str, str]:
    """What a single figure says of where it was measured: processor, threads, day and commit."""
    return {name: value for name, value in record_provenance().items() if name in ("cpu", "threads", "date", "commit")}


def made_on(made_with: Mapping[str, str]) -> str:
    """The machine of a :func:`provenance`, for a card; empty where none is recorded."""
    cpu, threads = made_with.get("cpu", ""), made_with.get("threads", "")
    return f"{cpu}, {threads} thread{'' if threads == '1' else 's'}" if cpu and threads else cpu


def heading() -> str:
    """The comment line of resolved settings that names the machine."""
    here = machine_properties()
    return f"# Made on {here['cpu']} ({here['capability']}), {here['threads']} threads, torch {torch.__version__}.\n"


def machine_identity() -> str:
    """A short hash of the machine, of the libraries' version and of what restricts their instructions."""
    limits = {name: os.environ.get(name, "") for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")}
    identity = json.dumps({**machine_properties(), **limits, "torch": torch.__version__}, sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def measured_once(name: str, measure: Callable[[], Any], is_clear: Callable[[Any], bool] = lambda value: True) -> Any:
    """A JSON-able measurement of this machine: read where it is kept, else made now and kept in the cache folder.

    A cache that cannot be read or written only means that it is measured again, and so does a result that is not clear.
    """
    measurements = _kept()
    own = measurements.get(machine_identity())
    if isinstance(own, dict) and name in own:
        return own[name]
    value = measure()
    if is_clear(value):
        remember(name, value)
    return value


def remember(name: str, value: Any) -> None:
    """Keep a measurement of this machine, in place of an earlier one."""
    measurements = _kept()
    own = measurements.get(machine_identity())
    measurements[machine_identity()] = {**(own if isinstance(own, dict) else {}), name: value}
    with suppress(UserError, OSError):
        write_json(cache_folder() / FILE, measurements)


def _kept() -> dict[str, Any]:
    """Every machine's measurements; nothing where the file is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        measurements = json.loads((cache_folder() / FILE).read_text(encoding="utf-8"))
        if isinstance(measurements, dict):
            return measurements
    return {}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor from the host on a device, without waiting for the copy: CUDA takes it over before it returns."""
    return tensor.to(device, non_blocking=device.type == "cuda")
