"""The canvas on the page: a custom component, and its sources."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ...core.errors import UserError
from .. import canvas
from ..generation import ratio_of
from ..page import PRIVATE, errors_as_toast
from ..poses import MOST_PEOPLE, POSES
from ..workspace import Workspace

HERE = Path(__file__).parent.parent
Value = dict[str, Any] | None
Maker = Callable[[Path, float], bytes]
UPLOADS: dict[str, tuple[str, str, Maker]] = {
    "generate-upload-drawing": ("Upload a drawing", "strokes", canvas.ink_of_drawing),
    "generate-upload-photo": ("Trace a photo", "strokes", canvas.ink_of_photo),
    "generate-upload-people": ("Keypose from a photo", "keypose", canvas.keypose_of_photo),
}


def own_component(name: str, html: str | None = None, **more: Any) -> gr.HTML:
    """A custom component from ``app/<name>.js`` and its ``.html`` and ``.css`` if they exist."""
    files = {kind: HERE / f"{name}.{kind}" for kind in ("html", "css", "js")}
    text = {kind: file.read_text(encoding="utf-8") if file.exists() else "" for kind, file in files.items()}
    return gr.HTML(
        html_template=html or text["html"],
        css_template=text["css"],
        js_on_load=text["js"],
        apply_default_css=False,
        **more,
    )


def build_canvas() -> gr.HTML:
    """The canvas with its tools; updates may set ``value``, ``ratio``, ``concepts`` and
    ``backdrop``, a picture behind it."""
    return own_component(
        "canvas", value={"strokes": "", "keypose": "", "regions": []}, ratio=1.0, concepts=[], backdrop="",
        elem_id="generate-canvas",
    )  # fmt: skip


def build_sources(workspace: Workspace, drawing: gr.HTML, size: list[Any]) -> None:
    """Ready-made sketches, uploads and poses under the canvas, and their wiring.

    Args:
        size: the fields that determine the canvas's shape: base, width, height.
    """
    given = [drawing, *size]
    with gr.Accordion("Start from a sketch, a photo or a pose", open=False, elem_id="generate-sources"):
        sketch = gr.Dropdown(
            ["", *canvas.sketch_files()], value="", label="Ready-made sketch", elem_id="generate-sketch",
            info="Replaces the strokes on the canvas.",
        )  # fmt: skip
        with gr.Row():
            for elem_id, (label, layer, make) in UPLOADS.items():
                upload = gr.UploadButton(label, file_types=["image"], size="sm", elem_id=elem_id, min_width=120)
                upload.upload(partial(put, workspace, layer, make), [upload, *given], drawing, **PRIVATE)
        with gr.Row(equal_height=False):
            pose = gr.Dropdown(list(POSES), value="standing", label="Pose", elem_id="generate-pose", min_width=120)
            count = gr.Radio(
                list(range(1, MOST_PEOPLE + 1)), value=1, label="People", elem_id="generate-people", min_width=120
            )
        add = gr.Button("Put the pose on the canvas", size="sm", elem_id="generate-pose-put")
    sketch.input(partial(put_sketch, workspace), [sketch, *given], drawing, **PRIVATE)
    add.click(partial(put_pose, workspace), [pose, count, *given], drawing, **PRIVATE)


def put(workspace: Workspace, layer: str, make: Maker, file: str | None, value: Value, *size: Any) -> Value:
    """The canvas with an upload on it."""
    with errors_as_toast():
        if not file:
            raise UserError("No picture was chosen.")
        return canvas_changed(value, layer, make(Path(file), ratio_of(workspace, *size)))


def put_sketch(workspace: Workspace, name: str, value: Value, *size: Any) -> Value:
    """The canvas with a ready-made sketch on it."""
    with errors_as_toast():
        return canvas_changed(value, "strokes", canvas.ready_sketch(name, ratio_of(workspace, *size)) if name else None)


def put_pose(workspace: Workspace, pose: str, count: int, value: Value, *size: Any) -> Value:
    """The canvas with people in a ready-made pose on it."""
    with errors_as_toast():
        return canvas_changed(
            value, "keypose", canvas.keypose_preset(pose, int(count or 1), ratio_of(workspace, *size))
        )


def canvas_changed(value: Value, layer: str, data: bytes | None) -> Value:
    """The canvas's value with another image in the layer ``strokes`` or ``keypose``."""
    kept = value if isinstance(value, dict) else {}
    return {"strokes": "", "keypose": "", "regions": []} | kept | {layer: canvas.as_url(data)}
