"""The registry of studies, each of which regenerates a figure or table of the paper."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..core.registry import Registry
from .runner import StudyRunner

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table: a title and rows with the same columns."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Findings:
    """A study's results: tables, a verdict that follows from them, pictures by name, what is missing, remarks."""

    tables: Sequence[Table]
    verdict: str
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    missing: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        paper: the figure or table of the paper that it regenerates.
        claim: the paper's claim in a sentence.
        minutes: about how long it takes on two CPU cores with nothing cached, whole and quick.
        run: ``(lab, quick)`` to findings.
    """

    name: str
    paper: str
    claim: str
    minutes: tuple[float, float]
    run: Callable[[StudyRunner, bool], Findings]


STUDIES: Registry[Study] = Registry("study", __package__, {"registry", "runner", "report", "charts", "repeat"})


def study(
    name: str, paper: str, claim: str, minutes: tuple[float, float]
) -> Callable[[Callable[[StudyRunner, bool], Findings]], Callable[[StudyRunner, bool], Findings]]:
    """Register a study's ``run`` under a name."""

    def decorate(function: Callable[[StudyRunner, bool], Findings]) -> Callable[[StudyRunner, bool], Findings]:
        STUDIES.add(name, Study(name, paper, claim, minutes, function))
        return function

    return decorate


def all_studies() -> dict[str, Study]:
    """Every study by name."""
    return STUDIES.all()


def get_study(name: str) -> Study:
    """The study of that name.

    Raises:
        UserError: there is none.
    """
    return STUDIES.get(name)


def not_allowed(late: Mapping[str, Collection[str]], whole: int) -> list[str]:
    """What the time limit left out, by group; "all" where every one of the ``whole`` parts is missing."""
    return [f"{which}: {'all' if len(parts) == whole else ', '.join(parts)}" for which, parts in late.items()]
