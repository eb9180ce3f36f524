"""The command line."""

from __future__ import annotations

import atexit
import gc
import os
import sys

import typer

from ..core.errors import UserError
from .verbs import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; what a person can mend is one sentence and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before the libraries are imported
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    atexit.register(gc.freeze)  # the interpreter need not search four thousand modules for garbage to end
    try:
        app()
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        typer.echo(f"Error: Cannot use {error.filename}: {error.strerror}.", err=True)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is imported only where it is needed
            raise
        typer.echo(
            "Error: The GPU's memory is full; take a smaller batch_size= or size, dtype=float16, or --device cpu.",
            err=True,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        sys.exit(130)
