"""The fields of the train tab: the form with its estimate, and the trained adapters."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from ...config.settings import description
from ...config.train import TrainConfig
from ..launchers import CLUSTER, cluster_is_here
from ..presets import preset_train_settings, presets

EXECUTORS = [("this computer", "local"), ("the cluster (Slurm)", CLUSTER)]
NO_ADAPTERS = "None yet. What you train appears here, ready for steps 3 and 4."


@dataclass(frozen=True)
class Form:
    """The training form, in the order in which :meth:`TrainHandlers.start` takes the values."""

    concept: gr.Dropdown
    preset: gr.Dropdown
    base: gr.Textbox
    method: gr.Dropdown
    rank: gr.Number
    steps: gr.Number
    seed: gr.Number
    slot: gr.Textbox
    samples: gr.Checkbox
    executor: gr.Dropdown
    cluster: gr.Textbox

    @property
    def all(self) -> list[Any]:
        """The components in their order."""
        return [getattr(self, item.name) for item in fields(self)]

    @staticmethod
    def named(values: tuple[Any, ...]) -> dict[str, Any]:
        """The components' values by name, without the concept and the preset."""
        return dict(zip((item.name for item in fields(Form)[2:]), values, strict=True))


@dataclass(frozen=True)
class AdapterTable:
    """The adapters."""

    empty: gr.Markdown
    table: gr.HTML
    problems: gr.Markdown
    actions: gr.Row
    chosen: gr.Dropdown

    @property
    def all(self) -> list[Any]:
        """The components in their order."""
        return [getattr(self, item.name) for item in fields(self)]


def build_form() -> tuple[Form, gr.Markdown, gr.Markdown, gr.HTML, gr.Button, gr.Markdown]:
    concept = gr.Dropdown([], label="Concept", info="From step 1.", elem_id="train-concept", allow_custom_value=True)
    about = gr.Markdown(elem_id="train-about", elem_classes="muted")
    known = presets()
    preset = gr.Dropdown(list(known), value="pocket", label="Preset", info=known["pocket"], elem_id="train-preset")
    computer = gr.Markdown(elem_id="train-computer", elem_classes="muted")
    settings = preset_train_settings("pocket", "train")
    with gr.Accordion("More settings", open=False, elem_id="train-more"):
        base = gr.Textbox(
            settings["base"], label="Base", info=description(TrainConfig, "base"),
            max_lines=1, elem_id="train-base",
        )  # fmt: skip
        method = gr.Dropdown(
            [settings["method"]], value=settings["method"], label="Method", info=description(TrainConfig, "method"),
            allow_custom_value=True, elem_id="train-method",
        )  # fmt: skip
        with gr.Row():
            rank = gr.Number(
                settings["rank"], label="Rank", info=description(TrainConfig, "rank"),
                precision=0, minimum=1, min_width=120, elem_id="train-rank",
            )  # fmt: skip
            steps = gr.Number(
                settings["steps"], label="Steps", info=description(TrainConfig, "steps"), precision=0, minimum=1,
                min_width=120, elem_id="train-steps",
            )  # fmt: skip
        with gr.Row():
            seed = gr.Number(
                0, label="Seed", info=description(TrainConfig, "seed"), precision=0, minimum=0, min_width=120,
                elem_id="train-seed",
            )  # fmt: skip
            slot = gr.Textbox(
                "next", label="Slot", info=description(TrainConfig, "slot"),
                max_lines=1, min_width=120, elem_id="train-slot",
            )  # fmt: skip
        samples = gr.Checkbox(
            True, label="Generate samples on the way", info="A few small pictures; they cost some time.",
            elem_id="train-with-samples",
        )  # fmt: skip
        with gr.Row(visible=cluster_is_here()):
            executor = gr.Dropdown(
                EXECUTORS, value="local", label="Runs on", min_width=120, elem_id="train-executor",
                info="The cluster takes several at once; this folder must be on a disk that its nodes share.",
            )  # fmt: skip
            cluster = gr.Textbox(
                "", label="Cluster options", placeholder="partition=gpu minutes=90", max_lines=1, min_width=120,
                info="KEY=VALUE, separated by spaces.", elem_id="train-cluster",
            )  # fmt: skip
    costs = gr.HTML(elem_id="train-estimate", label="Estimate", padding=False)
    start = gr.Button("Start training", variant="primary", elem_id="train-start")
    message = gr.Markdown(elem_id="train-said")
    form = Form(concept, preset, base, method, rank, steps, seed, slot, samples, executor, cluster)
    return form, about, computer, costs, start, message


def build_shelf() -> tuple[AdapterTable, gr.Markdown, gr.Button, tuple[gr.Button, gr.Column, gr.Button, gr.Button]]:
    gr.Markdown("### Trained concepts\nEach is kept in a small file, an *adapter*.")
    empty = gr.Markdown(NO_ADAPTERS, elem_id="train-no-adapters")
    table = gr.HTML(visible=False, label="Your adapters", padding=False, elem_id="train-adapters")
    problems = gr.Markdown(visible=False, elem_id="train-problems")
    with gr.Row(visible=False) as actions:
        chosen = gr.Dropdown(
            [], label="Trained concept", allow_custom_value=True, elem_id="train-adapter", min_width=200
        )
        use = gr.Button("Generate with it", elem_id="train-adapter-use", min_width=120)
        ask = gr.Button("Delete", elem_id="train-adapter-delete", min_width=120)
    with gr.Column(visible=False, elem_id="train-adapter-asked") as asked:
        gr.Markdown("The adapter goes into the trash and its columns become free; fusions that hold it stay.")
        with gr.Row():
            really = gr.Button("Delete it", size="sm", variant="stop", elem_id="train-adapter-delete-sure")
            no = gr.Button("Keep it", size="sm", elem_id="train-adapter-keep")
    message = gr.Markdown(elem_id="train-adapters-said")
    return AdapterTable(empty, table, problems, actions, chosen), message, use, (ask, asked, really, no)
