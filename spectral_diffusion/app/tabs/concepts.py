"""The concepts tab: cards, the slot map, one concept's photos, and adding your own."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ...core.errors import UserError
from .. import concept_html as cards
from .. import concepts, editing
from ..first_run import adopt
from ..overview import look
from ..page import PRIVATE, Handed, Page, asked, errors_as_toast, hand, plain_html
from ..sentences import rendered
from ..uploads import looked_through

SHOW_ME = "Show me: two ready-made concepts in one picture"
GUIDE = (
    "That takes seconds, since both are trained already. **Then your own:** choose a *concept*, something you want in "
    "your pictures, and press *Train it in step 2*. When it is trained, draw it in step 4. For two things in one "
    "picture train both, then in step 4 give each a box, or put them together in step 3 first."
)
NOTHING = "Choose a concept to see its photos and to train it, or add your own thing above."
FILES = ["image", ".zip", ".txt"]
CHOOSE = """element.addEventListener('click', event => {
    const card = event.target.closest('button[data-name]');
    if (!card) return;
    element.querySelectorAll('button[data-name]').forEach(one => one.setAttribute('aria-pressed', one === card));
    trigger('select', {name: card.dataset.name});
    const detail = document.getElementById('concepts-about');
    if (detail && window.innerWidth < 900) setTimeout(() => detail.scrollIntoView({behavior: 'smooth'}), 300);
})"""


def build(page: Page, tab: gr.Tab) -> None:
    """Fill the tab and wire its events."""
    chosen: gr.State = gr.State(None)
    with gr.Column(elem_id="concepts-guide", visible=False) as guide:
        show_me = gr.Button(SHOW_ME, variant="primary", elem_id="concepts-first")
        gr.Markdown(GUIDE)
    problems = gr.Markdown(elem_id="concepts-problems", visible=False)
    adding = _adding()
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            shelf = gr.HTML(elem_id="concepts-shelf", js_on_load=CHOOSE, label="Concepts")
        with gr.Column(scale=2, min_width=320, elem_id="concepts-side"):
            detail = _detail()
    gr.Markdown(
        "### Who sits where\nA base has many directions, the strongest first. Each concept is written into some of its "
        "own, so that none overwrites another."
    )
    slots = gr.HTML(elem_id="concepts-slots", label="Slot map")

    handlers = ConceptHandlers(page)
    overview = [guide, problems, shelf, slots]
    page.refreshed(tab, handlers.overview, [chosen], overview)
    page.refreshed(tab, handlers.show, [chosen], detail.shown)

    def again(event: Any) -> None:
        """After a change: the shelf, then the concept."""
        event.success(handlers.overview, [chosen], overview, **PRIVATE).then(
            handlers.show, [chosen], detail.shown, **PRIVATE
        )

    shelf.select(handlers.choose, None, [chosen, detail.result], **PRIVATE).then(
        handlers.show, [chosen], detail.shown, **PRIVATE
    )
    adding.files.change(handlers.preview, [adding.files], [adding.preview, adding.summary], **PRIVATE)
    adding.name.change(
        handlers.suggest, [adding.name, adding.token, adding.suggested], [adding.token, adding.suggested], **PRIVATE
    )
    saved = adding.save.click(
        handlers.add,
        [adding.name, adding.noun, adding.files, adding.token],
        [adding.result, chosen],
        api_name="add_concept",
    )
    again(saved)
    saved.success(
        lambda: [None, "", "", "", gr.Accordion(open=False)],
        None,
        [adding.files, adding.name, adding.noun, adding.token, adding.whole],
        **PRIVATE,
    )
    again(show_me.click(handlers.first, None, [page.first, page.tabs], **PRIVATE))
    detail.train.click(handlers.to_training, [chosen], [page.concept, page.tabs], **PRIVATE)
    again(detail.copy.click(handlers.copy, [chosen], [detail.result], **PRIVATE))
    _wire_editing(handlers, detail, chosen, again)


# --- layout --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adding:
    """The parts of "Add your own thing"."""

    whole: gr.Accordion
    files: gr.File
    preview: gr.Gallery
    summary: gr.Markdown
    name: gr.Textbox
    noun: gr.Textbox
    token: gr.Textbox
    suggested: gr.State
    save: gr.Button
    result: gr.Markdown


def _adding() -> Adding:
    with gr.Accordion("Add your own thing", open=False, elem_id="concepts-add") as whole:
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                files = gr.File(
                    label="Photos, or a zip of them", file_count="multiple", file_types=FILES, height=170,
                    elem_id="concepts-files",
                )  # fmt: skip
                gr.Markdown(
                    "One to about ten pictures of the same thing, from different sides. A text file of a photo's name "
                    "becomes its caption.",
                    elem_classes="muted",
                )
            with gr.Column(scale=2, min_width=280):
                name = gr.Textbox(label="Name", placeholder="rex", max_lines=1, elem_id="concepts-name")
                noun = gr.Textbox(
                    label="What it is", info="In a word that everybody knows.", placeholder="dog", max_lines=1,
                    elem_id="concepts-noun",
                )  # fmt: skip
                token = gr.Textbox(
                    "", label="Its word in prompts", info="Suggested from the name.", placeholder="<rex>", max_lines=1,
                    elem_id="concepts-token",
                )  # fmt: skip
        preview = gr.Gallery(
            label="What will be saved", show_label=False, columns=6, height="auto", object_fit="cover",
            interactive=False, buttons=[], allow_preview=False, visible=False, elem_id="concepts-preview",
            elem_classes="concepts-photos",
        )  # fmt: skip
        summary = gr.Markdown(elem_id="concepts-found")
        save = gr.Button("Save concept", variant="primary", elem_id="concepts-save")
    result = gr.Markdown(elem_id="concepts-added")
    return Adding(whole, files, preview, summary, name, noun, token, gr.State(""), save, result)


@dataclass(frozen=True)
class Detail:
    """The parts of one concept's panel; ``shown`` are the outputs of :meth:`ConceptHandlers.show`."""

    about: gr.Markdown
    train: gr.Button
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
            self.about, self.train, self.copy, self.photos, self.flags, self.editing, self.names, self.photo,
            self.caption, self.tidy, self.new_name, self.new_noun, self.new_token, self.asked, self.with_adapter,
        ]  # fmt: skip


