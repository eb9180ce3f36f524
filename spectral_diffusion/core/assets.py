"""Paths of the files that come with the package: ready-made concepts and presets."""

from __future__ import annotations

from pathlib import Path

from ..pocket import is_pocket
from .errors import UserError, nearest
from .files import is_file, parse_json, read_text

_HERE = Path(__file__).parent.parent


def _folder(name: str) -> Path:
    installed = _HERE / "_data" / name  # inside a wheel
    return installed if installed.is_dir() else _HERE.parent / name  # in a checkout


def concepts() -> Path:
    """The folder of ready-made concepts for the pocket base."""
    return _folder("concepts")


def configs() -> Path:
    """The folder of presets."""
    return _folder("configs")


def preset_of(base: str) -> str | None:
    """The default preset of a base: a pocket base's own, also for a fusion built directly on it."""
    if is_pocket(base):
        return base
    manifest = Path(base) / "manifest.json"
    try:
        below = parse_json(read_text(manifest))["base"] if base and is_file(manifest) else ""
        return below if is_pocket(below) else None
    except (ValueError, OSError, LookupError, TypeError):
        return None


def preset(name: str) -> Path:
    """A preset by name (``pocket``, ``sd15-12gb``, …) or any YAML file by path.

    Raises:
        UserError: neither.
    """
    if Path(name).suffix in {".yaml", ".yml"}:
        return Path(name)
    known = {path.stem: path for path in sorted(configs().glob("*.yaml"))}
    if name not in known:
        raise UserError(
            f"Unknown preset '{name}'{nearest(name, known)}; use a .yaml file or one of {', '.join(known)}."
        )
    return known[name]
