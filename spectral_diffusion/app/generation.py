"""The generate tab without gradio: from a prompt, concepts and a canvas to pictures in the workspace."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from .. import pocket
from ..config.presets import preset_part
from ..config.scene import Scene
from ..config.settings import build
from ..core.assets import preset_of
from ..core.errors import Cancelled, UserError
from ..core.files import write_bytes
from ..core.hooks import QUIET, Event, Hooks, Progress
from .adapters import adapter_file, read_adapter, workspace_adapters
from .base_cache import BaseCache
from .bases import FUSED, base_path, fused_names
from .canvas import Canvas, CanvasRegion
from .concepts import known_concepts
from .fusing import SPARING, parse_strengths
from .presets import generate_parts, preset_of_base
from .sentences import errors_in_app, in_app
from .speeds import expected, line, measured, work_of_pictures
from .workspace import Workspace, filled

SKETCHES = "sketches"  # the folder of control images inside that of the pictures
PREVIEWS = 6  # of one picture, about
DEFAULT_SIDE, POCKET_SIDE = 512, 128
LARGE = 256  # from this side in pixels on, a base runs in half precision on a GPU
UNKNOWN = re.compile(r"Note: (\S+) is no token of this base")


@dataclass(frozen=True)
class GeneratedPictures:
    """Written pictures and a message."""

    pictures: list[Path]
    message: str


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate: the page's fields other than the scene's settings.

    Attributes:
        adapters: names of adapters that act everywhere; those bound to regions need not be among them.
        strength: one number for all, or ``rex=0.8, brew=1.2``.
        sketch_adapter, keypose_adapter: other T2I-Adapters than the base's own, by folder or hub id.
    """

    base: str | None = None
    adapters: Sequence[str] = ()
    strength: str | None = None
    canvas: Canvas = field(default_factory=Canvas)
    sketch_weight: float = 1.0
    keypose_weight: float = 1.0
    sketch_adapter: str | None = None
    keypose_adapter: str | None = None


def tokens(workspace: Workspace, base: str | None, chosen: Sequence[str] | None) -> dict[str, str]:
    """The tokens a prompt may use, with their class nouns.

    Raises:
        UserError: a chosen base or adapter is missing or damaged.
    """
    from ..merging.manifest import read_manifest  # imports torch, which a page need not wait for

    manifest = read_manifest(Path(base_path(workspace, base)))
    nouns = (
        {str(concept["token"]): str(concept["noun"]) for concept in manifest["concepts"].values()} if manifest else {}
    )
    for name in chosen or []:
        adapter = read_adapter(workspace, name)
        nouns[adapter.token] = adapter.noun
    return nouns


def generate(
    workspace: Workspace,
    request: GenerateRequest,
    hooks: Hooks = QUIET,
    preview: Callable[[list[Image.Image]], None] | None = None,
    keeper: BaseCache | None = None,
    **changes: Any,
) -> GeneratedPictures:
    """Generate into ``pictures/``. ``changes`` are scene settings; an empty one keeps the default.

    A stop is not an error: finished pictures are kept.

    Raises:
        UserError: anything the user can fix.
    """
    from ..scenes.generate import generate_to_file

    stem = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    notes: list[str] = []
    with errors_in_app(workspace, workspace.pictures.name):
        scene = requested_scene(
            workspace, request, workspace.pictures / f"{stem}.png", Hooks(notify=notes.append), **changes
        )
        every = max(1, round(scene.num_inference_steps / PREVIEWS))
        show = None if preview is None else lambda step, images: preview(images)
        with _kept(scene, _drawing_files(workspace, stem, request.canvas)):
            try:
                with (keeper or BaseCache()).acquire(
                    scene.base, scene.device, scene.dtype, scene.quantization, scene.layer_offload
                ) as base:
                    said = Hooks(progress=_of_all(scene, hooks), notify=notes.append, should_stop=hooks.should_stop)
                    with measured(workspace, speed_key(scene.base), _units(scene, base.size)):
                        generate_to_file(scene, said, show, base=base, every=every)
                message = "Generated {}."
            except Cancelled:
                message = "Stopped; {} finished before that."
    if len(scene.every_seed()) > 1:  # the contact sheet, which the page does not show
        scene.output.unlink(missing_ok=True)
    written = [path for path in picture_paths(scene) if path.exists()]
    notes.append(message.format(_counted(written)) if written else "Stopped.")
    return GeneratedPictures(written, "\n".join(in_app(_explained(workspace, note), workspace) for note in notes))


def speed_key(path: str) -> str:
    """What pictures of a base are measured as: a fusion is as quick as its base."""
    return f"generate {preset_of(path) or path}"


def _units(scene: Scene, side: int) -> float:
    """The work of a scene's pictures."""
    return work_of_pictures(
        scene.num_inference_steps, len(scene.every_seed()), scene.guidance_scale, len(scene.regions),
        scene.global_prompt_weight, scene.width or side, scene.height or side,
    )  # fmt: skip


