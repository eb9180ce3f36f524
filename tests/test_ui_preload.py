"""The page is there before torch is: requests wait for the import, the page itself does not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest

from spectral_diffusion.app import preload
from spectral_diffusion.app.generation import POCKET_SIDE
from spectral_diffusion.models.loading import size_from_configs

HEAVY = ("torch", "diffusers", "transformers", "peft", "scipy")


def test_the_page_is_built_without_torch() -> None:
    pytest.importorskip("gradio")
    code = (
        "import sys; from pathlib import Path; from spectral_diffusion.app.server import build_app; "
        f"build_app(Path('nowhere')); print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout + done.stderr
    assert size_from_configs("pocket") == POCKET_SIDE  # which is not read for the page


def test_only_functions_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    importing, imported = threading.Event(), threading.Event()

    def slow_import(module: str, package: str | None) -> None:
        importing.set()
        imported.wait(60)

    monkeypatch.setattr(preload, "import_module", slow_import)
    answered: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answered.append(scope["path"])

    nothing: Any = None
    gate = preload.Waiting(app, preload.Preload())

    async def ask() -> None:
        await gate({"type": "http", "path": "/assets/index.js"}, nothing, nothing)
        await gate({"type": "lifespan"} | {"path": "start"}, nothing, nothing)
        waiting = asyncio.create_task(gate({"type": "http", "path": "/gradio_api/queue/join"}, nothing, nothing))
        await asyncio.to_thread(importing.wait, 60)  # the first request begins it
        assert answered == ["/assets/index.js", "start"] and not waiting.done()
        imported.set()
        await waiting
        await gate({"type": "http", "path": "/gradio_api/call/generate"}, nothing, nothing)

    asyncio.run(ask())
    assert answered[2:] == ["/gradio_api/queue/join", "/gradio_api/call/generate"]


def test_a_failed_import_lets_requests_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str, package: str | None) -> None:
        raise ImportError(module)

    monkeypatch.setattr(preload, "import_module", broken)
    everything = preload.Preload()
    everything.soon()
    everything.wait()
    assert everything.done


def test_it_begins_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(preload, "PATIENCE", 0.0)
    monkeypatch.setattr(preload, "import_module", lambda module, package: seen.append(module))
    called = threading.Event()
    everything = preload.Preload([called.set])
    everything.soon()
    assert called.wait(60) and everything.done and tuple(seen) == preload.MODULES
