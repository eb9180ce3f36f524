"""The fuse tab: choose concepts and strengths, compare, save; take concepts out of saved fusions, download them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr

from ...core.errors import Cancelled, UserError
from ...core.hooks import Hooks
from ...core.templates import render
from .. import bases, comparing, downloads, fusing, temporary
from ..adapters import adapter_rows
from ..page import DEVICE, PRIVATE, Handed, Page, afterwards, asked, errors_as_toast, hand, plain_html, teller
from ..streaming import CancelTokens, cancellable
from .fuse_layout import DEFAULT_NAME, WHOLE, Bench, Saved

COLUMNS = {  # the table's headings and their explanations
    "Concept": "",
    "Columns": "The part of the base that it changed. Concepts with columns of their own disturb each other least.",
    "Size": "How much it changes the base at strength 1.",
    "Others act on it": "What the others do in its place, as a share of what it does itself: at 0% it stays as it was "
    "trained, at 100% they weigh as much.",
    "Nearest neighbour": "The concept that changes the base most alike: 0 is nothing in common, 1 is the same.",
}
STOPPED = "Stopped; nothing was saved."
NOT_BEGUN = "Stopped while it waited; nothing was saved."
TOO_FEW = {
    0: "Nothing is trained yet. Train two concepts in step 2, then put them together here.",
    1: "One concept is trained. Train a second one in step 2, then put them together here.",
}
HIDDEN: dict[str, Any] = {"api_visibility": "private"}
ENOUGH = "Tick two or more concepts, then press **Show before and after** or **Save**."


def build(page: Page, tab: gr.Tab) -> None:
    """Fill the tab and wire its events."""
    handlers = FuseHandlers(page)
    hint = gr.Markdown(elem_id="fuse-hint")
    to_train = gr.Button("Train a concept", elem_id="fuse-to-train", visible=False)
    problems = gr.Markdown(elem_id="fuse-problems", visible=False)
    bench, saved = Bench(), Saved()

    shown = [hint, to_train, problems, bench.all, bench.chosen, bench.merge, saved.all, saved.which, saved.about]
    lists: dict[str, Any] = {
        "fn": handlers.lists, "inputs": [bench.chosen, saved.which], "outputs": shown, **PRIVATE,
    }  # fmt: skip
    page.refreshed(tab, lists["fn"], lists["inputs"], lists["outputs"])
    page.trained.change(lists["fn"], lists["inputs"], lists["outputs"], **PRIVATE)
    to_train.click(lambda: gr.Tabs(selected="train"), None, page.tabs, **PRIVATE)
    _wire_bench(bench, handlers, page, lists)
    _wire_saved(saved, handlers, page, lists)
    gr.api(handlers.fuse, api_name="fuse", **DEVICE)
    gr.api(handlers.cancel_for_program, api_name="cancel_fuse", queue=False)


def _wire_bench(bench: Bench, handlers: FuseHandlers, page: Page, lists: dict[str, Any]) -> None:
    look = {
        "fn": handlers.look, "inputs": [bench.chosen, bench.strengths], "outputs": [bench.table, bench.warnings],
        **PRIVATE,
    }  # fmt: skip
    bench.chosen.change(**look)
    bench.strengths.change(**look)
    priced = [bench.chosen, bench.merge, bench.distill, bench.options, bench.prior_weight]
    gr.on(
        [bench.chosen.change, bench.merge.change, bench.distill.change, bench.saved.change],
        handlers.estimate, priced, bench.expected, trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    bench.merge.change(handlers.about_merge, bench.merge, bench.summary, **PRIVATE)
    bench.distill.change(
        handlers.about_distillation, bench.distill, [bench.merge, bench.prior_weight, bench.options], **PRIVATE
    )
    buttons = [bench.compare, bench.save, bench.stop]
    tickets = gr.Textbox(visible=False), gr.Textbox(visible=False)  # see the generate tab
    asked: dict[str, Any] = {"queue": False, **PRIVATE}
    shown: dict[str, Any] = {"show_progress_on": bench.result, "trigger_mode": "multiple", **DEVICE, **HIDDEN}
    trying = bench.compare.click(handlers.begin_compare, None, [*buttons, tickets[0]], **asked).then(
        handlers.compare, [tickets[0], *bench.settings], [bench.pictures, bench.sheet, bench.result], **shown
    )
    saving = bench.save.click(handlers.begin_save, None, [*buttons, tickets[1]], **asked).then(
        handlers.save,
        [tickets[1], bench.name, bench.replace, *bench.settings],
        [bench.result, page.base, bench.saved, bench.use],
        **shown,
    )
    for running, ticket in zip((trying, saving), tickets, strict=True):
        running.success(handlers.done, gr.State(""), buttons, queue=False, **PRIVATE)  # see the generate tab
        running.failure(handlers.done, ticket, buttons, queue=False, **PRIVATE)
    saving.success(**lists)
    bench.stop.click(handlers.stop, None, [*buttons, bench.result], queue=False, **PRIVATE)
    page.blocks.unload(handlers.left)
    page.gone.append(handlers.gone)
    bench.name.change(handlers.taken, bench.name, bench.replace, **PRIVATE)
    page.blocks.load(handlers.taken, bench.name, bench.replace, **PRIVATE)
    afterwards(saving, handlers.taken, bench.name, bench.replace, **PRIVATE)
    bench.use.click(handlers.generate_with, bench.saved, [page.base, page.tabs], **PRIVATE)


def _wire_saved(saved: Saved, handlers: FuseHandlers, page: Page, lists: dict[str, Any]) -> None:
    saved.which.change(handlers.show, saved.which, [saved.about, saved.concept, saved.file, saved.sure], **PRIVATE)
    saved.use.click(handlers.generate_with, saved.which, [page.base, page.tabs], **PRIVATE)
    buttons, ticket = [saved.take, saved.stop], gr.Textbox(visible=False)  # see the generate tab
    taking = saved.take.click(handlers.begin_taking, None, [*buttons, ticket], queue=False, **PRIVATE).then(
        handlers.take_out, [ticket, saved.which, saved.concept, saved.new], [saved.result, saved.which],
        show_progress_on=saved.result, trigger_mode="multiple", **DEVICE, **HIDDEN,
    )  # fmt: skip
    taking.success(handlers.taking_done, gr.State(""), buttons, queue=False, **PRIVATE)
    taking.failure(handlers.taking_done, ticket, buttons, queue=False, **PRIVATE)
    taking.success(**lists)
    saved.stop.click(handlers.stop_taking, None, [*buttons, saved.result], queue=False, **PRIVATE)
    saved.pack.click(
        handlers.download, [saved.which, saved.kind], [saved.file, saved.result], show_progress_on=saved.result,
        **DEVICE, **HIDDEN,
    )  # fmt: skip
    deleting = saved.delete.click(handlers.delete, [saved.which, saved.sure], [saved.result, saved.sure], **PRIVATE)
    deleting.success(**lists)


def fusion_table(rows: Sequence[comparing.Row]) -> str:
    """How the concepts get on: a sentence each, and folded figures."""
    cells = [dict(zip(COLUMNS, row.figures, strict=True)) for row in rows]
    sentences = [(row.concept, row.sentence) for row in rows]
    return render("app/templates/fusion_table.html.jinja", columns=COLUMNS, rows=cells, sentences=sentences)


def ready(yes: bool) -> list[Any]:
    """The states of Compare, Save and Stop: ``yes`` while nothing runs."""
    return [gr.Button(interactive=yes), gr.Button(interactive=yes), gr.Button(visible=not yes)]


def lines(message: str) -> str:
    """A message of several lines for the page."""
    return plain_html(message).replace("\n", "\n\n")


def ready_to_take(yes: bool) -> list[Any]:
    """The states of Take it out and its Stop: ``yes`` while nothing is taken out."""
    return [gr.Button(interactive=yes), gr.Button(visible=not yes)]


def changes_for(merge: str, distill: int | str, options: str, prior_weight: float | None) -> dict[str, Any]:
    """The fields as changes of a fusion's settings; the preset has its own merge."""
    if distill == WHOLE:
        return {"preset": WHOLE}
    return {"merge": merge, "distill_steps": distill, "options": options, "prior_weight": prior_weight}


