"""Blind naming: unlabelled pictures of the base, a list of names, and the key kept apart."""

from __future__ import annotations

from pathlib import Path
from random import Random

from PIL import Image

from spectral_diffusion.config.scene import Scene
from spectral_diffusion.core.files import write_json, write_text
from spectral_diffusion.data.image_grid import image_grid, labelled
from spectral_diffusion.metrics.classifiers import NOUNS
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.sampling import sample

from .world import COLOURS, SETTINGS, Backdrop, Thing, caption


def make_naming(output: Path, base: str = "pocket", seed: int = 0, names: int = 40, pictures: int = 48) -> None:
    """Write ``sheet.png`` (numbered pictures), ``names.txt`` (the list) and ``key.json`` (the answers)."""
    random = Random(f"naming/{seed}")
    nouns = sorted(random.sample(NOUNS, names))
    answers = random.choices(nouns, k=pictures)  # with replacement: a name may occur often or never
    prompts = []
    for noun in answers:
        thing = Thing(noun, random.choice(list(COLOURS)))  # the colour must not give the class away
        prompts.append(caption([thing], Backdrop(random.choice(list(SETTINGS)), None), random))
    config = Scene(base=base, num_inference_steps=20, guidance_scale=4.0)
    images = sample(load_base(base), prompts, [random.randrange(2**31) for _ in prompts], config)
    output.mkdir(parents=True, exist_ok=True)
    naming_sheet(images).save(output / "sheet.png")
    write_text(output / "names.txt", "\n".join(nouns) + "\n")
    write_json(output / "key.json", [{"noun": n, "prompt": p} for n, p in zip(answers, prompts, strict=True)])


def naming_sheet(images: list[Image.Image], columns: int = 8, side: int = 160) -> Image.Image:
    """Numbered pictures in a grid, enlarged."""
    large = (image.resize((side, side), Image.Resampling.BICUBIC) for image in images)
    return image_grid([labelled(image, str(number)) for number, image in enumerate(large, 1)], columns, gap=8)
