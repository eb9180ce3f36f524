"""The verbs that list methods and merges."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..core.errors import UserError
from .support import JsonOption, echo


def methods(
    arch: Annotated[str, typer.Option(help="sd15, sdxl or pocket.")] = "sd15",
    rank: Annotated[list[int] | None, typer.Option(help="Ranks to count; may be repeated.")] = None,
    targets: Annotated[str, typer.Option(help="attention, feed-forward, conv … joined by +.")] = "attention",
    as_json: JsonOption = False,
) -> None:
    """List the methods, their factors on the learning rate, and how many numbers each trains."""
    if any(r < 1 for r in rank or []):
        raise UserError("Rank must be at least 1.")
    from ..methods import all_methods
    from ..models.architectures import RANKS, count_table

    rows = count_table(arch, tuple(rank) if rank else RANKS, targets)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for name, method in sorted(all_methods().items()):
        counts = ", ".join(f"r={row['rank']}: {row['trainable']:,}" for row in rows if row["method"] == name)
        echo(f"{name}: {method.summary}\n  learning rate ×{method.lr_scale:g}; {counts}")


def merges(as_json: JsonOption = False) -> None:
    """List the merges, their papers, and their own settings (options.NAME)."""
    from ..merging.merges import all_merges

    registered = all_merges()
    if as_json:
        rows = [
            {"name": name, "summary": merge.summary, "paper": merge.paper, "options": merge.options.model_json_schema()}
            for name, merge in registered.items()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    for name, merge in registered.items():
        echo(f"{name}: {merge.summary}" + (f" ({merge.paper})" if merge.paper else ""))
        for option, field in merge.options.model_fields.items():
            echo(f"  options.{option}={field.default}  {field.description}")
