"""The memory of trainings and of teaching fusions, computed without weights: Stable Diffusion 1.5 and XL."""

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
from spectral_diffusion.models.base import parse_dtype, quiet_loading
from spectral_diffusion.models.targets import find_targets
from spectral_diffusion.training.memory import Estimate, estimate

TRAINING = ("encoding photos", "drawing ordinary pictures", "drawing samples", "training")
TEACHING = ("sampling targets", "distilling")
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


def taught(name: str, targets: str = "attention") -> Estimate:
    """The estimate for teaching a fusion as a preset does, or by its defaults if none is named."""
    settings = read_yaml(resources.configs() / f"{name}.yaml").get("fuse", {}) if name else {}
    config = build(FuseConfig, settings, {"adapters": ["x"], "output": "y"}).distill
    with quiet_loading():
        models = {name: model.requires_grad_(False) for name, model in build_meta("sd15").items()}
        vae = build_vae_meta()
    learners = [layer.weight for layer in find_targets(models, targets).values()]
    return distillation_memory(models, vae, learners, config, SIDES["sd15"])


def teachers() -> list[str]:
    """The presets that say how a fusion is taught."""
    return [name for name, _ in presets() if "fuse" in read_yaml(resources.configs() / f"{name}.yaml")]


def row(name: str, found: Estimate, phases: Sequence[str] = TRAINING) -> str:
    """One line of the table, in GiB."""
    cells = [found.weights, found.adapter, *(found.phases.get(phase) for phase in phases), found.total]
    return f"| {name} | " + " | ".join("–" if cell is None else f"{cell / 2**30:.2f}" for cell in cells) + " |"


def training_table(arch: str) -> Iterator[str]:
    """The lines of an architecture's cases, or of the presets."""
    yield "| | weights | adapter | photos | ordinary | samples | training | at most |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    if arch == "presets":
        yield from (row(name, computed(name[:4], config)) for name, config in presets())
        return
    for case in CASES[arch]:
        config = build(TrainConfig, case, {"concept": "x", "output": "y"})
        words = ", ".join(f"{key}={value}" for key, value in case.items())
        yield row(f"{arch} {SIDES[arch]}²: {words}", computed(arch, config))


def teaching_table() -> Iterator[str]:
    """The lines of teaching Stable Diffusion 1.5: the layers that adapters change, then all of the U-Net."""
    yield "| | weights | optimiser | lessons | teaching | at most |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for name in ("", *teachers()):
        yield row(name or "defaults", taught(name), TEACHING)
    for name in ("", "sd15-12gb"):
        yield row(f"{name or 'defaults'}, all of the U-Net", taught(name, r"re:unet\..*"), TEACHING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = ["presets", "teaching", *CASES]
    parser.add_argument("--arch", choices=known, nargs="*", default=known)
    for arch in parser.parse_args().arch:
        for line in teaching_table() if arch == "teaching" else training_table(arch):
            print(line, flush=True)


if __name__ == "__main__":
    main()
