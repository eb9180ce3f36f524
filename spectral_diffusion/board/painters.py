"""What makes an entry's pictures: a base with something in it, or a program of somebody else's."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from ..config.scene import Scene
from ..core.errors import UserError
from ..core.files import write_json
from ..data.image_io import open_photo
from ..models.base import Base
from ..scenes.sampling import sample

LAST = 400  # characters of what a program said that an error repeats


@dataclass(frozen=True)
class Shot:
    """One picture to make."""

    prompt: str
    seed: int
    width: int
    height: int


class Painter(Protocol):
    """Makes pictures of some concepts.

    Attributes:
        seconds: that merging took; None if that is unknown.
        size: bytes of what a person keeps to make these pictures besides the base; None if that is unknown.
    """

    seconds: float | None
    size: int | None

    def paint(self, shots: Sequence[Shot]) -> list[Image.Image]:
        """One picture per shot."""
        ...


@dataclass
class BasePainter:
    """A base with adapters acting, or merged, or a pipeline from elsewhere."""

    base: Base
    scene: Scene
    seconds: float | None = 0.0
    size: int | None = 0

    def paint(self, shots: Sequence[Shot]) -> list[Image.Image]:
        """Pictures of one size are sampled together."""
        made: dict[Shot, Image.Image] = {}
        for size in dict.fromkeys((shot.width, shot.height) for shot in shots):
            mine = [shot for shot in dict.fromkeys(shots) if (shot.width, shot.height) == size]
            scene = self.scene.model_copy(update={"width": size[0], "height": size[1]})
            prompts = [self.base.spell(shot.prompt) for shot in mine]
            made |= zip(mine, sample(self.base, prompts, [shot.seed for shot in mine], scene), strict=True)
        return [made[shot] for shot in shots]


@dataclass
class StockPainter(BasePainter):
    """A transformer's stock pipeline, in which other programs' LoRA layers are: the base only encodes the prompts."""

    def paint(self, shots: Sequence[Shot]) -> list[Image.Image]:
        """One picture after the other."""
        pipeline, denoiser, images = self.base.pipeline, self.base.denoiser, []
        pipeline.set_progress_bar_config(disable=True)
        for shot in shots:
            size = (shot.height // denoiser.vae_scale, shot.width // denoiser.vae_scale)
            with torch.no_grad():
                prompt, empty = denoiser.encode([shot.prompt], size), denoiser.encode([""], size)
            images += pipeline(
                width=shot.width, height=shot.height, num_inference_steps=self.scene.num_inference_steps,
                generator=torch.Generator("cpu").manual_seed(shot.seed), **denoiser.embedding_options(prompt, empty),
                **denoiser.guidance_options(self.scene.guidance_scale),
            ).images  # fmt: skip
        return images


@dataclass
class CommandPainter:
    """A program that reads a job (JSON) and writes its pictures beside it.

    The job holds ``concepts`` (name, token, noun, photos), ``pictures`` (prompt, seed, width, height, file),
    ``num_inference_steps`` and ``guidance_scale``.
    """

    command: Sequence[str]
    concepts: Sequence[dict[str, str]]
    scene: Scene
    folder: Path
    timeout: float
    seconds: float | None = None
    size: int | None = None

    def paint(self, shots: Sequence[Shot]) -> list[Image.Image]:
        """Run the program once, in the entry's folder.

        Raises:
            UserError: it cannot run, fails, or leaves a picture out.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            pictures = [{**asdict(shot), "file": f"{index:05}.png"} for index, shot in enumerate(shots)]
            job: dict[str, Any] = {"concepts": list(self.concepts), "pictures": pictures}
            job |= {name: getattr(self.scene, name) for name in ("num_inference_steps", "guidance_scale")}
            write_json(folder / "job.json", job)
            words = [part.replace("{job}", str(folder / "job.json")) for part in self.command]
            try:
                done = subprocess.run(
                    words,
                    cwd=self.folder,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=self.timeout,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise UserError(f"The entry's command could not run to its end: {error}.") from error
            if done.returncode:
                said = " ".join((done.stderr or done.stdout).split())[-LAST:]
                raise UserError(f"The entry's command failed ({done.returncode}): {shlex.join(self.command)}: {said}")
            images = []
            for picture, shot in zip(pictures, shots, strict=True):
                file = folder / str(picture["file"])
                if not file.is_file():
                    raise UserError(f"The entry's command made no {file.name} ({json.dumps(shot.prompt)}).")
                image = open_photo(file)
                if image.size != (shot.width, shot.height):
                    raise UserError(
                        f"The entry's command made {file.name} {image.width}×{image.height}; the job says "
                        f"{shot.width}×{shot.height}."
                    )
                images.append(image)
            return images
