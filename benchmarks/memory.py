"""The memory of trainings and of distilling fusions, computed without weights: Stable Diffusion 1.5 and XL."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.settings import build, read_yaml
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core import assets as resources
from spectral_diffusion.merging.memory import distillation_memory
from spectral_diffusion.models.architectures import build_meta, build_vae_meta
from spectral_diffusion.models.loading import parse_dtype, quiet_loading
from spectral_diffusion.models.targets import find_targets
from spectral_diffusion.training.memory import Estimate, estimate

TRAINING = ("encoding photos", "generating prior images", "generating samples", "training")
SIDES = {"sd15": 512, "sdxl": 1024}
CASES: dict[str, list[dict[str, Any]]] = {
    "sd15": [
        {"batch_size": 1, "dtype": dtype, "gradient_checkpointing": ck}
        for dtype in ("float32", "float16")
        for ck in (False, True)
    ],
    "sdxl": [
        {"batch_size": 1, "dtype": "float16", "gradient_checkpointing": ck, "method": method}
        for method in ("spectral-additive", "spectral-rotation")
        for ck in (False, True)
    ],
}


def computed(arch: str, config: TrainConfig, size: int | None = None, device: str = "cuda") -> Estimate:
    """The estimate for an architecture in the settings' precision."""
    dtype = parse_dtype(config.dtype)
    with quiet_loading():
        models = {name: model.to(dtype).requires_grad_(False) for name, model in build_meta(arch).items()}
        vae = build_vae_meta().to(dtype)
    return estimate(models, vae, config, size or config.resolution or SIDES[arch], device)


def presets() -> Iterator[tuple[str, TrainConfig]]:
    """The shipped presets for Stable Diffusion 1.5 and XL by name, which begins with the architecture's."""
    for path in sorted(
        resources.configs().glob("sd*-*gb.yaml"), key=lambda path: (path.stem[:4], int(path.stem[5:-2]))
    ):
        yield path.stem, build(TrainConfig, read_yaml(path)["train"], {"concept": "x", "output": "y"})


def distillation(name: str, targets: str = "attention") -> Estimate:
    """The estimate for distilling a fusion with a preset's settings, or with the defaults."""
    settings = read_yaml(resources.configs() / f"{name}.yaml").get("fuse", {}) if name else {}
    config = build(FuseConfig, settings, {"adapters": ["x"], "output": "y"}).distill
    with quiet_loading():
        models = {name: model.requires_grad_(False) for name, model in build_meta("sd15").items()}
        vae = build_vae_meta()
    return distillation_memory(models, vae, find_targets(models, targets), config, SIDES["sd15"])


def fusing_presets() -> list[str]:
    """The presets with settings for fusing."""
    return [name for name, _ in presets() if "fuse" in read_yaml(resources.configs() / f"{name}.yaml")]


def row(name: str, memory: Estimate, phases: Sequence[str] | None = None) -> str:
    """One line of the table, in GiB; ``phases`` are all phases by default."""
    columns = list(memory.phases) if phases is None else phases
    cells = [memory.weights, memory.adapter, *(memory.phases.get(phase) for phase in columns), memory.total]
    return f"| {name} | " + " | ".join("–" if cell is None else f"{cell / 2**30:.2f}" for cell in cells) + " |"


def training_table(arch: str) -> Iterator[str]:
    """The lines of an architecture's cases, or of the presets."""
    yield "| | weights | adapter | photos | prior images | samples | training | at most |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    if arch == "presets":
        yield from (row(name, computed(name[:4], config), TRAINING) for name, config in presets())
        return
    for case in CASES[arch]:
        config = build(TrainConfig, case, {"concept": "x", "output": "y"})
        settings = ", ".join(f"{key}={value}" for key, value in case.items())
        yield row(f"{arch} {SIDES[arch]}²: {settings}", computed(arch, config), TRAINING)


def distillation_table() -> Iterator[str]:
    """The lines of distillation for Stable Diffusion 1.5: the adapted layers, then all of the U-Net."""
    yield "| | weights | optimizer | generating | distillation | at most |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for name in ("", *fusing_presets()):
        yield row(name or "defaults", distillation(name))
    for name in ("", "sd15-12gb"):
        yield row(f"{name or 'defaults'}, the whole U-Net", distillation(name, r"re:unet\..*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = ["presets", "distillation", *CASES]
    parser.add_argument("--arch", choices=known, nargs="*", default=known)
    for arch in parser.parse_args().arch:
        for line in distillation_table() if arch == "distillation" else training_table(arch):
            print(line, flush=True)


if __name__ == "__main__":
    main()
