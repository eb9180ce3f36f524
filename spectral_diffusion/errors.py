"""Errors that a person can mend: one clear sentence, shown without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the caller can put right. The message is one sentence that says what and how.

    The command line prints it and exits with code 2; the UI shows it in place.
    """


class NotFiniteError(UserError):
    """Training met NaN or infinity and stopped; the last good state is kept."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'rank'?)`` for a misspelt word, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
