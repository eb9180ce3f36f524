"""Two processes that train together, as a launcher would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def in_two_processes(work: Callable[[int], None]) -> None:
    """Do ``work(rank)`` in two forks, as a launcher would start them."""
    port, children = str(free_port()), []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
                os.environ.update({name: str(value) for name, value in places.items()})
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
                work(rank)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
