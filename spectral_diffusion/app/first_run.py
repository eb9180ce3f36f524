"""The first picture without any training: two adapters that come with the package, each in a box."""

from __future__ import annotations

import shutil

from .. import pocket
from ..config.presets import preset_settings
from ..config.scene import Scene
from ..config.settings import build
from ..core.errors import UserError
from ..core.files import atomic
from ..slots.ledger import LEDGER, Ledger, SlotRequest
from .gallery import FIELDS, Refill
from .workspace import Workspace

CONCEPTS = ("rex", "brew")  # whose adapters come with the pocket base
STEPS = 12  # twenty take longer and look the same
SCENE = "on the grass"  # sand hides the dog's body


def adopt(workspace: Workspace) -> list[str]:
    """Copy the ready-made adapters into the workspace and enter their slots: both or none; those that are there stay.

    Returns:
        The names of the adapters.

    Raises:
        UserError: a concept of the same name or slot is there or being trained, or the ledger is damaged.
    """
    from ..adapters.formats.native import load_adapter  # imports torch and diffusers, which a page need not wait for

    missing = [name for name in CONCEPTS if not (workspace.adapters / f"{name}.safetensors").exists()]
    ledger = Ledger(workspace.adapters / LEDGER)
    made = {name: load_adapter(pocket.adapter(name)) for name in missing}
    for name, adapter in made.items():
        assert adapter.slot is not None and adapter.fingerprint is not None
        for owner, slot in ledger.read().get(adapter.fingerprint.exact, {}).items():
            if (owner == name and slot != adapter.slot) or (owner != name and slot.overlaps(adapter.slot)):
                raise UserError(
                    f"The ready-made '{name}' was trained in {adapter.slot}, and your '{owner}' has {slot}; train "
                    f"'{name}' yourself in step 2, which takes free ones."
                )
    for fingerprint in {adapter.fingerprint for adapter in made.values()}:
        assert fingerprint is not None
        requests = {
            name: SlotRequest(adapter.rank, str(adapter.slot), min(min(size) for size in adapter.sizes.values()))
            for name, adapter in made.items()
        }
        ledger.reserve_all(fingerprint.exact, requests, rounded=(fingerprint.half, fingerprint.brain))
    for name in missing:
        with atomic(workspace.adapters / f"{name}.safetensors") as temporary:
            shutil.copyfile(pocket.adapter(name), temporary)
    return list(CONCEPTS)


def first_scene() -> Refill:
    """The fields of step 4 for both concepts, each in its half of the picture."""
    prompt = f"<{CONCEPTS[0]}> on the left and <{CONCEPTS[1]}> on the right {SCENE}"
    scene = build(
        Scene,
        preset_settings("pocket", "generate"),
        {"prompt": prompt, "width": 256, "height": 128, "num_inference_steps": STEPS},
    )
    boxes = ([0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0])
    regions = [
        {"box": box, "prompt": f"a photo of <{name}> {SCENE}", "concept": name}
        for box, name in zip(boxes, CONCEPTS, strict=True)
    ]
    return Refill(
        base="pocket", adapters=[], strength="1", canvas={"strokes": "", "keypose": "", "regions": regions},
        sketch_weight=1.0, keypose_weight=1.0, sketch_adapter="", keypose_adapter="", seed=3,
        fields={**{field: getattr(scene, field) for field in FIELDS}, "quantization": ""}, notes=[],
    )  # fmt: skip
