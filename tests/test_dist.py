"""The wheel is whole without the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.dist import check_wheel


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_makes_a_picture_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.dist", "--outdir", str(tmp_path), "--borrow"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    assert "spectral_diffusion/_data/concepts/rex/concept.yaml" in names
    assert "spectral_diffusion/pocket/weights/unet/diffusion_pytorch_model.safetensors" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_wheel_with_a_workshop_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "some-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("spectral_diffusion/__init__.py", "")
        content.writestr("spectral_diffusion-1.dist-info/METADATA", "")
    check_wheel(wheel)
    with zipfile.ZipFile(wheel, "a") as content:
        content.writestr("tools/pocket/__init__.py", "")
    with pytest.raises(ValueError, match="holds tools"):
        check_wheel(wheel)
