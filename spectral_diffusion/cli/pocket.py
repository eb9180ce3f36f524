"""The verb of the pocket base."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.errors import UserError, nearest

pocket_app = typer.Typer(help="The pocket base.", no_args_is_help=True)


@pocket_app.callback()
def pocket_group() -> None:
    """The pocket base."""


@pocket_app.command("path")
def pocket_path(
    base: Annotated[str, typer.Argument(help="pocket, or pocket-transformer.")] = "pocket",
) -> None:
    """Print the folder of a pocket base."""
    from .. import pocket

    if not pocket.is_pocket(base):
        raise UserError(f"No pocket base '{base}'{nearest(base, pocket.BASES)}; there are {', '.join(pocket.BASES)}.")
    typer.echo(str(pocket.path(base)))
