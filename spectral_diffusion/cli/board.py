"""The verbs of the board, on which anybody's results can be entered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import UserError
from .executors import ClusterOption, ExecutorOption, Executors, ParallelOption, submit_jobs, this_command
from .support import echo, progress_bar

if TYPE_CHECKING:  # they bring torch
    from ..board.contestant import Contestant
    from ..board.measure import Board

board_app = typer.Typer(
    help="A board for several concepts: any trainer's LoRAs, any merger's result, any generator, on the same tasks.",
    no_args_is_help=True,
)
SuiteOption = Annotated[str, typer.Option(help="The tasks: pocket, another of configs/board, or a YAML file.")]
FolderOption = Annotated[Path, typer.Option("-o", "--output", help="Folder of the page and the results.")]


@board_app.command("run")
def board_run(
    entry: Annotated[list[Path], typer.Option(help="An entry's file (repeatable).")],
    suite: SuiteOption = "pocket",
    n: Annotated[str, typer.Option("--n", help="Numbers of concepts, such as 2,4,8; default: the suite's.")] = "",
    output: FolderOption = Path("board"),
    work: Annotated[Path | None, typer.Option(help="Where adapters and figures are cached.")] = None,
    base: Annotated[str | None, typer.Option(help="The base, where the suite's own is elsewhere.")] = None,
    concepts: Annotated[Path | None, typer.Option(help="The folder with the concepts' folders of photos.")] = None,
    hours: Annotated[float, typer.Option(help="The time limit; run it again to continue.")] = 12.0,
    run_commands: Annotated[
        bool, typer.Option("--run-commands", help="Let entries run the program that they name. Read it first.")
    ] = False,
    executor: ExecutorOption = None,
    jobs: ParallelOption = None,
    cluster: ClusterOption = None,
) -> None:
    """Measure entries and write their results and the page."""
    from ..board.contestant import Contestant
    from ..board.entry import read_entry
    from ..board.measure import Board
    from ..board.page import check_page, tasks_key, write_page
    from ..board.suite import read_suite
    from ..studies.runner import StudyRunner

    check_page(output)
    tasks = read_suite(suite, base=base, folder=concepts, counts=_counts(n))
    entries = [read_entry(path) for path in entry]
    if twice := {e.slug for e in entries if [o.slug for o in entries].count(e.slug) > 1}:
        raise UserError(f"Two entries are called {twice.pop()}; give one of them another name.")
    if executor:
        each = dict(zip((one.slug for one in entries), entry, strict=True))
        submit_entries(each, output, executor, cluster, jobs)
        return
    failed: list[UserError] = []
    with progress_bar() as progress:
        lab = StudyRunner(
            tasks.base, settings={"train": tasks.train, "generate": tasks.generate}, encoder_name=tasks.encoder,
            progress=progress, note=echo, most=hours * 3600, concepts=tasks.photos, nouns=tasks.nouns,
            loading=tasks.loading,
        )  # fmt: skip
        if work is not None:
            lab.folder = work
        opened = [Contestant(one, tasks, lab, run_commands) for one in entries]
        board = Board(tasks, lab)
        for contestant in opened:
            try:
                _measure(board, contestant, output)
            except UserError as error:  # the other entries can still be measured
                echo(f"{contestant.entry.name}: {error}")
                failed.append(error)
    if len(failed) < len(entries) or list((output / "results").glob("*.json")):
        echo(f"Wrote {write_page(output, tasks, tasks_key(tasks, board.given))}.")
    if failed:
        raise UserError(f"{len(failed)} of {len(entries)} entries could not be measured to their end, as said above.")


def _measure(board: Board, contestant: Contestant, output: Path) -> None:
    """Measure an entry for every number of concepts that time allows, and say what was found.

    Raises:
        UserError: it cannot be measured; larger numbers are not tried.
    """
    from ..board.run import measure_to_file
    from ..studies.runner import TimeOver

    counts = board.suite.counts
    for count in [c for c in counts if c in (contestant.entry.counts or counts)]:
        name = f"{contestant.entry.name}, {count} concepts"
        try:
            result = measure_to_file(board, contestant, count, output)
        except TimeOver:
            echo(f"{name}: the time is over; run it again to go on here.")
            continue
        row = result.row
        echo(
            f"{name}: identity {row['identity']}, kept {row['kept']}, drift {row['drift of others']:.3f}, "
            f"collapse {row['collapse rate']} ({result.file})"
        )
        if result.dropped:
            numbers = ", ".join(map(str, result.dropped))
            echo(f"Note: earlier figures for {numbers} concepts were of other tasks, files or another entry.")


def submit_entries(
    entries: dict[str, Path], output: Path, executor: Executors, cluster: list[str] | None, jobs: int | None
) -> None:
    """Submit a job for every entry's file, by its name."""
    from ..batch.job import Job

    common = this_command(["--entry"])
    each = [Job(name=slug, arguments=(*common, "--entry", str(path))) for slug, path in entries.items()]
    submit_jobs(output, each, executor, cluster, jobs)


@board_app.command("page")
def board_page(suite: SuiteOption = "pocket", output: FolderOption = Path("board")) -> None:
    """Write the page again from the results that are there, also from others' files."""
    from ..board.page import write_page
    from ..board.suite import read_suite

    echo(f"Wrote {write_page(output, read_suite(suite, with_photos=False))}.")


def _counts(text: str) -> list[int] | None:
    """The numbers of an option; None for the suite's.

    Raises:
        UserError: something is no number.
    """
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise UserError(f"--n takes numbers such as 2,4,8, not '{text}'.") from error
