"""Two independent judges of generated pictures: which class, which colour, which backdrop.

They differ in architecture, seed and augmentations. One may choose settings such as the guidance, the other
gives the final figures, so that nothing is tuned on the figure that is reported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from torch import Tensor, nn

from ... import pocket
from ...files import read_tensors, write_tensors
from ...training.state import load_state, save_state
from . import puppets
from .render import Picture, Renderer, WorldConfig
from .vae import Report
from .world import CLASSES, COLOURS, PLAIN, SETTINGS, Backdrop, Thing

SIZE = 64
TRAINED = 40  # classes of the curriculum
NOUNS = (*list(CLASSES)[:TRAINED], *puppets.NOUNS)
TINTS = (*COLOURS, "own")
BACKDROPS = (*SETTINGS, *PLAIN)
HEADS = {"noun": len(NOUNS) + 1, "colour": len(TINTS), "backdrop": len(BACKDROPS)}  # the last noun is "nothing"
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


def windows(picture: Image.Image, count: int) -> list[Image.Image]:
    """The picture cut into ``count`` windows from left to right, a little wider than their share, 64×64 each."""
    if count == 1:
        return [picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)]
    room = picture.width / count
    out = []
    for index in range(count):
        left, right = max(0.0, (index - 0.08) * room), min(picture.width, (index + 1.08) * room)
        box = (left, 0.0, right, float(picture.height))
        out.append(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))
    return out


def labels(thing: Thing | None, backdrop: Backdrop) -> tuple[int, int, int]:
    """Indices of the three heads; −100 where nothing can be said."""
    place = BACKDROPS.index(backdrop.setting or backdrop.colour)
    if thing is None:
        return len(NOUNS), -100, place
    return NOUNS.index(thing.noun), TINTS.index(thing.colour or "own"), place


class Plain(nn.Module):
    """Convolutions in pairs, batch norm, max pooling: in the manner of VGG."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 160)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for width in widths:
            for _ in range(2):
                layers += [nn.Conv2d(inside, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                inside = width
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(inside * 16, size) for name, size in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = F.dropout(self.body(images).flatten(1), 0.3, self.training)
        return {name: head(features) for name, head in self.heads.items()}


class Depthwise(nn.Module):
    """Large depthwise kernels between pointwise layers, group norm, strided patches: in the manner of ConvNeXt."""

    def __init__(self, widths: tuple[int, ...] = (48, 96, 192), depth: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=4)]
        for index, width in enumerate(widths):
            if index:
                layers += [nn.GroupNorm(1, widths[index - 1]), nn.Conv2d(widths[index - 1], width, 2, stride=2)]
            layers += [Mixer(width) for _ in range(depth)]
        self.body = nn.Sequential(*layers, nn.GroupNorm(1, widths[-1]))
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1] * 16, size) for name, size in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images).flatten(1)
        return {name: head(features) for name, head in self.heads.items()}


class Mixer(nn.Module):
    """A 7×7 depthwise convolution and two pointwise ones, with a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.GELU(),
            nn.Conv2d(3 * width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


@dataclass(frozen=True)
class Kind:
    """How one judge is built and what its training pictures go through."""

    build: type[nn.Module]
    seed: int
    blur: float  # share of softened pictures
    noise: float  # standard deviation of pixel noise
    round_trip: float  # share through the VAE


KINDS = {"chooser": Kind(Plain, 1, 0.5, 0.0, 0.4), "referee": Kind(Depthwise, 2, 0.3, 6.0, 0.6)}


def tensor_of(images: Sequence[Image.Image]) -> Tensor:
    """(n, 3, 64, 64) in −1…1."""
    stack = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
    return torch.from_numpy(stack).permute(0, 3, 1, 2) / 127.5 - 1


def examples(
    renderer: Renderer, random: Random, count: int, vae: AutoencoderKL | None, share: float
) -> tuple[list[Image.Image], list[tuple[int, int, int]]]:
    """Windows of true scenes with their labels, a share of the scenes through the VAE's round trip."""
    images: list[Image.Image] = []
    truths: list[tuple[int, int, int]] = []
    for width in (64, 128):
        pictures: list[Picture] = []
        found = len(images)
        while sum(len(p.things) for p in pictures) + found < count * (1 if width == 128 else 0.5):
            pictures.append(renderer.scene(random, SEEN, width, SIZE))
        stack = torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
        chosen = torch.tensor([vae is not None and random.random() < share for _ in pictures])
        if vae is not None and chosen.any():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
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
        picture = renderer.scene(random, SEEN, 64, SIZE)
        canvas = renderer.backdrop(picture.backdrop, 64, SIZE, random)
        images.append(Image.fromarray(canvas.round().astype(np.uint8)))
        truths.append(labels(None, picture.backdrop))
    return images, truths


def train_judge(renderer: Renderer, folder: Path, name: str, steps: int = 1500, report: Report = print) -> None:
    """Train one judge into ``folder/judges/<name>.safetensors``, going on from its state if there is one."""
    kind = KINDS[name]
    torch.manual_seed(kind.seed)
    judge = kind.build()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    path, step, spent = folder / f"judge-{name}.state.safetensors", 0, 0.0
    if path.exists():
        tensors, meta = load_state(path, optimizer)
        judge.load_state_dict(tensors)
        step, spent = meta["step"], meta["spent"]
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    last = time.monotonic()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 100) * (1 - step / steps) + 1e-6
        random = Random(f"judge/{name}/{step}")
        images, truths = examples(renderer, random, 60, vae, kind.round_trip)
        more, none = empty_examples(renderer, random, 4)
        images, truths = images + more, truths + none
        images = [
            image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.2))) if random.random() < kind.blur else image
            for image in images
        ]
        inputs = tensor_of(images)
        generator = torch.Generator().manual_seed(step)
        inputs = inputs + torch.randn(inputs.shape, generator=generator) * kind.noise / 127.5 * random.random()
        truth = dict(zip(HEADS, torch.tensor(truths).unbind(1), strict=True))
        with torch.autocast("cpu", torch.bfloat16):
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


def load_judge(name: str, folder: Path | None = None) -> nn.Module:
    """A trained judge: the shipped one, or the one in a folder."""
    judge = KINDS[name].build()
    tensors, _ = read_tensors((folder or pocket.path() / "judges") / f"{name}.safetensors")
    judge.load_state_dict({n: v.float() if v.is_floating_point() else v for n, v in tensors.items()})
    return judge.eval().requires_grad_(False)


@dataclass(frozen=True)
class Verdict:
    """What a judge sees in one window."""

    noun: str | None
    colour: str
    backdrop: str


@torch.no_grad()
def judge_pictures(judge: nn.Module, pictures: Sequence[Image.Image], counts: Sequence[int]) -> list[list[Verdict]]:
    """Verdicts for every picture's windows from left to right, ``counts`` windows each."""
    parts = [window for picture, count in zip(pictures, counts, strict=True) for window in windows(picture, count)]
    answers: dict[str, list[int]] = {head: [] for head in HEADS}
    for start in range(0, len(parts), 64):
        for head, logits in judge(tensor_of(parts[start : start + 64])).items():
            answers[head] += logits.argmax(1).tolist()
    verdicts = [
        Verdict(NOUNS[n] if n < len(NOUNS) else None, TINTS[c], BACKDROPS[b])
        for n, c, b in zip(answers["noun"], answers["colour"], answers["backdrop"], strict=True)
    ]
    out = []
    for count in counts:
        out.append(verdicts[:count])
        verdicts = verdicts[count:]
    return out
