"""The memory of trainings, computed without weights: Stable Diffusion 1.5 and XL, as presets and settings ask."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from spectral_diffusion import resources
from spectral_diffusion.architectures import build_meta, build_vae_meta
from spectral_diffusion.base import parse_dtype, quiet
from spectral_diffusion.config import TrainConfig, build, read_yaml
from spectral_diffusion.training.memory import Estimate, estimate

SIDES = {"sd15": 512, "sdxl": 1024}
CASES: dict[str, list[dict[str, Any]]] = {
    "sd15": [
        {"batch": 1, "dtype": dtype, "gradient_checkpointing": ck}
        for dtype in ("float32", "float16")
        for ck in (False, True)
    ],
    "sdxl": [
        {"batch": 1, "dtype": "float16", "gradient_checkpointing": ck, "method": method}
        for method in ("spectral-additive", "spectral-rotation")
        for ck in (False, True)
    ],
}


def computed(arch: str, config: TrainConfig, size: int | None = None, device: str = "cuda") -> Estimate:
    """The estimate for an architecture in the settings' precision."""
    dtype = parse_dtype(config.dtype)
    with quiet():
        models = {name: model.to(dtype).requires_grad_(False) for name, model in build_meta(arch).items()}
        vae = build_vae_meta().to(dtype)
    return estimate(models, vae, config, size or config.resolution or SIDES[arch], device)


def presets() -> Iterator[tuple[str, TrainConfig]]:
    """The shipped presets for Stable Diffusion 1.5 and XL by name, which begins with the architecture's."""
    for path in sorted(
        resources.configs().glob("sd*-*gb.yaml"), key=lambda path: (path.stem[:4], int(path.stem[5:-2]))
    ):
        yield path.stem, build(TrainConfig, read_yaml(path)["train"], {"concept": "x", "output": "y"})


def row(name: str, found: Estimate) -> str:
    """One line of the table, in GiB."""
    order = ("encoding photos", "drawing ordinary pictures", "drawing samples", "training")
    cells = [found.weights, found.adapter, *(found.phases.get(phase) for phase in order), found.total]
    return f"| {name} | " + " | ".join("–" if cell is None else f"{cell / 2**30:.2f}" for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=[*CASES, "presets"], nargs="*", default=["presets", *CASES])
    for arch in parser.parse_args().arch:
        print("| | weights | adapter | photos | ordinary | samples | training | at most |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        if arch == "presets":
            for name, config in presets():
                print(row(name, computed(name[:4], config)), flush=True)
            continue
        for case in CASES[arch]:
            config = build(TrainConfig, case, {"concept": "x", "output": "y"})
            words = ", ".join(f"{key}={value}" for key, value in case.items())
            print(row(f"{arch} {SIDES[arch]}²: {words}", computed(arch, config)), flush=True)


if __name__ == "__main__":
    main()
