"""How soon the app answers: cold start, first preview, first picture, and twenty requests at once.

A server of its own on an empty workspace and the pocket base, seen by a headless Chromium (the extra ``dev`` brings
Playwright) and by gradio's client.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from gradio_client import Client
from playwright.sync_api import sync_playwright

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PATIENCE = 120_000  # milliseconds


def peak(pid: int) -> float:
    """The most memory that a process has held, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, begun = f"http://127.0.0.1:{port}", time.monotonic()

    def told(what: str, since: float) -> None:
        print(f"{what}: {time.monotonic() - since:.2f} s")

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "spectral_diffusion.cli", "ui", "--port", str(port), "--workspace", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            while True:
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.05)
            told("cold start, to the first answer", begun)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                page.goto(url)
                page.locator("#tab-generate-button:visible").last.click()
                page.locator("#generate-prompt textarea").fill("a red dog on the beach")
                told("cold start, to a prompt that is typed", begun)
                for which in ("first", "second"):
                    before = page.evaluate("document.querySelector('#generate-picture img')?.src ?? ''")
                    clicked = time.monotonic()
                    page.locator("#generate-go").click()
                    page.wait_for_function(
                        "before => (document.querySelector('#generate-picture img')?.src ?? before) !== before",
                        arg=before, timeout=PATIENCE,
                    )  # fmt: skip
                    told(f"{which} click, to its first preview", clicked)
                    page.locator("#generate-status", has_text="Generated 1").wait_for(timeout=PATIENCE)
                    told(f"{which} click, to its picture", clicked)
                browser.close()
            held, clicked, answers = peak(server.pid), time.monotonic(), []

            def ask(seed: int) -> None:
                client = Client(url, verbose=False, analytics_enabled=False)
                answers.append(client.predict("a red dog on the beach", seed=seed, api_name="/generate"))

            threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(arguments.requests)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            told(f"{len(answers)} of {arguments.requests} requests at once answered", clicked)
            print(f"peak memory: {held:.0f} MiB before them, {peak(server.pid):.0f} after")
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main()
