"""Time the fusion ``sum`` of eight adapters at Stable Diffusion 1.5 size against reading and writing the weights.

The attention weights alone (176 matrices) with random factors; the merge as ``fuse`` does it, in float64 and layer by
layer, against ``load_file`` + ``save_file`` of the same tensors from a warm cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.merging.merges import Contribution, get_merge
from spectral_diffusion.merging.merges.registry import MergeContext
from spectral_diffusion.methods import get_method
from spectral_diffusion.slots.ledger import Slot

SHAPES = {
    (768, 768): 48, (320, 320): 30, (640, 640): 30, (1280, 1280): 36, (320, 768): 10, (640, 768): 10, (1280, 768): 12,
}  # fmt: skip


def contributions(out: int, inside: int, count: int, rank: int) -> list[Contribution]:
    """Random spectral-additive adapters in disjoint slots."""
    method = get_method("spectral-additive")
    made = []
    for index in range(count):
        parameters = {"A_U": 0.01 * torch.randn(out, rank), "A_V": 0.01 * torch.randn(inside, rank)}
        frozen = {"U": torch.randn(out, rank), "S": torch.rand(rank), "V": torch.randn(inside, rank)}
        made.append(
            Contribution(f"c{index}", method, parameters, frozen, Slot.interval(index * rank, (index + 1) * rank))
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    weights = {
        f"{out}x{inside}.{index}": torch.randn(out, inside)
        for (out, inside), count in SHAPES.items() for index in range(count)
    }  # fmt: skip
    brought = {
        name: contributions(*weight.shape, arguments.adapters, arguments.rank) for name, weight in weights.items()
    }
    config = FuseConfig(adapters=[Path("a")], output=Path("b"))
    merge = get_merge("spectral")
    context = MergeContext(merge.settings(config.options), config.seed)
    files, merges = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(weights, path)
        for _ in range(arguments.rounds):
            begun = time.perf_counter()
            save_file(load_file(path), Path(folder) / "again.safetensors")
            files.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            for name, weight in weights.items():
                found = merge.combine(brought[name], context)
                weight.add_(found.delta())  # type: ignore[union-attr]
            merges.append(time.perf_counter() - begun)
    largest = max(weights.values(), key=torch.Tensor.numel)
    size = largest.numel() * 4 / 2**20
    print(
        json.dumps(
            {
                "threads": torch.get_num_threads(),
                "weights_mib": round(sum(w.numel() for w in weights.values()) * 4 / 2**20),
                "load_and_save_seconds": round(sorted(files)[len(files) // 2], 3),
                "merge_seconds": round(sorted(merges)[len(merges) // 2], 3),
                "ratio": round(sorted(merges)[len(merges) // 2] / sorted(files)[len(files) // 2], 2),
                "largest_layer_mib": round(size, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
