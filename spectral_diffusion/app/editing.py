"""Edit the user's own concepts. The ready-made ones cannot be changed; deleted files go into the trash."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from ..core.errors import UserError
from ..core.files import write_text
from ..core.names import check_token, with_article
from ..data.folder import Concept, Photo, load_concept, read_about
from ..data.sidecars import Files, find_caption
from ..slots.ledger import LEDGER, ROWS, Ledger
from .adapters import release_slot
from .concepts import (
    ABOUT,
    about,
    adapters_of_concept,
    concept_folder,
    concept_folders,
    file_names,
    known_concepts,
    odd_files,
    own_folder,
    own_folders,
    photo_files,
    pixels,
    pocket_tokens,
    read_concept,
    suggest_token,
)
from .disk import disk_errors_as_sentence
from .jobs import refuse_busy
from .trash import discard
from .uploads import PHOTOS, copy_into, looked_through
from .workspace import Workspace, pick, safe_name

CAPTION = 400  # characters
RESERVED = {"caption", "captions", "mask", "masks"}  # folder names with a meaning for the trainer
ADAPTER_FILES = (".safetensors", ".yaml", ".md", ".state.safetensors", ".status.json", "-samples")


def add_concept(
    workspace: Workspace, name: str, noun: str, uploads: Iterable[Path], token: str | None = None
) -> tuple[str, list[str]]:
    """Copy photos, or zips of them, into a new folder; returns the name and a reason per file left out.

    Raises:
        UserError: the name is invalid or taken, the token is another concept's, or no photo is readable.
    """
    name = safe_name(name, "name of the concept")
    noun = _checked_noun(noun)
    if name in concept_folders(workspace) or name in RESERVED:
        raise UserError(f"'{name}' is taken already; choose another name.")
    token = _free_token(workspace, token, name)
    files = list(uploads)
    if not files:
        raise UserError("No photos were uploaded; add one to about ten pictures of your thing.")
    with looked_through(files) as intake:
        if not intake.photos:
            raise UserError(f"None of the photos can be used: {'; '.join(intake.problems) or 'the zip is empty'}.")
        with _new_folder(workspace, name) as folder:
            copy_into(folder, intake.photos)
            _write_about(folder, name, noun, token)
    return name, list(intake.problems)


def copy_concept(workspace: Workspace, name: str | None) -> str:
    """Copy a ready-made concept into the workspace under its own name for editing; returns the name.

    Raises:
        UserError: it is the user's own already.
    """
    source = concept_folder(workspace, name)
    if source.name in own_folders(workspace):
        raise UserError(f"'{name}' is yours already.")
    concept = read_concept(source)
    with _new_folder(workspace, source.name) as folder:
        for photo in concept.photos:
            shutil.copyfile(photo.path, folder / photo.path.name)
            if photo.caption:
                (folder / photo.path.name).with_suffix(".txt").write_text(photo.caption + "\n", encoding="utf-8")
        _write_about(folder, concept.name, concept.noun, concept.token)
    return source.name


def add_photos(workspace: Workspace, name: str | None, uploads: Iterable[Path]) -> tuple[int, list[str]]:
    """Copy more photos into a concept; returns how many, and a reason per file left out.

    Raises:
        UserError: it is ready-made, or the folder cannot be written.
    """
    folder = own_folder(workspace, name)
    existing = photo_files(folder)
    known = [digest for path in existing if (digest := pixels(path))]
    taken = [int(path.stem) for path in folder.iterdir() if re.fullmatch(r"\d{1,6}", path.stem)]
    with (
        looked_through(list(uploads), known, PHOTOS - len(existing)) as intake,
        disk_errors_as_sentence("concepts"),
        tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch,  # a full disk must leave no partial photo
    ):
        names = copy_into(Path(scratch), intake.photos, max([0, *taken]) + 1)
        for path in sorted(Path(scratch).iterdir(), reverse=True):  # captions before their photos
            path.rename(folder / path.name)
    return len(names), list(intake.problems)


def write_caption(workspace: Workspace, name: str | None, photo: str | None, text: str | None) -> str:
    """Write a photo's caption beside it; an empty one removes it. Returns a message.

    Raises:
        UserError: the concept is ready-made, there is no such photo, or its captions are in one table.
    """
    folder = own_folder(workspace, name)
    concept = read_concept(folder)
    chosen = _photo(folder, concept, photo)
    for table in ("metadata.jsonl", "metadata.csv"):
        if (chosen.path.parent / table).is_file() or (folder / table).is_file():
            raise UserError(f"The captions of '{name}' are in its {table}; change them there, or remove that file.")
    caption = " ".join((text or "").split())
    caption = re.sub(re.escape(concept.token), "<TOK>", caption, flags=re.IGNORECASE)  # the token may change
    if len(caption) > CAPTION:
        raise UserError(f"The caption has {len(caption)} characters; say it in at most {CAPTION}.")
    file = chosen.path.with_suffix(".txt")
    with disk_errors_as_sentence("concepts"):
        if caption:
            write_text(file, caption + "\n")
        else:
            file.unlink(missing_ok=True)
    if not caption and (other := find_caption(chosen.path, folder, Files())):
        raise UserError(f"The caption of {photo} is in {other.relative_to(folder)} of '{name}'; remove that file.")
    return f"{'Saved' if caption else 'Removed'} the caption of {photo}."


def remove_photo(workspace: Workspace, name: str | None, photo: str | None) -> str:
    """Put a photo and its caption into the trash; returns a message.

    Raises:
        UserError: the concept is ready-made, there is no such photo, or it is the last one.
    """
    folder = own_folder(workspace, name)
    concept = read_concept(folder)
    chosen = _photo(folder, concept, photo)
    if len(concept.photos) == 1:
        raise UserError(f"{photo} is the last photo of '{name}'; add another first, or delete the concept.")
    discard(workspace, folder.name, [chosen.path, chosen.path.with_suffix(".txt")])
    return f"Removed {photo}."


def tidy_concept(workspace: Workspace, name: str | None) -> str:
    """Put broken photos and duplicates into the trash; returns a message.

    Raises:
        UserError: the concept is ready-made, or has nothing to tidy.
    """
    folder = own_folder(workspace, name)
    odd = odd_files(folder)
    if not odd:
        raise UserError(f"'{name}' has no broken photos and no duplicates.")
    discard(workspace, folder.name, [file for path in odd for file in (path, path.with_suffix(".txt"))])
    return f"Removed {', '.join(path.name for path in odd)}."


def change_concept(workspace: Workspace, name: str | None, new: str, noun: str, token: str) -> tuple[str, list[str]]:
    """Change a concept's name, class noun or token; returns the name and messages.

    Raises:
        UserError: it is ready-made, in training, or the name or token is another concept's.
    """
    folder = own_folder(workspace, name)
    before = about(folder)
    new, noun = safe_name(new, "name of the concept"), _checked_noun(noun)
    if new != folder.name and (new in {*concept_folders(workspace), *RESERVED} or (workspace.concepts / new).exists()):
        raise UserError(f"'{new}' is taken already; choose another name.")
    token = _free_token(workspace, token or before[2], folder.name)
    refuse_busy(workspace, folder.name)
    trained = adapters_of_concept(workspace, folder.name)
    repeats = read_about(folder)[1]
    with disk_errors_as_sentence("concepts"):
        _write_about(folder, new, noun, token, None if repeats == 1 else repeats)
        if new != folder.name:
            folder.rename(workspace.concepts / new)
    notes = [f"Saved: '{new}' is {with_article(noun)}, called {token} in prompts."]
    if trained:
        notes.append(
            f"Its adapter '{trained[0].path.stem}' stays as it was trained: in prompts it is {trained[0].token}. "
            "Train again to give it the new name and token."
        )
    return new, notes


def delete_concept(workspace: Workspace, name: str | None, with_adapter: bool = False) -> str:
    """Put a concept into the trash, optionally with its adapter, whose slot is freed; returns a message.

    Raises:
        UserError: it is ready-made, in training, or cannot be moved.
    """
    folder = own_folder(workspace, name)
    refuse_busy(workspace, folder.name)
    files, names = traces(workspace, folder.name) if with_adapter else ([], [])
    trash_folder = discard(workspace, folder.name, [folder, *files])
    for concept_name in names:
        release_slot(workspace, concept_name)
    message = f"Deleted '{name}'"
    if with_adapter:
        message += " with its adapter, and freed its place in the spectrum" if files else " and freed its place"
    return f"{message}. To restore it, look in {trash_folder.relative_to(workspace.root)} of the workspace."


def traces(workspace: Workspace, name: str) -> tuple[list[Path], list[str]]:
    """The traces of a concept's trainings: files among the adapters, and its own names in the ledgers.

    Raises:
        UserError: a ledger is damaged.
    """
    details = known_concepts(workspace)
    others = {
        other_name for folder, (called, _, _) in details.items() if folder != name for other_name in (folder, called)
    }
    mine = adapters_of_concept(workspace, name)
    names = ({name, details[name][0]} - others) | {label.name for label in mine}
    ledgers = [Ledger(workspace.adapters / file).read() for file in (LEDGER, ROWS)]
    ledger_names = {ledger_name for ledger in ledgers for concepts in ledger.values() for ledger_name in concepts}
    stems = sorted({name} | {label.path.stem for label in mine})
    files = [workspace.adapters / f"{stem}{ending}" for stem in stems for ending in ADAPTER_FILES]
    return [file for file in files if file.exists()], sorted(names & ledger_names)


# --- shared ---------------------------------------------------------------------------------------------------


def _free_token(workspace: Workspace, token: str | None, name: str) -> str:
    """The token for a concept of that name.

    Raises:
        UserError: not a token, or another concept's.
    """
    token = (token or "").strip()
    if not token:
        return suggest_token(workspace, name)
    token = check_token(token if token.startswith("<") else f"<{token}>")
    claims = [other for other, details in known_concepts(workspace).items() if details[2] == token and other != name]
    claims += ["the pocket base"] if token in pocket_tokens() else []
    if claims:
        raise UserError(f"The token {token} belongs to {claims[0]}; take {suggest_token(workspace, token[1:-1])}.")
    return token


def _checked_noun(noun: str | None) -> str:
    noun = (noun or "").strip()
    if not re.fullmatch(r"[A-Za-z][A-Za-z -]{0,39}", noun):
        raise UserError("The class noun is missing or odd; write what your thing is in plain words, such as dog.")
    return noun


@contextmanager
def _new_folder(workspace: Workspace, name: str) -> Iterator[Path]:
    """A new concept's folder, which appears under its name complete or not at all."""
    with disk_errors_as_sentence("concepts"):
        workspace.concepts.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=workspace.concepts))
        try:
            yield new
            load_concept(new, name)
            new.chmod(0o755)
            new.rename(workspace.concepts / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _write_about(folder: Path, name: str, noun: str, token: str, repeats: object = None) -> None:
    settings = {"name": name, "noun": noun, "token": token} | ({} if repeats is None else {"repeats": repeats})
    write_text(folder / ABOUT, yaml.safe_dump(settings, sort_keys=False))


def _photo(folder: Path, concept: Concept, name: str | None) -> Photo:
    if not name:
        raise UserError("No photo is chosen; click one first.")
    return pick(name, file_names(folder, concept), "photo", "reload the page")
