"""The fusion: tick concepts, weigh them, compare, save; and what was saved, to take apart or to take away."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import gradio as gr

from ...progress import Progress
from .. import comparing, downloads, fusing
from ..adapters import adapter_rows
from ..page import DEVICE, PRIVATE, Page, plain, teller, told
from ..turns import Runs, until

COLUMNS = {  # the heads of the table, and what they mean
    "Concept": "",
    "Columns": "The part of the base that it changed. Concepts with columns of their own disturb each other least.",
    "Size": "How much it changes the base at strength 1.",
    "Others act on it": "What the others do in its place, as a share of what it does itself: at 0% it stays as it was "
    "trained, at 100% they weigh as much.",
    "Nearest neighbour": "The concept that changes the base most alike: 0 is nothing in common, 1 is the same.",
}
ADVICE = (
    "These figures are of a plain sum: the less others act on a concept, the better it keeps its looks there. "
    "Merging by gradient and teaching even it out; otherwise lower the strength of the others."
)
MERGE_INFO = (
    "gradient keeps several concepts best and takes longest; spectral adds what was trained, which is exact and quick."
)
TEACHING = {"no": 0, "300 steps": 300, "900 steps": 900}
TEACHING_INFO = (
    "After any merge, the fusion is taught what every concept draws alone. It keeps several concepts much better and "
    "other prompts more as they were; it takes minutes."
)
STOPPED = "Stopped; nothing was saved."
TOO_FEW = {
    0: "Nothing is trained yet. Train two concepts in step 2, then put them together here.",
    1: "One concept is trained. Train a second one in step 2, then put them together here.",
}
HIDDEN: dict[str, Any] = {"api_visibility": "private"}
USUAL_NAME = "together"
ENOUGH = "Tick two or more concepts, then press **Compare** or **Save**."


def build(page: Page, tab: gr.Tab) -> None:
    """Fill the tab and wire its events."""
    handlers = Handlers(page)
    hint = gr.Markdown(elem_id="fuse-hint")
    to_train = gr.Button("Train a concept", elem_id="fuse-to-train", visible=False)
    problems = gr.Markdown(elem_id="fuse-problems", visible=False)
    bench, saved = _Bench(), _Saved()

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


def _wire_bench(bench: _Bench, handlers: Handlers, page: Page, lists: dict[str, Any]) -> None:
    look = {
        "fn": handlers.look, "inputs": [bench.chosen, bench.strengths], "outputs": [bench.table, bench.warnings],
        **PRIVATE,
    }  # fmt: skip
    bench.chosen.change(**look)
    bench.strengths.change(**look)
    bench.merge.change(handlers.about_merge, bench.merge, bench.summary, **PRIVATE)
    asked: dict[str, Any] = {"fn": handlers.begin, "outputs": bench.stop, "queue": False, **PRIVATE}
    shown: dict[str, Any] = {"show_progress_on": bench.result, **DEVICE, **HIDDEN}
    trying = bench.compare.click(**asked).then(
        handlers.compare, bench.settings, [bench.pictures, bench.result], **shown
    )
    saving = bench.save.click(**asked).then(
        handlers.save, [bench.name, bench.replace, *bench.settings], [bench.result, page.base, bench.draw], **shown
    )
    for running in (trying, saving):
        running.then(lambda: gr.Button(visible=False), None, bench.stop, queue=False, **PRIVATE)
    saving.success(**lists)
    bench.stop.click(handlers.stop, queue=False, **PRIVATE)
    for event in (bench.name.change, saving.then):  # after a refusal too
        event(handlers.taken, bench.name, bench.replace, **PRIVATE)
    bench.draw.click(lambda: gr.Tabs(selected="generate"), None, page.tabs, **PRIVATE)


def _wire_saved(saved: _Saved, handlers: Handlers, page: Page, lists: dict[str, Any]) -> None:
    saved.which.change(handlers.show, saved.which, [saved.about, saved.concept, saved.file], **PRIVATE)
    saved.draw.click(handlers.draw, saved.which, [page.base, page.tabs], **PRIVATE)
    taking = saved.take.click(
        handlers.take_out, [saved.which, saved.concept, saved.new], [saved.result, saved.which],
        show_progress_on=saved.result, **DEVICE, **HIDDEN,
    )  # fmt: skip
    taking.success(**lists)
    saved.pack.click(
        handlers.download, [saved.which, saved.kind], [saved.file, saved.result], show_progress_on=saved.result,
        **DEVICE, **HIDDEN,
    )  # fmt: skip
    deleting = saved.delete.click(handlers.delete, [saved.which, saved.sure], [saved.result, saved.sure], **PRIVATE)
    deleting.success(**lists)


def table_of(rows: Sequence[comparing.Row]) -> str:
    """How the chosen get on, and what the columns mean; every cell bears its head, for screens too narrow for a row."""
    heads = "".join(f'<th scope="col">{head}</th>' for head in COLUMNS)
    body = ""
    for row in rows:
        first, *cells = zip(COLUMNS, astuple(row), strict=True)
        body += f'<tr><th scope="row">{html.escape(first[1])}</th>'
        body += "".join(f'<td data-head="{head}">{html.escape(cell)}</td>' for head, cell in cells) + "</tr>"
    meanings = "".join(f"<dt>{head}</dt><dd>{meaning}</dd>" for head, meaning in COLUMNS.items() if meaning)
    return (
        f"<table><caption>How they get on</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{ADVICE}</p><details><summary>What the columns mean</summary><dl>{meanings}</dl></details>"
    )


class _Bench:
    """The upper half: what to fuse and how, how they get on, and pictures of it; hidden while nothing is trained."""

    def __init__(self) -> None:
        self.strengths: gr.State = gr.State({})
        with gr.Row(visible=False, elem_id="fuse-bench") as self.all:
            with gr.Column(min_width=320):
                self._choice()
            with gr.Column(min_width=320):
                self.table = gr.HTML(visible=False, label="How they get on", elem_id="fuse-table")
                self.warnings = gr.Markdown(elem_id="fuse-warnings", visible=False)
                self.pictures = gr.Gallery(
                    label="Alone, and in the fusion", columns=2, object_fit="contain",
                    interactive=False, visible=False, elem_id="fuse-pictures", buttons=["fullscreen"],
                    fit_columns=False, height="auto",
                )  # fmt: skip
        self.settings = [self.chosen, self.strengths, self.merge, self.teach, self.form, self.anchor, self.seed]

    def _choice(self) -> None:
        self.chosen = gr.CheckboxGroup([], label="Concepts", elem_id="fuse-concepts", show_select_all=True)
        gr.render(inputs=[self.chosen, self.strengths], triggers=[self.chosen.change])(self._sliders)
        self.merge = gr.Dropdown(
            ["gradient"], value="gradient", label="How to merge", info=MERGE_INFO, elem_id="fuse-merge",
        )  # fmt: skip
        self.summary = gr.Markdown(elem_id="fuse-summary")
        self.teach = gr.Radio(
            list(TEACHING.items()), value=0, label="Teach it afterwards", info=TEACHING_INFO, elem_id="fuse-teach"
        )
        with gr.Accordion("More settings", open=False):
            self.form = gr.Radio(
                ["sum", "mean", "paper"], value="sum", label="Form of spectral", elem_id="fuse-form",
                info="sum adds the changes, mean averages them, paper averages their factors.",
            )  # fmt: skip
            self.anchor = gr.Slider(
                0, 8, 1, step=0.5, label="Anchor of gradient and ssr", elem_id="fuse-anchor",
                info="How much ordinary pictures count, in concepts. More keeps other prompts as they were.",
            )  # fmt: skip
            self.seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, elem_id="fuse-seed",
                info="Another number gives other pictures to compare.",
            )  # fmt: skip
        self.name = gr.Textbox(
            label="Name of the fusion", placeholder=USUAL_NAME, max_lines=1, elem_id="fuse-name",
            info="Letters, digits, - and _.",
        )  # fmt: skip
        self.replace = gr.Checkbox(label="Replace it", visible=False, elem_id="fuse-replace")
        with gr.Row():
            self.compare = gr.Button("Compare", elem_id="fuse-compare")
            self.save = gr.Button("Save", variant="primary", elem_id="fuse-save")
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="fuse-stop")
        self.result = gr.Textbox(label="Result", interactive=False, lines=2, elem_id="fuse-result")
        self.draw = gr.Button("Draw with it", elem_id="fuse-draw", visible=False)

    def _sliders(self, names: list[str] | None, held: dict[str, float] | None) -> None:
        """A strength for every ticked concept; it keeps what was set while others come and go."""
        for name in names or []:
            slider = gr.Slider(
                0, 2, (held or {}).get(name, 1.0), step=0.05, label=f"Strength of {name}",
                elem_id=f"fuse-strength-{name}", key=f"strength-{name}", interactive=True,
            )  # fmt: skip
            gr.on(  # input: by keyboard and in the box; release: by mouse, and set back
                [slider.input, slider.release],
                lambda value, held, name=name: {**(held or {}), name: value},
                [slider, self.strengths],
                self.strengths,
                trigger_mode="always_last",
                **PRIVATE,
            )


class _Saved:
    """The lower half: what was saved before; hidden while there is nothing."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="fuse-shelf") as self.all:
            gr.Markdown("### Saved fusions")
            with gr.Row():
                with gr.Column(min_width=320):
                    self.which = gr.Dropdown([], label="Fusion", elem_id="fuse-saved", interactive=True)
                    self.about = gr.Markdown(elem_id="fuse-about")
                    self.draw = gr.Button("Draw with it", elem_id="fuse-saved-draw")
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
        with gr.Row(elem_classes="fuse-line"):
            self.kind = gr.Dropdown(
                [(words, kind) for kind, words in downloads.KINDS.items()], value="kohya",
                label="For other programs", elem_id="fuse-kind", scale=2, min_width=220,
            )  # fmt: skip
            self.pack = gr.Button("Prepare the file", elem_id="fuse-pack", min_width=140)
        self.file = gr.File(label="Download", interactive=False, visible=False, elem_id="fuse-file")
        self.result = gr.Textbox(label="Result", interactive=False, lines=2, elem_id="fuse-saved-result")


