"""The train tab: the training form with an estimate, the trainings, and the trained adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from ...config.train import TrainConfig
from ...core.errors import UserError
from ...core.names import with_article
from ...core.templates import render
from ...data.folder import load_concept
from ..adapters import ADAPTER_COLUMNS, adapter_rows, delete_adapter, newest_adapter, workspace_adapters
from ..concepts import concept_folder, concept_folders, known_concepts
from ..page import PRIVATE, Handed, Page, asked, errors_as_toast, hand, plain_html
from ..presets import preset_train_settings, presets, train_settings
from ..queue import Queue
from ..sentences import rendered
from ..workspace import sentence_of
from .job_list import List, build_list, shown_jobs
from .train_layout import Form, build_form, build_shelf

QUICKER = {"pocket": "pocket-quick"}  # a preset of half the steps
PATIENT = 240.0  # seconds of a training after which that is said


class TrainHandlers:
    """The buttons' callbacks: values from the page in, updates of the page out."""

    def __init__(self, page: Page) -> None:
        self.workspace = page.workspace
        self.queue = Queue(page.workspace)
        page.ready.append(self.queue.start)  # waiting jobs run once the server is up, without any page

    # --- the form

    def opened(
        self, concept: str | None, handed: Handed | None, taken: int, method: str | None
    ) -> tuple[Any, Any, int]:
        """The concepts and methods; one handed over from the concepts tab is chosen once.

        ``taken`` is the time of the last hand-over that was chosen.
        """
        from ...methods import all_methods

        folders = concept_folders(self.workspace)
        newest = [job.record.concept for job in self.queue.jobs()][:1]  # after the page was reloaded
        name, when = handed or (None, taken)
        first = (concept, name) if when == taken else (name, concept)
        value = next((name for name in (*first, *newest, *folders) if name in folders), None)
        details = known_concepts(self.workspace)
        shown = [(f"{name} ({details[name][1]})" if details[name][1] else name, name) for name in folders]
        return gr.Dropdown(choices=shown, value=value), gr.Dropdown(choices=list(all_methods()), value=method), when

    def about(self, concept: str | None) -> str:
        """A line on the chosen concept."""
        try:
            loaded = load_concept(concept_folder(self.workspace, concept))
        except UserError as error:
            return plain_html(rendered(error))
        count = f"{len(loaded.photos)} photo{'s' if len(loaded.photos) != 1 else ''}"
        line = f"{count} of {plain_html(with_article(loaded.noun))}. In prompts it is called `{loaded.token}`."
        if concept in workspace_adapters(self.workspace):
            line += " It is trained already; training it again replaces its adapter and keeps its place."
        return line

    def computer(self) -> tuple[Any, str]:
        """The presets with those first that suit this computer, and a line on it."""
        from ...doctor import this_computer

        device, suited = this_computer()
        names = [*(name for name in presets() if name in suited), *(name for name in presets() if name not in suited)]
        choices = [(f"{name} (suits this computer)" if name in suited else name, name) for name in names]
        return gr.Dropdown(choices=choices), f"This computer: {plain_html(device)}."

    def preset(self, name: str) -> list[Any]:
        """A preset's own settings for the fields."""

        with errors_as_toast():
            settings = preset_train_settings(name, "train")
        values = [
            settings.get(key, TrainConfig.model_fields[key].default) for key in ("base", "method", "rank", "steps")
        ]
        return [gr.Dropdown(info=presets().get(name, "")), *values]

    def estimate(self, concept: str | None, preset: str, *values: Any) -> Iterator[str]:
        """The estimated cost, or an error; the memory of a large base takes a moment longer."""
        from ..estimates import estimate_training, memory_estimate

        try:
            given = {name: value for name, value in Form.named(values).items() if name not in ("executor", "cluster")}
            config = train_settings(self.workspace, concept, preset, given)
            costs = estimate_training(config, self.queue.jobs())
            if preset in QUICKER and (costs.seconds or 0) > PATIENT:
                quicker = (
                    f"The preset {QUICKER[preset]} takes half as long and keeps less of the thing, above all of faces."
                )
                costs = replace(costs, note=f"{costs.note} {quicker}")
            yield figures(costs.trained, "counting …", costs.time, costs.note)
            most, more = memory_estimate(config)
            yield figures(costs.trained, most, costs.time, costs.note + more)
        except Exception as error:  # in place of the figures
            yield f'<p class="train-note train-wrong">{plain_html(sentence_of(error))}</p>'

    def start(self, concept: str | None, preset: str, *values: Any) -> tuple[Any, str]:
        """Start a training, or queue it; returns its id and a message."""
        with errors_as_toast():
            name, message = self.queue.enqueue(concept, preset, **Form.named(values))
            runs = self.queue.job(name).record.state == "running"
        return (name if runs else gr.skip()), plain_html(message)  # a queued one does not hide the running one

    # --- the list

    def look(self, chosen: str | None, seen: dict[str, Any], table: dict[str, Any]) -> list[Any]:
        """Poll the queue and show it; the adapters too if they have changed."""
        jobs = self.queue.refresh()
        before, (updates, seen) = seen, shown_jobs(self.workspace, jobs, self.queue.trouble, chosen, seen)
        ended = before.get("timer") == {"active": True} and seen["timer"] == {"active": False}
        message = "" if ended else gr.skip()  # the last message on the queue is outdated
        moved = gr.skip() if seen["chosen"] == chosen else seen["chosen"]
        now = self.adapters()
        shelf = [gr.skip()] * 5 if table == now else self.shelf(now)
        return [*updates, moved, message, seen, *shelf, now]

    def adapters(self) -> dict[str, Any]:
        """The adapters: the table's rows, the sentences on unreadable ones, all names."""
        try:
            rows, problems = adapter_rows(self.workspace)
        except OSError as error:
            rows, problems = [], [sentence_of(error)]
        return {"rows": rows, "problems": problems, "names": list(workspace_adapters(self.workspace))}

    def shelf(self, now: dict[str, Any]) -> list[Any]:
        """The updates of the adapters' part."""
        problems = "\n".join(f"- {plain_html(text)}" for text in now["problems"])
        return [
            gr.Markdown(visible=not now["names"]),
            gr.HTML(adapter_table_html(now["rows"]), visible=bool(now["rows"])),
            gr.Markdown(problems, visible=bool(problems)),
            gr.Row(visible=bool(now["names"])),
            gr.Dropdown(choices=now["names"], value=newest_adapter(self.workspace)),
        ]

    def ask(self, what: str, job: str | None) -> str:
        """Pause, stop or resume a training; returns a message."""
        with errors_as_toast():
            return plain_html(str(getattr(self.queue, what)(job)))

    def remove(self, job: str | None) -> tuple[str, Any, Any]:
        """Remove a training from the list, or ask first if it is unfinished."""
        with errors_as_toast():
            queued = self.queue.job(job)
            if queued.record.state != "done" and queued.record.launches and self.queue.resumable(queued):
                return "", gr.Column(visible=True), gr.Row(visible=False)
            return plain_html(self.queue.remove(job)), gr.Column(visible=False), gr.Row(visible=True)

    def remove_surely(self, job: str | None) -> tuple[str, Any, Any]:
        """Remove an unfinished training from the list."""
        with errors_as_toast():
            return plain_html(self.queue.remove(job, sure=True)), gr.Column(visible=False), gr.Row(visible=True)

    def clear(self) -> str:
        """Remove the finished trainings from the list."""
        with errors_as_toast():
            return plain_html(self.queue.clear())

    def generate_with_job(self, job: str | None) -> tuple[Handed, Any]:
        """Hand a finished training's adapter to the pictures."""
        with errors_as_toast():
            return self.generate_with(self.queue.job(job).record.concept)

    def follow_strip(self) -> tuple[Any, Any]:
        """Where the line at the foot of the page leads: to the trainings, or to pictures with the last trained one."""
        jobs = self.queue.jobs()
        done = next((job for job in jobs if job.record.state == "done"), None)
        if done is None or any(job.active for job in jobs):
            return gr.skip(), gr.Tabs(selected="train")
        return self.generate_with(done.record.concept)

    # --- the adapters

    def generate_with(self, name: str | None) -> tuple[Handed, Any]:
        """Hand an adapter to the pictures."""
        with errors_as_toast():
            if name not in workspace_adapters(self.workspace):
                raise UserError(f"The adapter '{name}' is not there any more; train it again.")
            return hand([str(name)]), gr.Tabs(selected="generate")

    def delete(self, name: str | None) -> tuple[str, Any]:
        """Delete an adapter."""
        with errors_as_toast():
            return plain_html(delete_adapter(self.workspace, name)), gr.Column(visible=False)

    # --- for programs

    @asked
    def api_train(
        self,
        concept: str,
        preset: str = "pocket",
        base: str | None = None,
        method: str | None = None,
        rank: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        resume: bool = False,
        executor: str = "local",
        cluster: str = "",
    ) -> tuple[str, str]:
        """Put a training into the queue; returns its id, as in ``jobs``, and a message.

        Omitted values follow the preset. ``resume`` continues the concept's unfinished training. ``executor`` may be
        slurm, of which ``cluster`` asks, such as partition=gpu minutes=90.
        """
        with errors_as_toast():
            if resume:
                return self.queue.resume_concept(concept)
            changes = {"base": base, "method": method, "rank": rank, "steps": steps, "seed": seed}
            return self.queue.enqueue(concept, preset, executor, cluster, samples=True, **changes)

    def api_jobs(self) -> list[dict[str, Any]]:
        """All trainings: running, waiting in their turn, then the others from the newest."""
        with errors_as_toast():
            return [job.as_json() for job in self.queue.refresh()]

    @asked
    def api_stop(self, job: str) -> str:
        """Stop a training and keep its state; returns a message."""
        with errors_as_toast():
            return self.queue.stop(job)


