"""Regions found by attention against boxes and against adapters that act everywhere: who is where, and the cost.

Look-alikes of the pocket base are named in one prompt at 2:1; the identity encoder says which concept is nearest in
each half or third. Adapters come from a folder with ``rex.safetensors``, ``fido.safetensors``, … (``train … --config
pocket``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.apply import enabled_adapters, install_tokens
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.evaluate import PLACES
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.core import assets
from spectral_diffusion.data.folder import load_concept, open_photo
from spectral_diffusion.metrics.encoders import load_encoder
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.auto_regions import AutoConcept
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.studies.scenes import GROUPS, HEIGHT, WIDTH, boxes, prompt_of, square_picture

WAYS = ("found", "boxes", "everywhere")


def pictures(base: Base, adapters: Sequence[Adapter], way: str, location: str, seeds: list[int]) -> list[Image.Image]:
    """Pictures of one scene by one way."""
    tokens = [adapter.token for adapter in adapters]
    prompt = prompt_of(tokens, location)
    scene = Scene(prompt=prompt, width=WIDTH, height=HEIGHT, guidance_scale=2.0, region_isolation=1.0)
    bound = [[(adapter, 1.0)] for adapter in adapters]
    prompts = [prompt] * len(seeds)
    if way == "everywhere":
        with enabled_adapters(base, [(adapter, 1.0) for adapter in adapters]):
            return sample(base, prompts, seeds, scene)
    if way == "found":
        concepts = [AutoConcept(token, own) for token, own in zip(tokens, bound, strict=True)]
        return sample(base, prompts, seeds, scene, concepts=concepts)
    regions = [
        Region(box=box, prompt=f"a photo of {token} {location}")
        for box, token in zip(boxes(len(tokens)), tokens, strict=True)
    ]
    return sample(base, prompts, seeds, scene.model_copy(update={"regions": regions}), bound=bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", choices=("2", "3"), default="2")
    parser.add_argument("--count", type=int, default=36, help="pictures of each scene")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    encoder, base = load_encoder("pocket"), load_base("pocket")
    names = sorted({name for scene in GROUPS[options.number].scenes for name in scene})
    adapters = {name: load_adapter(options.folder / f"{name}.safetensors") for name in names}
    references = {}
    for name, adapter in adapters.items():
        install_tokens(base, adapter)
        photos = [open_photo(photo.path) for photo in load_concept(assets.concepts() / name).photos]
        references[name] = encoder.embed(photos).mean(0)
    places = list(PLACES)[:2]
    print("| way | pictures | right concept | all right | cosine | s a picture |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for way in options.ways:
        right, cosines, seconds = [], [], 0.0
        for names_here in GROUPS[options.number].scenes:
            known = torch.stack([references[name] for name in names_here])
            for start, location in enumerate(places):
                seeds = [100 * start + number for number in range(options.count // len(places))]
                begun = time.perf_counter()
                images = pictures(base, [adapters[name] for name in names_here], way, location, seeds)
                seconds += time.perf_counter() - begun
                crops = [square_picture(box, WIDTH) for box in boxes(len(names_here))]
                near = [encoder.embed([image.crop(crop) for image in images]) @ known.mT for crop in crops]
                right.append(torch.stack([one.argmax(1) == index for index, one in enumerate(near)]))
                cosines.append(torch.stack([one[:, index] for index, one in enumerate(near)]))
        chosen = torch.cat(right, 1).float()
        print(
            f"| {way} | {chosen.shape[1]} | {chosen.mean():.3f} | {chosen.amin(0).mean():.3f} | "
            f"{torch.cat(cosines, 1).mean():.3f} | {seconds / chosen.shape[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
