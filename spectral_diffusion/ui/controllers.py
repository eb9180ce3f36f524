"""What the app does, without gradio: a workspace folder, and one function per step on the library's own calls."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from .. import resources
from ..adapter import Adapter
from ..config import FuseConfig, TrainConfig, build, read_yaml
from ..data.folder import SUFFIXES, Concept, load_concept, open_photo
from ..errors import UserError, nearest
from ..files import atomic, write_text
from ..formats.native import load_adapter
from ..fusion.recipe import RECIPE, fuse_to_folder, read_recipe
from ..generation.extract import clean_strokes
from ..generation.pipeline import generate_to_file
from ..generation.scene import Scene
from ..progress import Event, Progress, silent
from ..training.loop import Stopped
from ..training.run import state_path, train_to_file

THUMBNAIL = 256
FUSED = "fused/"  # marks a fused folder of the workspace among the bases
ADAPTER_COLUMNS = ("Adapter", "Token", "Noun", "Method", "Columns", "Rank", "Base")
STAGES = {
    "spectrum": "Decomposing the base's weights",
    "train": "Training",
    "fuse": "Fusing",
    "generate": "Drawing",
}


@dataclass(frozen=True)
class Workspace:
    """The one folder that the app writes to."""

    root: Path

    @property
    def concepts(self) -> Path:
        return self.root / "concepts"

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

    @property
    def fused(self) -> Path:
        return self.root / "fused"

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"


def sentence_of(error: BaseException) -> str:
    """One sentence for any error; a UserError has its own."""
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
    return f"Something unexpected went wrong ({reason}); the app goes on, and its console has the details."


def safe_name(text: str | None, what: str = "name") -> str:
    """A name that can be a file's name and nothing else.

    Raises:
        UserError: empty, or anything but letters, digits, ``-`` and ``_``.
    """
    name = (text or "").strip()
    if not name:
        raise UserError(f"The {what} is missing; write a short one such as rex.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
        raise UserError(f"'{name[:60]}' cannot be the {what}; use letters, digits, - and _ only, at most 40.")
    return name


class Teller:
    """Turns progress events into a line to show: what is done, the loss, and the time that is left."""

    def __init__(self, show: Callable[[int, int, str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._show, self._now = show, now
        self._stage, self._began, self._first = "", 0.0, 0

    def __call__(self, event: Event) -> None:
        if event.stage != self._stage:
            self._stage, self._began, self._first = event.stage, self._now(), event.done
        words = STAGES.get(event.stage, event.stage)
        if isinstance(loss := event.figures.get("loss"), float):
            words += f", loss {loss:.4f}"
        steps = event.done - self._first
        if steps > 0 and event.done < event.total:
            left = (self._now() - self._began) / steps * (event.total - event.done)
            words += f", {_duration(left)} left"
        self._show(event.done, event.total, words)


def _duration(seconds: float) -> str:
    return f"about {math.ceil(seconds / 60)} min" if seconds >= 90 else f"{math.ceil(seconds)} s"


# --- 1. concepts ---------------------------------------------------------------------------------------------


def concept_folders(workspace: Workspace) -> dict[str, Path]:
    """The person's own photo folders, then the ready-made ones, by name."""
    own = {path.name: path for path in _visible(workspace.concepts) if path.is_dir()}
    ready = {path.parent.name: path.parent for path in sorted(resources.concepts().glob("*/concept.yaml"))}
    return own | {name: path for name, path in ready.items() if name not in own}


def concept_folder(workspace: Workspace, name: str | None) -> Path:
    """The folder of a listed concept.

    Raises:
        UserError: none is chosen, or there is none of that name.
    """
    if not name:
        raise UserError("No concept is chosen; pick one in step 1, or add your own photos there.")
    return _pick(name, concept_folders(workspace), "concept", "add it in step 1")


