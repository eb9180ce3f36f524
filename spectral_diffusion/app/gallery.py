"""The pictures of the workspace: list, describe, restore into fields, download, delete."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from .. import pocket
from ..config.scene import Scene
from ..config.settings import build
from ..core.errors import UserError
from ..core.files import write_bytes
from .adapters import read_adapter, workspace_adapters
from .bases import FUSED, fused_folders
from .canvas import MOST_SIDE, as_url, png_of
from .generation import SKETCHES
from .sentences import rendered
from .trash import discard
from .workspace import Workspace, visible

PAGE = 24
RUN = re.compile(r"(?<=-\d{3})-\d+$")  # a picture's seed, after the time of its run
SCENES = "scenes"  # the folder of downloads inside that of the pictures
BACKDROP = 384  # longer side in pixels of a picture behind the canvas
MOST_BYTES = 50_000_000  # of a picture or control image that is read
FIELDS = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "sampler", "quantization", "width",
          "height", "global_prompt_weight", "region_isolation", "region_start", "region_end")  # fmt: skip


@dataclass(frozen=True)
class Refill:
    """The page's fields that generate a picture again, and notes on what they cannot hold.

    ``fields`` holds the scene's own; ``canvas`` is the canvas's value.
    """

    base: str
    adapters: list[str]
    strength: str
    canvas: dict[str, Any]
    sketch_weight: float
    keypose_weight: float
    sketch_adapter: str
    keypose_adapter: str
    seed: int
    fields: dict[str, Any]
    notes: list[str]


def picture_files(workspace: Workspace) -> dict[str, Path]:
    """The pictures by their files' names without ending: the newest run first, the pictures of a run in their order."""
    entries = []
    for path in visible(workspace.pictures):
        if path.suffix == ".png":
            with suppress(OSError):  # deleted meanwhile
                entries.append((path.stat().st_mtime_ns, path.stem, path))
    runs: dict[str, list[tuple[int, str, Path]]] = {}
    for entry in sorted(entries):
        runs.setdefault(RUN.sub("", entry[1]), []).append(entry)
    newest = sorted(runs.values(), key=lambda run: run[-1][:2], reverse=True)
    return {stem: path for run in newest for _, stem, path in run}


def picture_file(workspace: Workspace, name: str | None) -> Path:
    """The file of a listed picture.

    Raises:
        UserError: none is chosen, or there is none of that name.
    """
    if not name:
        raise UserError("No picture is chosen; click on one below.")
    known = picture_files(workspace)
    if name not in known:
        raise UserError(f"There is no picture '{name[:60]}' any more; choose another.")
    return known[name]


