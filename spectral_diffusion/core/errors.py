"""Errors that a person can mend: one clear sentence, shown without a traceback."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fix:
    """What puts an error right: an option, and the value to give it.

    It names a setting or a parameter as Python does. The command line shows the flag instead, the app the field.

    Attributes:
        option: such as ``rank``, ``device`` or ``resume``.
        value: such as ``"8"``; ``"true"`` and ``"false"`` for switches; empty where any other value would do.
        so: what it does, as a clause: ``"to go on with the new settings"``.
    """

    option: str
    value: str = ""
    so: str = ""


class UserError(Exception):
    """Something the caller can put right.

    Args:
        message: one sentence on what is wrong. It names no flag and no field.
        fix: what to do about it; of several, one is enough.
    """

    def __init__(self, message: str, *fix: Fix) -> None:
        super().__init__(message)
        self.message, self.fixes = message, fix

    def __str__(self) -> str:
        return self.render(lambda fix: f"{fix.option}={fix.value or '…'}")

    def render(self, spell: Callable[[Fix], str]) -> str:
        """The message and its fixes, each option spelt as the caller's user knows it."""
        if not self.fixes:
            return self.message
        ways = [f"{spell(fix)} {fix.so}".strip() for fix in self.fixes]
        return f"{self.message} Use {', or '.join(ways)}."


class Cancelled(Exception):
    """The job was asked to stop, and did. What it had made so far is kept. It is no error."""


class NotFiniteError(UserError):
    """Training, distillation or generation met NaN or infinity and stopped; nothing was overwritten."""


def reason(error: BaseException, limit: int = 160) -> str:
    """The first line of an exception, cut to a readable length."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def shown(value: object, limit: int = 80) -> str:
    """A value's ``repr`` for a sentence, cut while it is written: the whole of a large one may take minutes."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict, short.maxset = 3, 6, 6, 6, 6
    short.maxstring = short.maxlong = short.maxother = limit
    try:
        text = short.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = f"this {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'rank'?)`` for a misspelt word, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def only_a_pickle(name: str, error: BaseException) -> str:
    """Why a model of a hub does not load, if that is because it is a pickle there; else an empty string."""
    if not re.search(r"(no file named|not appear to have a file named)\s+\S*safetensors", str(error)):
        return ""
    return (
        f"'{name}' holds no .safetensors weights, and pickles are not opened here; where you trust it save it anew "
        "once (docs/evaluate.md says how) and name that folder instead."
    )