def add_concept(workspace: Workspace, name: str, noun: str, uploads: Iterable[Path]) -> tuple[str, list[str]]:
    """Copy photos into a new folder of the workspace; returns the name and a reason per file left out.

    Raises:
        UserError: the name cannot be used or is taken, or no photo is readable.
    """
    name = safe_name(name, "name of the concept")
    noun = (noun or "").strip()
    if not re.fullmatch(r"[A-Za-z][A-Za-z -]{0,39}", noun):
        raise UserError("The class noun is missing or odd; write what your thing is in plain words, such as dog.")
    if name in concept_folders(workspace):
        raise UserError(f"There is a concept '{name}' already; choose another name.")
    files = [Path(upload) for upload in uploads]
    if not files:
        raise UserError("No photos were uploaded; add one to about ten pictures of your thing.")
    good, problems = [], []
    for file in files:
        try:
            if file.suffix.lower() not in SUFFIXES:
                raise UserError(f"{file.name} is not a .jpg, .png, .webp, .bmp, .tif or .gif")
            open_photo(file)
            good.append(file)
        except UserError as error:
            problems.append(str(error))
    if not good:
        raise UserError(f"None of the photos can be used: {'; '.join(problems)}.")
    try:
        workspace.concepts.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=workspace.concepts))
        try:
            for number, file in enumerate(good, 1):
                shutil.copyfile(file, new / f"{number:03}{file.suffix.lower()}")
            write_text(new / "concept.yaml", yaml.safe_dump({"name": name, "noun": noun}))
            load_concept(new, name)
            new.chmod(0o755)
            new.rename(workspace.concepts / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise UserError(f"Cannot write to {workspace.concepts}: {error.strerror or error}.") from error
    return name, problems


def view_concept(workspace: Workspace, name: str | None) -> tuple[Concept, list[Image.Image]]:
    """A concept and small copies of its photos.

    Raises:
        UserError: see :func:`concept_folder` and :func:`load_concept`.
    """
    concept = load_concept(concept_folder(workspace, name))
    thumbnails = []
    for photo in concept.photos[:24]:
        image = open_photo(photo.path)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        thumbnails.append(image)
    return concept, thumbnails


# --- 2. training ---------------------------------------------------------------------------------------------


def presets() -> list[str]:
    """The names of the shipped presets, the pocket base's first."""
    return sorted((path.stem for path in resources.configs().glob("*.yaml")), key=lambda name: (name != "pocket", name))


def preset_settings(name: str, verb: str) -> dict[str, Any]:
    """A shipped preset's part for ``train`` or ``generate``.

    Raises:
        UserError: no such preset.
    """
    if name not in presets():
        raise UserError(f"Unknown preset '{name}'{nearest(name, presets())}; use one of {', '.join(presets())}.")
    return read_yaml(resources.preset(name)).get(verb) or {}


def train(
    workspace: Workspace,
    concept: str | None,
    preset: str = "pocket",
    resume: bool = False,
    progress: Progress = silent,
    should_stop: Callable[[], bool] = lambda: False,
    **changes: Any,
) -> str:
    """Train a listed concept into ``adapters/<name>.safetensors``; returns what to tell, also after a stop.

    Raises:
        UserError: anything the person can mend.
    """
    folder = concept_folder(workspace, concept)
    output = workspace.adapters / f"{folder.name}.safetensors"
    settings = build(
        TrainConfig, preset_settings(preset, "train"), _given(changes), {"concept": folder, "output": output}
    )
    if resume and not state_path(output).exists():
        raise UserError(f"There is no stopped training of '{folder.name}' to go on with; untick 'Go on'.")
    notes: list[str] = []
    try:
        adapter = train_to_file(settings, resume, progress, should_stop, notes.append)
    except Stopped as stopped:
        where = str(stopped).partition(";")[0]
        return f"{where}; tick 'Go on with a stopped training' and train again to go on from there."
    notes.append(f"Wrote {output}. In step 4 call it {adapter.token}; step 3 fuses it with others.")
    return "\n".join(notes)


def adapter_files(workspace: Workspace) -> dict[str, Path]:
    """The adapter files by name; states of unfinished trainings do not count."""
    return {
        path.stem: path
        for path in _visible(workspace.adapters)
        if path.suffix == ".safetensors" and not path.stem.endswith(".state")
    }


def readable_adapters(workspace: Workspace) -> tuple[dict[str, Adapter], list[str]]:
    """The adapters by name, and a sentence per file that cannot be read."""
    adapters, problems = {}, []
    for name, path in adapter_files(workspace).items():
        try:
            adapters[name] = load_adapter(path)
        except Exception as error:  # one bad file must not hide the others
            problems.append(sentence_of(error))
    return adapters, problems


def adapter_rows(adapters: dict[str, Adapter]) -> list[list[str]]:
    """The table of adapters under ``ADAPTER_COLUMNS``."""
    return [
        [name, one.token, one.noun, one.method.name, str(one.slot or "–"), str(one.rank), one.base]
        for name, one in adapters.items()
    ]


# --- 3. fusion -----------------------------------------------------------------------------------------------


def parse_strengths(text: str | None, names: list[str]) -> dict[str, float]:
    """``0.8`` for all, or ``rex=0.8, brew=1.2``; who is not named gets 1.

    Raises:
        UserError: not a number, or a name that is not chosen.
    """
    strengths = dict.fromkeys(names, 1.0)
    for part in re.split(r"[\s,;]+", re.sub(r"\s*=\s*", "=", text or "")):
        name, equals, number = part.rpartition("=")
        if equals and name not in strengths:
            chosen = f"the chosen adapters are {', '.join(names)}" if names else "no adapter is chosen"
            raise UserError(f"The strength names '{name}'{nearest(name, names)}, but {chosen}.")
        try:
            value = float(number) if part else 1.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"The strength '{part}' is not a number; write 0.8, or rex=0.8, brew=1.2.")
        if part:
            strengths.update({name: value} if equals else dict.fromkeys(names, value))
    return strengths


