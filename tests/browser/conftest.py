"""The app as a person meets it: a real server process, Debian's Chromium, and no errors in its console."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-quic")
PATIENCE = 90_000  # milliseconds for anything that trains, fuses or draws


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """The app in a process of its own, which may be stopped and started again on the same workspace."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, within: float = 60.0) -> float:
        """Start it and wait until it answers; returns the seconds that took."""
        begun = time.monotonic()
        command = [sys.executable, "-m", "spectral_diffusion.cli", "ui"]
        log = self.workspace.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), "--workspace", str(self.workspace)],
            stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"},
        )  # fmt: skip
        while time.monotonic() - begun < within:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.url, timeout=5):
                    return time.monotonic() - begun
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise AssertionError(f"The server did not start: {self.workspace.with_suffix('.log').read_text()[-2000:]}")

    def stop(self) -> None:
        """Stop it as Ctrl-C does; what it started in processes of their own goes on."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "workspace")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *OFFLINE])
        yield browser
        browser.close()


class Visitor:
    """One browser window and everything its console complained of."""

    def __init__(
        self, browser: Any, url: str, width: int = 1280, height: int = 900, tabs: bool = True, **more: Any
    ) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **more)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.url = url
        self.page.goto(url)
        if tabs:
            self.page.get_by_role("tab").first.wait_for()

    def tab(self, words: str) -> None:
        """Open a tab by the words on it."""
        name = words.lower()
        self.page.locator(f"#tab-{name}-button:visible").last.click()
        self.page.locator(f"#tab-{name}").wait_for()

    def reload(self, act: Callable[[], Any] | None = None) -> None:
        """Load the page again, or do what loads it. What this cuts off is the browser's doing, not the app's."""
        before = len(self.complaints)
        if act:
            with self.page.expect_navigation():
                act()
        else:
            self.page.reload()
        cut = [said for said in self.complaints[before:] if "AbortError" in said or "errored out" in said]
        self.complaints[before:] = [said for said in self.complaints[before:] if said not in cut]
        self.page.get_by_role("tab").first.wait_for()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    visitors: list[Visitor] = []

    def visit(url: str, **more: Any) -> Visitor:
        visitors.append(Visitor(browser, url, **more))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.context.close()
    assert [complaint for visitor in visitors for complaint in visitor.complaints] == []
