"""How soon a concept is learnt on the pocket base: a sweep of the preset on concepts that are not reported.

The way goes from the base's pictures of the class (0) to held-out views of the thing (1), as in the model card; the
seconds are of the whole training, reading the photos and making prior images included, with nothing kept.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.settings import build, parse_overrides, read_yaml
from spectral_diffusion.core.assets import preset
from spectral_diffusion.metrics.identity import load_identity_encoder
from spectral_diffusion.studies.runner import TUNING_CONCEPTS
from tools.pocket.art import icon_sets
from tools.pocket.render import Renderer
from tools.pocket.report import concept_learnt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, required=True, help="folder of the artwork, fetched if it is not there")
    parser.add_argument("--concepts", nargs="*", default=list(TUNING_CONCEPTS))
    parser.add_argument("changes", nargs="*", help="settings of one trial each: steps=300,learning_rate=4e-3")
    arguments = parser.parse_args()
    config = build(Scene, read_yaml(preset("pocket"))["generate"], {"base": "pocket", "guidance_scale": 4.0})
    renderer, encoder = Renderer(icon_sets(arguments.art)), load_identity_encoder()
    for text in arguments.changes or [""]:
        change = parse_overrides([part for part in text.split(",") if part])
        with tempfile.TemporaryDirectory() as kept:
            os.environ["SPECTRAL_DIFFUSION_CACHE"] = kept
            found = concept_learnt("pocket", renderer, config, encoder, arguments.concepts, change)
        mean = found.pop("mean_way")
        seconds = [one["seconds"] for one in found.values()]
        ways = {name: round(one["way"], 3) for name, one in found.items()}
        print(
            json.dumps({"change": text, "way": round(mean, 3), "seconds": round(max(seconds), 1), **ways}), flush=True
        )


if __name__ == "__main__":
    main()
