"""The generate tab: prompt and settings on the left, the canvas on the right, the pictures below."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...config.presets import preset_settings
from .. import generation
from ..page import DEVICE, PRIVATE, Page
from .canvas import build_canvas, build_sources
from .gallery import Gallery, build_details, build_picture, build_wall, wire
from .generate_handlers import GenerateHandlers
from .generate_layout import Fields, build_scene_fields
from .pairs import PairFields, PairHandlers, build_pairs, wire_lists

TO_PICTURE = (
    "() => { const go = () => document.getElementById('generate-go')?.scrollIntoView({behavior: 'smooth'});"
    " for (const wait of [200, 1200]) setTimeout(go, wait) }"  # again once the page is as long as it will be
)


def build(page: Page, tab: gr.Tab) -> None:
    """Fill the tab and wire its events."""
    handlers = GenerateHandlers(page.workspace)
    defaults = preset_settings("pocket", "generate")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            scene_fields = build_scene_fields(defaults, generation.side_of(page.workspace, "pocket"))
        with gr.Column(scale=6, min_width=320):
            canvas = build_canvas()
            build_sources(page.workspace, canvas, [scene_fields["base"], scene_fields["width"], scene_fields["height"]])
            pairs = build_pairs()
    note, tokens, shape, side = (scene_fields.pop(name) for name in ("note", "tokens", "shape", "side_by_side"))
    form = Fields(canvas=canvas, **scene_fields)
    with gr.Row(elem_id="generate-go"):
        start = gr.Button("Generate", variant="primary", size="lg", elem_id="generate-start")
        cancel = gr.Button("Cancel", variant="stop", size="lg", visible=False, elem_id="generate-cancel")
    expected = gr.Markdown(elem_id="generate-expected", elem_classes="muted")
    status = gr.Markdown(elem_id="generate-status")
    with gr.Row(equal_height=False, visible=False, elem_id="generate-shown") as shown:
        with gr.Column(scale=6, min_width=320):
            picture = build_picture()
        with gr.Column(scale=5, min_width=320):
            details = build_details()
    gallery = Gallery(
        workspace=page.workspace,
        shown=shown,
        picture=picture,
        chosen=gr.State(None),
        names=gr.State([]),
        **details,
        **build_wall(),
    )
    wire(page, tab, gallery)
    _wire_lists(page, tab, handlers, form, note, tokens)
    _wire_sizes(page, handlers, form, shape)
    _wire_arranging(page, handlers, form, shape, side)
    _wire_drawing(page, handlers, form, gallery, start, cancel, status)
    _wire_estimate(page, tab, handlers, form, expected, gallery)
    _wire_pairs(page, tab, handlers, form, pairs, gallery, [start, cancel, status])
    _build_api(handlers, form)


def _wire_lists(page: Page, tab: gr.Tab, handlers: GenerateHandlers, form: Fields, note: Any, tokens: Any) -> None:
    """Wire what depends on the workspace: bases, adapters and their tokens."""
    tab.select(handlers.computer, None, form.base, **PRIVATE)  # not on load: it imports torch
    both = [form.base, form.adapters]
    followed = [form.adapters, form.strength, form.canvas, tokens]
    page.refreshed(tab, handlers.lists, both, [form.base, note, *followed])
    page.trained.change(handlers.lists, both, [form.base, note, *followed], **PRIVATE)
    form.base.change(handlers.follow, both, followed, **PRIVATE)
    tokens.click(handlers.pick, form.adapters, form.adapters, **PRIVATE)
    page.blocks.load(handlers.keeper.warm_soon, queue=False, **PRIVATE)


def _wire_sizes(page: Page, handlers: GenerateHandlers, form: Fields, shape: gr.Radio) -> None:
    """Wire what a base decides: the canvas's shape, sizes and sampling, also of one that another tab hands over."""
    both, size = [form.base, form.adapters], [form.base, form.width, form.height]
    sampling = [form.num_inference_steps, form.guidance_scale, form.region_isolation]
    suited = [form.width, form.height, *sampling]
    shape.input(handlers.shape, [shape, form.base], size[1:], **PRIVATE)
    form.base.input(handlers.suited, [form.base, shape, *sampling], suited, **PRIVATE)
    for size_field in size:
        size_field.change(handlers.reshaped, size, [form.canvas, shape], **PRIVATE)
    page.base.change(handlers.handed_base, [page.base, shape, *sampling], [*both, *suited], **PRIVATE)
    page.adapters.change(handlers.handed_adapters, [page.adapters, shape, *sampling], [*both, *suited], **PRIVATE)


def _wire_arranging(page: Page, handlers: GenerateHandlers, form: Fields, shape: gr.Radio, side: gr.Button) -> None:
    """Wire the prompt that follows the concepts, and a box for each."""
    words = [form.prompt, form.canvas]
    page.adapters.change(handlers.prompt_of_handed, [*words, page.adapters], words, **PRIVATE)
    form.adapters.change(lambda chosen: gr.Button(visible=len(chosen or []) > 1), form.adapters, side, **PRIVATE)
    arranged = [form.prompt, form.canvas, form.adapters, form.width, form.height, shape]
    side.click(handlers.arranged, [form.adapters, *words, form.base], arranged, **PRIVATE)


