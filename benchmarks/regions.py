"""Time four regions on a Stable Diffusion 1.5 U-Net (random weights) against the U-Net alone.

512×256 pixels (64×32 latents), one picture with guidance, so a batch of two; forward only, as in sampling. Regions with
prompts of their own, and the same with a rank-16 adapter bound to each. Interleaved rounds, medians of paired ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack

import torch
from step import build

from spectral_diffusion.linalg import Factors, matrix_shape
from spectral_diffusion.models.targets import find_targets
from spectral_diffusion.scenes.regions import EncodedRegion, RegionalPrompts, regional

HEIGHT, WIDTH, REGIONS, RANK = 32, 64, 4, 16


def areas(layers: dict[str, torch.nn.Module], bound: bool) -> list[EncodedRegion]:
    """Four columns of the picture, each with random prompts and, if asked, random changes of every layer."""
    found = []
    for index in range(REGIONS):
        deltas = {}
        for name, layer in layers.items() if bound else ():
            out, inside = matrix_shape(layer.weight)  # type: ignore[arg-type]
            deltas[name] = Factors(0.01 * torch.randn(out, RANK), 0.01 * torch.randn(RANK, inside))
        box = (index / REGIONS, 0.0, (index + 1) / REGIONS, 1.0)
        found.append(EncodedRegion(box, torch.randn(77, 768), torch.randn(77, 768), deltas))
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    unet = build()
    layers = find_targets({"unet": unet}, "unet-attention")
    ways = {"plain": [], "regions": areas(layers, False), "regions with adapters": areas(layers, True)}
    latents, text = torch.randn(2, 4, HEIGHT, WIDTH), torch.randn(2, 77, 768)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name in list(ways) if index % 2 else list(ways)[::-1]:
            with ExitStack() as stack:
                stack.enter_context(regional(unet, RegionalPrompts(ways[name], (HEIGHT, WIDTH), 1), layers))
                begun = time.perf_counter()
                unet(latents, torch.tensor([500]), text)
                times[name].append(time.perf_counter() - begun)
    out = {
        name: {
            "seconds": round(statistics.median(spent[1:]), 3),
            "of_plain": round(statistics.median(a / b for a, b in zip(spent[1:], times["plain"][1:], strict=True)), 3),
        }
        for name, spent in times.items()
    }
    print(json.dumps({"threads": torch.get_num_threads(), "regions": REGIONS, **out}, indent=1))


if __name__ == "__main__":
    main()
