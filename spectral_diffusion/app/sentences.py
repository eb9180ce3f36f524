"""The library's messages in the app's terms: with the labels of its fields, and without absolute paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from ..core.errors import Fix, UserError, reason
from .disk import NotWritable, unwritten

if TYPE_CHECKING:
    from .workspace import Workspace

FIELDS = {  # an option of the library to the label of the field that sets it
    "calibration.prior_weight": "Prior weight of gradient and ssr",
    "distill.steps": "Distillation",
    "guidance_scale": "Guidance",
    "merge": "Merge",
    "method": "Method",
    "num_inference_steps": "Steps",
    "options.form": "Merge options",
    "prompt": "Prompt",
    "rank": "Rank",
    "seed": "Seed",
    "slot": "Slot",
    "steps": "Steps",
}
ANOTHER = {  # settings without a single field
    "config": "choose another preset",
    "name": "choose another name",
    "output": "choose another name",
    "scales": "change the strengths",
    "token": "choose another token",
}
SHOWN = {("distill.steps", "0"): "none"}  # a field's text for a value
QUOTED = re.compile(r"'/[^']*?([^'/]+)/?'")
PATH = re.compile(r"(?<![\w.:/<])/(?:[^\s/'\"]+/)*([^\s/'\"]+)")


def field_of(fix: Fix) -> str:
    """A fix in the app's terms; empty if the app has no field for it."""
    if fix.option in ANOTHER:
        return ANOTHER[fix.option]
    label = FIELDS.get(fix.option)
    if label is None:
        return ""
    value = SHOWN.get((fix.option, fix.value), fix.value)
    return f"set “{label}” to {value}" if value else f"change “{label}”"


def rendered(error: UserError) -> str:
    """An error with the app's fields for its fixes."""
    return error.render(field_of, verb="")


def in_app(text: str, workspace: Workspace) -> str:
    """A sentence with paths shortened to names; files of the workspace keep their relative path."""
    for root in (workspace.root, workspace.root.resolve()):
        text = text.replace(f"{root}{os.sep}", "")
    return PATH.sub(r"\1", QUOTED.sub(r"'\1'", text))


@contextmanager
def errors_in_app(workspace: Workspace, folder: str) -> Iterator[None]:
    """Turn errors of the block into the app's terms; ``folder`` is the part of the workspace that it writes.

    Raises:
        UserError: anything the user can fix, including a full disk.
    """
    try:
        yield
    except NotWritable:  # of another folder, which it names
        raise
    except (UserError, OSError, SafetensorError) as error:
        why, number = _unwritten(error)
        if why:
            raise unwritten(folder, why, number) from error
        if not isinstance(error, UserError):
            raise
        raise UserError(in_app(rendered(error), workspace)) from error


def _unwritten(error: BaseException | None) -> tuple[str, int | None]:
    """Why a file could not be written, and the system's number of that; empty for other errors."""
    if isinstance(error, UserError):
        return _unwritten(error.__cause__) if error.message.startswith("Cannot write") else ("", None)
    if isinstance(error, OSError):
        return error.strerror or reason(error), error.errno
    if error is None or "Error while serializing" not in str(error):
        return "", None
    number = re.search(r"\(os error (\d+)\)", str(error))
    return reason(error).rpartition(": ")[2], int(number[1]) if number else None
