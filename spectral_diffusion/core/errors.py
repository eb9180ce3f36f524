"""Errors that a person can mend: one clear sentence, shown without a traceback."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable


class UserError(Exception):
    """Something the caller can put right. The message is one sentence that says what and how.

    The command line prints it and exits with code 2; the UI shows it in place.
    """


class NotFiniteError(UserError):
    """Training, teaching or drawing met NaN or infinity and stopped; nothing was written over."""


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
