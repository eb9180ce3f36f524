"""The verb of the pocket base."""

from __future__ import annotations

import typer

pocket_app = typer.Typer(help="The pocket base.", no_args_is_help=True)


@pocket_app.callback()
def pocket_group() -> None:
    """The pocket base."""


@pocket_app.command("path")
def pocket_path() -> None:
    """Print the folder of the pocket base."""
    from .. import pocket

    typer.echo(str(pocket.path()))
