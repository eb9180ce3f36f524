"""The container files: linted, and built where a container engine runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docker"
DOCKERFILES = [FOLDER / "Dockerfile", FOLDER / "Dockerfile.cuda"]


def test_the_files_are_clean() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, *map(str, DOCKERFILES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_follows_its_schema_and_stays_on_this_machine() -> None:
    pytest.importorskip("check_jsonschema")
    path = FOLDER / "compose.yaml"
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for service in yaml.safe_load(path.read_text())["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert (ROOT / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_the_app_as_nobody_special(path: Path) -> None:
    lines = path.read_text().splitlines()
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 1000"] and lines.index(users[0]) < lines.index('ENTRYPOINT ["spectral-diffusion"]')
    assert lines[-1] == 'CMD ["ui", "--host", "0.0.0.0"]'


def test_the_build_gets_what_it_needs() -> None:
    """What .dockerignore lets through has every file that the wheel is made of."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"spectral_diffusion", "concepts", "configs", "pyproject.toml", "README.md", "LICENSE"} <= allowed
    assert all((ROOT / name).exists() for name in allowed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_cpu_image_makes_a_picture(tmp_path: Path) -> None:
    engine = next((name for name in ("docker", "podman") if shutil.which(name)), None)
    if engine is None or subprocess.run([engine, "info"], capture_output=True).returncode:
        pytest.skip("no container engine runs here")
    subprocess.run([engine, "build", "-t", "spectral-diffusion:test", "-f", str(DOCKERFILES[0]), str(ROOT)], check=True)
    made = ["generate", "--prompt", "a red car", "-o", "car.png", "num_inference_steps=4"]
    name = "spectral-diffusion-test"
    try:
        subprocess.run([engine, "run", "--name", name, "spectral-diffusion:test", *made], check=True)
        subprocess.run([engine, "cp", f"{name}:/work/car.png", str(tmp_path)], check=True)
    finally:
        subprocess.run([engine, "rm", "--force", name], check=False)
    assert (tmp_path / "car.png").stat().st_size > 1000
