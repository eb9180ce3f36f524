"""Release the GPU between jobs of the app, since trainings in other processes need its memory."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def giving_back() -> Iterator[None]:
    """Release torch's cached GPU memory after the block has finished or failed."""
    try:
        yield
    except BaseException as failed:
        error: BaseException | None = failed
        while error is not None:  # the failed frames' variables still reference networks
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        raise
    finally:
        torch = sys.modules.get("torch")  # never imported for this
        if torch is not None and torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
