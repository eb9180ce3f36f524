"""The app's pages and buttons. Everything that is done is done in :mod:`.controllers`."""

from __future__ import annotations

import html
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from ..config import FuseConfig, TrainConfig
from ..errors import UserError
from ..generation.scene import Scene
from ..methods import all_methods
from . import controllers
from .controllers import ADAPTER_COLUMNS, Teller, Workspace

log = logging.getLogger(__name__)

DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}  # one job on the device at a time
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
INTRODUCTION = """# Spectral Diffusion
Several of your own things together in one picture, each still itself. Four steps, from left to right."""


@contextmanager
def told() -> Iterator[None]:
    """Show any error as one sentence in the page; the unexpected also goes to the log, with its traceback."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        if not isinstance(error, UserError):
            log.exception("Unexpected error in the app")
        # The page renders messages as HTML, where a bare <rex> would vanish.
        sentence = html.escape(controllers.sentence_of(error), quote=False)
        raise gr.Error(sentence, duration=30, title="That did not work", print_exception=False) from error


def teller(progress: gr.Progress) -> Teller:
    """The library's progress on gradio's bar."""
    return Teller(lambda done, total, words: progress((done, total), desc=words))


class Handlers:
    """What the buttons call: arguments from the page in, updates of the page out."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.asked_to_stop = threading.Event()

    def lists(self) -> list[Any]:
        """Concepts, table of adapters, its problems, adapters to fuse, hint, adapters to draw with, bases."""
        with told():
            names = list(controllers.concept_folders(self.workspace))
            adapters, problems = controllers.readable_adapters(self.workspace)
            choices = list(adapters)
            if not adapters:
                problems = ["No adapters yet: choose a concept in step 1, then press Train.", *problems]
            hints = {
                0: "There is nothing to fuse yet; train a concept in step 2.",
                1: "Train a second concept to fuse.",
            }
            return [
                gr.Dropdown(choices=names),
                gr.Dataframe(value=controllers.adapter_rows(adapters), visible=bool(adapters)),
                gr.Textbox(value="\n".join(problems), visible=bool(problems)),
                gr.Dropdown(choices=choices),
                gr.Markdown(hints.get(len(adapters), "Choose the concepts that shall live in one checkpoint.")),
                gr.Dropdown(choices=choices),
                gr.Dropdown(choices=controllers.base_choices(self.workspace)),
            ]

    def view(self, name: str | None) -> tuple[str, list[Any], str]:
        """A concept's description, thumbnails, and its line on the training page."""
        if not name:
            empty = "No concept is chosen. Pick a ready-made one, or add your own photos below."
            return empty, [], "No concept is chosen yet; pick one in step 1."
        with told():
            concept, thumbnails = controllers.view_concept(self.workspace, name)
        photos = f"{len(concept.photos)} photo{'s' if len(concept.photos) > 1 else ''}"
        line = f"**{concept.name}**: {photos} of a {concept.noun}, called `{concept.token}` in prompts."
        left_out = f" Left out: {'; '.join(concept.skipped)}." if concept.skipped else ""
        return f"{line}{left_out} Go on with step 2.", thumbnails, f"You train {line}"

    def add(self, name: str, noun: str, files: list[str] | None) -> tuple[Any, str]:
        """Keep uploaded photos as a concept of the workspace."""
        with told():
            name, problems = controllers.add_concept(self.workspace, name, noun, [Path(file) for file in files or []])
            names = list(controllers.concept_folders(self.workspace))
        left_out = f" Left out: {'; '.join(problems)}." if problems else ""
        return gr.Dropdown(choices=names, value=name), f"Added '{name}'.{left_out}"

    def preset(self, name: str) -> list[Any]:
        """Fill the training fields from a preset."""
        with told():
            settings = controllers.preset_settings(name, "train")
        return [settings.get(key, TrainConfig.model_fields[key].default) for key in ("base", "method", "rank", "steps")]

    def train(
        self,
        concept: str,
        preset: str = "pocket",
        base: str = "pocket",
        method: str = "spectral-additive",
        rank: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        resume: bool = False,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio looks for it in the defaults)
    ) -> str:
        """Train a concept into an adapter; returns what to tell."""
        self.asked_to_stop.clear()
        with told():
            progress(0, desc="Loading the base")
            changes = {"base": base, "method": method, "rank": rank, "steps": steps, "seed": seed}
            should_stop = self.asked_to_stop.is_set
            return controllers.train(self.workspace, concept, preset, resume, teller(progress), should_stop, **changes)

    def stop(self) -> None:
        """Ask a running training to keep its state and stop."""
        self.asked_to_stop.set()
        gr.Info("A running training keeps its state and stops after the present step.")

    def fuse(
        self,
        adapters: list[str],
        name: str,
        form: str = "sum",
        strength: str = "1",
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> str:
        """Fuse adapters into one checkpoint; returns what to tell."""
        with told():
            progress(0, desc="Loading the adapters and their base")
            return controllers.fuse(self.workspace, adapters, name, form, strength, teller(progress))

    def tokens(self, base: str, adapters: list[str]) -> str:
        """A line that says which tokens the prompt may use."""
        try:
            found = controllers.tokens(self.workspace, base, adapters)
        except UserError as error:
            return html.escape(str(error), quote=False)
        words = ", ".join(f"`{token}` (a {noun})" for token, noun in found.items())
        return f"Tokens for the prompt: {words}." if words else "No tokens: choose adapters, or a fused base of step 3."

    def generate(
        self,
        prompt: str,
        base: str = "pocket",
        adapters: list[str] | None = None,
        strength: str = "1",
        negative_prompt: str = "",
        seed: int | None = None,
        count: int | None = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sketch: dict[str, Any] | None = None,
        sketch_weight: float | None = None,
        sketch_adapter: str = "",
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[list[str], list[str], str]:
        """Draw pictures; returns them for looking at and for download, and what to tell."""
        with told():
            progress(0, desc="Loading the base")
            changes = {
                "prompt": prompt, "negative_prompt": negative_prompt, "seed": seed, "count": count, "width": width,
                "height": height, "steps": steps, "guidance": guidance, "sketch_weight": sketch_weight,
                "sketch_adapter": sketch_adapter,
            }  # fmt: skip
            drawing = sketch["composite"] if sketch else None
            paths, words = controllers.generate(
                self.workspace, base, adapters, strength, drawing, teller(progress), **changes
            )
        return [str(path) for path in paths], [str(path) for path in paths], words


class App(gr.Blocks):
    """The page; it remembers the folder whose pictures it may show."""

    pictures: Path


def build(workspace: Path) -> gr.Blocks:
    """The app over one workspace folder, which is made when something is first written there."""
    handlers = Handlers(Workspace(Path(workspace)))
    names = list(controllers.concept_folders(handlers.workspace))
    first, drawing = handlers.preset("pocket"), controllers.preset_settings("pocket", "generate")
    with App(title="Spectral Diffusion", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        blocks.pictures = handlers.workspace.pictures
        gr.Markdown(INTRODUCTION)
        with gr.Tab("1 · Concept"):
            concept = gr.Dropdown(
                names, value=names[0] if names else None, allow_custom_value=True,
                label="Concept", info="A thing of your own that the base does not know yet.",
            )  # fmt: skip
            about = gr.Markdown()
            photos = gr.Gallery(label="Photos", columns=8, fit_columns=False, interactive=False, buttons=[])
            with gr.Accordion("Add your own photos", open=False):
                with gr.Row():
                    new_name = gr.Textbox(label="Name", placeholder="rex", max_lines=1)
                    new_noun = gr.Textbox(label="What it is (class noun)", placeholder="dog", max_lines=1)
                files = gr.File(label="Photos", file_count="multiple", height=150)
                add = gr.Button("Add concept")
                added = gr.Textbox(label="Result", interactive=False)
        with gr.Tab("2 · Train"):
            chosen = gr.Markdown()
            with gr.Row():
                preset = gr.Dropdown(
                    controllers.presets(), value="pocket", label="Preset", info="Also sets what is not shown here."
                )
                base = gr.Textbox(
                    first[0],
                    label="Base",
                    max_lines=1,
                    info="pocket, a diffusers folder, a hub id or a .safetensors file.",
                )
                method = gr.Dropdown(
                    list(all_methods()),
                    value=first[1],
                    label="Method",
                    info="How the change is written down.",
                    allow_custom_value=True,
                )
            with gr.Row():
                rank = gr.Number(first[2], label="Rank", precision=0, minimum=1)
                steps = gr.Number(first[3], label="Steps", precision=0, minimum=1)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            resume = gr.Checkbox(label="Go on with a stopped training")
            with gr.Row():
                train = gr.Button("Train", variant="primary")
                stop = gr.Button("Stop", variant="stop")
            trained = gr.Textbox(label="Result", interactive=False, lines=2)
            gr.Markdown("### Your adapters")
            table = gr.Dataframe(headers=list(ADAPTER_COLUMNS), interactive=False, wrap=True, visible=False)
            problems = gr.Textbox(show_label=False, interactive=False, lines=1)
        with gr.Tab("3 · Fuse"):
            hint = gr.Markdown()
            to_fuse = gr.Dropdown([], multiselect=True, allow_custom_value=True, label="Adapters")
            with gr.Row():
                fused_name = gr.Textbox(label="Name of the fusion", placeholder="together", max_lines=1)
                form = gr.Radio(_choices(FuseConfig, "form"), value="sum", label="Form")
                fuse_strength = gr.Textbox("1", label="Strength", info="One number, or rex=0.8, brew=1.2.")
            fuse = gr.Button("Fuse", variant="primary")
            fused = gr.Textbox(label="Result", interactive=False, lines=2)
        with gr.Tab("4 · Generate"):
            with gr.Row():
                with gr.Column():
                    draw_base = gr.Dropdown(
                        controllers.base_choices(handlers.workspace), value="pocket", allow_custom_value=True,
                        label="Base", info="pocket, one of your fusions, or a path.",
                    )  # fmt: skip
                    draw_with = gr.Dropdown(
                        [], multiselect=True, allow_custom_value=True, label="Adapters", info="Only on an unfused base."
                    )
                    strength = gr.Textbox("1", label="Strength", info="One number, or rex=0.8, brew=1.2.")
                    words = gr.Markdown()
                    prompt = gr.Textbox(label="Prompt", placeholder="a photo of <rex> on the beach", lines=2)
                    negative = gr.Textbox("", label="Negative prompt", placeholder="what to keep away from")
                with gr.Column():
                    sketch = gr.ImageEditor(
                        label="Sketch",
                        type="pil", image_mode="L", layers=False, sources=("upload", "clipboard"), transforms=(),
                        canvas_size=(512, 512), height=400,
                        brush=gr.Brush(default_size=6, colors=["#000000", "#ffffff"], default_color="#000000"),
                    )  # fmt: skip
                    gr.Markdown(
                        "Optional: draw or upload where things are. A sketch is stretched to the picture's size."
                    )
            with gr.Row():
                draw_seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                count = gr.Slider(1, 16, 4, step=1, label="Pictures")
                draw_steps = gr.Slider(1, 100, drawing.get("steps", 20), step=1, label="Steps")
                guidance = gr.Slider(0, 20, drawing.get("guidance", 4.0), step=0.5, label="Guidance")
            with gr.Accordion("Size, sketch weight and adapter", open=False), gr.Row():
                width = gr.Number(None, label="Width", info="Empty: the base's own.", precision=0, step=8)
                height = gr.Number(None, label="Height", info="Empty: the base's own.", precision=0, step=8)
                sketch_weight = gr.Slider(0, 4, 1.0, step=0.1, label="Sketch weight")
                sketch_adapter = gr.Textbox(
                    "", label="Sketch adapter", info="Folder or hub id of a T2I-Adapter. Empty: the base's own."
                )
            generate = gr.Button("Generate", variant="primary")
            drawn = gr.Textbox(label="Result", interactive=False)
            gallery = gr.Gallery(
                label="Pictures", columns=4, fit_columns=False, object_fit="contain", interactive=False
            )
            downloads = gr.Files(label="Download, with the settings inside each picture", height=140, interactive=False)

        lists = [concept, table, problems, to_fuse, hint, draw_with, draw_base]
        blocks.load(handlers.lists, outputs=lists, **PRIVATE)
        viewed = {"fn": handlers.view, "inputs": concept, "outputs": [about, photos, chosen], **PRIVATE}
        blocks.load(**viewed)
        concept.change(**viewed)
        add.click(handlers.add, [new_name, new_noun, files], [concept, added], api_name="add_concept")
        preset.input(handlers.preset, preset, [base, method, rank, steps], **PRIVATE)
        train.click(
            handlers.train, [concept, preset, base, method, rank, steps, seed, resume], trained,
            api_name="train", show_progress_on=trained, **DEVICE,
        ).success(handlers.lists, outputs=lists, **PRIVATE)  # fmt: skip
        stop.click(handlers.stop, queue=False, api_name="stop")
        fuse.click(
            handlers.fuse, [to_fuse, fused_name, form, fuse_strength], fused, api_name="fuse", **DEVICE
        ).success(handlers.lists, outputs=lists, **PRIVATE)  # fmt: skip
        for changed in (draw_base, draw_with):
            changed.change(handlers.tokens, [draw_base, draw_with], words, **PRIVATE)
        blocks.load(handlers.tokens, [draw_base, draw_with], words, **PRIVATE)
        generate.click(
            handlers.generate,
            [prompt, draw_base, draw_with, strength, negative, draw_seed, count, width, height, draw_steps, guidance,
             sketch, sketch_weight, sketch_adapter],
            [gallery, downloads, drawn], api_name="generate", show_progress_on=drawn, **DEVICE,
        )  # fmt: skip
    return blocks


def launch(blocks: gr.Blocks, port: int, **options: Any) -> Any:
    """Serve the app on this machine only; of the workspace, only the pictures are served.

    Raises:
        UserError: the port is taken.
    """
    try:
        return blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            allowed_paths=[str(blocks.pictures.absolute())],
            theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css="footer {opacity: 0.7}",
            footer_links=["api"],
            max_file_size="50mb",
            **options,
        )
    except OSError as error:
        raise UserError(
            f"Cannot serve on port {port} of 127.0.0.1, perhaps it is taken; choose another port."
        ) from error


def _choices(model: type[FuseConfig | Scene], field: str) -> list[str]:
    return list(model.model_fields[field].annotation.__args__)  # type: ignore[union-attr]
