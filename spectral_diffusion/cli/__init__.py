"""The command line."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from ..core.errors import Fix, Spell, UserError, python
from .verbs import app

__all__ = ["app", "main", "speller"]

# Settings whose flags, or the parameters behind them, have another name.
SPELLED = {"adapters": "adapter", "format": "kind", "scales": "strength"}


def main() -> None:
    """Run the command line; an error that the user can fix is one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before the libraries are imported
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Normalization weights stay float32 under autocast; torch says once that this is slower.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
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
    """Print an error with its fixes and exit."""
    message = error.render(speller(sys.argv[1:])) if error.fixes else error.message
    typer.echo(f"Error: {message}", err=True)
    sys.exit(2)


def speller(arguments: Sequence[str]) -> Spell:
    """How to spell a fix on this command line: as a flag where its verb has one, else as key=value."""
    command: Any = typer.main.get_command(app)
    for argument in arguments:
        command = (command.get_command(None, argument) if hasattr(command, "get_command") else None) or command
    options = {option.name: option for option in command.params if option.param_type_name == "option"}

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
