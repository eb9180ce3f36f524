"""Time one training step of a Stable Diffusion 1.5 U-Net (random weights): our methods against PEFT LoRA.

256² pixels (32² latents), batch 1, rank 8 on the attention projections, forward + backward + AdamW. Timed in
interleaved rounds, so that a drifting machine disturbs all alike. Then what the whole network keeps for backward, with
gradients for latents and text, as in training, where the text encoder is trained too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from common import RANK, put, saved_bytes
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn


def build() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet.set_attn_processor(AttnProcessor())
    return unet.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--methods", nargs="*", default=["spectral-additive", "spectral-rotation"])
    arguments = parser.parse_args()
    names = ["lora", *arguments.methods]
    latents = torch.randn(1, 4, arguments.latent, arguments.latent)
    text = torch.randn(1, 77, 768)

    def forward(unet: nn.Module, x: Tensor, words: Tensor = text) -> Tensor:
        return unet(x, torch.tensor([500]), words).sample

    steps, kept, trained = {}, {}, {}
    for name in ["frozen", *names]:
        unet = build()
        if name != "frozen":
            injected = put(name, {"unet": unet}, "unet-attention", arguments.rank)
            parameters = [p for _, p in injected.named_parameters()]
            trained[name] = injected.count()
            steps[name] = (unet, torch.optim.AdamW(parameters, lr=1e-4))
        inputs = latents.clone().requires_grad_(), text.clone().requires_grad_()
        kept[name] = saved_bytes(unet, lambda unet=unet, inputs=inputs: forward(unet, *inputs))

    def step(name: str) -> float:
        unet, optimizer = steps[name]
        begun = time.perf_counter()
        forward(unet, latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun

    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        step(name)  # warm up
    for index in range(arguments.rounds):
        for name in names if index % 2 else names[::-1]:
            times[name].append(step(name))
    out = {
        name: {
            "trained": trained[name],
            "seconds": round(statistics.median(times[name]), 3),
            "of_lora": round(statistics.median(a / b for a, b in zip(times[name], times["lora"], strict=True)), 3),
            "kept_of_lora": round(kept[name] / kept["lora"], 4),
            "kept_of_frozen": round(kept[name] / kept["frozen"], 4),
        }
        for name in names
    }
    print(json.dumps({"threads": torch.get_num_threads(), **out}, indent=1))


if __name__ == "__main__":
    main()
