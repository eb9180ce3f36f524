"""What every method costs on a Stable Diffusion 1.5 U-Net (random weights): the paper's Fig. 7 and more, as a table.

Attention projections at rank 8 (64 blocks for OFT): trained numbers, preparation, a step (forward, backward, AdamW at
256² pixels), what it keeps for backward, its file, and merging it into the weights.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import put, saved_bytes
from step import build

from spectral_diffusion.linalg import sides
from spectral_diffusion.methods import all_methods, get_method
from spectral_diffusion.methods.frozen import STORED, frozen_tensors, with_weight
from spectral_diffusion.methods.targets import find_targets
from spectral_diffusion.slots import Slot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=sorted(all_methods()))
    arguments = parser.parse_args()
    latents, text = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768)
    print("| method | trained | prepare, s | step, s | kept, MiB | file, MiB | merge, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in arguments.methods:
        method, unet = get_method(name), build()
        weights = {n: m.weight.detach() for n, m in find_targets({"unet": unet}, "unet-attention").items()}
        rank = {"oft": 64, "svdiff": 1}.get(name, 8)
        slot = Slot.interval(0, rank) if method.slot else None
        begun = time.perf_counter()
        frozen = frozen_tensors(method, weights, rank, slot, cached=False)
        prepare = time.perf_counter() - begun
        attachment = put(name, {"unet": unet}, "unet-attention", rank)
        parameters = [p for _, p in attachment.named_parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)

        def forward(x: torch.Tensor, words: torch.Tensor = text, unet: torch.nn.Module = unet) -> torch.Tensor:
            return unet(x, torch.tensor([500]), words).sample

        inputs = latents.clone().requires_grad_(), text.clone().requires_grad_()
        kept = saved_bytes(unet, lambda forward=forward, inputs=inputs: forward(*inputs))
        times = []
        for _ in range(arguments.rounds + 1):
            begun = time.perf_counter()
            forward(latents).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - begun)
        trained = attachment.trained()
        stored = sum(frozen[n][k].numel() for n in frozen for k in frozen[n] if k in STORED.get(method.frozen, ()))
        size = 4 * (sum(t.numel() for t in trained.values()) + stored)
        begun = time.perf_counter()
        with torch.no_grad():
            for layer, weight in weights.items():
                names = method.shapes(*sides(weight), rank)
                held = {key: trained[f"{layer}.{key}"] for key in names}
                weight + method.delta(held, with_weight(method, frozen[layer], weight)).delta()
        merge = time.perf_counter() - begun
        step = statistics.median(times[1:])
        print(
            f"| {name} | {attachment.count():,} | {prepare:.1f} | {step:.2f} | {kept / 2**20:.0f} | {size / 2**20:.1f} "
            f"| {merge:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
