"""The gallery: pages of pictures, and the chosen one with its settings and actions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ...core.errors import UserError
from .. import gallery as pictures
from ..page import PRIVATE, Page, errors_as_toast, plain_html
from ..sentences import rendered
from ..workspace import Workspace

EMPTY = "No pictures yet. Write a prompt above and press **Generate**; everything you generate is kept here."


@dataclass(frozen=True)
class Gallery:
    """The components; ``chosen`` holds the chosen picture's name, ``names`` those of the page."""

    workspace: Workspace
    shown: gr.Row
    picture: gr.Image
    about: gr.Markdown
    canvas: gr.Button
    places: gr.Button
    again: gr.Button
    file: gr.DownloadButton
    scene: gr.DownloadButton
    delete: gr.Button
    wall: gr.Gallery
    note: gr.Markdown
    number: gr.Number
    paging: gr.Row
    pages: gr.Markdown
    chosen: gr.State
    names: gr.State

    @property
    def details(self) -> list[Any]:
        """The outputs of :meth:`choose`."""
        shown = [self.shown, self.chosen, self.picture, self.about]
        return [*shown, self.canvas, self.places, self.again, self.file, self.scene, self.delete]

    @property
    def listed(self) -> list[Any]:
        """The outputs of :meth:`show`."""
        return [self.wall, self.names, self.note, self.number, self.paging, self.pages]

    def show(self, number: float | None) -> list[Any]:
        """A page of the gallery."""
        with errors_as_toast():
            shown, pages, problems = pictures.page_of(self.workspace, int(number or 1))
        lines = [plain_html(problem) for problem in problems]
        return [
            gr.Gallery(value=[str(path) for path in shown], visible=bool(shown)),
            [path.stem for path in shown],
            gr.Markdown("\n\n".join([*([] if shown else [EMPTY]), *lines]), visible=bool(problems) or not shown),
            gr.Number(maximum=pages, value=min(max(1, int(number or 1)), pages)),
            gr.Row(visible=pages > 1),
            f"of {pages} pages",
        ]

    def choose(self, name: str | None) -> list[Any]:
        """A picture by its name with its settings; empty for None."""
        if not name:
            return [gr.Row(visible=False), None, None, "", *[gr.skip()] * 6]
        from ...scenes.png_metadata import read_places  # imports torch, which a page need not wait for

        with errors_as_toast():
            path = pictures.picture_file(self.workspace, name)
            scene: Path | None = None
            has_places = False
            try:
                rows = pictures.picture_details(self.workspace, name)
                scene = pictures.download_picture(self.workspace, name)[1]
                has_places = bool(read_places(path))
            except UserError as error:  # a foreign picture can still be viewed and deleted
                rows = [("", rendered(error))]
        details_text = "\n\n".join(f"**{head}** {verbatim(text)}" if head else verbatim(text) for head, text in rows)
        known: dict[str, Any] = {"interactive": scene is not None}
        return [
            gr.Row(visible=True),
            name,
            str(path),
            details_text,
            gr.Button(**known),
            gr.Button(visible=has_places),
            gr.Button(**known),
            gr.DownloadButton(value=str(path)),
            gr.DownloadButton(value=str(scene) if scene else None, **known),
            gr.skip(),
        ]

    def clicked(self, names: list[str], event: gr.SelectData) -> list[Any]:
        """The clicked picture."""
        index = event.index if isinstance(event.index, int) else 0
        return self.choose(names[index] if 0 <= index < len(names) else None)

    def remove(self, name: str | None) -> list[Any]:
        """Move the chosen picture to the trash."""
        with errors_as_toast():
            gr.Info(plain_html(pictures.delete(self.workspace, name)), duration=4)
        return self.choose(None)


def verbatim(text: str) -> str:
    """Escape a text for Markdown."""
    return plain_html(text).translate({ord(mark): f"\\{mark}" for mark in "\\`*_[]#|~$"})


def build_picture() -> gr.Image:
    """The picture, first unfinished, then done."""
    return gr.Image(
        label="Picture", show_label=False, type="filepath", format="png", interactive=False, height=360,
        buttons=["fullscreen"], elem_id="generate-picture",
    )  # fmt: skip


def build_details() -> dict[str, Any]:
    """The chosen picture's settings and buttons."""
    small: dict[str, Any] = {"size": "sm", "min_width": 100}
    about = gr.Markdown(elem_id="generate-about")
    with gr.Row():
        canvas = gr.Button("Use its settings", elem_id="generate-to-canvas", **small)
        places = gr.Button("Places as boxes", visible=False, elem_id="generate-places", **small)
        again = gr.Button("Generate it again", elem_id="generate-again", **small)
    with gr.Row():
        file = gr.DownloadButton("Download picture", elem_id="generate-download", **small)
        scene = gr.DownloadButton("Download settings", elem_id="generate-download-scene", **small)
        delete = gr.Button("Delete", variant="stop", elem_id="generate-delete", **small)
    own = {"about": about, "canvas": canvas, "places": places, "again": again}
    return {**own, "file": file, "scene": scene, "delete": delete}


def build_wall() -> dict[str, Any]:
    """All pictures, page by page."""
    gr.Markdown("### Your pictures")
    note = gr.Markdown(EMPTY, elem_id="generate-gallery-note")
    wall = gr.Gallery(
        label="Pictures, newest first", show_label=False, columns=6, fit_columns=False, object_fit="contain",
        height="auto", allow_preview=False, interactive=False, visible=False, buttons=[], elem_id="generate-gallery",
    )  # fmt: skip
    with gr.Row(visible=False, elem_id="generate-pages") as paging:
        number = gr.Number(1, label="Page", precision=0, minimum=1, min_width=80, scale=0)
        pages = gr.Markdown()
    return {"note": note, "wall": wall, "number": number, "paging": paging, "pages": pages}


def wire(page: Page, tab: gr.Tab, gallery: Gallery) -> None:
    """Paging, choosing and deleting."""
    page.refreshed(tab, gallery.show, [gallery.number], gallery.listed)
    gallery.number.input(gallery.show, gallery.number, gallery.listed, **PRIVATE)
    gallery.wall.select(gallery.clicked, gallery.names, gallery.details, **PRIVATE)
    gallery.delete.click(gallery.remove, gallery.chosen, gallery.details, **PRIVATE).then(
        gallery.show, gallery.number, gallery.listed, **PRIVATE
    )
