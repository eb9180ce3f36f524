"""The concepts tab: cards, the slot map, one concept's photos, and adding your own."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import gradio as gr

from ...config.train import STYLE_NOUN
from ...core.errors import UserError
from ...core.names import with_article
from .. import concept_html as cards
from .. import concepts, editing, trash
from ..first_run import adopt
from ..overview import look
from ..page import PRIVATE, Handed, Page, asked, errors_as_toast, hand, plain_html
from ..sentences import rendered
from ..uploads import looked_through
from .concepts_layout import NOTHING, Detail, build_adding, build_detail, build_trash

SHOW_ME = "Show me: two ready-made concepts in one picture"
GUIDE = (
    "That takes seconds, since both are trained already. **Then your own:** choose a *concept*, something you want in "
    "your pictures, and press *Train it in step 2*. When it is trained, generate pictures with it in step 4. For two "
    "things in one picture train both, then in step 4 give each a box, or fuse them in step 3 first."
)
LOADING = '<p class="muted">Loading …</p>'
CHOOSE = """element.addEventListener('click', event => {
    const card = event.target.closest('button[data-name]');
    if (!card) return;
    element.querySelectorAll('button[data-name]').forEach(one => one.setAttribute('aria-pressed', one === card));
    trigger('select', {name: card.dataset.name});
    const detail = document.getElementById('concepts-about');
    if (detail && window.innerWidth < 900) setTimeout(() => detail.scrollIntoView({behavior: 'smooth'}), 300);
})"""
TO_DETAIL = "() => setTimeout(() => document.getElementById('concepts-about')?.scrollIntoView({block: 'center'}), 600)"


def build(page: Page, tab: gr.Tab) -> None:
    """Fill the tab and wire its events."""
    chosen: gr.State = gr.State(None)
    with gr.Column(elem_id="concepts-guide", visible=not page.workspace.adapters.is_dir()) as guide:
        show_me = gr.Button(SHOW_ME, variant="primary", elem_id="concepts-first")
        gr.Markdown(GUIDE)
    problems = gr.Markdown(elem_id="concepts-problems", visible=False)
    adding = build_adding()
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            shelf = gr.HTML(LOADING, elem_id="concepts-shelf", js_on_load=CHOOSE, label="Concepts")
        with gr.Column(scale=2, min_width=320, elem_id="concepts-side"):
            detail = build_detail()
    gr.Markdown(
        "### Slots\nA base has many directions, the strongest first. Each concept has a slot, some of them "
        "that no other uses, so that none overwrites another."
    )
    slots = gr.HTML(elem_id="concepts-slots", label="Slot map")
    trash_line = build_trash()

    handlers = ConceptHandlers(page)
    overview = [guide, problems, shelf, slots, trash_line.whole, trash_line.line]
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
    adding.kind.input(handlers.kind, adding.kind, adding.noun, **PRIVATE)
    saved = adding.save.click(
        handlers.add,
        [adding.name, adding.noun, adding.files, adding.token],
        [adding.result, chosen],
        api_name="add_concept",
    )
    again(saved)
    saved.success(
        lambda: [None, "", "thing", gr.Textbox("", visible=True), "", gr.Accordion(open=False)],
        None, [adding.files, adding.name, adding.kind, adding.noun, adding.token, adding.whole],
        js=TO_DETAIL, **PRIVATE,
    )  # fmt: skip
    again(show_me.click(handlers.first, None, [page.first, page.tabs], **PRIVATE))
    detail.train.click(handlers.to_training, [chosen], [page.concept, page.tabs], **PRIVATE)
    detail.use.click(handlers.to_pictures, [chosen], [page.adapters, page.tabs], **PRIVATE)
    again(detail.copy.click(handlers.copy, [chosen], [detail.result], **PRIVATE))
    _wire_editing(handlers, detail, chosen, again)
    asking, really = trash_line.asked, trash_line.really
    trash_line.ask.click(lambda: gr.Row(visible=True), None, asking, **PRIVATE)
    trash_line.keep.click(lambda: gr.Row(visible=False), None, asking, **PRIVATE)
    really.click(handlers.empty_trash, None, [asking, trash_line.line], **PRIVATE)


# --- wiring ---------------------------------------------------------------------------------------------


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
                lines.append(
                    f"Adapters without photos here: {names}; they can be fused and used in pictures all the same."
                )
            problems = "\n".join(f"- ⚠ {line if '`' in line else plain_html(line)}" for line in lines)
            return [
                gr.Column(visible=overview.first_run),
                gr.Markdown(problems, visible=bool(lines)),
                cards.cards(overview, chosen),
                cards.slot_map_html(overview),
                *self.trash(),
            ]

    def trash(self) -> list[Any]:
        """The line on the trash, from which old deletions are first deleted for good."""
        emptied, line = trash.empty(self.workspace), trash.contents(self.workspace).line()
        return [gr.Column(visible=bool(line or emptied)), plain_html(f"{line} {emptied}".strip())]

    def empty_trash(self) -> list[Any]:
        """Delete everything in the trash for good."""
        with errors_as_toast():
            return [gr.Row(visible=False), plain_html(trash.empty(self.workspace, older_than=0))]

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
        about = (
            f"### {plain_html(chosen)}\n{_photos(len(concept.photos))} of {plain_html(with_article(concept.noun))}, "
        )
        about += f"called `{concept.token}` in prompts."
        if concept.is_style:
            about += f" A style: write `in {concept.token} style`. It acts everywhere and needs no box."
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
            trained=bool(concepts.adapters_of_concept(self.workspace, chosen)),
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
        trained: bool = False,
    ) -> list[Any]:  # fmt: skip
        return [
            about,
            gr.Button(visible=bool(names)),
            gr.Button(visible=trained),
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

    def kind(self, kind: str) -> Any:
        """The field for what it is, which a style does not need: its class noun is *style*."""
        return gr.Textbox(STYLE_NOUN if kind == "style" else "", visible=kind != "style")

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

    def to_pictures(self, chosen: str | None) -> tuple[Handed, Any]:
        """Hand the concept's newest adapter to the pictures and go there."""
        with errors_as_toast():
            trained = concepts.adapters_of_concept(self.workspace, str(chosen))
            if not trained:
                raise UserError(f"'{chosen}' is not trained any more; train it in step 2.")
            return hand([trained[-1].path.stem]), gr.Tabs(selected="generate")

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
