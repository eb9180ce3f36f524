"""The verb that opens the app."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UserError

PASSWORD = "SPECTRAL_DIFFUSION_PASSWORD"  # an alternative to --password that shell histories do not record


def ui(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on.")] = 7860,
    workspace: Annotated[Path, typer.Option(help="Folder for concepts, adapters and pictures.")] = Path("workspace"),
    host: Annotated[
        str, typer.Option(help="Address to serve on; any other than this machine needs a password.")
    ] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="A public link through gradio; needs a password.")] = False,
    password: Annotated[str | None, typer.Option(envvar=PASSWORD, help="Required to open the app.")] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve the app, by default to this machine only."""
    try:
        from ..app.server import build_app, is_local, launch
    except ImportError as error:
        raise UserError("The app needs gradio: pip install 'spectral-diffusion[ui]'.") from error
    if (share or not is_local(host)) and not password and sys.stdin.isatty():
        password = typer.prompt("A password for whoever opens the app", hide_input=True, confirmation_prompt=True)
    if workspace.exists() and not workspace.is_dir():
        raise UserError(f"The workspace {workspace} is not a folder; choose another with --workspace.")
    launch(build_app(workspace), port, host, share, password, inbrowser=open_browser)
