"""The fields of the concepts tab: adding one's own thing, and the panel of one concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

NOTHING = "Choose a concept to see its photos and to train it, or add your own thing above."
KINDS = [("a thing, an animal or a person", "thing"), ("a style, which any picture can have", "style")]
FILES = ["image", ".zip", ".txt"]


@dataclass(frozen=True)
class Adding:
    """The parts of "Add your own thing"."""

    whole: gr.Accordion
    files: gr.File
    preview: gr.Gallery
    summary: gr.Markdown
    name: gr.Textbox
    kind: gr.Radio
    noun: gr.Textbox
    token: gr.Textbox
    suggested: gr.State
    save: gr.Button
    result: gr.Markdown


def build_adding() -> Adding:
    with gr.Accordion("Add your own thing", open=False, elem_id="concepts-add") as whole:
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                files = gr.File(
                    label="Photos, or a zip of them", file_count="multiple", file_types=FILES, height=170,
                    elem_id="concepts-files",
                )  # fmt: skip
                gr.Markdown(
                    "One to about ten pictures of the same thing, from different sides. Captions are not needed; a "
                    "text file of a photo's name becomes one.",
                    elem_classes="muted",
                )
            with gr.Column(scale=2, min_width=280):
                name = gr.Textbox(label="Name", placeholder="rex", max_lines=1, elem_id="concepts-name")
                kind = gr.Radio(KINDS, value="thing", label="This is", elem_id="concepts-kind")
                noun = gr.Textbox(
                    label="What it is", info="In a word that everybody knows.", placeholder="dog", max_lines=1,
                    elem_id="concepts-noun",
                )  # fmt: skip
                token = gr.Textbox(
                    "", label="Token", info="What prompts call it; suggested from the name.", placeholder="<rex>",
                    max_lines=1, elem_id="concepts-token",
                )  # fmt: skip
        preview = gr.Gallery(
            label="What will be saved", show_label=False, columns=6, height="auto", object_fit="cover",
            interactive=False, buttons=[], allow_preview=False, visible=False, elem_id="concepts-preview",
            elem_classes="concepts-photos",
        )  # fmt: skip
        summary = gr.Markdown(elem_id="concepts-found")
        save = gr.Button("Save concept", variant="primary", elem_id="concepts-save")
    result = gr.Markdown(elem_id="concepts-added")
    return Adding(whole, files, preview, summary, name, kind, noun, token, gr.State(""), save, result)


@dataclass(frozen=True)
class Detail:
    """The parts of one concept's panel; ``shown`` are the outputs of :meth:`ConceptHandlers.show`."""

    about: gr.Markdown
    train: gr.Button
    use: gr.Button
    copy: gr.Button
    photos: gr.Gallery
    flags: gr.Markdown
    result: gr.Markdown
    editing: gr.Column
    names: gr.State
    photo: gr.State
    caption: gr.Textbox
    save: gr.Button
    remove: gr.Button
    more: gr.UploadButton
    tidy: gr.Button
    new_name: gr.Textbox
    new_noun: gr.Textbox
    new_token: gr.Textbox
    change: gr.Button
    ask: gr.Button
    asked: gr.Column
    with_adapter: gr.Checkbox
    delete: gr.Button
    keep: gr.Button

    @property
    def shown(self) -> list[Any]:
        """The outputs of a chosen concept."""
        return [
            self.about, self.train, self.use, self.copy, self.photos, self.flags, self.editing, self.names, self.photo,
            self.caption, self.tidy, self.new_name, self.new_noun, self.new_token, self.asked, self.with_adapter,
        ]  # fmt: skip


def build_detail() -> Detail:
    names: gr.State = gr.State([])
    photo: gr.State = gr.State(None)
    about = gr.Markdown(NOTHING, elem_id="concepts-about")
    with gr.Row():
        train = gr.Button("Train it in step 2 →", variant="primary", visible=False, elem_id="concepts-train")
        use = gr.Button("Generate with it in step 4 →", visible=False, elem_id="concepts-use")
        copy = gr.Button("Make it mine", visible=False, elem_id="concepts-copy")
    result = gr.Markdown(elem_id="concepts-result")
    photos = gr.Gallery(
        label="Photos", show_label=False, columns=4, height="auto", object_fit="cover", interactive=False, buttons=[],
        visible=False, allow_preview=False, elem_id="concepts-photos", elem_classes="concepts-photos",
    )  # fmt: skip
    flags = gr.Markdown(elem_id="concepts-flags")
    with gr.Column(visible=False, elem_id="concepts-editing") as editing:
        caption = gr.Textbox(
            label="Caption", info="Not needed. Click a photo, then say what else is in it; Enter goes to the next.",
            max_lines=1, elem_id="concepts-caption", interactive=False,
        )  # fmt: skip
        with gr.Row():
            save = gr.Button("Save caption", size="sm", elem_id="concepts-caption-save")
            remove = gr.Button("Remove photo", size="sm", elem_id="concepts-remove")
            more = gr.UploadButton(
                "Add photos", size="sm", file_count="multiple", file_types=FILES, elem_id="concepts-more"
            )
        tidy = gr.Button("Remove broken and duplicate photos", size="sm", visible=False, elem_id="concepts-tidy")
        with gr.Accordion("Name and token", open=False, elem_id="concepts-change"):
            with gr.Row():
                new_name = gr.Textbox(label="Name", max_lines=1, min_width=100, elem_id="concepts-new-name")
                new_noun = gr.Textbox(label="What it is", max_lines=1, min_width=100, elem_id="concepts-new-noun")
                new_token = gr.Textbox(label="Token", max_lines=1, min_width=100, elem_id="concepts-new-token")
            change = gr.Button("Save name and token", size="sm", elem_id="concepts-change-save")
        ask = gr.Button("Delete this concept…", size="sm", elem_id="concepts-delete")
        with gr.Column(visible=False, elem_id="concepts-asked") as asked:
            with_adapter = gr.Checkbox(
                label="Also delete its adapter and free its slot", elem_id="concepts-with-adapter"
            )
            with gr.Row():
                delete = gr.Button("Yes, delete it", variant="stop", size="sm", elem_id="concepts-delete-yes")
                keep = gr.Button("Keep it", size="sm", elem_id="concepts-delete-no")
    return Detail(
        about, train, use, copy, photos, flags, result, editing, names, photo, caption, save, remove, more, tidy,
        new_name, new_noun, new_token, change, ask, asked, with_adapter, delete, keep,
    )  # fmt: skip


@dataclass(frozen=True)
class TrashLine:
    """The line on the trash, and the buttons that empty it."""

    whole: gr.Column
    line: gr.Markdown
    ask: gr.Button
    asked: gr.Row
    really: gr.Button
    keep: gr.Button


def build_trash() -> TrashLine:
    """The trash at the foot of the tab; hidden while it is empty."""
    with gr.Column(visible=False, elem_id="concepts-trash") as whole:
        line = gr.Markdown(elem_id="concepts-trash-line", elem_classes="muted")
        ask = gr.Button("Empty the trash…", size="sm", elem_id="concepts-trash-empty")
        with gr.Row(visible=False) as asked:
            really = gr.Button("Delete all of it for good", variant="stop", size="sm", elem_id="concepts-trash-yes")
            keep = gr.Button("Keep it", size="sm", elem_id="concepts-trash-no")
    return TrashLine(whole, line, ask, asked, really, keep)
