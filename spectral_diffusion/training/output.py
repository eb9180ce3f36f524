"""A training's output: what exists already, what may be replaced, and which process writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from ..adapters.formats.card import MARK
from ..adapters.formats.native import is_native
from ..config.presets import with_rates
from ..config.settings import build, read_yaml
from ..config.train import TrainConfig
from ..core.errors import ELSEWHERE, Fix, UserError
from ..core.files import cannot_write, check_writable, read_header
from ..core.hooks import QUIET, Hooks
from ..core.locks import ProcessLock
from ..core.outputs import refuse_overwriting_page, refuse_overwriting_settings
from ..core.paths import without_folders
from ..data.folder import Concept
from ..methods import get_method
from .checkpoint import comparable_settings, differences, step_of

STATE = ".state.safetensors"


def state_path(output: Path) -> Path:
    """The path of an unfinished run's resumable state."""
    return output.with_name(f"{output.stem}{STATE}")


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Lock an output while it is trained.

    Raises:
        UserError: another training has locked it, or its folder cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock_file = output.with_name(f".{output.name}.lock")
        lock = ProcessLock(lock_file)
        lock.acquire(0.0)
    except Timeout as error:
        raise UserError(
            f"{output} is being trained by another process already, which has to end or be stopped first.",
            ELSEWHERE,
        ) from error
    except OSError as error:
        raise cannot_write(output, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock_file.unlink()  # before the release; Windows keeps it
        lock.release()


def prepare_output(config: TrainConfig, name: str, resume: bool, force: bool, hooks: Hooks = QUIET) -> bool:
    """Whether the adapter of these settings exists already, so that nothing is left to train.

    Args:
        name: of the concept.
        force: with ``resume`` go on although settings have changed; without it replace the output.

    Raises:
        UserError: something would be lost: a stopped training's state, another concept's adapter, a file of another
            kind, or with ``resume`` an adapter of other settings.
    """
    output, state = config.output, state_path(config.output)
    if output.is_dir():
        raise UserError(f"The output {output} is a folder.", ELSEWHERE)
    check_writable(output)
    refuse_other_output(output)
    refuse_overwriting_settings(output.with_suffix(".yaml"))
    if config.validation.model_card:
        refuse_overwriting_page(output.with_suffix(".md"), MARK)
    if state.exists():
        if not (resume or force):
            step = step_of(state)
            where = "A damaged state" if step is None else f"A training stopped at step {step}"
            raise UserError(
                f"{where} is in {state}.",
                Fix("resume", "true", "to go on from there"),
                Fix("force", "true", "to start anew"),
            )
        return False
    owner = name_in(output) if output.exists() else name
    if owner != name and not force:
        raise UserError(
            f"{output} is the adapter of '{owner}', which training '{name}' would replace.",
            ELSEWHERE,
            Fix("force", "true", "to replace it"),
        )
    if resume:
        if output.exists() and owner == name and is_done(config, force):
            hooks.notify(f"{output} is done already.")
            return True
        hooks.notify(f"No state of a stopped training is beside {output}; starting at step 0.")
    return False


def refuse_other_output(output: Path) -> None:
    """Refuse to write an adapter over anything but an adapter.

    Raises:
        UserError: it is something else, or damaged.
    """
    try:
        ours = not output.exists() or is_native(output)
    except UserError:
        ours = False
    if not ours:
        raise UserError(
            f"{output} is no adapter of this program, or a damaged one, and has to be removed first.",
            ELSEWHERE,
        )


def is_done(config: TrainConfig, force: bool = False) -> bool:
    """Whether the adapter exists already, from the same settings, and no state of a training since.

    Raises:
        UserError: it was made with others, and not ``force``.
    """
    output = config.output
    if not output.is_file() or state_path(output).exists() or not (before := settings_in(output)):
        return False
    settled_before = {key: before[key] for key in settled(config) if key in before}
    now = {**comparable_settings(with_rates(config)), **settled_before}
    if not output.with_suffix(".yaml").is_file():  # an adapter's own settings name no folders
        now = without_folders(now)
    changed = differences(before, now)
    if changed and not force:
        key, (old, new) = next(iter(changed.items()))
        raise UserError(
            f"{output} was made with {key}={old}, now it is {new}.",
            Fix("force", "true", "to keep it"),
            Fix("resume", "false", "to train it anew"),
        )
    with suppress(UserError):  # a damaged one is reported where it is used
        revision = int(read_header(output)[1].get("spectral.revision", "1"))
        return revision == get_method(config.method).revision  # else it would be refused there
    return True


def settings_in(output: Path) -> dict[str, Any]:
    """An adapter's settings, as :func:`.checkpoint.comparable_settings` gives them; empty if unknown.

    Raises:
        UserError: the file beside it is damaged.
    """
    beside = output.with_suffix(".yaml")
    if beside.is_file():
        return comparable_settings(build(TrainConfig, read_yaml(beside), file=str(beside)))
    try:
        settings = json.loads(read_header(output)[1]["spectral.config"])
        return settings if isinstance(settings, dict) else {}
    except (UserError, ValueError, KeyError, RecursionError):
        return {}


def settled(config: TrainConfig) -> set[str]:
    """The settings that a training overrides."""
    names = {"slot_seed"} if config.slot_seed is None else set()
    if config.mixed_precision == "auto":
        names.add("mixed_precision")
    if config.init_from_adapter:
        names |= {"method", "rank", "target_modules", "param_budget", "slot"}
    if config.param_budget or tuple(get_method(config.method).ranks([(64, 64)])) == (1,):
        names.add("rank")
    return names


def name_in(path: Path) -> str:
    """The name of the concept in an adapter's file; empty if it cannot be read."""
    return concept_in(path)[0]


def concept_in(path: Path) -> tuple[str, str]:
    """Name and token of the concept in an adapter's file; empty if it is none."""
    try:
        fields = json.loads(read_header(path)[1]["spectral.concept"])
        return str(fields["name"]), str(fields["token"])
    except (UserError, ValueError, KeyError, TypeError, RecursionError):
        return "", ""


def other_token(concept: Concept, first: Concept) -> Fix:
    """How to give a concept another token: the settings name the first one's, the others' folders their own."""
    if concept is first:
        return Fix("token", "<name>", "to choose another")
    return Fix("joint_concepts", so=f"with another token in {concept.name}'s concept.yaml")


def tokens_in(path: Path) -> dict[str, str]:
    """All tokens in an adapter's file, by their lower case; empty if it is none."""
    try:
        metadata = read_header(path)[1]
        tokens = [json.loads(metadata["spectral.concept"])["token"], *json.loads(metadata["spectral.earlier"])]
        return {str(token).lower(): str(token) for token in tokens}
    except (UserError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def check_token_is_free(output: Path, concept: Concept, first: Concept) -> None:
    """Refuse a token that the adapter of another concept beside the output has, in upper or lower case.

    Raises:
        UserError: one has it; the two could never be used together.
    """
    for path in sorted(output.parent.glob("*.safetensors")):
        token = "" if path == output or path.name.endswith(STATE) else tokens_in(path).get(concept.token.lower())
        if token and (name := name_in(path)) != first.name:
            raise UserError(
                f"{path}, the adapter of '{name}', has the token {token} already, and the two could not be "
                "used together.",
                other_token(concept, first),
            )
