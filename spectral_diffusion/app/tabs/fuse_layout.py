"""The layout of the fuse tab: the bench where concepts are fused, and the saved fusions."""

from __future__ import annotations

import gradio as gr

from ...config.fuse import FuseConfig
from ...config.settings import description
from .. import downloads
from ..page import PRIVATE

MERGE_INFO = (
    "gradient keeps several concepts best and takes longest; spectral adds what was trained, which is exact and quick."
)
WHOLE = "pocket-distilled"  # the preset with its own merge and distillation
DISTILLATION: dict[str, int | str] = {
    "none": 0,
    "300 steps": 300,
    "900 steps": 900,
    "900 steps, all of the U-Net": WHOLE,
}
DISTILLATION_INFO = (
    "After the merge, some minutes of training make the fusion generate what each concept generates alone. It keeps "
    "several concepts much better and changes other prompts less. All of the U-Net keeps most."
)
DEFAULT_NAME = "together"


class Bench:
    """The upper half: concepts, merge settings, interference and pictures; hidden while nothing is trained."""

    def __init__(self) -> None:
        self.strengths: gr.State = gr.State({})
        with gr.Row(visible=False, elem_id="fuse-bench") as self.all:
            with gr.Column(min_width=320):
                self._choice()
            with gr.Column(min_width=320):
                self.table = gr.HTML(visible=False, label="Interference", elem_id="fuse-table")
                self.warnings = gr.Markdown(elem_id="fuse-warnings", visible=False)
                self.pictures = gr.Gallery(
                    label="Alone, and in the fusion", columns=2, object_fit="contain",
                    interactive=False, visible=False, elem_id="fuse-pictures", buttons=["fullscreen"],
                    fit_columns=False, height="auto",
                )  # fmt: skip
                self.sheet = gr.DownloadButton("Download as one sheet", size="sm", visible=False, elem_id="fuse-sheet")
        self.settings = [
            self.chosen,
            self.strengths,
            self.merge,
            self.distill,
            self.options,
            self.prior_weight,
            self.seed,
        ]

    def _choice(self) -> None:
        self.chosen = gr.CheckboxGroup([], label="Concepts", elem_id="fuse-concepts", show_select_all=True)
        gr.render(inputs=[self.chosen, self.strengths], triggers=[self.chosen.change])(self._sliders)
        self.merge = gr.Dropdown(
            ["gradient"], value="gradient", label="Merge", info=MERGE_INFO, elem_id="fuse-merge",
        )  # fmt: skip
        self.summary = gr.Markdown(elem_id="fuse-summary")
        self.distill = gr.Radio(
            list(DISTILLATION.items()),
            value=0,
            label="Distillation",
            info=DISTILLATION_INFO,
            elem_id="fuse-distill",
        )
        with gr.Accordion("More settings", open=False):
            self.options = gr.Textbox(
                label="Merge options", placeholder="density=0.3", max_lines=1, elem_id="fuse-options",
                info=description(FuseConfig, "options"),
            )  # fmt: skip
            self.prior_weight = gr.Number(
                None, minimum=0, placeholder="the preset's", label="Prior weight of gradient and ssr",
                elem_id="fuse-prior-weight",
                info=description(FuseConfig, "calibration.prior_weight"),
            )  # fmt: skip
            self.seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, elem_id="fuse-seed",
                info="Another number gives other pictures to compare.",
            )  # fmt: skip
        self.name = gr.Textbox(
            label="Name of the fusion", placeholder=DEFAULT_NAME, max_lines=1, elem_id="fuse-name",
            info="Letters, digits, - and _.",
        )  # fmt: skip
        self.replace = gr.Checkbox(label="Replace it", visible=False, elem_id="fuse-replace")
        self.expected = gr.Markdown(elem_id="fuse-expected", elem_classes="muted")
        with gr.Row():
            self.compare = gr.Button("Show before and after", elem_id="fuse-compare")
            self.save = gr.Button("Save", variant="primary", elem_id="fuse-save")
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="fuse-stop")
        self.result = gr.Markdown(elem_id="fuse-result")
        self.saved = gr.State("")  # the name of the last saved fusion
        self.use = gr.Button("Generate with it", elem_id="fuse-use", visible=False)

    def _sliders(self, names: list[str] | None, strengths: dict[str, float] | None) -> None:
        """A strength slider for every chosen concept; its value stays while others are added or removed."""
        for name in names or []:
            slider = gr.Slider(
                0, 2, (strengths or {}).get(name, 1.0), step=0.05, label=f"Strength of {name}",
                elem_id=f"fuse-strength-{name}", key=f"strength-{name}", interactive=True,
            )  # fmt: skip
            gr.on(  # input: by keyboard and in the box; release: by mouse, and set back
                [slider.input, slider.release],
                lambda value, strengths, name=name: {**(strengths or {}), name: value},
                [slider, self.strengths],
                self.strengths,
                trigger_mode="always_last",
                **PRIVATE,
            )


class Saved:
    """The lower half: the saved fusions; hidden while there are none."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="fuse-shelf") as self.all:
            gr.Markdown("### Saved fusions")
            with gr.Row():
                with gr.Column(min_width=320):
                    self.which = gr.Dropdown([], label="Fusion", elem_id="fuse-saved", interactive=True)
                    self.about = gr.Markdown(elem_id="fuse-about")
                    self.use = gr.Button("Generate with it", elem_id="fuse-saved-use")
                    with gr.Accordion("Delete it", open=False):
                        self.sure = gr.Checkbox(label="Yes, delete this fusion", elem_id="fuse-sure")
                        self.delete = gr.Button("Delete", variant="stop", elem_id="fuse-delete")
                with gr.Column(min_width=320):
                    self._uses()

    def _uses(self) -> None:
        with gr.Row(elem_classes="fuse-line"):
            self.concept = gr.Dropdown(
                [], label="Take out", elem_id="fuse-take-concept", interactive=True, min_width=110
            )
            self.new = gr.Textbox(
                label="Name of the rest", placeholder="rest", max_lines=1, elem_id="fuse-take-name", min_width=110
            )
            self.take = gr.Button("Take it out", elem_id="fuse-take", min_width=140)
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="fuse-take-stop", min_width=100)
        with gr.Row(elem_classes="fuse-line"):
            self.kind = gr.Dropdown(
                [(text, kind) for kind, text in downloads.KINDS.items()], value="kohya",
                label="For other programs", elem_id="fuse-kind", scale=2, min_width=220,
            )  # fmt: skip
            self.pack = gr.Button("Prepare the file", elem_id="fuse-pack", min_width=140)
        self.file = gr.File(label="Download", interactive=False, visible=False, elem_id="fuse-file")
        self.result = gr.Markdown(elem_id="fuse-saved-result")
