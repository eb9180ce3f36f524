"""The registry of studies: what of the paper each one regenerates, and how."""

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
    """Rows of one table under a sentence that says what they are; every row has the same columns."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Findings:
    """What a study found: tables, a verdict in words that follow from them, pictures by name, what is still missing."""

    tables: Sequence[Table]
    verdict: str
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    missing: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        paper: the figure or table of the paper that it regenerates.
        claim: what the paper says, in a sentence.
        minutes: about how long it takes on two CPU cores with nothing kept, whole and quick.
        run: ``(lab, quick)`` to what was found.
    """

    name: str
    paper: str
    claim: str
    minutes: tuple[float, float]
    run: Callable[[StudyRunner, bool], Findings]


STUDIES: Registry[Study] = Registry("study", __package__, {"registry", "runner", "report", "charts"})


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
    """What time did not allow, by what it is a part of; where that is all of the ``whole`` parts, it is said so."""
    return [f"{which}: {'all' if len(parts) == whole else ', '.join(parts)}" for which, parts in late.items()]
