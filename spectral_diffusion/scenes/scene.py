"""Scene files, and the files that a scene's settings name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..config.scene import Scene
from ..config.settings import read_yaml
from ..core.files import exists
from ..pocket import is_pocket


def read_scene(path: Path) -> dict[str, Any]:
    """A scene file's settings, its files searched beside it first.

    Raises:
        UserError: no such file, or not YAML.
    """

    def locate(name: str) -> str:
        return str(next((candidate for candidate in candidate_paths(name, path.parent) if exists(candidate)), name))

    return paths_in(read_yaml(path), locate)


def candidate_paths(name: str, folder: Path) -> Iterator[Path | str]:
    """The candidates for a path in a file in ``folder``: beside that file, from here, or from a folder above it.

    Such a file is often in a subfolder of the one its paths start from.
    """
    if not Path(name).is_absolute():
        yield folder / name
    yield name
    if not Path(name).is_absolute():
        yield from (parent / name for parent in folder.resolve().parents)


def paths_in(settings: dict[str, Any], changed: Callable[[str], str]) -> dict[str, Any]:
    """A scene's settings with ``changed`` of every file and folder that they name; invalid values stay."""

    def renamed(name: Any) -> Any:
        return changed(name) if isinstance(name, str) and not is_pocket(name) else name

    def keys(adapters: Any) -> Any:
        return {renamed(name): value for name, value in adapters.items()} if isinstance(adapters, dict) else adapters

    def part(item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        files = {key: renamed(item[key]) for key in ("file", "mask", "adapter") if key in item}
        return {**item, **files, **({"adapters": keys(item["adapters"])} if "adapters" in item else {})}

    out = part(settings)
    if "base" in out:
        out["base"] = renamed(out["base"])
    lists = {key: out[key] for key in ("controls", "regions") if isinstance(out.get(key), list)}
    return {**out, **{key: [part(item) for item in items] for key, items in lists.items()}}


def adapter_tables(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The adapters of a scene's settings with their strengths, first those that act everywhere, no invalid ones."""
    regions = settings.get("regions")
    parts = [settings, *(regions if isinstance(regions, list) else [])]
    tables = [part.get("adapters") for part in parts if isinstance(part, dict)]
    return [adapters for adapters in tables if isinstance(adapters, dict)]


def adapter_files(scene: Scene) -> list[str]:
    """Every adapter file that a scene or a region of it names, once."""
    return list(dict.fromkeys([*scene.adapters, *(name for region in scene.regions for name in region.adapters)]))