def choose_concept(event: gr.SelectData) -> str:
    """The id of a training that was clicked in the list."""
    return str(event.value)


def figures(trained: str, memory: str, time: str, note: str) -> str:
    """The estimated cost of a training as tiles."""
    tiles = {"Trained parameters": trained, "Memory": memory, "Time": time}
    return render("app/templates/train_figures.html.jinja", tiles=tiles, note=note)


def adapter_table_html(rows: list[list[str]]) -> str:
    """The adapters as a table."""
    return render("app/templates/adapter_table.html.jinja", columns=ADAPTER_COLUMNS, rows=rows)


def build(page: Page, tab: gr.Tab) -> None:
    """Fill the tab and wire its events."""
    handlers = TrainHandlers(page)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            form, about, computer, costs, start, message = build_form()
        with gr.Column(scale=6, min_width=320):
            parts, sure, keep = build_list(start, page.strip, page.timer)
    shelf, adapters_said, use, delete = build_shelf()

    # The id of the shown training. The radio is never an input: gradio refuses choices that were added later.
    chosen: gr.State = gr.State(None)
    seen: gr.State = gr.State({})
    look: dict[str, Any] = {
        "fn": handlers.look, "inputs": [chosen, seen, page.trained], **PRIVATE,
        "outputs": [*parts.all, chosen, message, seen, *shelf.all, page.trained],
    }  # fmt: skip
    page.refreshed(tab, look["fn"], look["inputs"], look["outputs"])
    parts.timer.tick(**look)
    parts.jobs.select(choose_concept, None, chosen, **PRIVATE).then(**look)

    _wire_form(page, tab, handlers, form, [about, computer, costs])
    start.click(handlers.start, form.all, [chosen, message], **PRIVATE).success(**look)
    _wire_list(page, handlers, parts, chosen, (sure, keep), message, look)
    use.click(handlers.generate_with, [shelf.chosen], [page.adapters, page.tabs], **PRIVATE)
    page.strip.click(handlers.follow_strip, None, [page.adapters, page.tabs], **PRIVATE)
    ask, asked, really, no = delete
    ask.click(lambda: gr.Column(visible=True), None, asked, **PRIVATE)
    no.click(lambda: gr.Column(visible=False), None, asked, **PRIVATE)
    shelf.chosen.change(lambda: gr.Column(visible=False), None, asked, **PRIVATE)  # it was asked about another
    really.click(handlers.delete, [shelf.chosen], [adapters_said, asked], **PRIVATE).success(**look)

    for fn, name in ((handlers.api_train, "train"), (handlers.api_jobs, "jobs"), (handlers.api_stop, "stop")):
        gr.api(fn, api_name=name)


