"""The fuse tab without gradio: fuse concepts into one checkpoint of the workspace, and remove them again."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.fuse import FuseConfig
from ..config.presets import preset_part
from ..config.settings import Settings, build, parse_overrides
from ..core import assets as resources
from ..core.errors import UserError, nearest
from ..core.hooks import QUIET, Hooks
from .adapters import adapter_file, read_adapter
from .bases import fused_folder, fused_folders
from .device import giving_back
from .presets import preset_of_base
from .sentences import errors_in_app, in_app
from .speeds import expected, line, measured
from .workspace import Workspace, filled, safe_name, sentence_of

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter

SPACE = "\0"  # replaces a space inside a name
SPARING = "sd15-12gb"  # the preset for a base without its own


@dataclass(frozen=True)
class Fusion:
    """A saved fusion; ``problem`` is a sentence if its manifest cannot be read."""

    name: str
    concepts: dict[str, float]
    merge: str
    distill_steps: int = 0  # steps
    problem: str = ""


def parse_strengths(text: str | None, names: Sequence[str]) -> dict[str, float]:
    """``0.8`` for all, or ``rex=0.8, brew=1.2``; adapters that are not named get 1.

    Raises:
        UserError: not a number, or a name that is not chosen.
    """
    strengths, text = dict.fromkeys(names, 1.0), re.sub(r"\s*=\s*", "=", text or "")
    for name in names:
        text = text.replace(f"{name}=", f"{name.replace(' ', SPACE)}=")
    for part in re.split(r"[\s,;]+", text):
        name, equals, number = part.replace(SPACE, " ").rpartition("=")
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


def ticked(chosen: Sequence[str] | None) -> list[str]:
    """The chosen names, not looked up yet.

    Raises:
        UserError: none is chosen.
    """
    if not chosen:
        raise UserError("No concepts are chosen; tick the ones to fuse, or train one in step 2 first.")
    return list(chosen)


def load_chosen(workspace: Workspace, chosen: Sequence[str] | None) -> dict[str, Adapter]:
    """The chosen adapters by the names of their files.

    Raises:
        UserError: none is chosen, or one of them is missing or damaged.
    """
    names = ticked(chosen)
    for name in names:
        adapter_file(workspace, name)  # refuse before the slow imports of reading
    return {name: read_adapter(workspace, name) for name in names}


def fuse_settings(
    workspace: Workspace, chosen: Sequence[str] | None, output: Path, strengths: Mapping[str, float], **changes: Any
) -> FuseConfig:
    """The settings of the page's fields; ``changes`` are the merge's settings, an empty one keeps the default.

    They include ``distill_steps``, ``prior_weight`` and ``options`` (as text: ``density=0.3``); ``preset`` is one that
    fuses, by default the base's own, or one that fits most graphics cards.

    Raises:
        UserError: nothing is chosen, or a setting is invalid.
    """
    adapters = load_chosen(workspace, chosen)
    files = [adapter_file(workspace, name) for name in adapters]
    by_concept = {adapter.name: strengths.get(name, 1.0) for name, adapter in adapters.items()}
    given = filled(changes)
    prior_weight, steps, options = (given.pop(name, None) for name in ("prior_weight", "distill_steps", "options"))
    inner: dict[str, Any] = {} if prior_weight is None else {"calibration": {"prior_weight": prior_weight}}
    inner |= {} if steps is None else {"distill": {"steps": steps}}
    inner |= {} if options is None else {"options": parse_overrides(options.replace(",", " ").split())}
    preset = given.pop("preset", None)
    base = next(iter(adapters.values())).base
    if preset and resources.preset_of(base) != "pocket":
        raise UserError("All of the U-Net is distilled only on the pocket base here; choose fewer layers.")
    own = preset or preset_of_base(workspace, base)
    layer = (preset_part(own, "fuse") if own else {}) or preset_part(SPARING, "fuse")
    return build(FuseConfig, layer, given, inner, {"adapters": files, "output": output, "scales": by_concept})


def merge_summaries() -> dict[str, str]:
    """The summary of each merge, and its options with their defaults, by name."""
    from ..merging.merges.registry import all_merges  # imports torch

    return {name: " ".join([f"{merge.summary}.", *_options(merge.options)]) for name, merge in all_merges().items()}


def _options(model: type[Settings]) -> list[str]:
    return [f"{name}={field.default}: {field.description}" for name, field in model.model_fields.items()]


def fuse_chosen(
    workspace: Workspace,
    chosen: Sequence[str] | None,
    name: str,
    strengths: Mapping[str, float],
    hooks: Hooks = QUIET,
    replace: bool = False,
    **changes: Any,
) -> str:
    """Fuse listed adapters into ``fused/<name>/``; returns a message.

    Raises:
        UserError: anything the user can fix, such as a taken name without ``replace``.
    """
    chosen, name = ticked(chosen), safe_name(name, "name of the fusion")
    if name in fused_folders(workspace) and not replace:
        raise UserError(f"There is a fusion '{name}' already; choose another name, or tick to replace it.")
    from ..merging.fuse import fuse_to_folder

    notes: list[str] = []
    with giving_back(), errors_in_app(workspace, "fused"):
        settings = fuse_settings(workspace, chosen, workspace.fused / name, strengths, **changes)
        with _kept(workspace, name), measured(workspace, speed_key(settings), len(chosen)):
            notes += [
                f"Note: {warning}"
                for warning in fuse_to_folder(settings, Hooks(hooks.progress, notes.append, hooks.should_stop))
            ]
    messages = [in_app(note, workspace) for note in notes]
    return "\n".join([*messages, f"Saved '{name}' with {' and '.join(chosen)}. Generate with it in step 4."])


def speed_key(settings: FuseConfig) -> str:
    """What fusions with these settings are measured as."""
    base = settings.base or "pocket"
    steps = f" {settings.distill.steps}" if settings.distill.steps else ""
    return f"fuse {resources.preset_of(base) or base} {settings.merge}{steps}"


def compare_key(settings: FuseConfig) -> str:
    """What pictures before and after such fusions are measured as."""
    return f"compare {speed_key(settings)}"


def estimate(workspace: Workspace, chosen: Sequence[str] | None, **changes: Any) -> str:
    """How long a fusion of these adapters and its before and after will take; empty if neither is known."""
    try:
        settings = fuse_settings(workspace, chosen, workspace.fused / "estimate", {}, **changes)
    except UserError:  # reported when it is fused
        return ""
    kinds = {speed_key(settings): "this fusion", compare_key(settings): "before and after"}
    lines = [line(expected(workspace, kind, len(chosen or [])), what) for kind, what in kinds.items()]
    return " ".join(filter(None, lines))


@contextmanager
def _kept(workspace: Workspace, name: str) -> Iterator[None]:
    """Keep a fusion that is about to be replaced in the trash; if the new one fails, it is restored."""
    from .trash import keep

    if name not in fused_folders(workspace):
        yield
        return
    trash_folder = keep(workspace, name, [fused_folder(workspace, name)])
    try:
        yield
    except BaseException:
        shutil.rmtree(trash_folder, ignore_errors=True)
        raise
    shutil.rmtree(exports_of(workspace, name), ignore_errors=True)


def fusions(workspace: Workspace) -> list[Fusion]:
    """The saved fusions; one that cannot be read hides no other."""
    from ..merging.manifest import read_manifest

    listed = []
    for name, folder in fused_folders(workspace).items():
        try:
            manifest = read_manifest(folder) or {}
            concepts = {str(concept): float(manifest["scales"].get(concept, 1.0)) for concept in manifest["concepts"]}
            settings = manifest["settings"]
            listed.append(Fusion(name, concepts, str(settings["merge"]), int(settings["distill"]["steps"])))
        except Exception as error:  # one bad folder must not hide the others
            listed.append(Fusion(name, {}, "", problem=in_app(sentence_of(error), workspace)))
    return listed


def concepts_in(workspace: Workspace, name: str | None) -> list[str]:
    """The concepts of a saved fusion; none if it cannot be read."""
    return next((list(fusion.concepts) for fusion in fusions(workspace) if fusion.name == name), [])


def take_out(workspace: Workspace, name: str | None, concept: str | None, new: str, hooks: Hooks = QUIET) -> str:
    """Write a fusion without one of its concepts under a new name; returns a message.

    Raises:
        UserError: anything the user can fix.
    """
    folder = fused_folder(workspace, name)
    if not concept:
        raise UserError("No concept is chosen; choose which one to take out.")
    if concepts_in(workspace, name) == [concept]:
        raise UserError(f"'{concept}' is all that '{name}' holds; delete the fusion instead.")
    new = safe_name(new, "name of what is left")
    if new in fused_folders(workspace):
        raise UserError(f"There is a fusion '{new}' already; choose another name for what is left.")
    from ..merging.unfuse import unfuse

    notes: list[str] = []
    with giving_back(), errors_in_app(workspace, "fused"):
        quiet = Hooks(hooks.progress, notes.append, hooks.should_stop)
        unfuse(folder, [concept], workspace.fused / new, hooks=quiet)
    messages = [in_app(note, workspace) for note in notes]
    exactly = "" if messages else ", as if it had never been in"
    return "\n".join([*messages, f"Saved '{new}': '{name}' without {concept}{exactly}."])


def delete_fusion(workspace: Workspace, name: str | None) -> str:
    """Put a saved fusion into the trash; returns a message.

    Raises:
        UserError: there is none of that name.
    """
    from .trash import discard

    trash_folder = discard(workspace, str(name), [fused_folder(workspace, name)])
    shutil.rmtree(exports_of(workspace, str(name)), ignore_errors=True)
    where = trash_folder.relative_to(workspace.root)
    return f"Deleted the fusion '{name}'; it is in {where} of the workspace, and its adapters are kept."


def exports_of(workspace: Workspace, name: str) -> Path:
    """The folder of a fusion's downloads, all of which can be made again."""
    return workspace.pictures / "exports" / name