class FuseHandlers:
    """The buttons' callbacks: arguments from the page in, updates of the page out."""

    def __init__(self, page: Page) -> None:
        self.workspace = page.workspace
        self.compares, self.saves, self.takes = CancelTokens(), CancelTokens(), CancelTokens()

    def lists(self, chosen: list[str] | None, which: str | None) -> list[Any]:
        """The adapters and saved fusions, with all that depends on them."""
        with errors_as_toast():
            rows, problems = adapter_rows(self.workspace)
            names, saved = [row[0] for row in rows], fusing.fusions(self.workspace)
            merges = list(fusing.merge_summaries()) if names else []
        problems += [fusion.problem for fusion in saved if fusion.problem]
        readable = [fusion.name for fusion in saved if not fusion.problem]
        which = which if which in readable else readable[0] if readable else None
        left = [name for name in chosen or [] if name in names]
        changed = {"value": left} if left != (chosen or []) else {}  # else one that is ticked meanwhile would be lost
        return [
            gr.Markdown(TOO_FEW.get(len(names), ENOUGH)),
            gr.Button(visible=len(names) < 2),
            gr.Markdown("\n\n".join(map(plain_html, problems)), visible=bool(problems)),
            gr.Row(visible=bool(names or problems)),
            gr.CheckboxGroup(choices=names, **changed),
            gr.Dropdown(merges) if merges else gr.skip(),
            gr.Column(visible=bool(readable)),
            gr.Dropdown(readable, value=which),
            self._about(which),
        ]

    def look(self, chosen: list[str] | None, strengths: dict[str, float] | None) -> list[Any]:
        """The interference table and its warnings."""
        with errors_as_toast():
            comparison = comparing.together(self.workspace, chosen, strengths or {})
        text = "\n\n".join(f"⚠ {plain_html(warning)}" for warning in comparison.warnings)
        return [
            gr.HTML(fusion_table(comparison.rows), visible=bool(comparison.rows)),
            gr.Markdown(text, visible=bool(text)),
        ]

    def estimate(
        self, chosen: list[str] | None, merge: str, distill: int | str, options: str, prior_weight: float | None
    ) -> str:
        """How long the fusion of the fields will take."""
        with errors_as_toast():
            return fusing.estimate(self.workspace, chosen, **changes_for(merge, distill, options, prior_weight))

    def about_merge(self, merge: str) -> str:
        """A merge's description."""
        with errors_as_toast():
            return plain_html(fusing.merge_summaries().get(merge, ""))

    def about_distillation(self, distill: int | str) -> list[Any]:
        """Disable the fields that the preset determines."""
        return [gr.Dropdown(interactive=distill != WHOLE), *(gr.update(interactive=distill != WHOLE) for _ in range(2))]

    def taken(self, name: str) -> Any:
        """The checkbox for replacing a fusion, if the name is taken."""
        name = name.strip() or DEFAULT_NAME
        with errors_as_toast():
            exists = name in bases.fused_names(self.workspace)
        return gr.Checkbox(
            label=f"Replace the fusion '{name}' (the old one goes to the trash)", value=False, visible=exists
        )

    def begin_compare(self, request: gr.Request) -> list[Any]:
        """Register a comparison, which can be stopped from now on; the last value is its ticket."""
        return [*ready(False), self.compares.begin(request.session_hash or "")]

    def begin_save(self, request: gr.Request) -> list[Any]:
        """Register a fusion, which can be stopped from now on; the last value is its ticket."""
        return [*ready(False), self.saves.begin(request.session_hash or "")]

    def done(self, ticket: str, request: gr.Request) -> list[Any]:
        """A run is over, or failed before it began; another one of this browser may still be running."""
        self.compares.end(ticket)
        self.saves.end(ticket)
        who = request.session_hash or ""
        return ready(not (self.compares.busy(who) or self.saves.busy(who)))

    def stop(self, request: gr.Request) -> list[Any]:
        """Stop this browser's run. One at work shows its own last message; one that waits ends here."""
        who = request.session_hash or ""
        if any([self.compares.stop(who), self.saves.stop(who)]):
            return [gr.skip()] * 4
        return [*ready(True), NOT_BEGUN]

    def cancel_for_program(self, request: gr.Request) -> str:
        """Stop the fusions that this client has asked for; returns a message."""
        return "Stopping." if self.saves.stop(request.session_hash or "") else "Nothing was being fused."

    def begin_taking(self, request: gr.Request) -> list[Any]:
        """Register the taking out of a concept, which can be stopped from now on; the last value is its ticket."""
        return [*ready_to_take(False), self.takes.begin(request.session_hash or "")]

    def taking_done(self, ticket: str, request: gr.Request) -> list[Any]:
        """A concept is taken out, or it failed before it began."""
        self.takes.end(ticket)
        return ready_to_take(not self.takes.busy(request.session_hash or ""))

    def stop_taking(self, request: gr.Request) -> list[Any]:
        """Stop the taking out; one that waits ends here."""
        if self.takes.stop(request.session_hash or ""):
            return [gr.skip()] * 3
        return [*ready_to_take(True), NOT_BEGUN]

    def left(self, request: gr.Request) -> None:
        """The browser has disconnected."""
        self.gone(request.session_hash or "")

    def gone(self, session: str) -> None:
        """Stop a disconnected client's comparison; a fusion that is being saved continues."""
        self.compares.stop(session)

    @contextmanager
    def _run(self, runs: CancelTokens, ticket: str, stop: threading.Event, progress: gr.Progress) -> Iterator[Hooks]:
        """The hooks of a run that its browser can stop."""
        with self._stoppable(runs, ticket):
            yield Hooks(progress=cancellable(stop, teller(progress), STOPPED), should_stop=stop.is_set)

    @contextmanager
    def _stoppable(self, runs: CancelTokens, ticket: str) -> Iterator[None]:
        """Say in a sentence that a run was stopped, and forget its ticket in the end."""
        try:
            yield
        except Cancelled as stopped:
            raise UserError(STOPPED) from stopped
        finally:
            runs.end(ticket)

    def compare(
        self,
        ticket: str,
        chosen: list[str] | None,
        strengths: dict[str, float] | None,
        merge: str,
        distill: int | str,
        options: str,
        prior_weight: float | None,
        seed: int | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio looks for it in the defaults)
    ) -> tuple[Any, ...]:
        """Before and after of every ticked concept."""
        stop = self.compares.take(ticket)
        if stop is None:  # stopped while it waited, which the page has said
            return (gr.skip(),) * 3
        with errors_as_toast():
            progress(0, desc="Loading the base")
            changes = changes_for(merge, distill, options, prior_weight)
            with self._run(self.compares, ticket, stop, progress) as hooks:
                pictures = comparing.compare(self.workspace, chosen, strengths or {}, int(seed or 0), hooks, **changes)
            sheet = temporary.new_file("before-and-after.png")
            comparing.sheet_of(pictures).save(sheet)
        message = "Nothing is saved yet; press Save to keep this fusion."
        return gr.Gallery(value=pictures, visible=True), gr.DownloadButton(value=str(sheet), visible=True), message

    def save(
        self,
        ticket: str,
        name: str,
        replace: bool,
        chosen: list[str] | None,
        strengths: dict[str, float] | None,
        merge: str,
        distill: int | str,
        options: str,
        prior_weight: float | None,
        seed: int | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        """Fuse the ticked concepts; hands the result to the pictures."""
        stop = self.saves.take(ticket)
        if stop is None:
            return (gr.skip(),) * 4
        name = name.strip() or DEFAULT_NAME
        with errors_as_toast():
            progress(0, desc="Loading the adapters and their base")
            changes = {**changes_for(merge, distill, options, prior_weight), "seed": seed}
            with self._run(self.saves, ticket, stop, progress) as hooks:
                message = fusing.fuse_chosen(self.workspace, chosen, name, strengths or {}, hooks, replace, **changes)
        return lines(message), hand(bases.FUSED + name), name, gr.Button(visible=True)

    @asked
    def fuse(
        self,
        adapters: list[str],
        name: str,
        options: str = "",
        strength: str = "1",
        merge: str = "",
        replace: bool = False,
        distill: int = 0,
        request: gr.Request | None = None,
    ) -> str:
        """Fuse adapters into one checkpoint of the workspace, and distill it for ``distill`` steps.

        ``strength`` is 0.8, or rex=0.8, brew=1.2; ``merge`` is by default that of the base's preset; ``options`` are
        the merge's own, such as density=0.3.
        """
        ticket = self.saves.begin((request and request.session_hash) or "")
        stop = self.saves.take(ticket) or threading.Event()
        with errors_as_toast(), self._stoppable(self.saves, ticket):
            strengths = fusing.parse_strengths(strength, adapters)
            return fusing.fuse_chosen(
                self.workspace,
                adapters,
                name,
                strengths,
                Hooks(should_stop=stop.is_set),
                replace=replace,
                options=options,
                merge=merge,
                distill_steps=distill,
            )

    def show(self, which: str | None) -> list[Any]:
        """A saved fusion's description, and its concepts."""
        with errors_as_toast():
            inside = fusing.concepts_in(self.workspace, which)
        return [
            self._about(which),
            gr.Dropdown(inside, value=inside[-1] if inside else None),
            gr.File(value=None, visible=False),
            False,  # what was ticked was of the fusion before
        ]

    def generate_with(self, which: str | None) -> tuple[Handed, Any]:
        """Hand the chosen fusion to the pictures."""
        with errors_as_toast():
            bases.fused_folder(self.workspace, which)
        return hand(f"{bases.FUSED}{which}"), gr.Tabs(selected="generate")

    def take_out(
        self,
        ticket: str,
        which: str | None,
        concept: str | None,
        new: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, Any]:
        """Write the chosen fusion without one concept."""
        stop = self.takes.take(ticket)
        if stop is None:  # stopped while it waited, which the page has said
            return gr.skip(), gr.skip()
        with errors_as_toast():
            progress(0, desc="Fusing the rest")
            with self._run(self.takes, ticket, stop, progress) as hooks:
                message = fusing.take_out(self.workspace, which, concept, new, hooks)
        return lines(message), gr.Dropdown(bases.fused_names(self.workspace), value=new.strip())

    def download(
        self,
        which: str | None,
        kind: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, str]:
        """Pack the chosen fusion for another program."""
        with errors_as_toast():
            progress(0, desc="Writing the file")
            path, notes = downloads.download(self.workspace, which, kind)
        return gr.File(value=str(path), visible=True), lines("\n".join([f"{path.name} is ready.", *notes]))

    def delete(self, which: str | None, sure: bool) -> tuple[str, bool]:
        """Delete the chosen fusion after confirmation."""
        if not sure:
            return "Tick 'Yes, delete this fusion' first.", False
        with errors_as_toast():
            return lines(fusing.delete_fusion(self.workspace, which)), False

    def _about(self, which: str | None) -> Any:
        saved = next((fusion for fusion in fusing.fusions(self.workspace) if fusion.name == which), None)
        if saved is None:
            return gr.Markdown()
        inside = ", ".join(f"{name} at {strength:g}" for name, strength in saved.concepts.items())
        distilled = f", then distilled for {saved.distill_steps} steps" if saved.distill_steps else ""
        return gr.Markdown(
            f"**{plain_html(saved.name)}** holds {plain_html(inside)}; merged by *{saved.merge}*{distilled}."
        )