# --- wiring --------------------------------------------------------------------------------------------------


def _wire_form(page: Page, tab: gr.Tab, handlers: TrainHandlers, form: Form, lines: Sequence[Any]) -> None:
    """Wire the form and its ``lines``: the concept, this computer, and the estimate, which follows every change."""
    about, computer, tiles = lines
    costs: dict[str, Any] = {"fn": handlers.estimate, "inputs": form.all, "outputs": tiles, **PRIVATE}
    taken = gr.State(0)
    opened = {"fn": handlers.opened, "inputs": [form.concept, page.concept, taken, form.method], **PRIVATE}
    described: dict[str, Any] = {"fn": handlers.about, "inputs": form.concept, "outputs": about, **PRIVATE}
    # Not on page load: the estimate imports torch, and the first tab must not wait for it.
    tab.select(outputs=[form.concept, form.method, taken], **opened).then(**described).then(**costs)
    tab.select(handlers.computer, None, [form.preset, computer], **PRIVATE)
    handed = page.concept.change(lambda handed: handed[0], page.concept, form.concept, **PRIVATE)
    handed.then(**described).then(**costs)
    form.concept.input(**described).then(**costs)
    form.preset.input(
        handlers.preset, form.preset, [form.preset, form.base, form.method, form.rank, form.steps], **PRIVATE
    ).success(**costs)
    for part in form.all[2:]:
        part.input(trigger_mode="always_last", **costs)


def _wire_list(
    page: Page, handlers: TrainHandlers, parts: List, chosen: gr.State, answers: tuple[gr.Button, gr.Button],
    message: gr.Markdown, look: dict[str, Any],
) -> None:  # fmt: skip
    """The buttons of the chosen training."""
    sure, keep = answers
    for button, what in ((parts.pause, "pause"), (parts.resume, "resume"), (parts.stop, "stop")):
        button.click(lambda job, what=what: handlers.ask(what, job), chosen, message, **PRIVATE).success(**look)
    answered = [message, parts.asked, parts.buttons]
    parts.remove.click(handlers.remove, chosen, answered, **PRIVATE).success(**look)
    sure.click(handlers.remove_surely, chosen, answered, **PRIVATE).success(**look)
    keep.click(lambda: (gr.Column(visible=False), gr.Row(visible=True)), None, answered[1:], **PRIVATE)
    parts.clear.click(handlers.clear, None, message, **PRIVATE).success(**look)
    parts.use.click(handlers.generate_with_job, chosen, [page.adapters, page.tabs], **PRIVATE)
