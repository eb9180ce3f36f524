"""The verb that regenerates the paper's studies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import UserError
from ..core.hooks import Event, brief_duration
from ..core.paths import without_folders
from .executors import ClusterOption, ExecutorOption, Executors, ParallelOption, submit_jobs, this_command
from .support import echo, progress_bar

if TYPE_CHECKING:  # they bring torch
    from ..studies.registry import Study
    from ..studies.runner import StudyRunner


def experiment(
    name: Annotated[str | None, typer.Argument(help="A study, or all; by default they are listed.")] = None,
    base: Annotated[str, typer.Option(help="pocket, pocket-transformer, or a base of your own.")] = "pocket",
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test of some seconds.")] = False,
    hours: Annotated[float, typer.Option(help="The time limit of a study; run it again to continue.")] = 6.0,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the page.")] = Path("evidence"),
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with settings of the studies, which go over the base's own.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where adapters and figures are cached; default: the cache folder.")
    ] = None,
    from_record: Annotated[
        bool, typer.Option("--from-record", help="Reuse the records beside the pages, and measure the rest.")
    ] = False,
    repeat: Annotated[
        int, typer.Option(min=0, help="How many recorded cells to measure again on this machine; prints the spread.")
    ] = 0,
    encoder: Annotated[str, typer.Option(help="pocket, or a CLIP or DINOv2 model here, for identity.")] = "pocket",
    executor: ExecutorOption = None,
    jobs: ParallelOption = None,
    cluster: ClusterOption = None,
) -> None:
    """Regenerate a study of the paper: its table, its verdict, its pictures."""
    from ..studies.report import read_records, write_findings
    from ..studies.runner import study_settings

    if name is None and not repeat:
        _list()
        return
    if hours <= 0:
        raise UserError("--hours must be more than 0.")
    if repeat and executor:
        raise UserError("--repeat measures on this machine; leave out --executor.")
    if repeat:
        _repeat(repeat, base, recipe, encoder, output, work, hours)
        return
    assert name is not None
    studies = _chosen(name, output, quick)
    settings = study_settings(recipe, quick, base)
    if executor:
        _submit(name, [study.name for study in studies], output, executor, cluster, jobs)
        return
    failed: list[str] = []
    for study in studies:
        expected = brief_duration(60 * study.minutes[1 if quick else 0])
        echo(f"{study.name}: about {expected} with nothing cached, {hours:g} h at most; parts are cached.")
        how = _command(study.name, base, recipe, encoder, quick)
        try:
            with progress_bar() as progress:
                lab = _runner(base, settings, recipe, encoder, work, hours, progress)
                lab.known = read_records(output) if from_record else {}
                page = write_findings(study, study.run(lab, quick), lab, output, quick, how)
            echo(f"Wrote {page}.")
        except UserError as error:  # the other studies can still be measured
            if len(studies) == 1:
                raise
            echo(f"{study.name}: {error}")
            failed.append(study.name)
    if failed:
        raise UserError(f"{len(failed)} of {len(studies)} studies ended early: {', '.join(failed)}, as said above.")


def _chosen(name: str, output: Path, quick: bool) -> list[Study]:
    """The studies that are measured, none of which would replace a page that a person wrote."""
    from ..studies.registry import all_studies, get_study
    from ..studies.report import check_page

    studies = list(all_studies().values()) if name == "all" else [get_study(name)]
    for study in studies:
        check_page(study, output, quick)
    return studies


def _list() -> None:
    """Print every study with what it takes."""
    from ..studies.registry import all_studies

    for study in all_studies().values():
        expected = brief_duration(60 * study.minutes[0])
        echo(f"{study.name} ({study.paper}), about {expected} on two CPU cores: {study.claim}")


def _runner(
    base: str, settings: dict[str, Any], recipe: Path | None, encoder: str, work: Path | None, hours: float,
    progress: Callable[[Event], None],
) -> StudyRunner:  # fmt: skip
    """What a study measures with, from the command line's options."""
    from ..studies.runner import StudyRunner

    lab = StudyRunner(
        base, settings=settings, encoder_name=encoder, progress=progress, note=echo, most=hours * 3600, recipe=recipe
    )
    if work is not None:
        lab.folder = work
    return lab


def _command(study: str, base: str, recipe: Path | None, encoder: str, quick: bool) -> str:
    """The command that makes a page, without the folders of this machine."""
    words = ["spectral-diffusion", "experiment", study, "--base", str(without_folders(base))]
    words += ["--recipe", recipe.name] if recipe else []
    words += ["--encoder", str(without_folders(encoder))] if encoder != "pocket" else []
    return " ".join([*words, *(["--quick"] if quick else [])])


def _submit(
    name: str, studies: list[str], output: Path, executor: Executors, cluster: list[str] | None, jobs: int | None
) -> None:
    """Submit a job for every study; ``name`` is what the command line names."""
    from ..batch.job import Job

    verb, *rest = this_command()
    rest.remove(name)
    submit_jobs(output, [Job(name=one, arguments=(verb, one, *rest)) for one in studies], executor, cluster, jobs)


def _repeat(
    count: int, base: str, recipe: Path | None, encoder: str, output: Path, work: Path | None, hours: float
) -> None:
    """Measure some recorded cells again."""
    from ..studies.repeat import repeat
    from ..studies.runner import study_settings

    with progress_bar() as progress:
        lab = _runner(base, study_settings(recipe, base=base), recipe, encoder, work, hours, progress)
        page = repeat(output, lab, count)
    echo(f"Wrote {page}.")
