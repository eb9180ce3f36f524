"""The verbs that show and free slots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .support import JsonOption, echo

slots_app = typer.Typer(help="Which columns of the spectrum belong to which concept.", no_args_is_help=True)
FolderArgument = Annotated[Path, typer.Argument(help="The folder of the adapters, or a ledger (.json).")]


def ledgers_in(folder: Path) -> list[Path]:
    """The ledgers of a folder, of columns and of rows, existing or not; a ledger's own path is returned as it is."""
    from ..slots.ledger import LEDGER, ROWS

    return [folder] if folder.suffix == ".json" else [folder / LEDGER, folder / ROWS]


@slots_app.command("list")
def slots_list(folder: FolderArgument = Path(), as_json: JsonOption = False) -> None:
    """Show the ledger of a folder."""
    from ..slots.ledger import ROWS, Ledger

    paths = ledgers_in(folder)
    ledgers = {path: data for path in paths if any((data := Ledger(path).read()).values())}
    if as_json:
        shown = {b: {n: str(s) for n, s in c.items()} for data in ledgers.values() for b, c in data.items()}
        typer.echo(json.dumps(shown, indent=2))
        return
    if not ledgers:
        echo(f"No slots are taken in {paths[0]}.")
    for path, data in ledgers.items():
        for base, concepts in data.items():
            echo(f"base {base[:12]}" + (" (rows of the orthogonal basis)" if path.name == ROWS else ""))
            for name, slot in sorted(concepts.items(), key=lambda item: item[1]):
                echo(f"  {slot}  {name}")


@slots_app.command("release")
def slots_release(
    concept: Annotated[str, typer.Argument(help="The concept whose columns are freed.")],
    folder: FolderArgument = Path(),
) -> None:
    """Free a concept's columns."""
    from ..slots.ledger import Ledger

    paths = ledgers_in(folder)
    holding = [path for path in paths if any(concept in c for c in Ledger(path).read().values())]
    freed = [slot for path in holding or paths[:1] for slot in Ledger(path).release(concept)]
    echo(f"Released {', '.join(map(str, freed))} of '{concept}'.")
