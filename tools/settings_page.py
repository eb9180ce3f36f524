"""Write docs/settings.md: every setting with its default and its description, from the settings themselves.

python -m tools.settings_page
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from spectral_diffusion.config.control import ControlConfig
from spectral_diffusion.config.evaluate import EvaluateConfig
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import ControlImage, Region, Scene
from spectral_diffusion.config.train import TrainConfig

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
VERBS: dict[str, type[BaseModel]] = {
    "train": TrainConfig,
    "fuse": FuseConfig,
    "generate": Scene,
    "evaluate": EvaluateConfig,
    "train-control": ControlConfig,
}
HEAD = """# Settings

Every setting of every verb. Write them as `key=value` (`prior.loss_weight=1`), those without a dot also as flags
(`--batch-size 4`), in a YAML file or preset given by `--config`, or as keyword arguments in Python. The defaults
below are those of the settings themselves; the preset of a base changes some of them (`configs/`).
`python -m tools.settings_page` writes this page.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for verb, model in VERBS.items():
        parts += [f"## {verb}\n", table(model)]
        for name, field in model.model_fields.items():
            if part := nested(field):
                parts += [f"### {verb}: {name}\n", f"{summary(part)}\n", table(part, f"{name}.")]
    parts += ["### generate: each of regions\n", table(Region), "### generate: each of controls\n", table(ControlImage)]
    parts.append("The options of each merge (`options.NAME`) are listed by `spectral-diffusion merges`.\n")
    return "\n".join(parts)


def table(model: type[BaseModel], prefix: str = "") -> str:
    """The settings of a model as rows; settings within settings have a table of their own."""
    rows = ["| setting | default | what it is |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if not nested(field):
            rows.append(f"| `{prefix}{name}` | {default(field)} | {escaped(field.description or '')} |")
    return "\n".join(rows) + "\n"


def nested(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a setting that holds settings."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def summary(model: type[BaseModel]) -> str:
    """The first sentence of a model's docstring."""
    return (model.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")


def default(field: FieldInfo) -> str:
    """A default as YAML has it; empty where there is none."""
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    if value is None or value in ("", [], {}):
        return ""
    if isinstance(value, list):
        return f"{len(value)} texts" if len(str(value)) > 40 else f"`{value}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def escaped(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
