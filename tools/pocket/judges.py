"""Training of the two judges of :mod:`spectral_diffusion.metrics.classifiers`: which class, colour, backdrop."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter

from spectral_diffusion.core.files import write_tensors
from spectral_diffusion.core.precision import autocast, cpu_precision
from spectral_diffusion.metrics.classifiers import BACKDROPS, CLASSIFIERS, HEADS, NOUNS, SIZE, TINTS, tensor_of, windows
from spectral_diffusion.training.checkpoint import load_state, save_state

from .encoders import load_coarse
from .loop import Report
from .render import Picture, Renderer, WorldConfig
from .world import Backdrop, Thing

TRAINED = 40  # classes of the curriculum
SEEN = WorldConfig(
    classes=TRAINED,
    counts=(0.5, 0.5),
    wide_counts=(0.1, 0.4, 0.35, 0.15),
    scale=(0.68, 0.95),
    shift=0.08,
    rotate=10,
    natural=0.1,
    second_drawing=0.3,
    puppets=0.15,
)


def labels(thing: Thing | None, backdrop: Backdrop) -> tuple[int, int, int]:
    """Indices of the three heads; −100 where nothing can be said."""
    place = BACKDROPS.index(backdrop.setting or backdrop.colour)
    if thing is None:
        return len(NOUNS), -100, place
    return NOUNS.index(thing.noun), TINTS.index(thing.colour or "own"), place


@dataclass(frozen=True)
class Kind:
    """What one judge's training pictures go through."""

    seed: int
    blur: float  # share of softened pictures
    noise: float  # standard deviation of pixel noise
    round_trip: float  # share through the VAE


KINDS = {"chooser": Kind(1, 0.5, 0.0, 0.4), "referee": Kind(2, 0.3, 6.0, 0.6)}


def examples(
    renderer: Renderer, random: Random, count: int, vae: AutoencoderKL | None, share: float
) -> tuple[list[Image.Image], list[tuple[int, int, int]]]:
    """Windows of true scenes with their labels, a share of the scenes through the VAE's round trip."""
    images: list[Image.Image] = []
    truths: list[tuple[int, int, int]] = []
    for width in (SIZE, 2 * SIZE):
        pictures: list[Picture] = []
        found = len(images)
        while sum(len(p.things) for p in pictures) + found < count * (0.5 if width == SIZE else 1):
            pictures.append(renderer.scene(random, SEEN, width, SIZE))
        stack = torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
        chosen = torch.tensor([vae is not None and random.random() < share for _ in pictures])
        if vae is not None and chosen.any():
            with torch.no_grad(), autocast(torch.device("cpu"), cpu_precision()):
                again = vae.decode(vae.encode(stack[chosen]).latent_dist.mean).sample
            stack[chosen] = again.float().clamp(-1, 1)
        arrays = ((stack + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for picture, array in zip(pictures, arrays, strict=True):
            parts = windows(Image.fromarray(array), len(picture.things))
            images += parts
            truths += [labels(thing, picture.backdrop) for thing in picture.things]
    return images, truths


def empty_examples(
    renderer: Renderer, random: Random, count: int
) -> tuple[list[Image.Image], list[tuple[int, int, int]]]:
    """Windows in which there is nothing."""
    images, truths = [], []
    for _ in range(count):
        picture = renderer.scene(random, SEEN, SIZE, SIZE)
        canvas = renderer.backdrop(picture.backdrop, SIZE, SIZE, random)
        images.append(Image.fromarray(canvas.round().astype(np.uint8)))
        truths.append(labels(None, picture.backdrop))
    return images, truths


def softened(image: Image.Image, random: Random) -> Image.Image:
    """A picture as soft as a generated one may be."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.005, 0.019) * SIZE))


def train_judge(
    renderer: Renderer, folder: Path, name: str, steps: int = 1500, start: Path | None = None, report: Report = print
) -> None:
    """Train one judge into ``folder/judges/<name>.safetensors``, going on from its state if there is one.

    ``start`` is a folder with judges to begin with, also such for half the side.
    """
    kind = KINDS[name]
    torch.manual_seed(kind.seed)
    judge = CLASSIFIERS[name]()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    path, step, spent = folder / f"judge-{name}.state.safetensors", 0, 0.0
    if path.exists():
        tensors, meta = load_state(path, optimizer)
        judge.load_state_dict(tensors)
        step, spent = meta["step"], meta["spent"]
    elif start:
        load_coarse(judge, start / "judges" / f"{name}.safetensors")
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    last = time.monotonic()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = (7e-4 if start else 1.5e-3) * min(1.0, (step + 1) / 100) * (1 - step / steps) + 1e-6
        random = Random(f"judge/{name}/{step}")
        images, truths = examples(renderer, random, 60, vae, kind.round_trip)
        more, none = empty_examples(renderer, random, 4)
        images, truths = images + more, truths + none
        images = [softened(image, random) if random.random() < kind.blur else image for image in images]
        inputs = tensor_of(images)
        generator = torch.Generator().manual_seed(step)
        inputs = inputs + torch.randn(inputs.shape, generator=generator) * kind.noise / 127.5 * random.random()
        truth = dict(zip(HEADS, torch.tensor(truths).unbind(1), strict=True))
        with autocast(torch.device("cpu"), cpu_precision()):
            answers = judge(inputs)
        loss = sum(
            (F.cross_entropy(answers[head].float(), truth[head], label_smoothing=0.05) for head in HEADS),
            start=torch.zeros(()),
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        step += 1
        now = time.monotonic()
        spent, last = spent + now - last, now
        if step % 100 == 0 or step == steps:
            right = {h: f"{float((answers[h].argmax(1) == truth[h])[truth[h] >= 0].float().mean()):.2f}" for h in HEADS}
            report(f"judge {name} step {step}/{steps} {spent / 60:.1f} min loss {float(loss.detach()):.3f} {right}")
        if step % 400 == 0 or step == steps:
            save_state(path, dict(judge.state_dict()), optimizer, {"step": step, "spent": spent})
            last = time.monotonic()
    (folder / "judges").mkdir(exist_ok=True)
    write_tensors(
        folder / "judges" / f"{name}.safetensors",
        {n: v.half() if v.is_floating_point() else v for n, v in judge.state_dict().items()},
        {"steps": str(steps), "minutes": f"{spent / 60:.1f}"},
    )
