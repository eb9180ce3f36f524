"""The command line."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from ..core.errors import Fix, Spell, UserError, python
from .verbs import app

__all__ = ["app", "main", "speller"]

SPELLED = {"adapters": "adapter", "scales": "strength"}  # settings whose flags have a syntax of their own


def main() -> None:
    """Run the command line; what a person can mend is one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before the libraries are imported
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    atexit.register(gc.freeze)  # the interpreter need not search four thousand modules for garbage to end
    try:
        app()
    except UserError as error:
        fail(error)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        fail(UserError(f"Cannot use {error.filename}: {error.strerror}."))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is imported only where it is needed
            raise
        full = UserError(
            "The GPU's memory is full.",
            Fix("batch_size", "1"),
            Fix("resolution", so="for smaller pictures"),
            Fix("dtype", "float16"),
            Fix("device", "cpu"),
        )
        fail(full)
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        sys.exit(130)


def fail(error: UserError) -> None:
    """Print an error with what puts it right, and end."""
    said = error.render(speller(sys.argv[1:])) if error.fixes else error.message
    typer.echo(f"Error: {said}", err=True)
    sys.exit(2)


def speller(words: Sequence[str]) -> Spell:
    """How a command line with these words spells a fix: as a flag where its verb has one, else as key=value."""
    command: Any = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    options = {one.name: one for one in command.params if one.param_type_name == "option"}

    def spell(fix: Fix) -> str:
        option = options.get(SPELLED.get(fix.option, fix.option))
        if option is None:
            return python(fix)
        flag = str(option.opts[0])
        if option.is_flag:
            off = option.secondary_opts
            return flag if fix.value != "false" else str(off[0]) if off else f"no {flag}"
        if fix.option == "scales":
            return f"{flag} NAME={fix.value or '…'}"
        return f"{flag} {fix.value}".strip()

    return spell
