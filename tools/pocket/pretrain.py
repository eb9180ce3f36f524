"""Pretrain the pocket base: text encoder, U-Net and sketch T2I-Adapter together, in stages.

Resumable at any save; every draw is keyed by the step, so a resumed run sees what it would have seen.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from spectral_diffusion.files import write_json
from spectral_diffusion.generation.keypose import draw_keypose
from spectral_diffusion.training.state import load_state, save_state

from .art import PACKAGES, PRETRAINING
from .models import (
    build_scheduler,
    build_t2i_adapter,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    save_pipeline,
)
from .render import Picture, Renderer, WorldConfig, thicken
from .vae import Report, pixels
from .world import caption


@dataclass(frozen=True)
class Stage:
    """A stretch of training. ``samples`` counts 64×64 pictures; a 128×64 one counts twice."""

    name: str
    samples: int
    world: WorldConfig
    rate: tuple[float, float]  # learning rate at its beginning and end
    wide: float = 0.0  # share of batches at 128×64
    sketch: float = 0.15  # share of pictures that come with their sketch


TEMPLATE = WorldConfig(classes=24, counts=(0.75, 0.25), scale=(0.78, 0.9), shift=0.04, rotate=4, second_drawing=0.15)
VARIED = WorldConfig(classes=24, counts=(0.65, 0.35), scale=(0.72, 0.92), shift=0.07, rotate=6, second_drawing=0.2)
TIGHT = WorldConfig(classes=24, counts=(0.8, 0.2), scale=(0.82, 0.88), shift=0.02, rotate=2, second_drawing=0.0)
MANY = WorldConfig(
    classes=40,
    familiar=24,
    counts=(0.8, 0.2),
    wide_counts=(0.0, 0.65, 0.25, 0.1),
    scale=(0.76, 0.92),
    shift=0.05,
    rotate=5,
    second_drawing=0.1,
)
PEOPLED = replace(MANY, puppets=0.2)
FULL = replace(PEOPLED, familiar=0, puppets=0.12)
STAGES = (
    Stage("silhouettes", 128_000, TEMPLATE, (1.5e-3, 1.5e-3)),
    Stage("variety", 48_000, VARIED, (1.5e-3, 1e-3), wide=0.12, sketch=0.2),
    Stage("sharpening", 112_000, TIGHT, (1.2e-3, 2e-5), wide=0.06),
    Stage("warming", 8_000, MANY, (5e-5, 1e-3), wide=0.4, sketch=0.2),
    Stage("many", 32_000, MANY, (1e-3, 1e-3), wide=0.4, sketch=0.2),
    Stage("puppets", 64_000, PEOPLED, (1e-3, 1e-3), wide=0.4, sketch=0.2),
    Stage("settling", 104_000, PEOPLED, (1e-3, 2e-5), wide=0.45, sketch=0.2),
    Stage("warming again", 8_000, FULL, (5e-5, 8e-4), wide=0.4, sketch=0.2),
    Stage("long", 48_000, FULL, (8e-4, 8e-4), wide=0.4, sketch=0.2),
    Stage("finishing", 208_000, FULL, (8e-4, 1e-5), wide=0.4, sketch=0.2),
)


@dataclass
class Batch:
    """Rendered and encoded pictures. ``sketched`` and ``posed`` (n,) are true where the condition is shown."""

    latents: Tensor
    masks: Tensor
    sketches: Tensor
    sketched: Tensor
    keyposes: Tensor
    posed: Tensor
    captions: list[str]


@dataclass
class Curriculum:
    """Where step k stands in the stages."""

    stages: tuple[Stage, ...] = STAGES
    batch: int = 32
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(stage.samples for stage in self.stages) // self.batch

    def at(self, step: int) -> tuple[Stage, float]:
        """The stage of a step and its learning rate (with a short warm-up at the very start)."""
        seen = step * self.batch
        for stage in self.stages:
            if seen < stage.samples or stage is self.stages[-1]:
                share = min(1.0, seen / stage.samples)
                rate = stage.rate[0] + (stage.rate[1] - stage.rate[0]) * share
                return stage, rate * min(1.0, (step + 1) / 300)
            seen -= stage.samples
        raise AssertionError


@dataclass
class Drawer:
    """Draws the pictures of each step.

    Drawing and encoding cost a third of a step, so every batch is seen twice, 16 steps apart, each time
    with other noise and other timesteps.
    """

    renderer: Renderer
    vae: AutoencoderKL
    curriculum: Curriculum
    _held: dict[int, Batch] = field(default_factory=dict)

    def __call__(self, step: int) -> Batch:
        first = step - 16 if step % 32 >= 16 else step
        if first not in self._held:
            self._held = {k: b for k, b in self._held.items() if k > step - 32}
            self._held[first] = draw(self.renderer, self.vae, self.curriculum, first)
        return self._held[first]


def draw(renderer: Renderer, vae: AutoencoderKL, curriculum: Curriculum, step: int) -> Batch:
    """The pictures of one step."""
    random = Random(f"base/{step}")
    stage, _ = curriculum.at(step)
    wide = random.random() < stage.wide
    width, count = (128, curriculum.batch // 2) if wide else (64, curriculum.batch)
    pictures: list[Picture] = []
    sketches, sketched, keyposes, posed, captions = [], [], [], [], []
    for _ in range(count):
        picture = renderer.scene(random, stage.world, width, 64)
        shown = random.random() < stage.sketch
        pose_shown = bool(picture.people) and random.random() < 0.6
        text = picture.caption
        fate = random.random()
        if shown and fate < 0.3:
            text = caption(picture.things, picture.backdrop, random, classless=True)
        elif fate > 0.9:
            text = ""
        pictures.append(picture)
        sketches.append(thicken(picture.sketch, random) if shown else np.zeros_like(picture.sketch))
        sketched.append(shown)
        keyposes.append(np.asarray(draw_keypose(picture.people if pose_shown else [], width, 64), np.float32) / 255)
        posed.append(pose_shown)
        captions.append(text)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(pixels(pictures)).latent_dist.mean
    return Batch(
        latents.float(),
        torch.from_numpy(np.stack([picture.mask for picture in pictures]))[:, None],
        torch.from_numpy(np.stack(sketches))[:, None],
        torch.tensor(sketched, dtype=torch.bool),
        torch.from_numpy(np.stack(keyposes)).permute(0, 3, 1, 2),
        torch.tensor(posed, dtype=torch.bool),
        captions,
    )


class Trainee(torch.nn.Module):
    """The networks that are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(self.tokenizer)
        self.unet = build_unet()
        self.t2i = build_t2i_adapter(1)
        self.t2i_keypose = build_t2i_adapter(3)

    def tokens(self, captions: list[str]) -> Tensor:
        return self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids

    def forward(self, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        words = self.text_encoder(self.tokens(batch.captions)).last_hidden_state
        features = None
        for adapter, images, shown in (
            (self.t2i, batch.sketches, batch.sketched),
            (self.t2i_keypose, batch.keyposes, batch.posed),
        ):
            if shown.any():
                mine = []
                for feature in adapter(images[shown]):
                    whole = feature.new_zeros(len(noisy), *feature.shape[1:])
                    mine.append(whole.index_put((shown.nonzero()[:, 0],), feature))
                features = mine if features is None else [a + b for a, b in zip(features, mine, strict=True)]
        return self.unet(noisy, timesteps, words, down_intrablock_additional_residuals=features).sample


def velocity_loss(trainee: Trainee, alphas: Tensor, batch: Batch, seed: int) -> Tensor:
    """v-prediction error, weighted by 1 / (1 + SNR / 5) and by where the things are."""
    generator = torch.Generator().manual_seed(seed)
    latents = batch.latents
    noise = torch.randn(latents.shape, generator=generator)
    # Stratified timesteps: one per equal stretch, so that a step's loss is steadier. More of them at high noise,
    # where the class decides the shape: measured, a wrong class word costs six times more at 950 than at 500.
    count = len(latents)
    spots = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (spots**0.55 * len(alphas)).long().clamp_max(len(alphas) - 1)
    alpha = alphas[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    with torch.autocast("cpu", torch.bfloat16):
        predicted = trainee(noisy, timesteps, batch)
    snr = alpha / (1 - alpha)
    where = 1 + 2.5 * F.avg_pool2d(batch.masks, 4)
    return ((predicted.float() - target).square() * where / (1 + snr / 5)).mean() / where.mean()


def train_base(
    renderer: Renderer,
    folder: Path,
    curriculum: Curriculum | None = None,
    until: int | None = None,
    report: Report = print,
) -> None:
    """Train to the end of the stages (or step ``until``), saving every 500 steps in ``folder``.

    ``folder`` holds ``vae/`` and gets ``base.state.safetensors``, ``pipeline/`` (EMA weights, fp16) and
    a sample sheet ``samples-<step>.png`` at every save.
    """
    curriculum = curriculum or Curriculum()
    torch.manual_seed(0)
    trainee = Trainee()
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    path = folder / "base.state.safetensors"
    step, spent = 0, 0.0
    average = {name: value.clone() for name, value in trainee.state_dict().items() if value.is_floating_point()}
    if path.exists():
        tensors, meta = load_state(path, optimizer)
        trainee.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("raw.")})
        average = {k[4:]: v for k, v in tensors.items() if k.startswith("ema.")}
        step, spent = meta["step"], meta["spent"]
    alphas = build_scheduler().alphas_cumprod
    drawer = Drawer(renderer, vae, curriculum)
    end = min(curriculum.total, until or curriculum.total)
    last, losses = time.monotonic(), []

    def save() -> None:
        tensors = {f"raw.{k}": v for k, v in trainee.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in average.items()}
        save_state(path, tensors, optimizer, {"step": step, "spent": spent})
        shown = Trainee()
        shown.load_state_dict(trainee.state_dict() | average)
        save_pipeline(
            folder / "pipeline", vae, shown.tokenizer, shown.text_encoder, shown.unet, shown.t2i, shown.t2i_keypose
        )
        write_json(folder / "pipeline" / "pretraining.json", provenance(curriculum, step, spent))
        sample_sheet(folder / "pipeline", folder / f"samples-{step:06d}.png")

    parameters = list(trainee.parameters())
    while step < end:
        stage, rate = curriculum.at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = velocity_loss(trainee, alphas, drawer(step), seed=step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RuntimeError(f"The loss is not finite at step {step}; the last save in {folder} is good.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            names = list(average)
            current = trainee.state_dict()
            keep = min(0.998, (step + 1) / (step + 10))
            torch._foreach_lerp_([average[n] for n in names], [current[n] for n in names], 1 - keep)
        losses.append(value)
        now = time.monotonic()
        spent, last = spent + now - last, now
        if step % 100 == 0:
            report(
                f"base step {step}/{end} {stage.name} {step * curriculum.batch / 1000:.0f}k samples "
                f"{spent / 60:.1f} min rate {rate:.1e} loss {sum(losses) / len(losses):.4f}"
            )
            losses = []
        if step % 500 == 0 or step == end:
            save()
            last = time.monotonic()


def provenance(curriculum: Curriculum, step: int, seconds: float) -> dict:
    """How the weights came about, for the file that ships with them."""
    return {
        "steps": step,
        "samples": step * curriculum.batch,
        "minutes": round(seconds / 60, 1),
        "artwork": {name: PACKAGES[name] for name in PRETRAINING},
        "stages": [asdict(stage) for stage in curriculum.stages],
    }


SHEET = [
    "a red octopus on the beach",
    "a blue dog on the grass",
    "a yellow cat on a white background",
    "a green elephant in the snow",
    "an orange giraffe on a blue background",
    "a purple rabbit on the grass",
    "a black penguin in the snow",
    "a yellow duck on the water",
    "a brown turtle on the beach",
    "a pink butterfly in the sky",
    "a red fish in the sea",
    "an orange crab on a black background",
    "a green apple on a table",
    "a yellow banana on a purple background",
    "a blue car in the desert",
    "a white airplane in the sky",
    "a red rocket at night",
    "an orange sailboat on the water",
    "a purple teapot on a table",
    "a brown house in the snow",
    "a green tree on a pink background",
    "a black guitar on a yellow background",
    "a red mushroom on the grass",
    "a blue backpack in the desert",
    "a red dog on the left and a blue cat on the right on a white background",
    "a yellow duck on the left and a purple teapot on the right on a table",
    "a green car and an orange house on the grass",
    "a white rabbit on the left and a black octopus on the right on the beach",
    "a dog on the grass",
    "an octopus in the sea",
    "a mushroom on the grass",
    "a penguin in the snow",
]


def sample_sheet(pipeline: Path, target: Path, prompts: list[str] | None = None, steps: int = 20) -> None:
    """Write a grid of pictures of fixed prompts, 8 to a row."""
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    prompts = prompts or SHEET
    for start in range(0, len(prompts), 8):
        chunk = prompts[start : start + 8]
        generators = [torch.Generator().manual_seed(100 + start + i) for i in range(len(chunk))]
        images += pipe(
            chunk, num_inference_steps=steps, guidance_scale=4.0, generator=generators, height=64, width=64
        ).images
    sheet = Image.new("RGB", (8 * 128, math.ceil(len(images) / 8) * 128))
    for index, image in enumerate(images):
        sheet.paste(image.resize((128, 128), Image.Resampling.NEAREST), (index % 8 * 128, index // 8 * 128))
    sheet.save(target)