def _detail() -> Detail:
    names: gr.State = gr.State([])
    photo: gr.State = gr.State(None)
    about = gr.Markdown(NOTHING, elem_id="concepts-about")
    with gr.Row():
        train = gr.Button("Train it in step 2 →", variant="primary", visible=False, elem_id="concepts-train")
        copy = gr.Button("Make it mine", visible=False, elem_id="concepts-copy")
    result = gr.Markdown(elem_id="concepts-result")
    photos = gr.Gallery(
        label="Photos", show_label=False, columns=4, height="auto", object_fit="cover", interactive=False, buttons=[],
        visible=False, allow_preview=False, elem_id="concepts-photos", elem_classes="concepts-photos",
    )  # fmt: skip
    flags = gr.Markdown(elem_id="concepts-flags")
    with gr.Column(visible=False, elem_id="concepts-editing") as editing:
        caption = gr.Textbox(
            label="Caption", info="Click a photo, then say what else is in it. Enter goes to the next.", max_lines=1,
            elem_id="concepts-caption", interactive=False,
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
        about, train, copy, photos, flags, result, editing, names, photo, caption, save, remove, more, tidy, new_name,
        new_noun, new_token, change, ask, asked, with_adapter, delete, keep,
    )  # fmt: skip


def _wire_editing(handlers: ConceptHandlers, detail: Detail, chosen: gr.State, again: Any) -> None:
    """Wire the buttons that change the user's own concepts."""
    photo_inputs = [chosen, detail.photo]
    detail.photos.select(handlers.pick_photo, [chosen, detail.names], [detail.photo, detail.caption], **PRIVATE)
    following = [detail.photo, detail.caption, detail.photos]
    detail.save.click(handlers.save_caption, [*photo_inputs, detail.caption], [detail.result, detail.photos], **PRIVATE)
    detail.caption.submit(
        handlers.save_caption, [*photo_inputs, detail.caption], [detail.result, detail.photos], **PRIVATE
    ).success(handlers.next_photo, [*photo_inputs, detail.names], following[:2], **PRIVATE)
    again(detail.remove.click(handlers.remove, photo_inputs, [detail.result], **PRIVATE))
    again(detail.more.upload(handlers.more, [chosen, detail.more], [detail.result], **PRIVATE))
    again(detail.tidy.click(handlers.tidy, [chosen], [detail.result], **PRIVATE))
    changed = [chosen, detail.new_name, detail.new_noun, detail.new_token]
    again(detail.change.click(handlers.change, changed, [chosen, detail.result], **PRIVATE))
    detail.ask.click(lambda: gr.Column(visible=True), None, [detail.asked], **PRIVATE)
    detail.keep.click(lambda: gr.Column(visible=False), None, [detail.asked], **PRIVATE)
    again(detail.delete.click(handlers.delete, [chosen, detail.with_adapter], [chosen, detail.result], **PRIVATE))


def _photos(count: int) -> str:
    return f"{count} photo{'' if count == 1 else 's'}"