class Handlers:
    """What the buttons call: arguments from the page in, updates of the page out."""

    def __init__(self, page: Page) -> None:
        self.workspace = page.workspace
        self.runs = Runs()

    def lists(self, chosen: list[str] | None, which: str | None) -> list[Any]:
        """What there is to fuse and what is saved, with all that depends on it."""
        with told():
            rows, problems = adapter_rows(self.workspace)
            names, saved = [row[0] for row in rows], fusing.fusions(self.workspace)
            merges = list(fusing.merges()) if names else []
        problems += [one.problem for one in saved if one.problem]
        there = [one.name for one in saved if not one.problem]
        which = which if which in there else there[0] if there else None
        return [
            gr.Markdown(TOO_FEW.get(len(names), ENOUGH)),
            gr.Button(visible=len(names) < 2),
            gr.Markdown("\n\n".join(map(plain, problems)), visible=bool(problems)),
            gr.Row(visible=bool(names or problems)),
            gr.CheckboxGroup(names, value=[name for name in chosen or [] if name in names]),
            gr.Dropdown(merges) if merges else gr.skip(),
            gr.Column(visible=bool(there)),
            gr.Dropdown(there, value=which),
            self._about(which),
        ]

    def look(self, chosen: list[str] | None, strengths: dict[str, float] | None) -> list[Any]:
        """The interference table and its warnings."""
        with told():
            found = comparing.together(self.workspace, chosen, strengths or {})
        words = "\n\n".join(f"⚠ {plain(warning)}" for warning in found.warnings)
        return [
            gr.HTML(table_of(found.rows), visible=bool(found.rows)),
            gr.Markdown(words, visible=bool(words)),
        ]

    def about_merge(self, merge: str) -> str:
        """What a merge does, in a line."""
        with told():
            return plain(fusing.merges().get(merge, ""))

    def taken(self, name: str) -> Any:
        """The tick for replacing a fusion, where there is one of that name."""
        with told():
            there = name.strip() in fusing.fused_names(self.workspace)
        return gr.Checkbox(
            label=f"Replace the fusion '{name.strip()}' (the old one goes to the trash)", value=False, visible=there
        )

    def begin(self, request: gr.Request) -> Any:
        """A run is asked for: it can be stopped from now on."""
        self.runs.begin(request.session_hash or "")
        return gr.Button(visible=True)

    def stop(self, request: gr.Request) -> None:
        """Ask this browser's run to stop."""
        self.runs.stop(request.session_hash or "")

    @contextmanager
    def _run(self, request: gr.Request, progress: gr.Progress) -> Iterator[Progress]:
        """The progress of a run that this browser can stop."""
        who = request.session_hash or ""
        stop = self.runs.take(who)
        try:
            yield until(stop, teller(progress), STOPPED)
        finally:
            self.runs.end(who, stop)

    def compare(
        self,
        chosen: list[str] | None,
        strengths: dict[str, float] | None,
        merge: str,
        teach: int,
        form: str,
        anchor: float | None,
        seed: int | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio looks for it in the defaults)
    ) -> tuple[Any, str]:
        """Before and after of every ticked concept."""
        with told():
            progress(0, desc="Loading the base")
            changes = {"merge": merge, "teach": teach, "form": form, "anchor": anchor}
            with self._run(request, progress) as tell:
                pictures = comparing.compare(self.workspace, chosen, strengths or {}, int(seed or 0), tell, **changes)
        return gr.Gallery(value=pictures, visible=True), "Nothing is saved yet; press Save to keep this fusion."

    def save(
        self,
        name: str,
        replace: bool,
        chosen: list[str] | None,
        strengths: dict[str, float] | None,
        merge: str,
        teach: int,
        form: str,
        anchor: float | None,
        seed: int | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, str, Any]:
        """Fuse the ticked concepts; hands the result to the pictures."""
        name = name.strip() or USUAL_NAME
        with told():
            progress(0, desc="Loading the adapters and their base")
            changes = {"merge": merge, "teach": teach, "form": form, "anchor": anchor, "seed": seed}
            with self._run(request, progress) as tell:
                words = fusing.fuse(self.workspace, chosen, name, strengths or {}, tell, replace, **changes)
        return words, fusing.FUSED + name, gr.Button(visible=True)

    def fuse(
        self,
        adapters: list[str],
        name: str,
        form: str = "sum",
        strength: str = "1",
        merge: str = "spectral",
        replace: bool = False,
        teach: int = 0,
    ) -> str:
        """Fuse adapters into one checkpoint of the workspace, and teach it for ``teach`` steps.

        ``strength`` is 0.8, or rex=0.8, brew=1.2.
        """
        with told():
            strengths = fusing.parse_strengths(strength, adapters)
            return fusing.fuse(
                self.workspace, adapters, name, strengths, replace=replace, form=form, merge=merge, teach=teach
            )

    def show(self, which: str | None) -> list[Any]:
        """What a saved fusion is, and what can be taken out of it."""
        with told():
            inside = fusing.concepts_in(self.workspace, which)
        return [
            self._about(which),
            gr.Dropdown(inside, value=inside[-1] if inside else None),
            gr.File(value=None, visible=False),
        ]

    def draw(self, which: str | None) -> tuple[str, Any]:
        """Hand the chosen fusion to the pictures."""
        with told():
            fusing.fused_folder(self.workspace, which)
        return f"{fusing.FUSED}{which}", gr.Tabs(selected="generate")

    def take_out(
        self,
        which: str | None,
        concept: str | None,
        new: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, Any]:
        """Write the chosen fusion without one concept."""
        with told():
            progress(0, desc="Fusing the rest")
            words = fusing.take_out(self.workspace, which, concept, new, teller(progress))
        return words, gr.Dropdown(fusing.fused_names(self.workspace), value=new.strip())

    def download(
        self,
        which: str | None,
        kind: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, str]:
        """Pack the chosen fusion for another program."""
        with told():
            progress(0, desc="Writing the file")
            path, notes = downloads.download(self.workspace, which, kind)
        return gr.File(value=str(path), visible=True), "\n".join([f"{path.name} is ready.", *notes])

    def delete(self, which: str | None, sure: bool) -> tuple[str, bool]:
        """Put the chosen fusion away once that was confirmed."""
        if not sure:
            return "Tick 'Yes, delete this fusion' first.", False
        with told():
            return fusing.delete_fusion(self.workspace, which), False

    def _about(self, which: str | None) -> Any:
        found = next((one for one in fusing.fusions(self.workspace) if one.name == which), None)
        if found is None:
            return gr.Markdown()
        inside = ", ".join(f"{name} at {strength:g}" for name, strength in found.concepts.items())
        taught = f", then taught for {found.taught} steps" if found.taught else ""
        return gr.Markdown(f"**{plain(found.name)}** holds {plain(inside)}; merged by *{found.merge}*{taught}.")
