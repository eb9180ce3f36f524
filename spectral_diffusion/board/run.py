"""Measure an entry for a number of concepts and file the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..studies.runner import cell_key
from .contestant import Contestant
from .measure import Board, row_of
from .page import earlier_counts, key_of, result_file, tasks_key, write_result


@dataclass(frozen=True)
class FiledResult:
    """A result that was written.

    Attributes:
        row: its figures as the page shows them.
        file: where it was written.
        dropped: the numbers of concepts whose earlier figures in it were of other tasks, files or another entry.
    """

    row: dict[str, Any]
    file: Path
    dropped: list[int]


def measure_to_file(board: Board, contestant: Contestant, count: int, folder: Path) -> FiledResult:
    """Measure an entry for ``count`` concepts, or read what was measured, and write it into the folder of the board.

    Raises:
        TimeOver: the time limit is reached.
        UserError: the entry cannot be measured.
    """
    suite, entry = board.suite, contestant.entry
    earlier_counts(result_file(folder, entry, suite), entry)  # refuses another entry's file before hours of work
    figures = board.measure(contestant, count)
    sheet = board.sheet_of(contestant, suite.concepts[:count])
    found = {"key": key_of(entry, suite, board.given), "tasks": tasks_key(suite, board.given), "figures": figures}

    def files(count: int) -> str:
        return cell_key(contestant.depends_on(suite.concepts[:count]))

    path, dropped = write_result(folder, entry, suite, count, found, sheet, files)
    return FiledResult(row_of(figures), path, dropped)
