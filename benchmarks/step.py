"""Time one training step of a Stable Diffusion 1.5 U-Net (random weights): spectral-additive against PEFT LoRA.

256² pixels (32² latents), batch 1, rank 8 on the attention projections, forward + backward + AdamW. The two are
timed in interleaved rounds on the same frozen U-Net, so that a drifting machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from spectral_diffusion.methods import get_method
from spectral_diffusion.methods.attach import Attachment, attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--latent", type=int, default=32)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    unets: dict[str, nn.Module] = {}
    attachments: dict[str, Attachment] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name in ("spectral-additive", "lora"):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        unet.set_attn_processor(AttnProcessor())
        unets[name] = unet.requires_grad_(False)
        models = {"unet": unet}
        bands = {}
        if get_method(name).frozen == "band":
            from spectral_diffusion.methods.targets import find_targets

            for layer, module in find_targets(models, "unet-attention").items():
                # Random orthonormal columns: the step's cost does not depend on which columns they are.
                U = torch.linalg.qr(torch.randn(module.out_features, arguments.rank)).Q
                V = torch.linalg.qr(torch.randn(module.in_features, arguments.rank)).Q
                bands[layer] = {"U": U, "S": torch.ones(arguments.rank), "V": V}
        attachment = attach(models, get_method(name), arguments.rank, targets="unet-attention", frozen=bands)
        attachments[name] = attachment
        optimizers[name] = torch.optim.AdamW([p for _, p in attachment.named_parameters()], lr=1e-4)
        results[name] = []
    latents = torch.randn(1, 4, arguments.latent, arguments.latent)
    text = torch.randn(1, 77, 768)

    def step(name: str) -> float:
        start = time.perf_counter()
        loss = unets[name](latents, torch.tensor([500]), text).sample.square().mean()
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        return time.perf_counter() - start

    for name in results:
        step(name)  # warm up
    for index in range(arguments.rounds):
        for name in list(results) if index % 2 else list(results)[::-1]:
            results[name].append(step(name))
        print(index, {name: round(times[-1], 3) for name, times in results.items()}, flush=True)
    ratios = [a / b for a, b in zip(results["spectral-additive"], results["lora"], strict=True)]
    summary = {name: round(statistics.median(times), 3) for name, times in results.items()}
    trained = {name: attachment.count() for name, attachment in attachments.items()}
    print(json.dumps({"seconds": summary, "trained": trained, "median_ratio": round(statistics.median(ratios), 3)}))


if __name__ == "__main__":
    main()
