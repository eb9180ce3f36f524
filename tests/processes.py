"""Servers and processes of tests: a free port, a client, and two processes that train as launched ones do."""

from __future__ import annotations

import faulthandler
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed import TCPStore


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def client_of(url: str, **options: Any) -> Any:
    """A Gradio client that waits for a server whose processor other work shares."""
    from gradio_client import Client

    return Client(url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 120}, **options)


def places(rank: int, store: TCPStore) -> dict[str, str]:
    """What a launcher tells each of two processes: its place, and where they meet.

    They meet at a store that the test's own process keeps, as torchrun's do: a port that is looked up first and
    bound by a child later may be another test's by then.
    """
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": store.port}
    more = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {**{name: str(value) for name, value in found.items()}, **more}


def open_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def in_two_processes(work: Callable[[int], None]) -> None:
    """Do ``work(rank)`` in two forks, which know what this process knows."""
    store, children = open_store(), []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            faulthandler.enable(2)  # pytest's own writes to where nobody looks
            try:
                os.environ.update(places(rank, store))
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()  # a fork's error is seen by nobody else
            finally:
                os._exit(code)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [0, 0], f"the processes ended with {ends} (a negative one is a signal)"


def command_in_two(arguments: list[str]) -> None:
    """Start ``spectral-diffusion ARGUMENTS`` twice, as a launcher would.

    For work that a fork may not go on with: quantizers keep native state, and a fork of a process that has quantized
    ended without a word once in some thirty runs.
    """
    store = open_store()
    command = [sys.executable, "-X", "faulthandler", "-m", "spectral_diffusion", *arguments]
    started = [subprocess.Popen(command, env={**os.environ, **places(rank, store)}) for rank in range(2)]
    ends = [process.wait() for process in started]
    assert ends == [0, 0], f"the processes ended with {ends} (a negative one is a signal)"
