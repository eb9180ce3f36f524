"""The first picture without any training: two adapters that come with the package, each in a box."""

from __future__ import annotations

import shutil
from pathlib import Path

from .. import pocket
from ..config.presets import preset_settings
from ..config.scene import Scene
from ..config.settings import build
from ..core.errors import UserError
from ..core.files import atomic
from ..slots.ledger import LEDGER, Ledger, SlotRequest
from .gallery import FIELDS, Refill
from .workspace import Workspace

CONCEPTS = ("rex", "brew")  # of the package's concepts; their adapters are in the pocket base's folder
SCENE = "on the beach"


def ready_made(name: str) -> Path:
    """The adapter of a ready-made concept."""
    return pocket.path() / "adapters" / f"{name}.safetensors"


def adopt(workspace: Workspace) -> list[str]:
    """Copy the ready-made adapters into the workspace and enter their slots; those that are there stay.

    Returns:
        The names of the adapters.

    Raises:
        UserError: another concept has one of their slots.
    """
    from ..adapters.formats.native import load_adapter  # imports torch and diffusers, which a page need not wait for

    ledger = Ledger(workspace.adapters / LEDGER)
    for name in CONCEPTS:
        target = workspace.adapters / f"{name}.safetensors"
        if target.exists():
            continue
        adapter = load_adapter(ready_made(name))
        assert adapter.slot is not None and adapter.fingerprint is not None
        own, smallest = adapter.fingerprint, min(min(size) for size in adapter.sizes.values())
        request = SlotRequest(adapter.rank, str(adapter.slot), smallest)
        try:
            ledger.reserve(own.exact, name, request, rounded=(own.half, own.brain))
        except UserError as error:
            raise UserError(
                f"The ready-made '{name}' was trained in {adapter.slot}, which another concept of yours has; train it "
                "yourself in step 2, which takes the next free ones."
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target) as temporary:
            shutil.copyfile(ready_made(name), temporary)
    return list(CONCEPTS)


def first_scene() -> Refill:
    """The fields of step 4 for both concepts, each in its half of the picture."""
    prompt = f"<{CONCEPTS[0]}> on the left and <{CONCEPTS[1]}> on the right {SCENE}"
    scene = build(Scene, preset_settings("pocket", "generate"), {"prompt": prompt, "width": 256, "height": 128})
    boxes = ([0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0])
    regions = [
        {"box": box, "prompt": f"a photo of <{name}> {SCENE}", "concept": name}
        for box, name in zip(boxes, CONCEPTS, strict=True)
    ]
    return Refill(
        base="pocket", adapters=[], strength="1", canvas={"strokes": "", "keypose": "", "regions": regions},
        sketch_weight=1.0, keypose_weight=1.0, sketch_adapter="", keypose_adapter="", seed=4,
        fields={field: getattr(scene, field) for field in FIELDS}, notes=[],
    )  # fmt: skip