def _wire_drawing(
    page: Page,
    handlers: GenerateHandlers,
    form: Fields,
    gallery: Gallery,
    start: gr.Button,
    cancel: gr.Button,
    status: Any,
) -> None:
    """Wire generate, cancel, generate again, and a picture back into the fields."""
    # Not a state: gradio reads a state when the run's turn comes, by when it may be that of a later run.
    ticket = gr.Textbox(visible=False)
    asked: dict[str, Any] = {
        "fn": handlers.begin,
        "outputs": [start, cancel, status, gallery.shown, ticket],
        "queue": False,
        **PRIVATE,
    }
    shown = [gallery.picture, status, gallery.chosen]
    filled = page.first.change(handlers.first, None, [*form.all, status], **PRIVATE)
    for event, work, inputs in (
        (filled.then, handlers.generate_first, form.all),
        (start.click, handlers.generate_from_fields, form.all),
        (form.prompt.submit, handlers.generate_from_fields, form.all),
        (gallery.again.click, handlers.again, [gallery.chosen]),
    ):
        # multiple: one that was cancelled while it waited is not over yet when the next is asked for.
        run = event(**asked).then(work, [ticket, *inputs], shown, trigger_mode="multiple", **PRIVATE, **DEVICE)
        _wire_end(handlers, gallery, run, ticket, [start, cancel])
        run.success(gallery.choose, gallery.chosen, gallery.details, **PRIVATE)
    for event in (start.click, form.prompt.submit, gallery.again.click, page.first.change):
        event(None, js=TO_PICTURE, **PRIVATE)
    cancel.click(handlers.cancel, None, [start, cancel, status], queue=False, **PRIVATE)
    gr.api(handlers.cancel_for_program, api_name="cancel_generate", queue=False)
    page.blocks.unload(handlers.left)
    page.gone.append(handlers.gone)
    gallery.canvas.click(handlers.refilled, gallery.chosen, [*form.all, status], **PRIVATE)
    gallery.places.click(handlers.places, gallery.chosen, [*form.all, status], **PRIVATE)


def _wire_end(handlers: GenerateHandlers, gallery: Gallery, run: Any, ticket: gr.Textbox, buttons: list[Any]) -> None:
    """Wire what follows a run, also one that failed: the buttons, and the newest pictures.

    One that succeeded has given up its ticket, and the field may hold that of a later run by now.
    """
    for follows, given_up in ((run.success, gr.State("")), (run.failure, ticket)):
        ended = follows(handlers.ended, given_up, buttons, queue=False, **PRIVATE)
        ended.then(lambda: 1, None, gallery.number, queue=False, **PRIVATE).then(
            gallery.show, gallery.number, gallery.listed, **PRIVATE
        )


def _wire_estimate(
    page: Page, tab: gr.Tab, handlers: GenerateHandlers, form: Fields, expected: gr.Markdown, gallery: Gallery
) -> None:
    """Wire the line on the time that the pictures will take, which follows the fields and every picture."""
    page.refreshed(tab, handlers.estimate, form.all, [expected])
    followed = [form.base, form.num_images, form.width, form.height, form.num_inference_steps, form.guidance_scale]
    followed += [form.global_prompt_weight, form.canvas]
    gr.on(
        [*(field.change for field in followed), gallery.wall.change],
        handlers.estimate, form.all, expected, trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip


def _wire_pairs(
    page: Page,
    tab: gr.Tab,
    handlers: GenerateHandlers,
    form: Fields,
    pairs: PairFields,
    gallery: Gallery,
    controls: list[Any],
) -> None:
    """Wire the comparison of two; ``controls`` are the buttons that start and cancel, and the status line."""
    wire_lists(page, tab, PairHandlers(handlers.workspace, handlers.runs, handlers.keeper), pairs)
    start, cancel, status = controls
    ticket = gr.Textbox(visible=False)
    run = pairs.start.click(handlers.begin_both, None, [*controls, ticket], queue=False, **PRIVATE).then(
        handlers.generate_both, [ticket, *form.all, *pairs.changes], [*pairs.results, status],
        trigger_mode="multiple", **PRIVATE, **DEVICE,
    )  # fmt: skip
    _wire_end(handlers, gallery, run, ticket, [start, cancel])


def _build_api(handlers: GenerateHandlers, form: Fields) -> None:
    """The endpoint ``generate``, whose sketch is a file and whose regions are JSON."""
    sketch, regions = gr.File(visible=False, label="Sketch"), gr.JSON(visible=False, label="Regions")
    width, height = (gr.Number(None, visible=False, precision=0, label=label) for label in ("Width", "Height"))
    files, message, call = gr.Files(visible=False), gr.Textbox(visible=False), gr.Button(visible=False)
    call.click(
        handlers.generate,
        [
            form.prompt,
            form.base,
            form.adapters,
            form.strength,
            form.negative_prompt,
            form.seed,
            form.num_images,
            width,
            height,
            form.num_inference_steps,
            form.guidance_scale,
            sketch,
            form.sketch_weight,
            form.sketch_adapter,
            regions,
            form.global_prompt_weight,
            form.region_isolation,
            form.sampler,
        ],
        [files, message],
        api_name="generate",
        **DEVICE,
    )