def fuse(
    workspace: Workspace,
    chosen: list[str] | None,
    name: str,
    form: str = "sum",
    strength: str = "1",
    progress: Progress = silent,
) -> str:
    """Fuse listed adapters into ``fused/<name>/``; returns what to tell.

    Raises:
        UserError: anything the person can mend.
    """
    if not chosen:
        raise UserError("No adapters are chosen; choose the ones to fuse, or train one in step 2 first.")
    name = safe_name(name, "name of the fusion")
    strengths = parse_strengths(strength, chosen)
    files = [_adapter_file(workspace, one) for one in chosen]
    by_concept = {load_adapter(file).name: strengths[one] for one, file in zip(chosen, files, strict=True)}
    output = workspace.fused / name
    settings = build(FuseConfig, {"adapters": files, "output": output, "form": form, "strength": by_concept})
    notes = [f"Note: {warning}" for warning in fuse_to_folder(settings, progress)]
    return "\n".join([*notes, f"Wrote {output}/. Choose it as the base in step 4."])


def fused_names(workspace: Workspace) -> list[str]:
    """The names of the fused folders."""
    return [path.name for path in _visible(workspace.fused) if (path / RECIPE).is_file()]


# --- 4. pictures ---------------------------------------------------------------------------------------------


def base_choices(workspace: Workspace) -> list[str]:
    """``pocket``, then the fused folders as ``fused/<name>``."""
    return ["pocket", *(FUSED + name for name in fused_names(workspace))]


def base_path(workspace: Workspace, base: str | None) -> str:
    """What to load for a choice: a fused folder of the workspace, or whatever else was written, as it is.

    Raises:
        UserError: no such fused folder.
    """
    base = (base or "pocket").strip()
    if not base.startswith(FUSED):
        return base
    folders = {name: workspace.fused / name for name in fused_names(workspace)}
    return str(_pick(base.removeprefix(FUSED), folders, "fused folder", "fuse adapters in step 3"))


