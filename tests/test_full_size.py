"""The full-size Stable Diffusion 1.5 architecture with random weights, from photos to a picture, with peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from spectral_diffusion.models.architectures import build_meta, build_vae_meta, fill_randomly
from tools.pocket.models import build_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# Runs one verb and tells its own peak: the parent would see only the largest of all children.
CHILD = (
    "import json, resource, sys; from spectral_diffusion.cli import main\n"
    "try: main()\n"
    "except SystemExit as end: code = end.code or 0\n"
    "else: code = 0\n"
    "print(json.dumps({'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})); sys.exit(code)\n"
)


def make_base(folder: Path) -> Path:
    """Every network at its real size; weights small and random, half precision on disk."""
    torch.manual_seed(0)
    models = {**build_meta("sd15"), "vae": build_vae_meta()}
    for model in models.values():
        fill_randomly(model, torch.float16)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    StableDiffusionPipeline(
        tokenizer=tokenizer, scheduler=DDIMScheduler(clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **models,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_train_fuse_export_and_draw_at_full_size(photos: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "sd15")
    figures = {}

    def run(*words: object) -> None:
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *map(str, words)], capture_output=True, text=True, env={**os.environ}
        )
        assert done.returncode == 0, done.stderr[-2000:]
        peak = json.loads(done.stdout.strip().splitlines()[-1])["peak_mib"]
        figures[f"{len(figures) + 1} {words[0]}"] = {
            "seconds": round(time.monotonic() - begun),
            "peak_mib": round(peak),
        }

    files = []
    for name in ("rex", "mug"):
        files.append(tmp_path / f"{name}.safetensors")
        run("train", photos, "-o", files[-1], "--base", base, "--rank", 8, "--steps", 2, "--device", "cpu",
            f"name={name}", f"token=<{name}>", "resolution=64", "batch_size=1", "crops_per_image=1")  # fmt: skip
    run("fuse", *files, "-o", tmp_path / "fused", "--device", "cpu")
    run("export", tmp_path / "fused", "-o", tmp_path / "both.safetensors", "--format", "kohya", "--device", "cpu")
    run("generate", "--base", tmp_path / "fused", "--prompt", "<rex> and <mug>", "-o", tmp_path / "out.png",
        "--width", 64, "--height", 64, "--device", "cpu", "num_inference_steps=1")  # fmt: skip
    assert (tmp_path / "out.png").is_file() and (tmp_path / "both.safetensors").stat().st_size > 10 * 2**20
    print(json.dumps(figures))
    assert all(one["peak_mib"] < 9_000 for one in figures.values())
