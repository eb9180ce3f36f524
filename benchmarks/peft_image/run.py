"""Run PEFT's image benchmark (method_comparison/image-gen) with our methods: DreamBooth on FLUX.2 klein base 4B.

    git clone https://github.com/huggingface/peft
    pip install -r peft/method_comparison/image-gen/requirements.txt
    python benchmarks/peft_image/run.py peft/method_comparison/image-gen

It needs a GPU with 24 GB. It copies the experiments beside this file into the benchmark's own, registers our tuner
with PEFT, splits klein's fused projections as the rest of this program does, and runs the benchmark's own ``run.py``
for each experiment that has no result yet. DINOv2 similarity, drift, memory and time stand in its result files.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parent / "experiments"


def install_experiments(benchmark: Path) -> list[str]:
    """Copy the experiments into a checkout of the benchmark; returns their paths there, ``experiments/method/name``."""
    installed = []
    for config in sorted(EXPERIMENTS.glob("*/*/adapter_config.json")):
        name = config.parent.relative_to(EXPERIMENTS)
        shutil.copytree(config.parent, benchmark / "experiments" / name, dirs_exist_ok=True)
        installed.append(str(Path("experiments") / name))
    return installed


def prepare(pipeline: Any) -> Any:
    """Split a klein pipeline's fused layers, and have the decompositions on the GPU if there is one."""
    import torch

    from spectral_diffusion.models.families import family_of

    family = family_of(pipeline)
    if family is None:
        raise SystemExit(f"The benchmark loaded a {type(pipeline).__name__}, not a FLUX.2 klein pipeline.")
    family.prepare(pipeline)
    if torch.cuda.is_available():
        pipeline.transformer.to("cuda")
    return pipeline


def teach_peft() -> None:
    """Register our tuner with PEFT, and prepare every klein pipeline that is loaded from now on."""
    from diffusers import Flux2KleinPipeline

    import spectral_diffusion.adapters.tuner  # noqa: F401 (importing it registers it)

    load = Flux2KleinPipeline.from_pretrained.__func__
    Flux2KleinPipeline.from_pretrained = classmethod(lambda cls, *args, **more: prepare(load(cls, *args, **more)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path, help="folder method_comparison/image-gen of a PEFT checkout")
    parser.add_argument("--only", help="run one experiment, by its folder's name")
    given = parser.parse_args()
    script = given.benchmark.resolve() / "run.py"
    if not script.is_file():
        parser.error(f"{given.benchmark} holds no run.py; name the folder method_comparison/image-gen of a checkout.")
    experiments = install_experiments(script.parent)
    if given.only:
        experiments = [path for path in experiments if Path(path).name == given.only]
        if not experiments:
            parser.error(f"there is no experiment {given.only} in {EXPERIMENTS.name}/")
    os.chdir(script.parent)
    sys.path.insert(0, str(script.parent))
    teach_peft()
    for path in experiments:
        if (Path("results") / f"{'--'.join(Path(path).parts[1:])}.json").is_file():
            print(f"{path} has a result already.")
            continue
        sys.argv = ["run.py", "-v", path]
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
