"""The page is served at once; torch and the models' libraries are imported afterwards, and requests wait for them.

A person reads and types before the first request that needs them. The import begins when the page is in the browser and
sends its first requests (beside serving the page it would delay that by seconds), or after some seconds without any. It
runs in one thread: diffusers' lazy modules break when two import them at once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module

from anyio import to_thread

from .guard import Message, Receive, Send

MODULES = ("..merging.fuse", "..scenes.generate", "..training.status", "..doctor")  # and all that they import
WORK = ("/queue/join", "/call/", "/run/", "/api/")  # parts of the paths of requests that run functions
log = logging.getLogger(__name__)
PATIENCE = 5.0  # seconds without a request


class Preload:
    """The import of everything, in the background.

    Args:
        then: called once it is over.
    """

    def __init__(self, then: Sequence[Callable[[], None]] = ()) -> None:
        self.then = then
        self._asked, self._done = threading.Event(), threading.Event()

    @property
    def done(self) -> bool:
        """Whether everything is imported, or could not be."""
        return self._done.is_set()

    def soon(self) -> None:
        """Begin in the background when :meth:`wait` is called, or after some seconds."""
        threading.Thread(target=self._run, daemon=True, name="preload").start()

    def wait(self) -> None:
        """Begin, unless that is so already, and wait for the end."""
        self._asked.set()
        self._done.wait()

    def _run(self) -> None:
        self._asked.wait(PATIENCE)
        try:
            for module in MODULES:
                import_module(module, __package__)
        except Exception:  # the first request that needs it meets it again, and says it
            log.exception("Cannot import what the app needs")
        finally:
            self._done.set()
        for call in self.then:
            call()


class Waiting:
    """An ASGI layer in front of the functions: their requests wait until everything is imported."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], preload: Preload) -> None:
        self.app, self.preload = app, preload
        preload.soon()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, once it can be answered."""
        if scope["type"] == "http" and not self.preload.done and any(part in str(scope["path"]) for part in WORK):
            await to_thread.run_sync(self.preload.wait, abandon_on_cancel=True)
        await self.app(scope, receive, send)
