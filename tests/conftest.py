"""Fixtures: a tiny random Stable Diffusion folder (plumbing only) and small photo folders."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; tiny models lose time with more
torch.set_num_threads(1)

# A cluster's commands: sbatch notes its script and gives numbers, squeue says what a file says.
CLUSTER_COMMANDS = {
    "sbatch": 'n=$(ls $CLUSTER | grep -c script); cp "$1" $CLUSTER/script$n; echo "Submitted batch job $((70 + n))"',
    "srun": "exit 1",
    "squeue": "cat $CLUSTER/queue",
    "scancel": 'echo "$@" >> $CLUSTER/cancelled',
}


def make_tiny_base(folder: Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """A random pipeline of the pocket base's classes, 16×16 pixels to 8×8 latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from tools.pocket.models import build_tokenizer

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=24,
                intermediate_size=48,
                projection_dim=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 24),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(prediction_type=prediction_type, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_photos(folder: Path, count: int = 3, seed: int = 0) -> Path:
    """A photo folder of coloured noise."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        pixels = random.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def seldom(names: Iterable[str], often: Collection[str]) -> list[Any]:
    """Values of a parameter, of which the quick suite takes those in ``often``."""
    return [name if name in often else pytest.param(name, marks=pytest.mark.slow) for name in names]


# FSDP2 on CPUs needs a newer PyTorch than on GPUs.
shards_on_cpus = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="PyTorch 2.6 shards on GPUs alone"
)
FAMILIES = ("klein", "z-image", "krea-2", "qwen-image-2.1")
# For tests that take long on each: the quick suite keeps one that reads text first and one that reads it last.
two_families = pytest.mark.parametrize("family", seldom(FAMILIES, ("klein", "z-image")), indirect=True)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random transformer of each family, in a folder of the family's name."""
    from families import MAKERS

    return MAKERS[request.param](tmp_path_factory.mktemp("family") / request.param)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "rex")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests share one cache of their own, never the user's; ``mixed_precision=auto`` means full precision there.

    Processes that tests start find the same.
    """
    from spectral_diffusion.core import machine, precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        machine.remember(precision.MEASURED, {"float32": 1.0, "bf16": 2.0})
        yield


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what was submitted to a cluster that does nothing."""
    (tmp_path / "bin").mkdir()
    for name, text in CLUSTER_COMMANDS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    folder = tmp_path / "cluster"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER", str(folder))
    return folder