def page_of(workspace: Workspace, number: int) -> tuple[list[Path], int, list[str]]:
    """The pictures of a page (from 1), the number of pages, and a sentence for each unreadable file."""
    good, problems = [], []
    for path in picture_files(workspace).values():
        try:
            with Image.open(path, formats=["PNG"]) as image:
                if max(image.size) > 8192:
                    raise ValueError
            good.append(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            problems.append(f"{path.name} in the folder of pictures is no readable picture.")
    pages = max(1, -(-len(good) // PAGE))
    number = min(max(1, number), pages)
    return good[(number - 1) * PAGE : number * PAGE], pages, problems


def scene_inside(workspace: Workspace, name: str | None) -> Scene:
    """The scene that a listed picture was generated from.

    Raises:
        UserError: there is no such picture, or it holds no scene of this program.
    """
    from ..scenes.png_metadata import read_settings  # imports torch, which a page need not wait for

    path = picture_file(workspace, name)
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path.name} is too large to be read.")
    return build(Scene, read_settings(path), file=path.name)


def picture_details(workspace: Workspace, name: str | None) -> list[tuple[str, str]]:
    """The settings of a picture as pairs of a heading and a text.

    Raises:
        UserError: see :func:`scene_inside`.
    """
    scene = scene_inside(workspace, name)
    names = _names(workspace)
    rows = [("Prompt", scene.prompt)]
    for number, region in enumerate(scene.regions, 1):
        who = ", ".join(_short(file, names) for file in region.adapters)
        rows.append((f"Box {number}", region.prompt + (f" (with {who})" if who else "")))
    if scene.negative_prompt:
        rows.append(("Negative prompt", scene.negative_prompt))
    rows.append(("Base", _base_name(workspace, scene.base)))
    if scene.adapters:
        rows.append(("Concepts", ", ".join(f"{_short(f, names)} at {s}" for f, s in scene.adapters.items())))
    if scene.controls:
        rows.append(
            (
                "Control images",
                ", ".join(f"a {control.kind} at {control.conditioning_scale:g}" for control in scene.controls),
            )
        )
    rows.append(("Seed", str(scene.seed if scene.only_seed is None else scene.only_seed)))
    size = f", {scene.width}×{scene.height}" if scene.width and scene.height else ""
    rows.append(
        ("Sampling", f"{scene.num_inference_steps} steps, guidance {scene.guidance_scale:g}, {scene.sampler}{size}")
    )
    return rows


def refill(workspace: Workspace, name: str | None) -> Refill:
    """The page's fields that generate a picture again, bit for bit if ``notes`` is empty.

    Raises:
        UserError: see :func:`scene_inside`.
    """
    return SceneReader(workspace, scene_inside(workspace, name)).refill()


def boxes_of_places(workspace: Workspace, name: str | None) -> tuple[Refill, str]:
    """The page's fields with boxes where a picture's concepts were found, and the picture as a data URL.

    Every concept acts in its own box alone, and the boxes' prompts are what the found places read.

    Raises:
        UserError: no places were found in it, or see :func:`scene_inside`.
    """
    from ..scenes.auto_regions import own_prompt
    from ..scenes.png_metadata import read_places

    scene, path = scene_inside(workspace, name), picture_file(workspace, name)
    places = read_places(path)
    if not places:
        raise UserError(
            "No places were found in this picture: they are where the prompt names two concepts or more and no box "
            "is drawn."
        )
    filled = SceneReader(workspace, scene).refill()
    names = {read_adapter(workspace, adapter).token.lower(): adapter for adapter in filled.adapters}
    regions = [
        {
            "box": list(box),
            "prompt": own_prompt(scene.prompt, token, list(places)),
            "concept": names.get(token.lower(), ""),
        }
        for token, box in places.items()
    ]
    bound = {region["concept"] for region in regions}
    filled = replace(
        filled,
        adapters=[adapter for adapter in filled.adapters if adapter not in bound],
        canvas={**filled.canvas, "regions": regions},
    )
    with Image.open(path) as image:
        image.thumbnail((BACKDROP, BACKDROP))
        return filled, as_url(png_of(image.convert("RGB")))


@dataclass
class ControlDrawing:
    """What the page has of a kind of control image: the drawing as a data URL, and how it is used."""

    url: str = ""
    weight: float = 1.0
    adapter: str = ""


class SceneReader:
    """Reads the page's fields from a scene; ``notes`` says what the page cannot hold of it."""

    def __init__(self, workspace: Workspace, scene: Scene) -> None:
        self.workspace, self.scene = workspace, scene
        self.names = _names(workspace)
        self.strengths: dict[str, float] = {}
        self.notes: list[str] = []

    def refill(self) -> Refill:
        """All fields."""
        scene = self.scene
        adapters = self.known_adapters(scene.adapters)
        regions = self.regions()
        drawings = self.drawings()
        sketch, keypose = drawings["sketch"], drawings["keypose"]
        if len(scene.every_seed()) > 1:
            self.notes.append("It was generated together with others; alone its last bits may differ.")
        return Refill(
            base=_base_name(self.workspace, scene.base),
            adapters=adapters,
            strength=_written(self.strengths),
            canvas={"strokes": sketch.url, "keypose": keypose.url, "regions": regions},
            sketch_weight=sketch.weight,
            keypose_weight=keypose.weight,
            sketch_adapter=sketch.adapter,
            keypose_adapter=keypose.adapter,
            seed=scene.seed if scene.only_seed is None else scene.only_seed,
            fields={field: getattr(scene, field) for field in FIELDS},
            notes=self.notes,
        )

    def known_adapters(self, adapters: Mapping[str, Any]) -> list[str]:
        """The names of those adapters that are in the workspace; records their strengths."""
        known = []
        for file, strength in adapters.items():
            name = self.names.get(_real(file))
            if name is None:
                self.notes.append(f"The adapter {Path(file).stem} is not in this workspace any more; it is left out.")
                continue
            if isinstance(strength, dict):
                self.notes.append(f"{name} had strengths per network; the page has one for both.")
                strength = strength.get("unet", 1.0)
            if self.strengths.setdefault(name, strength) != strength:
                self.notes.append(f"{name} had several strengths; the page has one.")
            known.append(name)
        return known

    def regions(self) -> list[dict[str, Any]]:
        """The boxes of the canvas, each with its prompt and concept."""
        boxes = []
        for number, region in enumerate(self.scene.regions, 1):
            if region.box is None:
                self.notes.append(f"Region {number} is a painted mask, which the canvas cannot hold; it is left out.")
                continue
            adapters = self.known_adapters(region.adapters)
            if len(adapters) > 1 or region.negative_prompt or region.conditioning_scale != 1:
                self.notes.append(f"Region {number} has more settings than the canvas can hold.")
            box = list(region.fractions(self.scene.width or 1, self.scene.height or 1))
            boxes.append({"box": box, "prompt": region.prompt, "concept": adapters[0] if adapters else ""})
        return boxes

    def drawings(self) -> dict[str, ControlDrawing]:
        """The first drawing of each kind of control image."""
        drawings = {"sketch": ControlDrawing(), "keypose": ControlDrawing()}
        for control in self.scene.controls:
            drawing = drawings[control.kind]
            if drawing.url:
                self.notes.append(f"There are several drawings of the kind {control.kind}; the canvas holds the first.")
                continue
            try:
                drawing.url = as_url(_kept_drawing(self.workspace, control.file))
            except UserError as error:
                self.notes.append(rendered(error))
            drawing.weight, drawing.adapter = control.conditioning_scale, control.adapter or ""
        return drawings


def download_picture(workspace: Workspace, name: str | None) -> tuple[Path, Path]:
    """A picture's file, and a zip beside it with picture, control images and ``scene.yaml`` for ``generate`` elsewhere.

    Raises:
        UserError: see :func:`scene_inside`.
    """
    scene, path = scene_inside(workspace, name), picture_file(workspace, name)
    settings = scene.model_dump(mode="json", exclude={"output", "device"}, exclude_defaults=True)
    needed = [Path(file).name for file in [*scene.adapters, *(f for region in scene.regions for f in region.adapters)]]
    settings |= {"adapters": {Path(file).name: strength for file, strength in scene.adapters.items()}}
    for region in settings.get("regions", []):
        region["adapters"] = {Path(file).name: strength for file, strength in region.get("adapters", {}).items()}
    with_it: dict[str, bytes] = {path.name: path.read_bytes()}
    for number, condition in enumerate(settings.get("controls", [])):
        file = Path(condition["file"])
        inside = f"drawing-{number + 1}.png"  # a drawing's own name may be the picture's
        with suppress(UserError):
            with_it[inside] = _kept_drawing(workspace, file)
        condition["file"] = inside
    if not pocket.is_pocket(scene.base):
        needed.append(Path(scene.base).name)
        settings["base"] = Path(scene.base).name if Path(scene.base).is_absolute() else scene.base
    beside = f" Put beside this file: {', '.join(dict.fromkeys(needed))}." if needed else ""
    text = f"# spectral-diffusion generate scene.yaml draws this picture again.{beside}\n" + yaml.safe_dump(
        settings, allow_unicode=True, sort_keys=False
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file_name, data in {"scene.yaml": text.encode(), **with_it}.items():
            archive.writestr(zipfile.ZipInfo(file_name), data)
    packed = workspace.pictures / SCENES / f"{path.stem}.zip"
    write_bytes(packed, buffer.getvalue())
    return path, packed


def delete(workspace: Workspace, name: str | None) -> str:
    """Move a listed picture to the trash, with its control images if no other picture uses them; returns a message.

    Raises:
        UserError: there is none of that name, or it cannot be moved.
    """
    path = picture_file(workspace, name)
    run = "-".join(path.stem.split("-")[:3])  # day, time and thousandths; a seed may follow
    discard(workspace, path.stem, [path, workspace.pictures / SCENES / f"{path.stem}.zip"])
    if not any(other == run or other.startswith(f"{run}-") for other in picture_files(workspace)):
        files = [workspace.pictures / SKETCHES / file for file in (f"{run}.png", f"{run}-keypose.png")]
        if any(file.exists() for file in files):
            discard(workspace, f"{run}-sketches", files)
    return f"Moved {path.stem} to the trash."


def _kept_drawing(workspace: Workspace, file: Path) -> bytes:
    """A control image of the workspace as a PNG; nothing outside is read.

    Raises:
        UserError: it is missing, or not a readable PNG.
    """
    folder = workspace.pictures / SKETCHES
    kept = {_real(path): path for path in visible(folder)}
    path = kept.get(_real(file))
    if path is None:
        raise UserError(f"The drawing {Path(file).name} is not in this workspace any more; draw it again.")
    try:
        data = path.read_bytes() if path.stat().st_size <= MOST_BYTES else b""
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if max(image.size) <= MOST_SIDE:
                return data
            image.thumbnail((MOST_SIDE, MOST_SIDE))
            return png_of(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"The drawing {path.name} is damaged; draw it again.") from error


def _real(file: str | Path) -> str:
    return str(Path(file).absolute())


def _names(workspace: Workspace) -> dict[str, str]:
    """The workspace's adapters by their files' paths."""
    return {_real(path): name for name, path in workspace_adapters(workspace).items()}


def _short(file: str, names: Mapping[str, str]) -> str:
    return names.get(_real(file), Path(file).stem)


def _base_name(workspace: Workspace, base: str) -> str:
    """A base by its name in the page's list."""
    fused = {_real(path): name for name, path in fused_folders(workspace).items()}
    return FUSED + fused[_real(base)] if _real(base) in fused else base


def _written(strengths: Mapping[str, float]) -> str:
    """Strengths as :func:`.fusing.parse_strengths` reads them back."""
    if set(strengths.values()) <= {1.0}:
        return "1"
    return ", ".join(f"{name}={value!r}" for name, value in strengths.items())
