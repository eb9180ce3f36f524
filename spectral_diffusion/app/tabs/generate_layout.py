"""The fields of the generate tab: prompt, concepts, size, sampling, and the weights of drawings and boxes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from ...config.scene import ControlImage, Scene
from ...config.settings import description
from .canvas import own_component

SHAPES = {"Square": (1, 1), "Wide": (2, 1), "Tall": (1, 2)}
PRECISIONS = [("as suits this computer", ""), ("full", "none"), *((mode, mode) for mode in ("int8", "fp8", "nf4"))]
LOADED = "Bits of a transformer's frozen weights; fewer need less memory."
SAMPLERS = [("DPM-Solver++", "dpm"), ("DDIM", "ddim"), ("Euler", "euler")]


@dataclass(frozen=True)
class Fields:
    """The inputs of a picture as components, in the order of :meth:`GenerateHandlers.generate_from_fields`."""

    prompt: gr.Textbox
    base: gr.Dropdown
    adapters: gr.Dropdown
    strength: gr.Textbox
    negative_prompt: gr.Textbox
    seed: gr.Number
    num_images: gr.Slider
    width: gr.Number
    height: gr.Number
    num_inference_steps: gr.Slider
    guidance_scale: gr.Slider
    quantization: gr.Dropdown
    canvas: gr.HTML
    sketch_weight: gr.Slider
    sketch_adapter: gr.Textbox
    keypose_weight: gr.Slider
    keypose_adapter: gr.Textbox
    sampler: gr.Dropdown
    global_prompt_weight: gr.Slider
    region_isolation: gr.Slider
    region_start: gr.Slider
    region_end: gr.Slider

    @property
    def all(self) -> list[Any]:
        """The components in their order."""
        return [getattr(self, item.name) for item in fields(self)]

    @staticmethod
    def named(values: tuple[Any, ...]) -> dict[str, Any]:
        """The components' values by name."""
        return dict(zip((item.name for item in fields(Fields)), values, strict=True))


def build_scene_fields(defaults: dict[str, Any], side: int) -> dict[str, Any]:
    """The fields of concepts, prompt and numbers. ``side`` is the pocket base's, in pixels."""
    note = gr.Markdown(visible=False, elem_id="generate-note")
    made: dict[str, Any] = {"note": note}
    made["prompt"] = gr.Textbox(
        label="Prompt", placeholder="a photo of a red dog on the beach", lines=3, elem_id="generate-prompt",
        info=description(Scene, "prompt"),
    )  # fmt: skip
    made["tokens"] = own_component("tokens", '<div class="tokens" role="group" aria-label="Tokens"></div>', value=[],
                                   elem_id="generate-tokens")  # fmt: skip
    with gr.Row(equal_height=False):
        made["adapters"] = gr.Dropdown(
            [], multiselect=True, allow_custom_value=True, label="Concepts", visible=False, min_width=180,
            info="They act everywhere. A concept chosen for a box acts only there.", elem_id="generate-adapters",
        )  # fmt: skip
        made["side_by_side"] = gr.Button("A box for each", size="sm", visible=False, elem_id="generate-side")
        made["strength"] = gr.Textbox(
            "1", label="Strength", info="One number, or rex=0.8, brew=1.2.", visible=False, min_width=120,
            max_lines=1, elem_id="generate-strength",
        )  # fmt: skip
    made["shape"] = gr.Radio(list(SHAPES), value="Square", label="Shape", elem_id="generate-shape")
    with gr.Row(equal_height=False):
        made["num_images"] = gr.Slider(1, 16, 1, step=1, label="Pictures", elem_id="generate-count", min_width=120)
        made["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="generate-seed", min_width=120,
                                 info="Another number gives another picture.")  # fmt: skip
    with gr.Accordion("Base, size and sampling", open=False, elem_id="generate-more"):
        made |= _build_sampling(defaults, side)
    with gr.Accordion("Weights of sketch, keypose and regions", open=False, elem_id="generate-weights"):
        made |= _build_weights(defaults)
    return made


def _build_sampling(defaults: dict[str, Any], side: int) -> dict[str, Any]:
    """The fields of the base, the picture's size, and sampling."""
    made: dict[str, Any] = {}
    made["base"] = gr.Dropdown(
        ["pocket"], value="pocket", allow_custom_value=True, label="Base", elem_id="generate-base",
        info=description(Scene, "base"),
    )  # fmt: skip
    made["negative_prompt"] = gr.Textbox(
        "", label="Negative prompt", info=description(Scene, "negative_prompt"), max_lines=2,
        elem_id="generate-negative",
    )  # fmt: skip
    with gr.Row():
        made["num_inference_steps"] = gr.Slider(
            1, 100, defaults.get("num_inference_steps", 20), step=1, label="Steps",
            info=description(Scene, "num_inference_steps"),
        )  # fmt: skip
        made["guidance_scale"] = gr.Slider(
            0, 20, defaults.get("guidance_scale", 4.0), step=0.1, label="Guidance",
            info=description(Scene, "guidance_scale"),
        )  # fmt: skip
    with gr.Row():
        for name in ("width", "height"):
            made[name] = gr.Number(
                side, label=name.capitalize(), info=description(Scene, name), precision=0, step=8, minimum=8,
                min_width=100,
            )  # fmt: skip
    with gr.Row():
        made["quantization"] = gr.Dropdown(
            PRECISIONS, value="", label="Loaded as", info=LOADED, min_width=200,
            elem_id="generate-quantization",
        )  # fmt: skip
        made["sampler"] = gr.Dropdown(
            SAMPLERS, value="dpm", label="Sampler", info=description(Scene, "sampler"), min_width=130
        )
    return made


def _build_weights(defaults: dict[str, Any]) -> dict[str, Any]:
    """The weights of the sketch, the pose and the boxes."""
    made: dict[str, Any] = {}
    for kind in ("sketch", "keypose"):
        with gr.Row():
            made[f"{kind}_weight"] = gr.Slider(
                0, 4, 1.0, step=0.1, label=f"{kind.capitalize()} weight",
                info=description(ControlImage, "conditioning_scale"),
            )  # fmt: skip
            made[f"{kind}_adapter"] = gr.Textbox(
                "", label=f"{kind.capitalize()} adapter", max_lines=1, info=description(ControlImage, "adapter")
            )
    labels = {
        "global_prompt_weight": ("Global prompt weight", 0, 1, 0.0),
        "region_isolation": ("Region isolation", 0, 1, defaults.get("region_isolation", 0.0)),
        "region_start": ("Regions start", 0, 0.95, 0.0), "region_end": ("Regions end", 0.05, 1, 1.0),
    }  # fmt: skip
    with gr.Row():
        for name, (label, least, most, value) in labels.items():
            made[name] = gr.Slider(least, most, value, step=0.05, label=label, info=description(Scene, name))
    return made
