"""A registry of entries by name, filled by importing the files of one folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterator
from typing import Generic, TypeVar

from .errors import UserError, nearest

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Every file of ``package`` but the ``excluded`` ones registers its entry when it is imported."""

    def __init__(self, kind: str, package: str, excluded: Collection[str] = ("registry",)) -> None:
        self.kind, self.package, self.excluded = kind, package, excluded
        self.entries: dict[str, Entry] = {}
        self._imported = False

    def add(self, name: str, entry: Entry) -> Entry:
        """Register an entry under its name."""
        self.entries[name] = entry
        return entry

    def all(self) -> dict[str, Entry]:
        """Everything by name, sorted; imports the folder's files once."""
        if not self._imported:
            for name in self._files():
                importlib.import_module(f"{self.package}.{name}")
            self._imported = True
        return dict(sorted(self.entries.items()))

    def get(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            UserError: there is none.
        """
        known = self.all()
        if name not in known:
            raise UserError(f"Unknown {self.kind} '{name}'{nearest(name, known)}; known: {', '.join(known)}.")
        return known[name]

    def _files(self) -> Iterator[str]:
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            if module.name not in self.excluded:
                yield module.name
