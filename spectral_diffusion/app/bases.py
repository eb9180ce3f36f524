"""The bases that can be chosen: the pocket bases, the fusions of the workspace, and others by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import pocket
from .workspace import Workspace, pick, visible

FUSED = "fused/"  # marks a fused folder of the workspace among the bases
MANIFEST = (
    "manifest.json"  # the library's own name for it is in a module that brings torch, which no page has to wait for
)


def fused_folders(workspace: Workspace) -> dict[str, Path]:
    """The fused folders by name, damaged ones too."""
    return {path.name: path for path in visible(workspace.fused) if (path / MANIFEST).is_file()}


def fused_names(workspace: Workspace) -> list[str]:
    """The names of the fused folders."""
    return list(fused_folders(workspace))


def fused_folder(workspace: Workspace, name: str | None) -> Path:
    """The folder of a listed fusion.

    Raises:
        UserError: there is none of that name.
    """
    return pick(name, fused_folders(workspace), "fused folder", "fuse adapters in step 3")


def base_choices(workspace: Workspace, suited: Sequence[str] = ()) -> list[str]:
    """The pocket bases, the fused folders as ``fused/<name>``, then those that suit this computer."""
    return list(dict.fromkeys([*pocket.BASES, *(FUSED + name for name in fused_names(workspace)), *suited]))


def base_path(workspace: Workspace, base: str | None) -> str:
    """The base to load for a choice: a fused folder of the workspace, or any other text as it is.

    Raises:
        UserError: no such fused folder.
    """
    base = (base or "pocket").strip()
    return str(fused_folder(workspace, base.removeprefix(FUSED))) if base.startswith(FUSED) else base
