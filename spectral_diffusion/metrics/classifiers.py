"""Two independent classifiers of pocket pictures: class, color, backdrop.

They differ in architecture, seed and augmentations (the pocket base's makers trained them). One may choose settings
such as the guidance, the other gives the final figures, so that nothing is tuned on the figure that is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import pocket
from ..core.files import read_tensors
from .detail_stem import DetailStem

SIZE = 128  # of the pictures that they see, in pixels
NOUNS = (
    "octopus", "dog", "cat", "elephant", "giraffe", "rabbit", "penguin", "duck", "turtle", "butterfly", "fish",
    "crab", "apple", "banana", "car", "airplane", "rocket", "sailboat", "teapot", "house", "tree", "guitar",
    "mushroom", "backpack", "cup", "snail", "owl", "cactus", "umbrella", "bell", "crown", "hat", "chair",
    "pineapple", "pumpkin", "cupcake", "balloon", "snowman", "dinosaur", "flamingo", "person", "robot", "bear",
)  # fmt: skip
TINTS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "own",
)  # fmt: skip
BACKDROPS = (
    "grass", "beach", "sky", "sea", "night", "snow", "table", "desert", "red", "orange", "yellow", "green", "blue",
    "purple", "pink", "brown", "black", "white", "gray",
)  # fmt: skip
HEADS = {"noun": len(NOUNS) + 1, "colour": len(TINTS), "backdrop": len(BACKDROPS)}  # the last noun is "nothing"


def windows(picture: Image.Image, count: int) -> list[Image.Image]:
    """The picture cut into ``count`` windows from left to right, a little wider than their share, 128×128 each."""
    if count == 1:
        return [picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)]
    room = picture.width / count
    out = []
    for index in range(count):
        left, right = max(0.0, (index - 0.08) * room), min(picture.width, (index + 1.08) * room)
        box = (left, 0.0, right, float(picture.height))
        out.append(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))
    return out


class VggLike(nn.Module):
    """Convolutions in pairs, batch norm, max pooling: in the manner of VGG."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 160)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for width in widths:
            for _ in range(2):
                convolution = nn.Conv2d(inside, width, 3, padding=1, bias=False)
                layers += [convolution if layers else DetailStem(convolution), nn.BatchNorm2d(width), nn.ReLU()]
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
        layers: list[nn.Module] = [DetailStem(nn.Conv2d(3, widths[0], 4, stride=4))]
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


CLASSIFIERS: dict[str, type[nn.Module]] = {"chooser": VggLike, "referee": Depthwise}


def tensor_of(images: Sequence[Image.Image]) -> Tensor:
    """(n, 3, 128, 128) in −1…1."""
    stack = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
    return torch.from_numpy(stack).permute(0, 3, 1, 2) / 127.5 - 1


def load_classifier(name: str, folder: Path | None = None) -> nn.Module:
    """A trained judge, ``chooser`` or ``referee``: the shipped one, or the one in a folder."""
    judge = CLASSIFIERS[name]()
    tensors, _ = read_tensors((folder or pocket.path() / "judges") / f"{name}.safetensors")
    judge.load_state_dict({n: v.float() if v.is_floating_point() else v for n, v in tensors.items()})
    return judge.eval().requires_grad_(False)


@dataclass(frozen=True)
class Prediction:
    """A classifier's answer for one window."""

    noun: str | None
    colour: str
    backdrop: str


@torch.no_grad()
def classify_images(judge: nn.Module, pictures: Sequence[Image.Image], counts: Sequence[int]) -> list[list[Prediction]]:
    """Verdicts for every picture's windows from left to right, ``counts`` windows each."""
    parts = [window for picture, count in zip(pictures, counts, strict=True) for window in windows(picture, count)]
    answers: dict[str, list[int]] = {head: [] for head in HEADS}
    for start in range(0, len(parts), 64):
        for head, logits in judge(tensor_of(parts[start : start + 64])).items():
            answers[head] += logits.argmax(1).tolist()
    verdicts = [
        Prediction(NOUNS[n] if n < len(NOUNS) else None, TINTS[c], BACKDROPS[b])
        for n, c, b in zip(answers["noun"], answers["colour"], answers["backdrop"], strict=True)
    ]
    out = []
    for count in counts:
        out.append(verdicts[:count])
        verdicts = verdicts[count:]
    return out