def tokens(workspace: Workspace, base: str | None, chosen: list[str] | None) -> dict[str, str]:
    """The tokens a prompt may use, with their class nouns.

    Raises:
        UserError: a chosen base or adapter is not there or damaged.
    """
    recipe = read_recipe(Path(base_path(workspace, base)))
    found = {str(one["token"]): str(one["noun"]) for one in recipe["concepts"].values()} if recipe else {}
    for name in chosen or []:
        adapter = load_adapter(_adapter_file(workspace, name))
        found[adapter.token] = adapter.noun
    return found


def drawn(image: Image.Image | None) -> Image.Image | None:
    """A sketch with strokes as white on black; None for a canvas without any."""
    if image is None:
        return None
    low, high = image.convert("L").getextrema()
    return clean_strokes(image) if float(high) - float(low) > 16 else None  # type: ignore[arg-type]


def generate(
    workspace: Workspace,
    base: str | None,
    chosen: list[str] | None,
    strength: str,
    sketch: Image.Image | None = None,
    progress: Progress = silent,
    **changes: Any,
) -> tuple[list[Path], str]:
    """Draw into ``pictures/``; returns the pictures (the sheet of several last) and what to tell.

    Raises:
        UserError: anything the person can mend.
    """
    prompt = str(changes.get("prompt") or "")
    if not prompt.strip():
        raise UserError("The prompt is empty; write what to draw, such as: a photo of <rex> on the beach.")
    chosen = chosen or []
    path = base_path(workspace, base)
    files = {name: _adapter_file(workspace, name) for name in chosen}
    if chosen and read_recipe(Path(path)) is not None:
        raise UserError(f"{base} is fused already; choose no adapters with it, or take the base pocket.")
    strengths = parse_strengths(strength if chosen else "", chosen)
    known = tokens(workspace, base, chosen)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    output = workspace.pictures / f"{stamp}.png"
    layer: dict[str, Any] = {
        "base": path,
        "adapters": {str(file): strengths[name] for name, file in files.items()},
        "output": output,
    }
    strokes, held = drawn(sketch), workspace.pictures / "sketches" / f"{stamp}.png"
    given = _given(changes)
    weight, adapter = given.pop("sketch_weight", 1.0), given.pop("sketch_adapter", None)
    if strokes is not None:
        layer["conditions"] = [{"file": held, "weight": weight, "adapter": adapter}]
    settings = build(Scene, given, layer)
    if strokes is not None:
        with atomic(held) as temporary:
            strokes.save(temporary, format="PNG")
    notes = []
    if odd := sorted(set(re.findall(r"<[A-Za-z0-9][A-Za-z0-9-]*>", prompt)) - set(known)):
        here = ", ".join(known) or "none; choose adapters or a fused base"
        notes.append(f"Note: the prompt names {', '.join(odd)}, but the tokens here are {here}.")
    paths = generate_to_file(settings, progress, notes.append)
    what = "a picture"
    if len(paths) > 1:
        what = f"{len(paths) - 1} pictures and a sheet of them"
        paths = [*paths[1:], paths[0]]
    notes.append(f"Wrote {what} to {workspace.pictures}/{', held to your sketch' if strokes is not None else ''}.")
    return paths, "\n".join(notes)


# --- shared --------------------------------------------------------------------------------------------------


def _given(changes: dict[str, Any]) -> dict[str, Any]:
    """The fields that were filled in; an empty one leaves the default."""
    return {key: value for key, value in changes.items() if value not in (None, "")}


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _adapter_file(workspace: Workspace, name: str) -> Path:
    return _pick(name, adapter_files(workspace), "adapter", "train it in step 2")


def _pick(name: str, known: dict[str, Path], what: str, otherwise: str) -> Path:
    """Look a name up rather than build a path from it, so that no name leads out of the workspace."""
    if name not in known:
        there = f"there are {', '.join(known)}" if known else "there are none yet"
        raise UserError(f"No {what} '{str(name)[:60]}'{nearest(str(name), known)}: {there}; {otherwise}.")
    return known[name]
