"""A saved fusion as a zip for another program: the weights in its format, token embeddings and model card."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from ..core.errors import UserError
from ..core.files import atomic
from ..core.hooks import Hooks
from .bases import fused_folder
from .device import giving_back
from .fusing import exports_of
from .sentences import errors_in_app, in_app
from .workspace import Workspace

KINDS = {
    "kohya": "LoRA for ComfyUI and A1111",
    "comfyui": "LoRA for ComfyUI, also of Z-Image",
    "diffusers": "LoRA for diffusers",
    "checkpoint": "whole checkpoint (large)",
}


def download(workspace: Workspace, name: str | None, kind: str) -> tuple[Path, list[str]]:
    """Export a saved fusion into the folder of pictures, which is served; returns the zip and messages.

    Raises:
        UserError: no such fusion or kind, a fusion that this kind cannot hold, or a full disk.
    """
    folder = fused_folder(workspace, name)
    if kind not in KINDS:
        raise UserError(f"No format '{kind[:40]}'; choose one of {', '.join(KINDS)}.")
    from ..merging.export import export
    from ..merging.manifest import MERGED

    if kind != "checkpoint" and not (folder / MERGED).is_file():
        raise UserError(f"The merge of '{name}' changes whole weights, which no LoRA holds; choose the checkpoint.")
    exports, notes = exports_of(workspace, folder.name), list[str]()
    packed = exports / f"{name}-{kind}.zip"
    with giving_back(), errors_in_app(workspace, "pictures"):
        exports.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export.", dir=exports) as scratch:
            files = export(folder, Path(scratch) / f"{name}.safetensors", kind, hooks=Hooks(notify=notes.append))
            with atomic(packed) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                for file in files:
                    archive.write(file, file.name)
    return packed, [in_app(note, workspace) for note in notes]
