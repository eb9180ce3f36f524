"""Two concepts from photo folders to one picture, in Python. On the pocket base: a few minutes on two CPU cores."""

from __future__ import annotations

import sys
from pathlib import Path

from diffusers import StableDiffusionPipeline

import spectral_diffusion as sd


def main(photos: Path, output: Path, steps: int = 400) -> dict[str, float]:
    pipe = StableDiffusionPipeline.from_pretrained(sd.pocket.path())  # or any Stable Diffusion pipeline
    rex = sd.train(pipe, photos / "rex", output=output / "rex.safetensors", steps=steps)
    brew = sd.train(pipe, photos / "brew", output=output / "brew.safetensors", steps=steps)
    fused = sd.fuse(pipe, {rex: 1.0, brew: 1.0}, method="gradient")  # a new pipeline; `pipe` stays as it is
    left, right = sd.Region((0, 0, 0.5, 1), rex), sd.Region((0.5, 0, 1, 1), brew)
    images = sd.generate(fused, sd.Scene("on the beach", [left, right]), seeds=[0, 1], width=256)
    for seed, image in enumerate(images):
        image.save(output / f"together-{seed}.png")
    return sd.identity(images, {rex: photos / "rex", brew: photos / "brew"})


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))
