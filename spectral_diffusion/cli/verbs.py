"""The verbs of the command line. Each is imported when it is called, and heavy imports happen inside it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from .options import nested_help

# A verb: its module here, its function or group there, and the settings whose nested ones its help lists.
VERBS: dict[str, tuple[str, str] | tuple[str, str, str]] = {
    "train": ("training", "train", "config.train:TrainConfig"),
    "fuse": ("fusion", "fuse", "config.fuse:FuseConfig"),
    "tune": ("fusion", "tune", "config.fuse:FuseConfig"),
    "unfuse": ("fusion", "unfuse"),
    "generate": ("generation", "generate"),
    "evaluate": ("evaluation", "evaluate"),
    "export": ("files", "export"),
    "import": ("files", "import_file"),
    "push": ("files", "push"),
    "inspect": ("files", "inspect"),
    "methods": ("listings", "methods"),
    "merges": ("listings", "merges"),
    "board": ("board", "board_app"),
    "batch": ("batch", "batch_app"),
    "slots": ("slots", "slots_app"),
    "extract": ("extract", "extract_app"),
    "train-control": ("train_control", "train_control", "config.control:ControlConfig"),
    "experiment": ("experiments", "experiment"),
    "pocket": ("pocket", "pocket_app"),
    "demo": ("demo", "demo"),
    "ui": ("ui", "ui"),
    "doctor": ("doctor", "doctor"),
}
STYLE: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}


def verbs() -> None:
    """Nothing happens before a verb."""


class LazyVerbs(TyperGroup):
    """The verbs by their names; one is imported when somebody asks for it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: dict[str, Any] = dict.fromkeys(VERBS)  # typer suggests from these names

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in VERBS and self.commands[cmd_name] is None:
            self.commands[cmd_name] = command_of(cmd_name)
        return self.commands.get(cmd_name)


def command_of(verb: str) -> Any:
    """The command of a verb, with its flags."""
    place, attribute, *settings = VERBS[verb]
    found = getattr(import_module(f".{place}", __package__), attribute)
    alone = typer.Typer(**STYLE)
    alone.callback()(verbs)  # a group, also of one verb
    if isinstance(found, typer.Typer):
        alone.add_typer(found, name=verb)
    elif settings:
        module, model = settings[0].split(":")
        epilog = nested_help(getattr(import_module(f"..{module}", __package__), model))
        alone.command(verb, epilog=epilog)(found)
    else:
        alone.command(verb)(found)
    return typer.main.get_group(alone).commands[verb]


app = typer.Typer(name="spectral-diffusion", cls=LazyVerbs, no_args_is_help=True, **STYLE)
app.callback(help="Several of your own things together in one picture, each still itself.")(verbs)
