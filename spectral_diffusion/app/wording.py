"""What the library says, in the words of the app: without paths of the machine and options of a command line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from ..core.errors import UserError, reason
from .workspace import Workspace

SAID = {  # what the library says of the command line, and what a person does in the app
    "; choose another output with -o": "; choose another name",
    "--strength names": "A strength names",
    "sum of the scales, which is not positive; give one concept a scale above 0": (
        "sum of the strengths, which is not positive; set one of them above 0"
    ),
    "use --form sum": "choose the form sum under More settings",
    "with another name=": "under another name",
    "with another token=": "with another token",
    "with token=<name>": "token",
    "; rename it, or choose another output with -o": "; rename it",
    "; draw with dtype=bfloat16 or float32": "; its base needs more precision than half of it",
    "set calibration.calibrate_on=previous_stages, ": "",
    "set gradient_checkpointing=true, a smaller batch or resolution, dtype=bfloat16, or take": "choose",
    " (choose how near with --rank)": "",
    "Fuse without distill.steps.": "Choose no under Teach it afterwards.",
    ": lower distill.learning_rate.": "; choose fewer steps of teaching, or none.",
    "distill.target_modules: ": "",
    ": set distill.gradient_checkpointing=true and a smaller distill.batch_size with more "
    "distill.gradient_accumulation_steps, or no distill.target_modules": "; choose no under Teach it afterwards",
    "; put them back, go on with these by --resume --force, or start anew by --force without --resume": (
        "; remove it and train it anew"
    ),
}
# Any other clause or sentence about an option, up to its full stop.
OPTION = re.compile(r"(?:\s*[;:(]|\.\s)(?:(?!\.\s)[^;:(])*(?<![\w-])--?[a-z].*?(?=\.(?:\s|$)|$)")
QUOTED = re.compile(r"'/[^']*?([^'/]+)/?'")
PATH = re.compile(r"(?<![\w.:/<])/(?:[^\s/'\"]+/)*([^\s/'\"]+)")


def in_app(text: str, workspace: Workspace) -> str:
    """A sentence of the library as the app says it; files of the workspace are named as they lie in it."""
    for root in (workspace.root, workspace.root.resolve()):
        text = text.replace(f"{root}{os.sep}", "")
    text = PATH.sub(r"\1", QUOTED.sub(r"'\1'", text))
    for said, wanted in SAID.items():
        text = text.replace(said, wanted)
    return OPTION.sub("", text)


@contextmanager
def reworded(workspace: Workspace, folder: str) -> Iterator[None]:
    """Tell in the app's words what goes wrong inside; ``folder`` is the part of the workspace that is written to.

    Raises:
        UserError: anything the person can mend, a full disk too.
    """
    try:
        yield
    except (UserError, OSError, SafetensorError) as error:
        if why := _unwritten(error):
            raise UserError(
                f"Cannot write to the workspace's folder {folder}: {why}; free some space there."
            ) from error
        if not isinstance(error, UserError):
            raise
        raise UserError(in_app(str(error), workspace)) from error


def _unwritten(error: BaseException | None) -> str:
    """Why a file could not be written; empty if that is not what went wrong."""
    if isinstance(error, UserError):
        return _unwritten(error.__cause__) if str(error).startswith("Cannot write") else ""
    if isinstance(error, OSError):
        return error.strerror or reason(error)
    return reason(error).rpartition(": ")[2] if error and "Error while serializing" in str(error) else ""
