"""The GPU between two works of the app: trainings, in processes of their own, need what nobody here uses."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def giving_back() -> Iterator[None]:
    """Give a GPU's memory back that torch keeps ready after the work inside is done or has failed."""
    try:
        yield
    except BaseException as failed:
        error: BaseException | None = failed
        while error is not None:  # what failed holds networks in the variables of its functions
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        raise
    finally:
        torch = sys.modules.get("torch")  # never imported for this
        if torch is not None and torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
