"""The jobs of several photo folders: one training each, with all their slots reserved before any starts."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.settings import to_yaml
from ..config.train import TrainConfig
from ..core.errors import Fix, UserError
from ..core.files import write_text
from ..core.hooks import QUIET, Hooks
from ..data.folder import describe, load_concept
from ..methods import get_method
from ..models.base import Base
from ..models.loading import load_base
from ..training.output import is_done, state_path
from ..training.slot_choice import reserve_together
from ..training.status import status_path
from .job import PREPARE, BatchFolder, Job


@dataclass(frozen=True)
class Training:
    """One concept of a batch."""

    name: str  # of the folder, the adapter's file and the job
    config: TrainConfig


def trainings(folders: Sequence[Path], output: Path, settings: Callable[[Path, Path], TrainConfig]) -> list[Training]:
    """A training per photo folder, writing ``<output>/<folder's name>.safetensors``.

    Args:
        settings: a photo folder and its output to the settings.

    Raises:
        UserError: two folders of one name or token, or an output that is a file.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; several concepts go into a folder.", Fix("output", so="to name one"))
    names = [unicodedata.normalize("NFC", folder.resolve().name) for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two of the folders are called '{name}', and their adapters would be too; rename one.")
        if name == PREPARE:
            raise UserError(f"A folder of a batch cannot be called '{PREPARE}', as its first job is; rename it.")
    found = [
        Training(name, settings(folder, output / f"{name}.safetensors"))
        for folder, name in zip(folders, names, strict=True)
    ]
    check_tokens(found)
    return found


def check_tokens(batch: Sequence[Training]) -> None:
    """Refuse two concepts whose token is one word, which could never be used together.

    Raises:
        UserError: there are two.
    """
    owners: dict[str, str] = {}
    for training in batch:
        token = _token(training.config)
        owner = owners.setdefault(token.lower(), training.name) if token else training.name
        if owner != training.name:
            raise UserError(
                f"'{owner}' and '{training.name}' have one token, {token}; give one of them another in its "
                "concept.yaml (token: <name>)."
            )


def _token(config: TrainConfig) -> str:
    """The token of a concept; empty for a faulty folder, which its own training reports."""
    try:
        return describe(config.concept, config.name, config.token, config.class_noun).token
    except UserError:
        return ""


def without_done(batch: Sequence[Training], force: bool, hooks: Hooks = QUIET) -> list[Training]:
    """The trainings that are not done already.

    Raises:
        UserError: one was done with other settings, and not ``force``.
    """
    left = []
    for training in batch:
        if is_done(training.config, force):
            hooks.notify(f"{training.name} is done already.")
        else:
            left.append(training)
    return left


def with_slots(batch: Sequence[Training], resume: bool = False) -> tuple[list[Training], Base | None]:
    """Reserve the slots of all trainings in their order, so that their processes only read the ledger.

    Returns:
        The trainings with settled settings, and the base, which estimates need too; None where no method has slots.

    Raises:
        UserError: a slot is taken, there is no room for all, or the base cannot be loaded.
    """
    names = {t.name: name for t in batch if (name := _readable(t.config))}
    configs = {names[t.name]: t.config for t in batch if t.name in names}
    if not any(get_method(config.method).slot for config in configs.values()):
        return list(batch), None
    first = next(iter(configs.values()))
    base = load_base(first.base, "cpu", first.dtype)
    settled: Mapping[str, TrainConfig] = reserve_together(configs, base, resume)
    return [Training(t.name, settled.get(names.get(t.name, ""), t.config)) for t in batch], base


def _readable(config: TrainConfig) -> str:
    """The name of a concept; empty for a folder without photos, or another fault that its own training reports."""
    try:
        return load_concept(config.concept, config.name, config.token, config.class_noun).name
    except UserError:
        return ""


def training_jobs(
    folder: BatchFolder, batch: Sequence[Training], resume: bool = False, force: bool = False
) -> list[Job]:
    """The jobs of trainings, which read their settings from the batch's folder: see :func:`write_configs`."""
    jobs = []
    for training in batch:
        output, settings = training.config.output, folder.settings(training.name)
        arguments = ["train", str(training.config.concept), "-o", str(output), "--config", str(settings.resolve())]
        arguments += ["--status", "auto", *(["--resume"] if resume else []), *(["--force"] if force else [])]
        jobs.append(training_job(training.name, arguments, output))
    return jobs


def training_job(name: str, arguments: Sequence[str], output: Path, status: Path | None = None) -> Job:
    """The job of one training with these arguments; ``status`` is its status file if it is not beside the output."""
    return Job(
        name=name, arguments=tuple(arguments), output=str(output), status=(status or status_path(output)).resolve(),
        state=state_path(output).resolve(),
    )  # fmt: skip


def write_configs(folder: BatchFolder, batch: Sequence[Training]) -> None:
    """Write the settings that the jobs of trainings read."""
    for training in batch:
        write_text(folder.settings(training.name), to_yaml(training.config))