def estimate(workspace: Workspace, base: str | None, boxes: int, **fields: Any) -> str:
    """How long the pictures of these fields will take, as a sentence; empty if it is not known.

    Args:
        fields: the scene's settings, as of :func:`generate`.
    """
    try:
        path, side = base_path(workspace, base), side_of(workspace, base)
        units = work_of_pictures(
            float(fields["num_inference_steps"]), float(fields["num_images"] or 1), float(fields["guidance_scale"]),
            boxes, float(fields["global_prompt_weight"] or 0), float(fields["width"] or side),
            float(fields["height"] or side),
        )  # fmt: skip
    except (UserError, TypeError, ValueError, KeyError):  # reported when it is generated
        return ""
    pictures = "this picture" if (fields["num_images"] or 1) == 1 else "these pictures"
    return line(expected(workspace, speed_key(path), units), pictures)


def _counted(written: Sequence[Path]) -> str:
    """The number and size of the pictures, since the page shows small ones enlarged."""
    with Image.open(written[0]) as image:
        size = f"{image.width}×{image.height} pixels"
    return f"1 picture of {size}" if len(written) == 1 else f"{len(written)} pictures of {size}"


def _explained(workspace: Workspace, note: str) -> str:
    """A note on an unknown token, with a remedy if it belongs to a concept of the workspace."""
    match = UNKNOWN.match(note)
    names = {token: name for name, (_, _, token) in known_concepts(workspace).items()} if match else {}
    if not match or match[1].lower() not in names:
        return note
    name = names[match[1].lower()]
    trained = name in workspace_adapters(workspace)
    why = "is not among the concepts chosen for it" if trained else "is not trained yet"
    what = "click its token to choose it" if trained else "train it in step 2, or wait until its training is done"
    return f"Note: {match[1]} was read as plain text, for '{name}' {why}: {what}."


def _of_all(scene: Scene, hooks: Hooks) -> Progress:
    """Turn the progress of single pictures into that of all of them."""
    before = [-scene.num_inference_steps]

    def tell(event: Event) -> None:
        if event.done == 1:
            before[0] += scene.num_inference_steps
        hooks.progress(
            Event(
                event.stage, before[0] + event.done, scene.num_inference_steps * len(scene.every_seed()), event.metrics
            )
        )

    return tell


@contextmanager
def _kept(scene: Scene, files: dict[Path, bytes]) -> Iterator[None]:
    """Write the control images of a scene, and remove them again if no picture is generated."""
    try:
        for file, data in files.items():
            write_bytes(file, data)
        yield
    finally:
        if not any(path.exists() for path in picture_paths(scene)):
            for file in files:
                with suppress(OSError):
                    file.unlink(missing_ok=True)


def requested_scene(
    workspace: Workspace,
    request: GenerateRequest,
    output: Path,
    hooks: Hooks = QUIET,
    **changes: Any,
) -> Scene:
    """The scene of the page's fields; the canvas's control images are files beside the output.

    Raises:
        UserError: anything the user can fix.
    """
    from ..merging.manifest import read_manifest

    if not str(changes.get("prompt") or "").strip():
        raise UserError("The prompt is empty; write what to generate, such as: a photo of a red dog on the beach.")
    path = base_path(workspace, request.base)
    manifest = read_manifest(Path(path))
    inside = set(manifest["concepts"]) if manifest else set()  # fused into the base
    bound = list(
        dict.fromkeys(
            region.concept for region in request.canvas.regions if region.concept and region.concept not in inside
        )
    )
    everywhere = [name for name in request.adapters if name not in bound and name not in inside]
    if both := [name for name in request.adapters if name in bound]:
        acts = "acts in its own box" if len(both) == 1 else "act in their own boxes"
        hooks.notify(f"Note: {' and '.join(both)} {acts} only, not everywhere.")
    named = [*everywhere, *bound]
    files = {name: str(adapter_file(workspace, name)) for name in named}
    foreign = [name for name in named if not is_base(workspace, request.base, read_adapter(workspace, name).base)]
    if manifest and foreign:
        raise UserError(
            f"{request.base} is fused from {', '.join(sorted(inside))}, and {foreign[0]} is not among them: remove it "
            f"from the boxes and the concepts, or choose the base {read_adapter(workspace, foreign[0]).base}."
        )
    strengths = parse_strengths(request.strength if named else "", named)
    _note_missing_tokens(workspace, [region for region in request.canvas.regions if region.concept in bound], hooks)
    layer: dict[str, Any] = {
        "base": path,
        "adapters": {files[name]: strengths[name] for name in everywhere},
        "regions": [
            {
                "box": region.box,
                "prompt": region.prompt,
                "adapters": {files[region.concept]: strengths[region.concept]} if region.concept in bound else {},
            }
            for region in request.canvas.regions
        ],
        "controls": _conditions(workspace, output.stem, request),
        "output": output,
    }
    # One picture at a time: each is shown early, takes least memory, and is reproducible from its seed alone.
    loading = as_loaded(workspace, request.base, str(changes.get("device") or "auto"))
    return build(Scene, {"batch_size": 1, **loading}, filled(changes), layer)


