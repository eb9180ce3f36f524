"""One entry of a board: a file that says where its adapters, merged models or pictures come from."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePath
from typing import Any

from pydantic import Field, FiniteFloat, PrivateAttr, model_validator

from ..adapters.adapter import Adapter
from ..config.fuse import CalibrationConfig, DistillConfig
from ..config.settings import Settings, build, read_yaml
from ..core.errors import Fix, UserError, nearest
from ..core.names import slug
from ..core.paths import without_folders
from ..merging.merges.registry import all_merges

CUT = 39  # letters of a name as a file's from which on it may have been cut
PEFT_KINDS = ("ties", "dare_linear", "dare_ties", "cat", "svd")
STOCK = {
    "stock:set_adapters": "diffusers' set_adapters: all adapters act at once, nothing is merged",
    "stock:key-by-key": "each A and B summed by its name over the files, as trainers' merge scripts do",
    **{f"stock:{kind}": f"PEFT's add_weighted_adapter, {kind}" for kind in PEFT_KINDS},
}
SOURCES = ("adapters", "train", "fused", "command")


class BoardEntry(Settings):
    """Where an entry's results come from; exactly one of adapters, train, fused and command."""

    name: str = Field(min_length=1, max_length=60, description="What the page calls it.")
    author: str = Field("", max_length=200, description="Who entered it.")
    url: str = Field("", max_length=300, description="Where it is described.")
    notes: str = Field("", max_length=1000, description="What a reader must know.")
    adapters: str | None = Field(
        None, description="A LoRA of each concept, with {concept} for its name: any format that import reads."
    )
    embeddings: str | None = Field(None, description="Textual-inversion files beside them, with {concept}.")
    train: dict[str, Any] | None = Field(None, description="The board trains adapters with these changed settings.")
    own_slots: bool = Field(False, description="With train: every adapter gets the next columns of the spectrum.")
    joint: bool = Field(False, description="With train: one adapter of all concepts, as long as theirs together.")
    merge: str = Field("spectral", description="How adapters are merged: a merge of this program, or a stock: one.")
    options: dict[str, Any] = Field({}, description="Settings of the merge.")
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="As in fusing.")
    distill: DistillConfig = Field(DistillConfig(), description="As in fusing.")
    scale: FiniteFloat = Field(1.0, description="λ of every adapter.")
    mean: bool = Field(False, description="Divide the scale by the number of adapters.")
    fused: str | None = Field(
        None, description="What was merged elsewhere, with {n} for the number: a pipeline's folder or a LoRA file."
    )
    command: list[str] | None = Field(
        None, min_length=1, description="A program and its arguments; {job} is a JSON file that says what to make."
    )
    counts: list[int] | None = Field(None, description="Numbers of concepts that it takes part in. Default: all.")
    words: dict[str, str] = Field({}, description="The name of a concept in a prompt. Default: its token.")
    _folder: Path = PrivateAttr(Path())

    @model_validator(mode="after")
    def _has_one_source(self) -> BoardEntry:
        given = [source for source in SOURCES if getattr(self, source) is not None]
        if len(given) != 1 and given != ["adapters", "fused"]:
            raise ValueError(f"an entry needs exactly one of {', '.join(SOURCES)} (or adapters beside fused)")
        for source, mark in (("adapters", "{concept}"), ("embeddings", "{concept}"), ("fused", "{n}")):
            if (text := getattr(self, source)) is not None and mark not in text:
                raise ValueError(f"{source} needs {mark} in it")
        if self.command is not None and not any("{job}" in part for part in self.command):
            raise ValueError("command needs {job} among its arguments")
        if not slug(self.name):
            raise ValueError("name has no letter, so no file can be called by it")
        known = {*all_merges(), *STOCK}
        if self.merge not in known:
            raise ValueError(f"merge {self.merge} is none of {', '.join(sorted(known))}{nearest(self.merge, known)}")
        if (self.joint or self.own_slots) and self.train is None:
            raise ValueError("joint and own_slots are about adapters that the board trains; give train too")
        return self

    @property
    def slug(self) -> str:
        """Its name as a file's; names that begin alike and are cut differ by a hash."""
        short = slug(self.name).lower()
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:6]
        return short if len(short) < CUT else f"{short[: CUT - 7].rstrip('-')}-{digest}"

    def beside(self, text: str) -> Path:
        """A path as the entry's file sees it."""
        return (self._folder / text).resolve()

    def shared(self) -> dict[str, Any]:
        """The entry as others may read it: no folder of this machine, of a program its name alone."""
        about: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        for source in ("adapters", "embeddings", "fused"):
            if source in about:
                about[source] = PurePath(about[source]).name
        if self.command is not None:
            about["command"] = [PurePath(self.command[0]).name, "…"]
        shared: dict[str, Any] = without_folders(about)
        return shared

    def path(self, text: str, **marks: Any) -> Path:
        """A path of the entry, seen from the entry's file.

        Raises:
            UserError: there is nothing.
        """
        for mark, value in marks.items():
            text = text.replace(f"{{{mark}}}", str(value))
        path = self._folder / text
        if not path.exists():
            raise UserError(f"The entry '{self.name}' names {path}, which does not exist.")
        return path

    def word_for(self, concept: str, adapter: Adapter | None = None, token: str = "") -> str:
        """The name of a concept in a prompt.

        Raises:
            UserError: it has none.
        """
        if word := self.words.get(concept):
            return word
        word = (adapter.trigger or adapter.token) if adapter else token  # a base without new words reads the trigger
        if not word:
            raise UserError(f"'{concept}' has no name in the prompts of '{self.name}'.", Fix("words", so="to name it"))
        return word


def read_entry(path: Path) -> BoardEntry:
    """An entry's file.

    Raises:
        UserError: it cannot be read, or a setting is wrong.
    """
    entry = build(BoardEntry, read_yaml(path), file=str(path))
    entry._folder = Path(path).parent
    return entry