# --- handlers --------------------------------------------------------------------------------------------


class ConceptHandlers:
    """The buttons' callbacks: arguments from the page in, updates of the page out."""

    def __init__(self, page: Page) -> None:
        self.workspace = page.workspace

    def overview(self, chosen: str | None) -> list[Any]:
        """The guide, problems, cards and slot map."""
        with errors_as_toast():
            overview = look(self.workspace)
            lines = list(overview.problems)
            if overview.strangers:
                names = ", ".join(f"`{adapter.path.stem}`" for adapter in overview.strangers)
                lines.append(f"Adapters without photos here: {names}; they can be fused and drawn with all the same.")
            problems = "\n".join(f"- ⚠ {line if '`' in line else plain_html(line)}" for line in lines)
            return [
                gr.Column(visible=overview.first_run),
                gr.Markdown(problems, visible=bool(lines)),
                cards.cards(overview, chosen),
                cards.slot_map_html(overview),
            ]

    def first(self) -> tuple[Handed, Any]:
        """Take the ready-made adapters, and lead to the pictures, where the first one is drawn."""
        with errors_as_toast():
            adopt(self.workspace)
        return hand(True), gr.Tabs(selected="generate")

    def choose(self, event: gr.EventData) -> tuple[str, str]:
        """The name of the clicked card, and an empty message."""
        return str(event._data.get("name", "")), ""

    def show(self, chosen: str | None) -> list[Any]:
        """A concept's panel, see :attr:`Detail.shown`."""
        try:
            folder = concepts.concept_folder(self.workspace, chosen) if chosen else None
        except UserError:  # deleted meanwhile, perhaps in another browser
            folder = None
        if folder is None or chosen is None:
            return self._panel(NOTHING, chosen=None)
        own = chosen in concepts.own_folders(self.workspace)
        try:
            concept, small = concepts.view_concept(self.workspace, chosen)
        except UserError as error:
            return self._panel(plain_html(rendered(error)), chosen=chosen, own=own)
        about = f"### {plain_html(chosen)}\n{_photos(len(concept.photos))} of a {plain_html(concept.noun)}, "
        about += f"called `{concept.token}` in prompts."
        if not own:
            about += " Ready-made: it stays as it is, but you can change a copy."
        for adapter in concepts.adapters_of_concept(self.workspace, chosen):
            position = f", {adapter.kind} {adapter.slot}" if adapter.slot else ""
            about += f"\n\nTrained: {adapter.method} on {plain_html(adapter.base)}{position}."
        captions = self._captions(folder, concept)
        flags = [*concept.notes, *(f"{text}." for text in concept.skipped)]
        traces = False
        with contextlib.suppress(UserError):  # a damaged ledger is reported elsewhere
            traces = own and any(editing.traces(self.workspace, chosen))
        odd = own and bool(flags) and bool(concepts.odd_files(folder))
        return self._panel(
            about,
            chosen=chosen,
            own=own,
            photos=list(zip(small, captions, strict=False)),
            flags="\n".join(f"- ⚠ {plain_html(flag)}" for flag in flags),
            names=list(concepts.file_names(folder, concept)),
            odd=odd,
            traces=traces,
            noun=concept.noun,
            token=concept.token,
        )

    def _captions(self, folder: Path, concept: concepts.Concept) -> list[str]:
        """The caption shown under each photo."""
        prefix = f"a photo of {concept.token} "  # nearly all begin with it
        captions = []
        for name, photo in concepts.file_names(folder, concept).items():
            text = concept.prompt(photo.caption) if photo.caption else f"{name} (no caption)"
            captions.append(f"… {text.removeprefix(prefix)}" if text.startswith(prefix) else text)
        return captions

    def _panel(
        self, about: str, chosen: str | None, own: bool = False, photos: list[Any] | None = None, flags: str = "",
        names: list[str] | None = None, odd: bool = False, traces: bool = False, noun: str = "", token: str = "",
    ) -> list[Any]:  # fmt: skip
        return [
            about,
            gr.Button(visible=bool(names)),
            gr.Button(visible=bool(names) and not own),
            gr.Gallery(photos or [], visible=bool(photos), selected_index=None),
            flags,
            gr.Column(visible=own),
            names or [],
            None,
            gr.Textbox("", interactive=False, label="Caption"),
            gr.Button(visible=odd),
            chosen or "",
            noun,
            token,
            gr.Column(visible=False),
            gr.Checkbox(False, visible=traces),
        ]

    def preview(self, files: list[str] | None) -> tuple[Any, str]:
        """Thumbnails of uploaded files before they are saved, and the files left out."""
        if not files:
            return gr.Gallery([], visible=False), ""
        with errors_as_toast(), looked_through([Path(file) for file in files]) as intake:
            small = [(concepts.opened(photo.small), photo.label) for photo in intake.photos]
            for image, _ in small:
                image.load()
            captions = sum(bool(photo.caption) for photo in intake.photos)
            count = f"**{_photos(len(small))}** can be saved{f', {captions} with a caption' if captions else ''}."
            left_out = "\n".join(f"- ⚠ {plain_html(problem)}: left out." for problem in intake.problems)
        return gr.Gallery(small, visible=bool(small)), f"{count}\n\n{left_out}"

    def suggest(self, name: str, token: str, suggested: str) -> tuple[str, str]:
        """A token for the name, unless the user has typed one."""
        fresh = concepts.suggest_token(self.workspace, name)
        return (fresh if token in ("", suggested) else token), fresh

    @asked
    def add(self, name: str, noun: str, files: list[str] | None, token: str = "") -> tuple[str, str]:
        """Keep photos (or a zip of them) as a concept of the workspace; returns a message."""
        with errors_as_toast():
            uploads = [Path(file) for file in files or []]
            name, problems = editing.add_concept(self.workspace, name, noun, uploads, token)
        left_out = f" Left out: {plain_html('; '.join(problems))}." if problems else ""
        return f"Added '{name}'.{left_out}", name

    def to_training(self, chosen: str | None) -> tuple[Handed, Any]:
        """Hand the concept to the training and go there."""
        with errors_as_toast():
            return hand(concepts.concept_folder(self.workspace, chosen).name), gr.Tabs(selected="train")

    def copy(self, chosen: str | None) -> str:
        """Copy a ready-made concept as the user's own."""
        with errors_as_toast():
            return f"'{editing.copy_concept(self.workspace, chosen)}' is yours now; change what you like."

    def pick_photo(self, chosen: str | None, names: list[str], event: gr.SelectData) -> tuple[str | None, Any]:
        """The clicked photo and its caption."""
        index = int(event.index)
        return self._photo(chosen, names[index] if 0 <= index < len(names) else None)

    def next_photo(self, chosen: str | None, photo: str | None, names: list[str]) -> tuple[str | None, Any]:
        """The photo after this one, or the first."""
        index = (names.index(photo) + 1) % len(names) if photo in names else 0
        return self._photo(chosen, names[index] if names else None)

    def _photo(self, chosen: str | None, name: str | None) -> tuple[str | None, Any]:
        with errors_as_toast():
            folder = concepts.concept_folder(self.workspace, chosen)
            concept = concepts.read_concept(folder)
            photo = concepts.file_names(folder, concept).get(name or "")
            if photo is None:
                return None, gr.Textbox("", interactive=False, label="Caption")
            caption = concept.prompt(photo.caption) if photo.caption else ""
            return name, gr.Textbox(caption, interactive=True, label=f"Caption of {name}")

    def save_caption(self, chosen: str | None, photo: str | None, text: str) -> tuple[str, Any]:
        """Write a caption and show it under its photo."""
        with errors_as_toast():
            message = editing.write_caption(self.workspace, chosen, photo, text)
            concept, small = concepts.view_concept(self.workspace, chosen)
            folder = concepts.concept_folder(self.workspace, chosen)
            return message, list(zip(small, self._captions(folder, concept), strict=False))

    def remove(self, chosen: str | None, photo: str | None) -> str:
        """Take a photo out."""
        with errors_as_toast():
            return editing.remove_photo(self.workspace, chosen, photo)

    def more(self, chosen: str | None, files: list[str] | None) -> str:
        """Put more photos in."""
        with errors_as_toast():
            count, problems = editing.add_photos(self.workspace, chosen, [Path(file) for file in files or []])
        left_out = f" Left out: {plain_html('; '.join(problems))}." if problems else ""
        return f"Added {_photos(count)}.{left_out}"

    def tidy(self, chosen: str | None) -> str:
        """Take broken photos and duplicates out."""
        with errors_as_toast():
            return editing.tidy_concept(self.workspace, chosen)

    def change(self, chosen: str | None, name: str, noun: str, token: str) -> tuple[str, str]:
        """Give it another name, noun or token."""
        with errors_as_toast():
            name, notes = editing.change_concept(self.workspace, chosen, name, noun, token)
            return name, plain_html(" ".join(notes))

    def delete(self, chosen: str | None, with_adapter: bool) -> tuple[None, str]:
        """Put the concept into the trash."""
        with errors_as_toast():
            return None, editing.delete_concept(self.workspace, chosen, with_adapter)
