"""Drive a running app from Python: train two concepts, fuse them, draw them together.

Start it with ``spectral-diffusion ui``, then ``python examples/client.py http://127.0.0.1:7860 rex brew``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from gradio_client import Client


def finished(client: Client, job: str, wait: float = 1.0) -> dict[str, Any]:
    """Ask after a training until it has ended; returns what is told of it."""
    while True:
        told = next(one for one in client.predict(api_name="/jobs") if one["id"] == job)
        if told["state"] not in {"waiting", "running"}:
            return dict(told)
        time.sleep(wait)


def run(url: str, concepts: list[str], base: str = "pocket", steps: int | None = None, draw: int = 20) -> list[str]:
    """Train, fuse and draw; returns the pictures' files. ``draw`` is how many steps a picture takes."""
    client = Client(url, verbose=False, analytics_enabled=False)
    jobs = [client.predict(one, base=base, steps=steps, api_name="/train")[0] for one in concepts]
    for job in jobs:
        told = finished(client, job)
        if told["state"] != "done":
            raise SystemExit(f"{told['concept']}: {told['message']}")
    client.predict(concepts, "together", api_name="/fuse")
    prompt = " and ".join(f"<{one}>" for one in concepts) + " on the beach"
    files, _ = client.predict(prompt, base="fused/together", num_inference_steps=draw, api_name="/generate")
    return [str(file) for file in files]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("concepts", nargs="+", help="names of concepts that the app lists")
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--steps", type=int, help="of each training; default: the preset's")
    given = parser.parse_args()
    for picture in run(given.url, given.concepts, given.base, given.steps):
        print(picture)
