"""The flags of a verb, made from its settings: every plain setting is one, with its name, type and description."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Verb = TypeVar("Verb", bound=Callable[..., None])
SHORT = {"output": "-o"}


def settings_flags(
    model: type[BaseModel],
    *,
    without: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    types: Mapping[str, type] | None = None,
) -> Callable[[Verb], Verb]:
    """Give a verb a flag for every plain setting of ``model`` that is not one of its own parameters.

    The verb receives the given ones as its parameter ``flags``, a mapping by the settings' names. Paths are text in
    it, as in a settings file. Nested settings have no flags: :func:`nested_help` lists them.

    Args:
        without: settings without a flag.
        names: a setting to one more name of its flag, such as ``{"num_images": "--count"}``. A list's flag has only
            this one, and may be repeated.
        types: a setting to the type that its flag reads, if it differs from the setting's.
    """
    names, types = names or {}, types or {}

    def decorate(verb: Verb) -> Verb:
        own = inspect.signature(verb, eval_str=True)
        parameters = [parameter for name, parameter in own.parameters.items() if name != "flags"]
        made = [
            _parameter(name, field, kind, names.get(name))
            for name, field in model.model_fields.items()
            if name not in without and name not in own.parameters
            if (kind := types.get(name) or _kind(field.annotation)) is not None
        ]

        @functools.wraps(verb)
        def run(**values: Any) -> None:
            flags = {parameter.name: _setting_value(values.pop(parameter.name)) for parameter in made}
            verb(**values, flags={name: value for name, value in flags.items() if value is not None})

        # Files first, then the settings in their order, then what only this verb has.
        arguments = [
            parameter
            for parameter in parameters
            if parameter.default is inspect.Parameter.empty or _is_argument(parameter)
        ]
        rest = [parameter for parameter in parameters if parameter not in arguments]
        every = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*arguments, *made, *rest)]
        signature = own.replace(parameters=every)
        vars(run)["__signature__"] = signature
        run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        return typing.cast(Verb, run)

    return decorate


def nested_help(model: type[BaseModel]) -> str:
    """The nested settings as lines of help: ``prior.loss_weight=0.0``, and its description."""
    lines = [
        f"{name}.{inner}={_default(field)}\n  {field.description}"
        for name, outer in model.model_fields.items()
        if (part := _model(outer.annotation)) is not None
        for inner, field in part.model_fields.items()
    ]
    return "Any setting can be written key=value. These have no flag:\n\n\b\n" + "\n".join(lines)


def _is_argument(parameter: inspect.Parameter) -> bool:
    return any(
        isinstance(item, typer.models.ArgumentInfo) for item in getattr(parameter.annotation, "__metadata__", ())
    )


def _parameter(name: str, field: FieldInfo, kind: Any, other: str | None) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
    repeated = typing.get_origin(kind) is list
    flags = [other] if other and repeated else [spelling for spelling in (SHORT.get(name), other, flag) if spelling]
    text = f"{field.description or ''}{' Repeat for more.' if repeated else ''}"
    option = typer.Option(*flags, help=text, metavar=_choices(field.annotation), show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _members(annotation: Any) -> list[Any]:
    """The types of a setting other than None."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    if typing.get_origin(annotation) is Annotated:
        return _members(typing.get_args(annotation)[0])
    return [] if annotation is type(None) else [annotation]


def _kind(annotation: Any) -> Any:
    """The type that a flag reads, or None for a setting without a flag."""
    members = _members(annotation)
    if len(members) != 1:
        return None
    member = members[0]
    if typing.get_origin(member) is Literal:
        return str
    if typing.get_origin(member) is list and typing.get_args(member)[0] in (str, Path, int, float):
        return list[typing.get_args(member)[0]]  # type: ignore[misc]
    return member if member in (str, int, float, bool, Path) else None


def _choices(annotation: Any) -> str | None:
    members = _members(annotation)
    if len(members) == 1 and typing.get_origin(members[0]) is Literal:
        return "|".join(map(str, typing.get_args(members[0])))
    return None


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value == [] or value == "":
        return "…"
    if isinstance(value, list):
        return "[…]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _setting_value(value: Any) -> Any:
    """Paths as text, and an empty list as None."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list):
        return [str(item) if isinstance(item, Path) else item for item in value] or None
    return value
