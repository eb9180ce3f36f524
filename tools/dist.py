"""Build the sdist and the wheel, and try the wheel in an environment that holds nothing else.

``python -m tools.dist --outdir dist`` installs the wheel with all its dependencies as a user would;
``--borrow`` takes the dependencies of the environment that runs this, which takes seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 60_000_000  # bytes of the wheel
PACKAGES = {"spectral_diffusion"}


def build(outdir: Path, isolated: bool = True) -> tuple[Path, Path]:
    """The sdist and the wheel, which is built from the sdist."""
    command = [sys.executable, "-m", "build", "--outdir", str(outdir), *([] if isolated else ["--no-isolation"])]
    subprocess.run([*command, str(ROOT)], check=True, stdout=subprocess.DEVNULL)
    version = next(
        line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version")
    )
    [sdist] = outdir.glob(f"spectral_diffusion-{version}.tar.gz")
    [wheel] = outdir.glob(f"spectral_diffusion-{version}-*.whl")
    return sdist, wheel


def check_wheel(wheel: Path) -> None:
    """Refuse one that is too large, or that holds what is not for users.

    Raises:
        ValueError: so it is.
    """
    if wheel.stat().st_size > LARGEST:
        raise ValueError(f"The wheel has {wheel.stat().st_size / 1e6:.0f} MB; {LARGEST / 1e6:.0f} are allowed.")
    with zipfile.ZipFile(wheel) as content:
        tops = {name.split("/")[0] for name in content.namelist()}
    strange = {name for name in tops if not name.endswith(".dist-info")} - PACKAGES
    if strange:
        raise ValueError(f"The wheel holds {', '.join(sorted(strange))}.")


def try_wheel(wheel: Path, borrow: bool = False) -> dict[str, float]:
    """Install the wheel in a new environment and make a picture with it; returns seconds by step."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment["SPECTRAL_DIFFUSION_CACHE"] = str(folder / "cache")

        def step(name: str, *command: str) -> None:
            start = time.monotonic()
            subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
            seconds[name] = time.monotonic() - start

        step("environment", sys.executable, "-m", "venv", "clean")
        commands = folder / "clean" / ("Scripts" if os.name == "nt" else "bin")
        python = str(commands / "python")
        if borrow:
            own = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "clean")}))
            (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        step(
            "install",
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            *(["--no-deps"] if borrow else []),
            str(wheel.resolve()),
        )
        own_file = "import spectral_diffusion, sys; sys.exit(sys.prefix not in spectral_diffusion.__file__)"
        step("import", python, "-c", own_file)
        program = str(commands / "spectral-diffusion")
        step("methods", program, "methods")
        step("picture", program, "generate", "--prompt", "a red car", "-o", "car.png", "num_inference_steps=4")
        if not (folder / "car.png").is_file():
            raise FileNotFoundError("The wheel made no picture.")
    return seconds


def main() -> None:
    """Build, check, try, and print sizes and times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outdir", type=Path, default=Path("dist"))
    parser.add_argument("--borrow", action="store_true")
    arguments = parser.parse_args()
    for file in build(arguments.outdir, not arguments.borrow):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB", flush=True)
    check_wheel(file)
    for name, value in try_wheel(file, arguments.borrow).items():
        print(f"{name}: {value:.1f} s", flush=True)


if __name__ == "__main__":
    main()
