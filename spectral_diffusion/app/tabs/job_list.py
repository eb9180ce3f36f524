"""The list of trainings on the train tab, and the progress of the chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ...core.templates import render
from ..charts import loss_curve
from ..jobs import QueueJob, moving
from ..page import plain_html
from ..workspace import Workspace

MARKS = {"running": "▶", "waiting": "○", "paused": "‖", "stopped": "■", "done": "✓", "failed": "✕"}
GRIDS, MOST_PIXELS = 6, 16_000_000  # of the samples that are shown
EMPTY = (
    "No trainings yet. Choose a concept and press **Start training**; on the pocket base it takes a few minutes, and "
    "this page may be closed meanwhile."
)


@dataclass(frozen=True)
class List:
    """The parts of the list, in the order of :func:`shown_jobs`."""

    timer: gr.Timer
    start: gr.Button
    hint: gr.Markdown
    trouble: gr.Markdown
    jobs: gr.Radio
    detail: gr.Column
    progress: gr.HTML
    strip: gr.HTML
    buttons: gr.Row
    curve: gr.HTML
    caption: gr.Markdown
    samples: gr.Gallery
    pause: gr.Button
    resume: gr.Button
    stop: gr.Button
    use: gr.Button
    remove: gr.Button
    asked: gr.Column
    clear: gr.Button

    @property
    def all(self) -> list[Any]:
        """The components in their order."""
        return list(vars(self).values())


def build_list(start: gr.Button, strip: gr.HTML, timer: gr.Timer) -> tuple[List, gr.Button, gr.Button]:
    """The list, and the two buttons that confirm or cancel the removal of an unfinished training.

    Args:
        strip: the line at the foot of the page on the running training.
        timer: polls the queue on every tab.
    """
    gr.Markdown("### Trainings")
    hint = gr.Markdown(EMPTY, elem_id="train-hint")
    trouble = gr.Markdown(visible=False, elem_id="train-trouble")
    jobs = gr.Radio([], label="Trainings", show_label=False, visible=False, elem_id="train-jobs", interactive=True)
    with gr.Column(visible=False, elem_id="train-detail") as detail:
        progress = gr.HTML(elem_id="train-progress", label="Progress")
        with gr.Row() as buttons:
            pause = gr.Button("Pause", size="sm", min_width=80, elem_id="train-pause")
            resume = gr.Button("Resume", size="sm", min_width=80, variant="primary", elem_id="train-resume")
            stop = gr.Button("Stop", size="sm", min_width=80, elem_id="train-stop")
            use = gr.Button("Generate with it", size="sm", min_width=80, variant="primary", elem_id="train-use")
            remove = gr.Button("Remove", size="sm", min_width=80, elem_id="train-remove")
        with gr.Column(visible=False, elem_id="train-asked") as asked:
            gr.Markdown("Its unfinished state is deleted with it, and what was learned so far is lost.")
            with gr.Row():
                sure = gr.Button("Remove it", size="sm", min_width=80, variant="stop", elem_id="train-remove-sure")
                keep = gr.Button("Keep it", size="sm", min_width=80, elem_id="train-keep")
        curve = gr.HTML(elem_id="train-curve", label="Loss")
        caption = gr.Markdown(
            "Samples on the way, the newest first; from left to right ever more of what was learned.",
            visible=False,
            elem_id="train-samples-caption",
            elem_classes="train-caption",
        )
        samples = gr.Gallery(
            label="Samples on the way", show_label=False, columns=2, height="auto", object_fit="contain", buttons=[],
            interactive=False, visible=False, elem_id="train-samples",
        )  # fmt: skip
    clear = gr.Button("Clear finished ones", size="sm", visible=False, elem_id="train-clear")
    parts = List(
        timer, start, hint, trouble, jobs, detail, progress, strip, buttons, curve, caption, samples, pause, resume,
        stop, use, remove, asked, clear,
    )  # fmt: skip
    return parts, sure, keep


def shown_jobs(
    workspace: Workspace, jobs: Sequence[QueueJob], trouble: str, chosen: str | None, seen: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The updates of the list, and the new ``seen``; unchanged parts are skipped, so that focus stays.

    Args:
        chosen: id of the training to show; the first is shown if it is gone.
        seen: the last values that this page received.
    """
    job = next((other for other in jobs if other.id == chosen), jobs[0] if jobs else None)
    active = [other for other in jobs if other.active]
    if job and active and job.record.state == "done" and (seen.get("chosen"), seen.get("state")) == (job.id, "running"):
        job = active[0]  # the shown one has just ended, and the queue goes on
    state = job.record.state if job else ""
    stop_requested = job.record.wish if job else ""
    grids = samples(workspace, job)
    strip = strip_of(jobs)
    moved = job is None or job.id != seen.get("chosen")
    now: dict[str, Any] = {
        "timer": {"active": moving(jobs)},
        "start": {"value": "Add to queue" if active else "Start training"},
        "hint": {"visible": not jobs},
        "trouble": {"value": f"The queue cannot go on: {plain_html(trouble)}", "visible": bool(trouble)},
        "jobs": {"choices": [(label(other), other.id) for other in jobs], "visible": bool(jobs)},
        "detail": {"visible": job is not None},
        "progress": {"value": progress(job) if job else ""},
        "strip": {"value": strip, "visible": bool(strip)},
        "buttons": {"visible": True} if moved or state == "running" else {},
        "curve": {"value": curve(job) if job else "", "visible": bool(job and job.status and job.status.curve)},
        "caption": {"visible": bool(grids)},
        "samples": {"value": grids},
        "pause": {"visible": state == "running" and not stop_requested},
        "resume": {"visible": state in {"paused", "stopped", "failed"}},
        "stop": {"visible": stoppable(state, stop_requested, len(active)), "value": _stop_word(state, stop_requested)},
        "use": {"visible": state == "done"},
        "remove": {"visible": state in {"stopped", "paused", "failed", "done"}},
        "asked": {"visible": False} if moved or state == "running" else {},
        "clear": {"visible": sum(other.record.state == "done" for other in jobs) > 1},
    }  # fmt: skip
    updates: list[Any] = []
    for name, values in now.items():
        if name == "jobs" and moved:
            updates.append(gr.update(**values, value=job.id if job else None))
        elif not values or seen.get(name) == values:
            updates.append(gr.skip())
        elif name == "samples":
            files = values["value"]
            updates.append(gr.update(value=[(_opened(file), text) for file, text in files], visible=bool(files)))
        else:
            updates.append(gr.update(**values))
    return updates, {**now, "chosen": job.id if job else None, "state": state}