LOADING = ("dtype", "quantization", "layer_offload")  # the settings that say how a base is loaded


def as_loaded(workspace: Workspace, base: str | None, device: str = "auto") -> dict[str, Any]:
    """How a base is loaded on this computer: as the preset says that suits it, else in a precision that fits.

    Raises:
        UserError: no such fused folder.
    """
    preset = preset_of_base(workspace, base)
    known = generate_parts().get(preset, {}) if preset else {}
    precision = {"dtype": default_dtype(side_of(workspace, base), device)}
    return precision | {name: known[name] for name in LOADING if name in known}


def default_dtype(side: int, device: str) -> str:
    """Half precision for a large base on a CUDA GPU, where float32 takes twice the time and may not fit."""
    from ..core.machine import parse_device

    return "float16" if side >= LARGE and parse_device(device).type == "cuda" else "float32"


def picture_paths(scene: Scene) -> list[Path]:
    """The files of a scene's pictures, in order."""
    seeds = scene.every_seed()
    if len(seeds) == 1:
        return [scene.output]
    return [scene.output.with_name(f"{scene.output.stem}-{seed}.png") for seed in seeds]


def side_of(workspace: Workspace, base: str | None) -> int:
    """The native side in pixels of a base, without loading it; 512 if unknown."""
    try:
        name = base_path(workspace, base)
    except UserError:
        return DEFAULT_SIDE
    if pocket.is_pocket(name):
        return POCKET_SIDE
    from ..models.loading import size_from_configs

    return size_from_configs(name) or DEFAULT_SIDE


def sampling_of(workspace: Workspace, base: str | None, now: tuple[float, ...]) -> tuple[float, ...]:
    """Steps, guidance and isolation of regions for a base: its defaults replace another base's, the user's own stay."""

    def values(settings: Mapping[str, Any]) -> tuple[float, ...]:
        return settings["num_inference_steps"], settings["guidance_scale"], settings.get("region_isolation", 0.0)

    large = preset_part(SPARING, "generate")
    try:
        preset = preset_of_base(workspace, base)
    except UserError:
        return now
    suits = generate_parts().get(preset, large) if preset else large
    known = [values(part) for part in generate_parts().values()]
    choices = zip(now, values(suits), *known, strict=True)  # another base's default gives way, a person's own stays
    return tuple(suited if value in defaults else value for value, suited, *defaults in choices)


def is_base(workspace: Workspace, base: str | None, name: str) -> bool:
    """Whether a base by its name on the page is the one with that name or path."""
    try:
        return base_path(workspace, base) == name
    except UserError:
        return False


def may_fit(workspace: Workspace, base: str | None, name: str, distinct: Collection[str]) -> bool:
    """Whether adapters of the base ``name`` may fit a base by its name on the page.

    Args:
        distinct: names and paths of different models. Others may be of one model, such as a path and a hub id.
    """
    try:
        path = base_path(workspace, base)
    except UserError:  # reported on generating
        return True
    return path == name or not (path in distinct and name in distinct)


def chosen_base(workspace: Workspace, name: str) -> str:
    """The base that a listed adapter was trained on, by its name on the page.

    Raises:
        UserError: there is no such adapter, or it is damaged.
    """
    base = Path(read_adapter(workspace, name).base)
    inside = base.parent.resolve() == workspace.fused.resolve() and base.name in fused_names(workspace)
    return FUSED + base.name if inside else read_adapter(workspace, name).base


def ratio_of(workspace: Workspace, base: str | None, width: float | None, height: float | None) -> float:
    """Width to height of the picture; an empty field means the base's native side."""
    side = side_of(workspace, base)
    return min(8.0, max(1 / 8, (width or side) / (height or side)))


def _drawing_files(workspace: Workspace, stem: str, canvas: Canvas) -> dict[Path, bytes]:
    """The canvas's control images by file."""
    folder = workspace.pictures / SKETCHES
    named = {folder / f"{stem}.png": canvas.strokes, folder / f"{stem}-keypose.png": canvas.keypose}
    return {file: data for file, data in named.items() if data}


def _conditions(workspace: Workspace, stem: str, request: GenerateRequest) -> list[dict[str, Any]]:
    conditions = []
    for file in _drawing_files(workspace, stem, request.canvas):
        keypose = file.stem.endswith("-keypose")
        weight, adapter = (
            (request.keypose_weight, request.keypose_adapter)
            if keypose
            else (request.sketch_weight, request.sketch_adapter)
        )
        conditions.append(
            {
                "file": file,
                "kind": "keypose" if keypose else "sketch",
                "conditioning_scale": weight,
                "adapter": adapter or None,
            }
        )
    return conditions


def _note_missing_tokens(workspace: Workspace, regions: Sequence[CanvasRegion], hooks: Hooks) -> None:
    """Note regions whose prompt does not name the token of their concept."""
    for region in regions:
        [token] = tokens(workspace, None, [str(region.concept)])
        if token not in region.prompt.lower():
            hooks.notify(f"Note: a box has the concept {region.concept}, but its prompt does not name {token}.")
