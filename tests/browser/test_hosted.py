"""The hosted demo in a browser: one picture from the boxes that are there, and no errors in the console."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import PATIENCE, free_port

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def space(tmp_path: Path) -> Iterator[str]:
    """The demo as a Space runs it, in an empty folder."""
    port = free_port()
    environment = {
        **os.environ, "SPACE_ID": "somebody/demo", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, str(ROOT / "app.py")], env=environment, cwd=tmp_path)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=5):
                break
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, "it ended"
            time.sleep(0.1)
    yield url
    process.terminate()
    process.wait(20)


def test_a_visitor_gets_a_picture(space: str, visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit(space, tabs=False).page
    page.locator("#generate-canvas .regions > li").nth(1).wait_for()  # rex and brew, each in a box
    page.locator("#generate-start").click()
    page.locator("#generate-status", has_text="Generated 1 picture of 256×128").wait_for(timeout=PATIENCE)
    page.locator("#generate-picture img").wait_for()
    assert page.locator("input[type=file]").count() == 0
    assert [path for path in tmp_path.iterdir() if path.name != "__pycache__"] == []  # nothing is written
