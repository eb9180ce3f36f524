"""The documentation: it builds without a warning, its links lead somewhere, its commands and Python are real."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

import spectral_diffusion as sd
from spectral_diffusion.cli import app
from spectral_diffusion.cli.verbs import VERBS
from spectral_diffusion.config.control import ControlConfig
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.train import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETTINGS: dict[str, type[BaseModel]] = {
    "train": TrainConfig, "fuse": FuseConfig, "tune": FuseConfig, "generate": Scene, "train-control": ControlConfig,
}  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """The code blocks of a page: language and text."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    yield from BLOCK.findall(text)
    yield from (("sh", line) for line in re.findall(r"^    (spectral-diffusion .*)", text, re.MULTILINE))


def commands(path: Path) -> list[str]:
    """The commands of this program on a page; those that leave something out (…) are examples of a pattern."""
    found = []
    for language, text in blocks(path):
        if language in ("", "sh", "bash", "console"):
            found += [line.strip() for line in text.splitlines() if re.match(r"\s*(\$ )?spectral-diffusion ", line)]
    verbs = "|".join(VERBS)
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    inline = [re.sub(r"\s+", " ", words) for words in re.findall(r"`([^`]+)`", text)]
    found += [f"spectral-diffusion {words}" for words in inline if re.match(rf"({verbs}) .* -o ", words)]
    return [command.removeprefix("$ ").partition(" | ")[0] for command in found if "…" not in command]


def known_setting(model: type[BaseModel], key: str) -> bool:
    """Whether ``key`` (with dots) is a setting."""
    name, dot, rest = key.partition(".")
    field = model.model_fields.get(name)
    if field is None or not dot:
        return field is not None
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return any(known_setting(kind, rest) for kind in inner) or any(typing.get_origin(k) is dict for k in kinds)


def parse(words: list[str]) -> None:
    """Read a command as the program does, and its key=value settings.

    Raises:
        typer's usage errors; ValueError: an unknown verb or setting.
    """
    command: Any = typer.main.get_command(app)
    name = words[0]
    while hasattr(command, "get_command") and words:
        verb = command.get_command(None, words[0])
        if verb is None:
            raise ValueError(f"no verb {words[0]}")
        command, words = verb, words[1:]
    context = command.make_context(name, list(words))
    for parameter in command.params:
        value = context.params.get(parameter.name) if parameter.param_type_name == "argument" else None
        for word in value if isinstance(value, list | tuple) else ():
            match = re.match(r"([a-z_][a-z_0-9.]*)=", str(word))
            if match and name in SETTINGS and not known_setting(SETTINGS[name], match[1]):
                raise ValueError(f"no setting {match[1]} of {name}")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_are_understood(path: Path) -> None:
    for command in commands(path):
        try:
            parse(shlex.split(command, comments=True)[1:])
        except Exception as error:
            pytest.fail(f"{command}: {error}")


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(ValueError, match="no verb"):
        parse(["trian", "photos"])
    with pytest.raises(Exception, match=r"No such option"):
        parse(["train", "photos", "-o", "a.safetensors", "--stepz", "3"])
    with pytest.raises(ValueError, match="no setting"):
        parse(["train", "photos", "-o", "a.safetensors", "prior.lossweight=3"])
    assert sum(len(commands(path)) for path in PAGES) > 60


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_on_pages_names_what_there_is(path: Path) -> None:
    for language, text in blocks(path):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sd":
                assert hasattr(sd, node.attr), f"sd.{node.attr}"


def test_scenes_on_pages_are_scenes() -> None:
    found = 0
    for path in PAGES:
        for language, text in blocks(path):
            if language == "yaml" and "regions:" in text:
                Scene.model_validate(yaml.safe_load(text))
                found += 1
    assert found >= 2


def test_presets_on_pages_are_there() -> None:
    presets = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    named = re.compile(r"--config ([\w-]+)(?![\w./-])")
    for path in PAGES:
        for name in named.findall(path.read_text(encoding="utf-8")):
            assert name in presets or name == "FILE", f"{path.name}: {name}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: every page, link and anchor is there, and every docstring is read."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    assert 'id="spectral_diffusion.api.train"' in reference
    help_page = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    assert "--learning-rate" in help_page and "slots release" in help_page
    home = str(ROOT)
    assert not any(home in page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html"))
