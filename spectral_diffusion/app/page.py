"""Shared by all tabs of the app: the workspace, hand-overs between tabs, errors as messages."""

from __future__ import annotations

import functools
import html
import inspect
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import gradio as gr
from pydantic import TypeAdapter, ValidationError

from ..core.errors import UserError, short_repr
from .workspace import ProgressLine, Workspace, sentence_of

log = logging.getLogger(__name__)

DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}  # one job on the device at a time
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


Handed = tuple[Any, int]  # a value handed to another tab, and the number of the hand-over
NUMBERS = itertools.count(time.time_ns())  # also after the server was started anew no number comes twice


def hand(value: Any) -> Handed:
    """A value for another tab, stamped so that gradio sees a change every time."""
    return value, next(NUMBERS)


@dataclass(frozen=True)
class Page:
    """The page under construction.

    Attributes:
        tabs: with the ids ``concepts``, ``train``, ``fuse``, ``generate``; a button leads to another tab by returning
            ``gr.Tabs(selected="train")``.
        trained: the adapters as the training tab last saw them; it changes when one is new.
        strip: the line at the foot of the page on the running training; ``timer`` ticks during one.
        concept: name of the concept to train, handed from the concepts to the training (:func:`hand`).
        base: the base to generate with (``pocket``, ``fused/<name>``), handed from the fusion to the pictures.
        adapters: names of adapters to generate with, handed from the training to the pictures.
        first: handed from the concepts to the pictures, which then generate the first picture.
        gone: called with the session of a browser or program that has disconnected.
        ready: called once the server is up and everything is imported.
    """

    workspace: Workspace
    blocks: gr.Blocks
    tabs: gr.Tabs
    strip: gr.HTML
    timer: gr.Timer
    trained: gr.State
    concept: gr.State
    base: gr.State
    adapters: gr.State
    first: gr.State
    gone: list[Callable[[str], None]] = field(default_factory=list)
    ready: list[Callable[[], None]] = field(default_factory=list)

    def refreshed(self, tab: gr.Tab, fn: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Call ``fn`` when the page is loaded and whenever the tab is opened."""
        for event in (self.blocks.load, tab.select):
            event(fn, list(inputs), list(outputs), **PRIVATE)


def afterwards(event: Any, fn: Callable[..., Any], inputs: Any, outputs: Any, **more: Any) -> None:
    """Call ``fn`` once an event is over, also after an error, which gradio's ``then`` does not follow."""
    for follows in (event.success, event.failure):
        follows(fn, inputs, outputs, **more)


@contextmanager
def errors_as_toast() -> Iterator[None]:
    """Show any error as one sentence in the page; unexpected ones are also logged with their traceback."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        if not isinstance(error, UserError):
            log.exception("Unexpected error in the app")
        raise gr.Error(
            plain_html(sentence_of(error)), duration=12, title="That did not work", print_exception=False
        ) from error


def asked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """An API endpoint that refuses arguments of wrong types with a sentence."""
    hints = {name: hint for name, hint in get_type_hints(fn).items() if name not in {"request", "return"}}
    kinds = {name: TypeAdapter(hint) for name, hint in hints.items()}

    @functools.wraps(fn)
    def call(*args: Any, **more: Any) -> Any:
        given = inspect.signature(fn).bind(*args, **more)
        with errors_as_toast():
            for name in kinds.keys() & given.arguments.keys():
                value = given.arguments[name]
                try:
                    given.arguments[name] = kinds[name].validate_python(value)
                except ValidationError as error:
                    why = error.errors()[0]["msg"]
                    raise UserError(f"'{name}' cannot be {short_repr(value)}: {why[0].lower()}{why[1:]}.") from error
        return fn(*given.args, **given.kwargs)

    return call


def plain_html(text: str) -> str:
    """Escape a text for the page, which renders messages as HTML, where a bare ``<rex>`` would vanish."""
    return html.escape(text, quote=False)


def teller(progress: gr.Progress) -> ProgressLine:
    """Show the library's progress on gradio's bar."""
    return ProgressLine(lambda done, total, text: progress((done, total), desc=text))
