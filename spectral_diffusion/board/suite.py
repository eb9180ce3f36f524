"""What everybody on a board is measured on: concepts, prompts, sizes, numbers of concepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ..config.evaluate import GENERIC_SUBJECTS, PLACES
from ..config.settings import Settings, Templates, build, read_yaml
from ..core import assets
from ..core.errors import UserError, nearest


class BoardSuite(Settings):
    """The tasks of a board, the same for every entry."""

    name: str = Field(description="What the page calls it.")
    base: str = Field("pocket", description="The base that entries are for.")
    encoder: str = Field("pocket", description="What measures identity: pocket, a CLIP or DINOv2 model.")
    concepts: list[str] = Field(min_length=2, description="Folders of photos by name; N concepts are the first N.")
    nouns: dict[str, str] = Field({}, description="Class nouns of concepts whose folders do not say them.")
    folder: Path | None = Field(None, description="Where these folders are. Default: the shipped concepts.")
    counts: list[int] = Field([2, 4, 8, 16, 32], min_length=1, description="Numbers of concepts that are fused.")
    prompts: Templates = Field(
        [f"a photo of {{}} {place}" for place in PLACES], description="One picture of each concept per prompt."
    )
    generic: list[str] = Field(
        [f"a photo of {subject}" for subject in GENERIC_SUBJECTS],
        min_length=1,
        description="Prompts without a concept, which show drift.",
    )
    pairs: list[str] = Field(
        [f"{{left}} on the left and {{right}} on the right {place}" for place in PLACES],
        min_length=1,
        description="Prompts of two concepts: the first with the second, and so on, eight pairs at most.",
    )
    pair_size: tuple[int, int] = Field((256, 128), description="Width and height of these pictures.")
    seed: int = Field(0, ge=0, lt=2**20, description="Seed of everything random.")
    train: dict[str, Any] = Field({}, description="Training settings of entries that the board trains.")
    generate: dict[str, Any] = Field({}, description="Settings of every picture.")
    loading: dict[str, Any] = Field({}, description="How the base is loaded to generate and merge: device, dtype …")
    hours: str = Field("", description="How long an entry takes, and on what.")

    @model_validator(mode="after")
    def _counts_fit(self) -> BoardSuite:
        if len(set(self.concepts)) < len(self.concepts):
            raise ValueError("concepts names one twice")
        if wrong := [count for count in self.counts if not 2 <= count <= len(self.concepts)]:
            raise ValueError(
                f"counts has {wrong[0]}, but there are {len(self.concepts)} concepts, and one is no fusion"
            )
        if wrong_prompts := [text for text in self.pairs if "{left}" not in text or "{right}" not in text]:
            raise ValueError(f"pairs needs {{left}} and {{right}} in each prompt: {wrong_prompts[0]}")
        return self

    @property
    def photos(self) -> Path:
        """The folder of the concepts' folders."""
        return self.folder or assets.concepts()


def read_suite(name: str, with_photos: bool = True, **changes: Any) -> BoardSuite:
    """A suite by name, or from a YAML file.

    Args:
        with_photos: the concepts' folders must be there.
        changes: what differs from the file; None is no change.

    Raises:
        UserError: neither, or a setting that is wrong.
    """
    known = {path.stem: path for path in sorted((assets.configs() / "board").glob("*.yaml"))}
    path = Path(name) if Path(name).suffix in {".yaml", ".yml"} else known.get(name)
    if path is None:
        raise UserError(f"No suite '{name}'{nearest(name, known)}; use a .yaml file or one of {', '.join(known)}.")
    given = {key: value for key, value in changes.items() if value is not None}
    suite = build(BoardSuite, read_yaml(path), given, file=str(path))
    if suite.folder is not None and not suite.folder.is_absolute() and not suite.folder.is_dir():
        beside = path.parent / suite.folder
        suite = suite.model_copy(update={"folder": beside}) if beside.is_dir() else suite
    if with_photos and (missing := [concept for concept in suite.concepts if not (suite.photos / concept).is_dir()]):
        raise UserError(f"{suite.photos} has no folder '{missing[0]}', which {path} names; put its photos there.")
    return suite
