"""Compare two: the scene of the fields, and the same with another base, other concepts or another strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ...core.errors import UserError
from ...core.hooks import Hooks
from ..adapters import adapter_rows
from ..base_cache import BaseCache
from ..bases import base_choices
from ..generation import GenerateRequest
from ..page import PRIVATE, Page, errors_as_toast, plain_html
from ..pairs import Pair, generate_both, other_request
from ..streaming import CancelTokens, stream
from ..workspace import ProgressLine, Workspace

WAITING = "Getting ready… (It waits while something else is generated or fused.)"
NOT_BEGUN = "Cancelled while it waited; nothing was generated."
Asked = tuple[GenerateRequest, dict[str, Any]]


@dataclass(frozen=True)
class PairFields:
    """What is different in the second picture, and where both are shown."""

    base: gr.Dropdown
    adapters: gr.Dropdown
    strength: gr.Textbox
    start: gr.Button
    shown: gr.Column
    slider: gr.ImageSlider
    number: gr.Slider
    sheet: gr.DownloadButton
    pairs: gr.State

    @property
    def changes(self) -> list[Any]:
        """The fields of the second picture."""
        return [self.base, self.adapters, self.strength]

    @property
    def results(self) -> list[Any]:
        """The outputs of a comparison, but for the status line."""
        return [self.shown, self.slider, self.number, self.sheet, self.pairs]


def build_pairs() -> PairFields:
    """The folded part of the page."""
    with gr.Accordion("Compare two", open=False, elem_id="generate-pairs"):
        gr.Markdown(
            "The fields above are the first picture. Say what is different in the second: two fusions, two adapters or "
            "two strengths, with the same seeds.",
            elem_classes="muted",
        )
        with gr.Row(equal_height=False):
            base = gr.Dropdown(
                [], value=None, allow_custom_value=True, label="Second base", elem_id="pairs-base", min_width=160
            )
            adapters = gr.Dropdown(
                [], multiselect=True, label="Second concepts", elem_id="pairs-adapters", min_width=160
            )
            strength = gr.Textbox(
                "", label="Second strength", info="One number, or rex=0.8.", max_lines=1, elem_id="pairs-strength",
                min_width=120,
            )  # fmt: skip
        start = gr.Button("Generate both", elem_id="pairs-start")
        with gr.Column(visible=False, elem_id="pairs-shown") as shown:
            slider = gr.ImageSlider(
                label="Both", show_label=False, type="filepath", interactive=False, elem_id="pairs-slider",
                buttons=["fullscreen"],
            )  # fmt: skip
            number = gr.Slider(1, 2, 1, step=1, label="Pair", visible=False, elem_id="pairs-number")
            sheet = gr.DownloadButton("Download all as one sheet", size="sm", elem_id="pairs-sheet")
    return PairFields(base, adapters, strength, start, shown, slider, number, sheet, gr.State([]))


class PairHandlers:
    """The callbacks: arguments from the page in, updates of the page out."""

    def __init__(self, workspace: Workspace, runs: CancelTokens, keeper: BaseCache) -> None:
        self.workspace, self.runs, self.keeper = workspace, runs, keeper

    def lists(self) -> list[Any]:
        """The bases and concepts that there are."""
        rows, _ = adapter_rows(self.workspace)
        return [gr.Dropdown(choices=base_choices(self.workspace)), gr.Dropdown(choices=[row[0] for row in rows])]

    def generate_both(
        self, ask: Callable[[], Asked], changes: tuple[Any, ...], ticket: str
    ) -> Iterator[tuple[Any, ...]]:
        """Draw both; yields lines for the status, at the end the pictures (:attr:`PairFields.results`) and a line."""
        stop, line = self.runs.take(ticket), [WAITING]
        nothing = (gr.skip(),) * 5
        if stop is None:  # cancelled while it waited, which the page has said
            yield *nothing, gr.skip()
            return

        def work(tell: Any) -> Pair:
            def show_step(done: int, total: int, text: str) -> None:
                line[0] = f"{text} (step {done} of {total})"
                tell(line[0])

            request, scene = ask()
            second = other_request(request, *changes)
            hooks = Hooks(ProgressLine(show_step), should_stop=stop.is_set)
            return generate_both(self.workspace, request, second, hooks, keeper=self.keeper, **scene)

        try:
            with errors_as_toast():
                for news in stream(work, stop):
                    if isinstance(news, str):
                        yield *nothing, plain_html(news)
                    elif isinstance(news, Pair):
                        yield *self._shown(news), plain_html(news.message)
        except gr.Error as error:  # shown in the status line
            yield *nothing, f"**That did not work.** {error.message}"
        finally:
            self.runs.end(ticket)

    def _shown(self, pair: Pair) -> tuple[Any, ...]:
        files = [(str(one), str(two)) for one, two in pair.pictures]
        if not files:
            return (gr.skip(),) * 5
        count = len(files)
        return (
            gr.Column(visible=True), files[0], gr.Slider(value=1, maximum=max(2, count), visible=count > 1),
            gr.DownloadButton(value=str(pair.sheet)), files,
        )  # fmt: skip

    def turn(self, number: float, files: list[tuple[str, str]]) -> Any:
        """The pair of a number."""
        with errors_as_toast():
            index = int(number) - 1
            if not 0 <= index < len(files) or not all(Path(file).exists() for file in files[index]):
                raise UserError("These pictures are gone; generate both again.")
            return files[index]


def wire_lists(page: Page, tab: gr.Tab, handlers: PairHandlers, fields: PairFields) -> None:
    """Fill the lists whenever the tab is opened, and turn the pairs."""
    page.refreshed(tab, handlers.lists, [], [fields.base, fields.adapters])
    page.trained.change(handlers.lists, None, [fields.base, fields.adapters], **PRIVATE)
    fields.number.input(handlers.turn, [fields.number, fields.pairs], fields.slider, **PRIVATE)