def label(job: QueueJob) -> str:
    """A job's line in the list."""
    return f"{MARKS[job.record.state]} {job.record.concept} · {job.line()}"


def progress(job: QueueJob) -> str:
    """A job's name, progress bar and notes."""
    record, status = job.record, job.status
    share = min(100.0, 100 * job.steps_done / record.steps) if record.steps else 0.0
    share = 100.0 if record.state == "done" else share
    look: str = record.state
    if record.state == "running" and status and status.stage != "train" and status.steps:  # the stages before
        share, look = 100 * status.step / status.steps, "preparing"
    loss = f" · loss {status.loss:.4f}" if status and status.loss is not None and status.stage == "train" else ""
    line = f"{job.line()}{loss if record.state == 'running' else ''}"
    notes = [record.message] if record.message else []
    if status and record.state == "running":
        notes += [note for note in status.notes if not note.startswith("Concept ")][-2:]  # the concept's name is above
    if record.state == "done":
        notes = ["It is trained. Generate with it, or fuse it with others in step 3."]
    return render(
        "app/templates/train_progress.html.jinja",
        concept=record.concept,
        line=line,
        look=look,
        share=share,
        notes=notes,
    )


def curve(job: QueueJob) -> str:
    """A job's loss curve with a heading."""
    points = job.status.curve if job.status else []
    return f'<p class="train-caption">Loss (it wavers; the trend counts)</p>{loss_curve(points, job.record.steps)}'


def samples(workspace: Workspace, job: QueueJob | None) -> list[tuple[str, str]]:
    """The newest sample grids among the workspace's adapters, with a caption each."""
    inside, grids = workspace.adapters.resolve(), []
    for sample in reversed(job.status.samples if job and job.status else []):
        file = Path(sample.file)
        if file.suffix == ".png" and file.is_file() and file.resolve().is_relative_to(inside):
            grids.append((str(file), f"step {sample.step}"))
    return grids[:GRIDS]


def _opened(file: str) -> Image.Image:
    """A sample grid; a blank one if it cannot be shown."""
    try:
        with Image.open(file) as image:
            if image.width * image.height <= MOST_PIXELS:
                return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass
    return Image.new("RGB", (64, 64), "grey")


def stoppable(state: str, stop_requested: str, active: int) -> bool:
    """Whether stopping differs from pausing: other jobs wait, or the present step is to be aborted."""
    return (
        state == "waiting"
        or (state == "running" and bool(stop_requested))
        or (state in {"running", "paused"} and active > 1)
    )


def _stop_word(state: str, stop_requested: str) -> str:
    if state == "waiting":
        return "Remove from the queue"
    return "Stop at once" if stop_requested and state == "running" else "Run the next one first"


def strip_of(jobs: Sequence[QueueJob]) -> str:
    """The line at the foot of the page: the running training, the number of others, the last finished one; or empty."""
    active = [job for job in jobs if job.active]
    done = [job for job in jobs if job.record.state == "done" and job.fresh]
    shown = active or done
    if not shown:
        return ""
    job = shown[0]
    texts = {"running": "is being trained", "done": "is trained: generate with it in step 4"}
    parts = [texts.get(job.record.state, job.record.state)]
    if active and job.line() != parts[0]:
        parts.append(job.line())
    if len(active) > 1:
        parts.append(f"{len(active) - 1} more")
    if active and done:
        parts.append(f"{done[0].record.concept} is trained")
    mark, concept = MARKS[job.record.state], job.record.concept
    return render("app/templates/train_strip.html.jinja", mark=mark, concept=concept, line=" · ".join(parts))
