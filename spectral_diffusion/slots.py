"""Slots: disjoint intervals of columns of the spectrum, one per concept, kept in a ledger.

The ledger is the small file ``slots.json`` beside a set of adapters. It knows, per base, which columns
belong to which concept, so that adapters trained apart never overlap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from .errors import UserError
from .files import cannot_write, write_json

LEDGER = "slots.json"


@dataclass(frozen=True, order=True)
class Slot:
    """The columns ``start … stop − 1``."""

    start: int
    stop: int

    @property
    def rank(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: Slot) -> bool:
        return self.start < other.stop and other.start < self.stop

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


def parse_slot(text: str, rank: int) -> Slot | None:
    """``next`` to None; ``3`` to the fourth interval of ``rank`` columns; ``16:24`` to exactly these.

    Raises:
        UserError: anything else, or an interval whose width is not the rank.
    """
    if text == "next":
        return None
    if re.fullmatch(r"\d{1,6}", text):
        return Slot(int(text) * rank, (int(text) + 1) * rank)
    if match := re.fullmatch(r"(\d{1,7}):(\d{1,7})", text):
        slot = Slot(int(match[1]), int(match[2]))
        if slot.rank == rank:
            return slot
        raise UserError(f"Slot {text} has {slot.rank} columns but the rank is {rank}; make them equal.")
    raise UserError(f"Slot '{text}' is not understood; use next, a number such as 3, or columns such as 16:24.")


@dataclass
class Ledger:
    """The columns in use beside one set of adapters. Every change holds a file lock."""

    path: Path

    @classmethod
    def beside(cls, output: Path) -> Ledger:
        """The ledger of the folder that an adapter is written to."""
        return cls(Path(output).parent / LEDGER)

    def read(self) -> dict[str, dict[str, Slot]]:
        """Base fingerprint to concept to slot.

        Raises:
            UserError: the file is not a ledger.
        """
        if not self.path.exists():
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["format_version"] != 1:
                raise ValueError
            return {
                base: {concept: Slot(int(start), int(stop)) for concept, (start, stop) in concepts.items()}
                for base, concepts in data["bases"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} is not a slot ledger; repair or remove it.") from error

    @contextmanager
    def _locked(self) -> Iterator[dict[str, dict[str, Slot]]]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
            lock.acquire()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            data = self.read()
            yield data
            write_json(
                self.path,
                {
                    "format_version": 1,
                    "bases": {
                        base: {
                            name: [slot.start, slot.stop] for name, slot in sorted(concepts.items(), key=lambda x: x[1])
                        }
                        for base, concepts in data.items()
                        if concepts
                    },
                },
            )
        finally:
            lock.release()

    def reserve(self, base: str, concept: str, rank: int, wanted: str, capacity: int, narrowest: str = "") -> Slot:
        """Take a slot for a concept. Retraining a concept with ``next`` and the same rank keeps its slot.

        Args:
            base: the base's fingerprint.
            wanted: ``next``, a slot number or ``start:stop``.
            capacity: columns that every target has; ``narrowest`` names the layer that sets it.

        Raises:
            UserError: the slot is taken, or past the capacity, or no room is left.
        """
        if rank < 1:
            raise UserError(f"Rank must be at least 1, not {rank}.")
        slot = parse_slot(wanted, rank)
        with self._locked() as data:
            taken = data.setdefault(base, {})
            mine = taken.get(concept)
            if slot is None and mine is not None and mine.rank == rank:
                return mine
            others = {name: held for name, held in taken.items() if name != concept}
            if slot is None:
                slot = _first_free(rank, list(others.values()))
            clash = next((name for name, held in others.items() if held.overlaps(slot)), None)
            if clash:
                raise UserError(
                    f"Slot {slot} overlaps the columns {others[clash]} of '{clash}'; use --slot next, another slot, "
                    f"or free it (spectral-diffusion slots release {clash})."
                )
            if slot.stop > capacity:
                reason = f" (the narrowest adapted weight, {narrowest}, has that many)" if narrowest else ""
                raise UserError(
                    f"Slot {slot} is past the {capacity} columns of this base{reason}: "
                    f"{capacity // rank} slots of rank {rank} fit; release one or lower --rank."
                )
            taken[concept] = slot
            return slot

    def release(self, concept: str, base: str | None = None) -> list[Slot]:
        """Free a concept's columns (on every base unless one is named).

        Raises:
            UserError: no such concept in the ledger.
        """
        freed = []
        with self._locked() as data:
            for fingerprint, concepts in data.items():
                if base in (None, fingerprint) and concept in concepts:
                    freed.append(concepts.pop(concept))
        if not freed:
            raise UserError(f"No concept '{concept}' in {self.path}.")
        return freed


def _first_free(rank: int, taken: list[Slot]) -> Slot:
    """The first interval of ``rank`` columns that overlaps nothing."""
    start = 0
    for held in sorted(taken):
        if start + rank <= held.start:
            break
        start = max(start, held.stop)
    return Slot(start, start + rank)
