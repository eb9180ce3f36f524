"""Time the adapted layers alone: every method's overhead over the frozen Linear, and what it keeps for backward.

The attention projections of Stable Diffusion 1.5's U-Net at 256² pixels (32² latents, batch 1), forward and backward
with a gradient for the input, as inside the network. Rounds are interleaved, so that a drifting machine disturbs all
alike; medians of paired ratios are told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from common import put, saved_bytes
from torch import Tensor, nn

SHAPES = [  # (out, in, rows, how many)
    (320, 320, 1024, 30), (640, 640, 256, 30), (1280, 1280, 64, 30), (1280, 1280, 16, 6),
    (320, 768, 77, 10), (640, 768, 77, 10), (1280, 768, 77, 12),
]  # fmt: skip


class Layers(nn.Module):
    """The projections side by side, each with rows of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Linear(inside, out, bias=False, dtype=dtype)
            for out, inside, _, count in SHAPES for _ in range(count)
        )  # fmt: skip
        self.inputs = [
            torch.randn(1, rows, inside, dtype=dtype, requires_grad=True)
            for _, inside, rows, count in SHAPES for _ in range(count)
        ]  # fmt: skip

    def widen(self, times: int) -> None:
        """More rows where they are pixels; words stay as many, twice for the batch."""
        self.inputs = [x.detach().repeat(2 if x.shape[1] == 77 else times, 1, 1).requires_grad_() for x in self.inputs]

    def forward(self) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, self.inputs, strict=True)]


def build(name: str, dtype: torch.dtype) -> Layers:
    """The layers with a method on them; ``frozen`` has none."""
    net = Layers(dtype).requires_grad_(False)
    if name != "frozen":
        put(name, {"unet": net}, r"re:unet\..*")
    return net


def step(net: Layers) -> float:
    begun = time.perf_counter()
    torch.autograd.backward([y.float().sum() for y in net()])
    spent = time.perf_counter() - begun
    for x in net.inputs:
        x.grad = None
    net.zero_grad()
    return spent


def measure(methods: list[str], dtype: torch.dtype, rounds: int, widen: int = 1) -> dict[str, dict[str, float]]:
    """Per method: seconds, overhead over frozen and as a share of LoRA's, bytes kept at 512² pixels and batch 2."""
    names = ["frozen", *dict.fromkeys(["lora", *methods])]
    nets = {name: build(name, dtype) for name in names}
    for net in nets.values():
        if widen > 1:
            net.widen(widen)
        step(net)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names if index % 2 else names[::-1]:
            times[name].append(step(nets[name]))
    for net in nets.values():
        if widen == 1:
            net.widen(8)  # the paper's recipe: 64² latents, batch 2
    bytes_kept = {name: saved_bytes(net, net) for name, net in nets.items()}
    out = {}
    for name in names:
        over = [a - f for a, f in zip(times[name], times["frozen"], strict=True)]
        lora = [a - f for a, f in zip(times["lora"], times["frozen"], strict=True)]
        out[name] = {
            "seconds": round(statistics.median(times[name]), 4),
            "overhead": round(statistics.median(o / f for o, f in zip(over, times["frozen"], strict=True)), 3),
            "of_lora": round(statistics.median(over) / statistics.median(lora), 3),
            "saved_mib": round(bytes_kept[name] / 2**20, 2),
            "saved_of_lora": round(bytes_kept[name] / bytes_kept["lora"], 3),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", nargs="*", default=["spectral-additive", "spectral-rotation"])
    parser.add_argument("--widen", type=int, default=1, help="8 times the rows are 512² pixels, batch 2")
    arguments = parser.parse_args()
    found = {
        str(dtype).removeprefix("torch."): measure(arguments.methods, dtype, arguments.rounds, arguments.widen)
        for dtype in (torch.float32, torch.bfloat16)
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
