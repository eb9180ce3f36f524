"""Generate pictures from a config. The samplers and pipelines are diffusers' own."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders import TextualInversionLoaderMixin
from PIL import Image, PngImagePlugin

from ..adapted import put_on
from ..base import Base, load_base
from ..config import GenerateConfig
from ..errors import UserError, nearest
from ..files import atomic, check_writable
from ..formats.native import load_adapter, versions
from ..progress import Event, Progress, silent
from ..tokens import collapse, expand, known_tokens
from .conditions import load_t2i_adapter, read_sketch
from .regions import Region, regional

SETTINGS_KEY = "spectral_diffusion"
CHUNK = 8  # pictures denoised together


def sampler(base: Base, name: str) -> Any:
    """A diffusers scheduler with the base's own noise schedule."""
    config = base.pipeline.scheduler.config
    if name == "ddim":
        return DDIMScheduler.from_config(config)
    return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")


@torch.no_grad()
def sample(
    base: Base,
    prompts: list[str],
    seeds: list[int],
    config: GenerateConfig,
    progress: Progress = silent,
    sketch: Image.Image | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One picture per (prompt, seed). A picture's noise depends on its seed alone, not on its neighbours."""
    width, height = config.width or base.size, config.height or base.size
    components = {name: part for name, part in base.pipeline.components.items() if name != "image_encoder"}
    components["scheduler"] = sampler(base, config.sampler)
    options: dict[str, Any] = {}
    large = isinstance(base.pipeline, StableDiffusionXLPipeline)
    unchecked: dict[str, Any] = {} if large else {"requires_safety_checker": False}
    if sketch is not None:
        adapter = load_t2i_adapter(base, config.t2i_adapter)
        kind = StableDiffusionXLAdapterPipeline if large else StableDiffusionAdapterPipeline
        pipe = kind(**components, adapter=adapter, **unchecked)
        options = {"adapter_conditioning_scale": config.sketch_weight}
    else:
        pipe = type(base.pipeline)(**components, **unchecked)
    pipe.set_progress_bar_config(disable=True)
    tokens = known_tokens(base.pipeline.tokenizer)
    regions = [Region(part.box, part.prompt, part.negative_prompt) for part in config.regions]
    latent_size = (height // base.pipeline.vae_scale_factor, width // base.pipeline.vae_scale_factor)

    # Pipelines with textual inversion expand <rex> to <rex> <rex>_1 by themselves; the SD sketch pipeline does not.
    spell = collapse if isinstance(pipe, TextualInversionLoaderMixin) else expand

    def encode(texts: Sequence[str]) -> torch.Tensor:
        short = [collapse(text, tokens) for text in texts]
        return base.pipeline.encode_prompt(
            prompt=short, device=base.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]

    images: list[Image.Image] = []
    total = math.ceil(len(prompts) / CHUNK) * config.steps
    for start in range(0, len(prompts), CHUNK):
        chunk = [spell(prompt, tokens) for prompt in prompts[start : start + CHUNK]]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + CHUNK]]
        if sketch is not None:
            options["image"] = [sketch.resize((width, height), Image.Resampling.BILINEAR)] * len(chunk)
        done = start // CHUNK * config.steps

        def tell(step: int, done: int = done) -> None:
            if should_stop():
                raise UserError("Stopped.")
            progress(Event("generate", done + step + 1, total))

        # The adapter pipeline still has the older callback; both tell the step.
        if sketch is not None:
            options["callback"] = lambda step, timestep, latents, tell=tell: tell(step)
        else:
            options["callback_on_step_end"] = lambda pipe, step, timestep, state, tell=tell: tell(step) or state
        with (
            warnings.catch_warnings(),
            regional(pipe.unet, regions, encode, latent_size, len(chunk), config.region_share),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, about itself
            images += pipe(
                prompt=chunk,
                negative_prompt=[config.negative_prompt] * len(chunk),
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                generator=generators,
                width=width,
                height=height,
                **options,
            ).images
    return images


def generate_to_file(
    config: GenerateConfig,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Path]:
    """Make ``count`` pictures with seeds ``seed, seed + 1, …`` and write them with their settings inside.

    One picture goes to ``output``; several to ``output`` as a grid and ``<stem>-<seed>.png`` each.

    Raises:
        UserError: anything the person can mend.
    """
    if config.output.suffix.lower() != ".png":
        raise UserError(f"The output {config.output} must end in .png.")
    if not config.prompt.strip():
        raise UserError('A prompt is needed: --prompt "a photo of <rex> on the beach".')
    sketch = read_sketch(config.sketch) if config.sketch else None
    adapters = [(load_adapter(Path(path)), strength) for path, strength in config.adapters.items()]
    check_writable(config.output)
    base = load_base(config.base, config.device, config.dtype)
    for text in put_on(base, adapters, config.allow_base):
        note(text)
    known = known_tokens(base.pipeline.tokenizer)
    typed = " ".join([config.prompt, *(part.prompt for part in config.regions)])
    for word in sorted(set(re.findall(r"<[\w-]+>", typed)) - set(known)):
        note(f"Note: {word} is no token of this base or its adapters{nearest(word, known)}; it is read as plain text.")
    seeds = [config.seed + index for index in range(config.count)]
    images = sample(base, [config.prompt] * config.count, seeds, config, progress, sketch, should_stop)
    paths = []
    for seed, image in zip(seeds, images, strict=True):
        path = config.output if config.count == 1 else config.output.with_name(f"{config.output.stem}-{seed}.png")
        save_png(image, path, config.model_copy(update={"seed": seed, "count": 1}))
        paths.append(path)
    if config.count > 1:
        save_png(grid(images), config.output, config)
        paths.insert(0, config.output)
    return paths


def grid(images: list[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures of one size side by side."""
    columns = columns or min(len(images), max(1, math.ceil(math.sqrt(len(images)))))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def save_png(image: Image.Image, path: Path, config: GenerateConfig) -> None:
    """Write a PNG with its settings and library versions inside, atomically."""
    info = PngImagePlugin.PngInfo()
    settings = config.model_dump(mode="json", exclude={"output", "device"})
    info.add_itxt(SETTINGS_KEY, json.dumps({"settings": settings, "versions": versions()}, sort_keys=True))
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings embedded in a picture.

    Raises:
        UserError: none are there.
    """
    try:
        with Image.open(path) as image:
            return json.loads(image.info[SETTINGS_KEY])["settings"]
    except (OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} holds no settings of this program.") from error
