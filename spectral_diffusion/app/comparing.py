"""Compare chosen concepts before they are fused: interference figures, and pictures of each alone and fused."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config.presets import preset_settings
from ..config.settings import build
from ..core.hooks import QUIET, Hooks
from .adapters import read_adapter
from .device import giving_back
from .fusing import compare_key, fuse_settings, load_chosen, ticked
from .sentences import errors_in_app, in_app
from .speeds import measured
from .workspace import Workspace, sentence_of

if TYPE_CHECKING:
    from PIL import Image

    from ..adapters.adapter import Adapter
    from ..config.fuse import FuseConfig

STEPS = 12  # of a compared picture
LOCATIONS = ("on the beach", "on the grass")  # of the compared pictures
ACTING = {  # words for shares below these
    0.1: "keeps its looks: the others hardly act on it.",
    0.3: "keeps most of its looks: the others act on it a little.",
    1.0: "loses some of its looks: the others act on it much.",
}
MORE = "is at risk: the others act on it more than it does itself."
UNKNOWN = "changes what shows only beside its base; press Show before and after to see it."
ALONE = "is by itself; choose a second one."
COLUMNS = ("alone", "in the fusion")


@dataclass(frozen=True)
class Row:
    """One of the chosen concepts as text; – where a figure is missing."""

    concept: str
    columns: str  # changed columns of the spectrum
    size: str  # |ΔW| at strength 1
    disturbed: str  # the others' action on its inputs, relative to its own
    neighbour: str  # the concept with the most similar change, and the cosine
    sentence: str  # what ``disturbed`` means for its looks

    @property
    def figures(self) -> tuple[str, ...]:
        """The cells of the table."""
        return self.concept, self.columns, self.size, self.disturbed, self.neighbour


@dataclass(frozen=True)
class Together:
    """The interference table of chosen adapters, and warnings: sentences."""

    rows: list[Row]
    warnings: list[str]


def together(workspace: Workspace, chosen: Sequence[str] | None, strengths: Mapping[str, float]) -> Together:
    """The interference of these adapters; a missing or damaged one becomes a warning and hides no other."""
    if not chosen:
        return Together([], [])
    from ..inspection import cosine, interference, overlaps, slot_clashes_between

    adapters, warnings = _readable(workspace, chosen)
    comparable = {name: adapter for name, adapter in adapters.items() if not adapter.needs_base}
    shares = interference(
        list(comparable.values()), {left_name.name: strengths.get(name, 1.0) for name, left_name in comparable.items()}
    )
    alike: dict[str, dict[str, float]] = {name: {} for name in comparable}
    for left_name, right_name in itertools.combinations(comparable, 2):
        alike[left_name][right_name] = alike[right_name][left_name] = cosine(
            comparable[left_name], comparable[right_name]
        )
    rows = [
        Row(
            name,
            str(adapter.slot or "–"),
            "–" if (norm := adapter.norm()) is None else f"{norm:.2f}",
            f"{shares[adapter.name]:.0%}" if alike.get(name) else "–",
            _nearest(alike.get(name)),
            _sentence(shares[adapter.name]) if alike.get(name) else UNKNOWN if adapter.needs_base else ALONE,
        )
        for name, adapter in adapters.items()
    ]
    loaded = list(adapters.values())
    incomparable = [name for name in adapters if name not in comparable]
    warnings += [f"What {name} changes shows only beside its base, so it has no figures." for name in incomparable]
    return Together(
        rows, [*warnings, *(in_app(text, workspace) for text in (*overlaps(loaded), *slot_clashes_between(loaded)))]
    )


def _readable(workspace: Workspace, chosen: Sequence[str]) -> tuple[dict[str, Adapter], list[str]]:
    """The chosen adapters by file name, and a sentence for each that cannot be read."""
    adapters, problems = {}, []
    for name in chosen:
        try:
            adapters[name] = read_adapter(workspace, name)
        except Exception as error:  # deleted or damaged: the others are shown all the same
            problems.append(in_app(sentence_of(error), workspace))
    return adapters, problems


def _sentence(share: float) -> str:
    return next((text for most, text in ACTING.items() if share < most), MORE)


def _nearest(alike: Mapping[str, float] | None) -> str:
    if not alike:
        return "–"
    name = max(alike, key=lambda other: abs(alike[other]))
    return f"{name}, {round(alike[name], 2) + 0.0:.2f}"  # + 0.0: never -0.00


def sheet_of(captioned: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """The pictures of :func:`compare` on one sheet: a row per concept, alone and in the fusion."""
    from ..data.image_grid import labelled_grid

    images = [image for image, _ in captioned]
    names = [caption.removesuffix(f" {COLUMNS[0]}") for _, caption in captioned[::2]]
    return labelled_grid(list(zip(images[::2], images[1::2], strict=True)), names, COLUMNS)


def compare(
    workspace: Workspace,
    chosen: Sequence[str] | None,
    strengths: Mapping[str, float],
    seed: int = 0,
    hooks: Hooks = QUIET,
    **changes: Any,
) -> list[tuple[Image.Image, str]]:
    """Every concept alone and in the fusion, from the same seeds, with a caption each; nothing is saved.

    Raises:
        UserError: anything the user can fix.
    """
    chosen = ticked(chosen)
    with giving_back(), errors_in_app(workspace, "pictures"):
        settings = fuse_settings(workspace, chosen, workspace.fused / "compared", strengths, seed=seed, **changes)
        with measured(workspace, compare_key(settings), len(chosen)):
            return _before_and_after(workspace, chosen, settings, hooks)


def _before_and_after(
    workspace: Workspace, chosen: Sequence[str], settings: FuseConfig, hooks: Hooks
) -> list[tuple[Image.Image, str]]:
    """What :func:`compare` returns, for settings whose adapters exist."""
    from ..adapters.apply import put_adapters
    from ..adapters.attach import remove_adapters
    from ..config.scene import Scene
    from ..data.image_grid import image_grid
    from ..merging.fuse import check_together, fuse_adapters
    from ..merging.merges.registry import get_merge
    from ..models.loading import load_base
    from ..scenes.sampling import sample

    def generate_image(token: str) -> Image.Image:
        prompts = [f"a photo of {token} {location}" for location in LOCATIONS]
        seeds = [settings.seed + index for index in range(len(LOCATIONS))]
        return image_grid(sample(base, prompts, seeds, scene, hooks), len(LOCATIONS))

    adapters = list(load_chosen(workspace, chosen).values())
    check_together(adapters, settings.scales)
    get_merge(settings.merge).accept(adapters, settings)
    base = load_base(settings.base or adapters[0].base, settings.device, settings.dtype)
    scene = build(
        Scene,
        preset_settings(base.name, "generate"),
        {"num_inference_steps": STEPS, "base": base.name, "device": settings.device},
    )
    alone = []
    for adapter in adapters:
        put_adapters(base, [(adapter, 1.0)])
        alone.append(generate_image(adapter.token))
        remove_adapters(base.models)
    fuse_adapters(base, adapters, settings, hooks, install=False)
    captioned = []
    for adapter, before in zip(adapters, alone, strict=True):
        captioned += [
            (before, f"{adapter.name} {COLUMNS[0]}"),
            (generate_image(adapter.token), f"{adapter.name} {COLUMNS[1]}"),
        ]
    return captioned
