"""Settings as the command line resolves them: a preset or file, what a scene said, then the changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ..core.assets import preset, preset_of
from ..core.errors import Fix, UserError
from ..core.files import read_header
from .settings import Model, build, read_yaml
from .train import TrainConfig

VERBS = {"train", "fuse", "generate", "train-control", "evaluate"}  # that a preset may have a part for


def preset_part(name: str, verb: str) -> dict[str, Any]:
    """The settings of a shipped preset for a verb.

    Raises:
        UserError: no such preset.
    """
    return read_yaml(preset(name)).get(verb) or {}


RATES = ("learning_rate", "text_encoder_learning_rate")  # those that depend on the method


def rates_for(settings: dict[str, Any], method: Any) -> dict[str, Any]:
    """A preset's or file's settings, with its rates scaled where another method takes the place of its own.

    Rates in a file that names a method belong to that method; those in a file without one apply to every method.

    Raises:
        UserError: there is no such method.
    """
    from ..methods import get_method  # it brings torch, which no page has to wait for

    before = settings.get("method")
    if not (isinstance(before, str) and isinstance(method, str)) or before == method:
        return settings
    ratio = get_method(method).lr_scale / get_method(before).lr_scale
    scaled = {}
    for name in RATES:
        try:
            scaled[name] = round_rate(float(settings[name]) * ratio)
        except (KeyError, TypeError, ValueError):
            continue  # missing or not a number: reported when the settings are checked
    return {**settings, **scaled}


def method_of_start(*layers: Mapping[str, Any]) -> str | None:
    """The method of the adapter that training starts from, whose rates it then needs; None without a readable one."""
    start = next((layer["init_from_adapter"] for layer in reversed(layers) if layer.get("init_from_adapter")), None)
    try:
        return None if start is None else read_header(Path(str(start)))[1].get("spectral.method")
    except (UserError, OSError, ValueError):
        return None  # the training reports it


def with_rates(config: TrainConfig) -> TrainConfig:
    """Fill in the learning rates that are not set: the defaults, times the method's ``lr_scale``.

    Raises:
        UserError: there is no such method.
    """
    from ..methods import get_method  # see above

    scale = get_method(config.method).lr_scale
    unset = {name: round_rate(getattr(config, name) * scale) for name in RATES if name not in config.model_fields_set}
    return config.model_copy(update=unset)


def round_rate(rate: float) -> float:
    """A rate without the rounding of a multiplication: 3e-4, not 0.00030000000000000003."""
    return float(f"{rate:.12g}")


def preset_settings(base: str, verb: str) -> dict[str, Any]:
    """The settings of a base's default preset for a verb; empty without one."""
    name = preset_of(base)
    return preset_part(name, verb) if name else {}


def settings_for(
    model: type[Model],
    verb: str,
    *changes: Mapping[str, Any],
    config: str | None = None,
    scene_settings: Mapping[str, Any] | None = None,
    source: str = "",
    base: str = "pocket",
) -> Model:
    """The settings of a verb as the command line resolves them; with few words the same as there::

        settings_for(TrainConfig, "train", {"concept": "photos/rex", "output": "rex.safetensors"})

    A preset by name or a YAML file comes first, then a scene's settings, then the changes, of which later ones win.

    Args:
        config: the preset or file; by default the preset that the base brings along.
        scene_settings: the settings of a scene that was read from ``source``.
        base: what is meant where nothing names one.

    Raises:
        UserError: no such preset or file, one of another verb, or a setting that cannot be.
    """
    named = [layer["base"] for layer in (scene_settings or {}, *changes) if layer.get("base") is not None]
    chosen = config or preset_of(str([base, *named][-1]))
    layer: dict[str, Any] = {}
    if chosen is not None:
        layer = read_yaml(preset(chosen))
        if layer and set(layer) <= VERBS:
            if verb == "train" and verb not in layer:
                raise UserError(
                    f"{chosen} is a preset for {', '.join(layer)}, not for train.", Fix("config", so="to name another")
                )
            layer = layer.get(verb) or {}
            if not isinstance(layer, dict):
                raise UserError(f"The part '{verb}' of {chosen} must hold key: value lines.")
    last = [dict(change) for change in changes]
    if scene_settings:
        return build(
            model, dict(scene_settings), {k: v for k, v in layer.items() if k not in scene_settings}, *last, file=source
        )
    if verb != "train":
        return build(model, layer, *last, file=config or "")
    method = next((change["method"] for change in reversed(last) if change.get("method")), None)
    if method is None and (method := method_of_start(layer, *last)):
        last.append({"method": method})
    settings = build(model, rates_for(layer, method), *last, file=config or "")
    return cast(Model, with_rates(cast(TrainConfig, settings)))
