"""Errors that a user can fix: one clear sentence, shown without a traceback."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fix:
    """A fix of an error: an option, and the value to set.

    It names a setting or a parameter as Python does. The command line shows the flag instead, the app the field.

    Attributes:
        option: such as ``rank``, ``device`` or ``resume``.
        value: such as ``"8"``; ``"true"`` and ``"false"`` for switches; empty where any other value would do.
        so: what it does, as a clause: ``"to go on with the new settings"``.
        also: another one that has to go with it.
    """

    option: str
    value: str = ""
    so: str = ""
    also: Fix | None = None


ELSEWHERE = Fix("output", so="to write elsewhere")
Spell = Callable[[Fix], str]
USE = "Use"  # what the sentence of the fixes begins with, and nothing else


def python(fix: Fix) -> str:
    """A fix as Python and ``key=value`` spell it."""
    return f"{fix.option}={fix.value or '…'}"


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
        return self.render(python)

    def render(self, spell: Spell, verb: str = USE) -> str:
        """The message and what :meth:`remedy` says."""
        return f"{self.message} {self.remedy(spell, verb)}".strip()

    def remedy(self, spell: Spell, verb: str = USE) -> str:
        """One sentence of the fixes, each option spelled as the caller's user knows it; empty where there are none.

        Args:
            spell: a fix in such words; empty for one that this user has no means for, which is left out.
            verb: what the sentence begins with; empty where every spelling has one of its own.
        """
        spellings = [spelling for fix in self.fixes if (spelling := _spelled(fix, spell))]
        if not spellings:
            return ""
        text = f"{verb} {', or '.join(dict.fromkeys(spellings))}.".strip()
        return text[0].upper() + text[1:]


def _spelled(fix: Fix, spell: Spell) -> str:
    """A fix with what goes with it, and what it does; empty if one part has no spelling."""
    parts = [spell(part) for part in (fix, fix.also) if part]
    return f"{' and '.join(parts)} {fix.so}".strip() if all(parts) else ""


class Cancelled(Exception):
    """The job was asked to stop, and did. What it had made so far is kept. It is no error."""


class NotFiniteError(UserError):
    """Training, distillation or generation met NaN or infinity and stopped; nothing was overwritten."""


def reason(error: BaseException, limit: int = 160) -> str:
    """The first line of an exception, cut to a readable length."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def short_repr(value: object, limit: int = 80) -> str:
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
