"""Runs inside a checkout of ComfyUI: which keys of LoRA files does its own loader leave out?

``python comfyui_reader.py CASES.json``, with ComfyUI's folder as the working directory. A case has ``lora``, ``model``
(the base's weights by their names in ComfyUI), ``text`` (those of its text encoders) and ``classes`` (names of its
model classes; the first that this version has is taken). Prints a JSON list of ``{"left": [...], "unknown": [...]}``.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path.cwd()))
sys.argv, cases = [sys.argv[0], "--cpu"], json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))

import comfy.lora  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.utils  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


class Heard(logging.Handler):
    """The keys that the loader warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.keys: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "not loaded" in message:
            self.keys.append(message.rpartition(" ")[2])


def stand_in(classes: list[str], weights: dict[str, Any]) -> Any:
    """A model of ComfyUI's class with these weights' names, and the config that ComfyUI detects from them."""
    parent = next((getattr(comfy.model_base, n) for n in classes if hasattr(comfy.model_base, n)), object)
    bare = {name.removeprefix("diffusion_model."): value for name, value in weights.items()}
    config = comfy.model_detection.detect_unet_config(bare, "")
    members = {
        "__init__": lambda self: None,
        "state_dict": lambda self: weights,
        "model_config": SimpleNamespace(unet_config=config),
    }
    return type("StandIn", (parent,), members)()


found = []
for case in cases:
    weights = load_file(case["model"])
    names = comfy.lora.model_lora_keys_unet(stand_in(case["classes"], weights), {})
    text = dict.fromkeys(case["text"])
    names = comfy.lora.model_lora_keys_clip(SimpleNamespace(state_dict=lambda text=text: text), names)
    heard = Heard()
    logging.getLogger().addHandler(heard)
    lora = comfy.utils.load_torch_file(case["lora"], safe_load=True)
    patches = comfy.lora.load_lora(lora, names)
    logging.getLogger().removeHandler(heard)
    targets = {key if isinstance(key, str) else key[0] for key in patches}
    found.append({"left": heard.keys, "unknown": sorted(targets - set(weights) - set(text)), "taken": len(patches)})
print(json.dumps(found))
