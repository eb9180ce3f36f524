"""The strict base of all settings, and how they are read: YAML files, ``key=value`` words, and their defaults.

A misspelt key is an error that names the nearest known key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from ..core.errors import UserError, nearest, reason, short_repr
from ..core.files import read_text
from ..core.paths import without_folders


def _single_placeholder(texts: list[str]) -> list[str]:
    if any(text.count("{}") != 1 for text in texts):
        raise ValueError("every one needs {} exactly once, where the concept goes")
    return texts


Precision = Literal["auto", "no", "bf16", "fp16"]
Quantization = Literal["none", "int8", "fp8", "nf4"]
Templates = Annotated[
    list[str], Field(min_length=1), AfterValidator(_single_placeholder)
]  # texts with a place for a concept


class Settings(BaseModel):
    """Strict base of all settings."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("true and false are none of its values (as words they go into quotes)")
        return value


Model = TypeVar("Model", bound=Settings)
YAML_BYTES = 1_000_000  # of a file of settings, which has some thousands


def _as_in_yaml_1_2(tag: str, pattern: re.Pattern[str]) -> re.Pattern[str]:
    """What YAML 1.1 takes for a number, but none of base 60; for a boolean, but true and false only."""
    if tag.endswith(":bool"):
        return re.compile(r"true|True|TRUE|false|False|FALSE")
    number = tag.endswith((":int", ":float"))
    return re.compile(rf"(?![-+]?[0-9][0-9_]*:){pattern.pattern}", re.X) if number else pattern


# What PyYAML raises for text that it cannot read: its constructors, of dates and numbers, nearly anything.
UNREAD = (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError, IndexError)


class Loader(yaml.SafeLoader):
    """Safe YAML in which ``16:24``, ``no`` and ``on`` are texts, as in YAML 1.2.

    Aliases are refused: a few hundred bytes of them expand to a value of billions of parts.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise Alias(None, None, f"the alias *{event.anchor}", event.start_mark)
        return super().compose_node(parent, index)


class Alias(yaml.composer.ComposerError):
    """An alias of an earlier value."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, _as_in_yaml_1_2(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping.

    Raises:
        UserError: missing, not YAML, or not a mapping.
    """
    try:
        data = yaml.load(read_text(Path(path), max_bytes=YAML_BYTES), Loader)
    except FileNotFoundError as error:
        raise UserError(f"No such file: {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {getattr(error, 'strerror', None) or reason(error)}.") from error
    except Alias as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} uses {error.problem}{where}; write the value itself there.") from error
    except UNREAD as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f" at line {line + 1}" if line is not None else ""
        raise UserError(f"{path} is not valid YAML{where}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{path} must hold key: value lines.")
    return data


WHOLE = ("scales.",)  # what follows is one name, such as rex.unet


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """``["steps=10", "scales.rex=0.8"]`` to a mapping; values are read as YAML scalars.

    Raises:
        UserError: a word without ``=``.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError(f"'{pair}' is not understood; overrides are written key=value.")
        try:
            value = yaml.load(text, Loader) if text else ""
        except UNREAD:
            value = text
        target = out
        *path, last = key.split(".") if not key.startswith(WHOLE) else key.split(".", 1)
        for part in path:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise UserError(f"'{pair}' sets a part of something that was set whole before.")
        target[last] = value
    return out


def build(model: type[Model], *layers: dict[str, Any], file: str = "", prefix: str = "") -> Model:
    """Merge layers (later ones win) and validate them. The first layer was read from ``file``, if named.

    Args:
        prefix: put before a setting's name in errors.

    Raises:
        UserError: one sentence about the first thing wrong, with the nearest known key for a misspelt one.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                value = merged[key] | value
            merged[key] = value
    try:
        return model(**merged)
    except ValidationError as error:
        first = error.errors()[0]["loc"][:1]
        later = any(first[0] in layer for layer in layers[1:]) if first else any(layers[1:])
        from_file = file and not later and (not first or first[0] in layers[0])
        raise UserError(_sentence(model, error, f" in {file}" if from_file else "", prefix)) from error


def _sentence(model: type[Settings], error: ValidationError, where: str, prefix: str) -> str:
    first = error.errors()[0]
    name = ".".join(str(part)[:80] for part in first["loc"])
    key = prefix + name
    if first["type"] == "extra_forbidden":
        return f"Unknown setting '{key}'{where}{nearest(name, model.model_fields)}."
    if first["type"] == "missing":
        return f"The setting '{key}' is missing{where}."
    why = first["msg"].removeprefix("Value error, ")
    if not name:  # about several settings at once
        return f"The settings{where} do not fit together: {why[0].lower()}{why[1:]}."
    return f"Setting '{key}'{where} cannot be {short_repr(first['input'])}: {why[0].lower()}{why[1:]}."


def description(model: type[BaseModel], name: str) -> str:
    """The sentence about a setting, or about one within a setting: ``prior.loss_weight``."""
    first, _, rest = name.partition(".")
    field = model.model_fields[first]
    if rest:
        assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        return description(field.annotation, rest)
    return field.description or ""


def to_yaml(settings: Settings, shared: bool = False) -> str:
    """The resolved settings as YAML that ``--config`` reads back; full paths are names alone where it is ``shared``."""
    values = settings.model_dump(mode="json")
    return yaml.safe_dump(without_folders(values) if shared else values, sort_keys=False, allow_unicode=True)
