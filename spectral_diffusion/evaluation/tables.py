"""Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; numbers to the right."""
    if not rows:
        return "(nothing measured)"
    columns = list(rows[0])
    numeric = [all(isinstance(row[c], int | float) or row[c] is None for row in rows) for c in columns]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---:" if n else "---" for n in numeric) + " |"]
    lines += ["| " + " | ".join(cell_text(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell_text(value: Any) -> str:
    """A cell: a dash for nothing, three digits after the point."""
    if value is None:
        return "—"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
