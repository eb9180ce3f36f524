"""Slots: disjoint sets of columns of the spectrum, one per concept, kept in a ledger.

The ledger is the small file ``slots.json`` beside a set of adapters. It knows, per base, which columns
belong to which concept, so that adapters trained apart never overlap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import Fix, UserError
from ..core.files import cannot_write, parse_json, read_text, write_json
from ..core.locks import locked
from ..core.rng import keyed_random

LEDGER = "slots.json"
ROWS = "rows.json"  # the same for methods whose slots are rows of a shared basis
WAIT = 20.0  # seconds for the ledger's lock, which is taken for a moment only
POOL = 64  # how many top columns ``sampled`` chooses from by default


@dataclass(frozen=True, order=True)
class Slot:
    """Columns in rising order: 0, 1, … from the largest singular value; −1, −2, … from the smallest."""

    columns: tuple[int, ...]

    @classmethod
    def interval(cls, start: int, stop: int) -> Slot:
        """The columns ``start … stop − 1``."""
        return cls(tuple(range(start, stop)))

    @property
    def rank(self) -> int:
        return len(self.columns)

    @property
    def top(self) -> int:
        """How many columns from the top it needs."""
        return max(0, self.columns[-1] + 1)

    @property
    def bottom(self) -> int:
        """How many columns from the bottom it needs."""
        return max(0, -self.columns[0])

    def fits(self, capacity: int) -> bool:
        """Whether it fits into ``capacity`` columns."""
        return max(self.top, self.bottom) <= capacity

    def shared(self, other: Slot) -> int:
        """How many columns two slots have in common."""
        return len(set(self.columns) & set(other.columns))

    def overlaps(self, other: Slot) -> bool:
        return self.shared(other) > 0

    def from_top(self, count: int) -> set[int]:
        """The columns counted from the top, where there are ``count``."""
        return {column if column >= 0 else count + column for column in self.columns}

    def __str__(self) -> str:
        first, last = self.columns[0], self.columns[-1]
        if last - first == self.rank - 1:
            return f"{first}:{last + 1}"
        return ",".join(map(str, self.columns))


def read_columns(text: str) -> Slot:
    """``16:24`` or ``1,5,9`` to a slot.

    Raises:
        ValueError: anything else, no columns, one named twice, or columns of both ends.
    """
    if match := re.fullmatch(r"(-?\d{1,7}):(-?\d{1,7})", text):
        start, stop = int(match[1]), int(match[2])
        if not start < stop <= start + 100_000 or start < 0 < stop:
            raise ValueError(text)
        return Slot.interval(start, stop)
    if not re.fullmatch(r"-?\d{1,7}(,-?\d{1,7})+", text):
        raise ValueError(text)
    columns = sorted(int(part) for part in text.split(","))
    if len(set(columns)) < len(columns) or columns[0] < 0 <= columns[-1]:
        raise ValueError(text)
    return Slot(tuple(columns))


@dataclass(frozen=True)
class Policy:
    """How a slot is chosen.

    ``next``: the first free interval. ``fixed``: the given columns. ``sampled``: random among the top ``pool``
    columns without a ledger, for separate trainings. ``random``: random among all columns. ``bottom``: the
    last free interval.
    """

    kind: str
    slot: Slot | None = None
    pool: int = POOL

    @property
    def is_random(self) -> bool:
        """Whether a seed decides the columns."""
        return self.kind in {"sampled", "random"}


def parse_policy(text: str, rank: int) -> Policy:
    """Read ``next``, ``3`` (the fourth interval), ``16:24``, ``1,5,9``, ``sampled[:128]``, ``random`` or ``bottom``.

    Raises:
        UserError: anything else, or columns whose number is not the rank.
    """
    if rank < 1:
        raise UserError(f"Rank must be at least 1, not {rank}.")
    if text in {"next", "random", "bottom", "sampled"}:
        return Policy(text)
    if match := re.fullmatch(r"sampled:(\d{1,6})", text):
        return Policy("sampled", pool=int(match[1]))
    if re.fullmatch(r"\d{1,6}", text):
        return Policy("fixed", Slot.interval(int(text) * rank, (int(text) + 1) * rank))
    try:
        slot = read_columns(text)
    except ValueError as error:
        raise UserError(
            f"Slot '{text}' is not understood; use next, a number such as 3, columns such as 16:24 or 1,5,9, "
            "sampled, random or bottom."
        ) from error
    if slot.rank != rank:
        raise UserError(f"Slot {text} has {slot.rank} columns but the rank is {rank}; make them equal.")
    return Policy("fixed", slot)


def random_slot(rank: int, pool: int, seed: int) -> Slot:
    """``rank`` of the first ``pool`` columns; the seed decides which.

    Raises:
        UserError: the pool is too small.
    """
    if rank > pool:
        raise UserError(
            f"{rank} columns cannot be drawn from {pool}.",
            Fix("rank", str(pool)),
            Fix("slot", f"sampled:{max(128, rank)}"),
        )
    return Slot(tuple(sorted(keyed_random("slot", seed).sample(range(pool), rank))))


def collision_probability(rank: int, pool: int) -> float:
    """The chance that two independently sampled slots share a column."""
    return 1 - math.comb(pool - rank, rank) / math.comb(pool, rank)


@dataclass(frozen=True)
class SlotRequest:
    """A concept's request to the ledger.

    Attributes:
        policy: how to choose (see :func:`parse_policy`); ``sampled`` neither reads nor writes the ledger.
        capacity: columns that every target has; ``narrowest`` names the layer that sets it.
        seed: decides the columns that ``sampled`` and ``random`` choose.
    """

    rank: int
    policy: str
    capacity: int
    narrowest: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Ledger:
    """The columns that a set of adapters uses. Every change takes a file lock."""

    path: Path

    @classmethod
    def beside(cls, output: Path, name: str = LEDGER) -> Ledger:
        """The ledger of the folder that an adapter is written to."""
        return cls(Path(output).parent / name)

    def read(self) -> dict[str, dict[str, Slot]]:
        """Base fingerprint to concept to slot.

        Raises:
            UserError: the file is not a ledger.
        """
        return self._read()[0]

    def _read(self) -> tuple[dict[str, dict[str, Slot]], dict[str, list[str]]]:
        """The entries, and the hashes of bases in half precisions where those are known."""
        if not self.path.exists():
            return {}, {}
        try:
            data = parse_json(read_text(self.path))
            if data["format_version"] != 2:
                raise ValueError
            rounded = {base: [str(digest) for digest in hashes] for base, hashes in data.get("rounded", {}).items()}
            return {
                base: {concept: read_columns(str(value)) for concept, value in concepts.items()}
                for base, concepts in data["bases"].items()
            }, rounded
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.path} is not a slot ledger; repair or remove it.") from error

    @contextmanager
    def _locked(self) -> Iterator[tuple[dict[str, dict[str, Slot]], dict[str, list[str]]]]:
        with ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path.with_name(f".{self.path.name}.lock"), WAIT))
            except OSError as error:
                raise cannot_write(self.path, error) from error
            data, rounded = self._read()
            yield data, rounded
            bases = {
                base: {name: str(slot) for name, slot in sorted(concepts.items(), key=lambda x: x[1])}
                for base, concepts in data.items()
                if concepts
            }
            kept = {base: hashes for base, hashes in rounded.items() if base in bases}
            write_json(self.path, {"format_version": 2, "bases": bases} | ({"rounded": kept} if kept else {}))

    def reserve(self, base: str, concept: str, request: SlotRequest, rounded: Sequence[str] = ()) -> Slot:
        """Take a slot for a concept; see :meth:`reserve_all`."""
        return self.reserve_all(base, {concept: request}, rounded)[concept]

    def reserve_all(
        self, base: str, requests: Mapping[str, SlotRequest], rounded: Sequence[str] = ()
    ) -> dict[str, Slot]:
        """Take slots for several concepts in order, under one lock: all of them or none.

        Retraining a concept with ``next`` (or from the bottom with ``bottom``) and the same rank keeps its slot. Where
        every concept has the slot that it asks for, the ledger is only read.

        Args:
            base: the base's fingerprint.
            rounded: its fingerprints in half precisions. A base that shares one is the same in another precision, whose
                adapters will meet this one's: their columns are taken too.

        Raises:
            UserError: a slot is taken, or past the capacity, or no room is left.
        """
        policies = {name: parse_policy(request.policy, request.rank) for name, request in requests.items()}
        out = {
            name: random_slot(requests[name].rank, min(policy.pool, requests[name].capacity), requests[name].seed)
            for name, policy in policies.items()
            if policy.kind == "sampled"
        }
        wanted = {name: request for name, request in requests.items() if name not in out}
        if not wanted:
            return out
        data, hashes = self._read()
        own = data.get(base, {})
        if hashes.get(base, []) == list(rounded) and all(
            _keeps(own.get(name), policies[name], request) for name, request in wanted.items()
        ):
            return out | {name: own[name] for name in wanted}
        with self._locked() as (data, hashes):
            if rounded:
                hashes[base] = list(rounded)
            columns = TakenColumns(base, data, alike(base, hashes))
            for name, request in wanted.items():
                out[name] = columns.take(name, policies[name], request)
        return {name: out[name] for name in requests}

    def release(self, concept: str, base: str | None = None) -> list[Slot]:
        """Free a concept's columns (on every base unless one is named).

        Raises:
            UserError: no such concept in the ledger.
        """
        freed = []
        with self._locked() as (data, _):
            for fingerprint, concepts in data.items():
                if base in (None, fingerprint) and concept in concepts:
                    freed.append(concepts.pop(concept))
        if not freed:
            raise UserError(f"No concept '{concept}' in {self.path}.")
        return freed


class TakenColumns:
    """The columns of a base and of the same base in other precisions, while slots of some concepts are chosen."""

    def __init__(self, base: str, data: dict[str, dict[str, Slot]], bases: set[str]) -> None:
        self.own = data.setdefault(base, {})
        self.related = [data[other] for other in bases if other in data and other != base]
        self.taken = {name: slot for concepts in (*self.related, self.own) for name, slot in concepts.items()}
        self.owners: dict[int, dict[int, str]] = {}  # by capacity: columns from the top, with an owner of each

    def take(self, name: str, policy: Policy, request: SlotRequest) -> Slot:
        """Choose a concept's slot and note it.

        Raises:
            UserError: it is taken, or past the capacity.
        """
        mine = self.taken.get(name)
        if policy.kind in ("next", "bottom") and _keeps(mine, policy, request):
            assert mine is not None
            slot = mine
        else:
            others = self._others(name, request.capacity)
            slot = _chosen(policy, request, others)
            _check_free(slot, request, others, self.taken)
        for concepts in self.related:
            if slot is not mine:
                concepts.pop(name, None)  # it is trained anew
        self.own[name] = slot
        if mine is None:  # one more; else some columns are free again
            for capacity, columns in self.owners.items():
                columns.update(dict.fromkeys(sorted(slot.from_top(capacity)), name))
        elif slot is not mine:
            self.owners.clear()
        self.taken[name] = slot
        return slot

    def _others(self, name: str, capacity: int) -> dict[int, str]:
        """The columns that other concepts have, with an owner of each; kept while concepts are only added."""
        if name in self.taken:
            return self._columns(capacity, name)
        if capacity not in self.owners:
            self.owners[capacity] = self._columns(capacity)
        return self.owners[capacity]

    def _columns(self, capacity: int, without: str | None = None) -> dict[int, str]:
        return {
            column: other
            for concepts in (*self.related, self.own)
            for other, slot in concepts.items()
            if other != without
            for column in sorted(slot.from_top(capacity))
        }


def _keeps(mine: Slot | None, policy: Policy, request: SlotRequest) -> bool:
    """Whether a concept has the slot that it asks for."""
    if mine is None or mine.rank != request.rank or not mine.fits(request.capacity):
        return False
    return policy.kind == "next" or mine == policy.slot or (policy.kind == "bottom" and mine.bottom > 0)


def alike(base: str, hashes: Mapping[str, Sequence[str]]) -> set[str]:
    """The bases that are the same in several precisions, linked by shared hashes, ``base`` included."""
    bases, shared = {base}, set(hashes.get(base, ()))
    while more := {other for other, own in hashes.items() if other not in bases and shared & set(own)}:
        bases |= more
        shared.update(*(hashes[other] for other in more))
    return bases


def _chosen(policy: Policy, request: SlotRequest, used: Collection[int]) -> Slot:
    """The slot that a policy names, or chooses among the free columns."""
    if policy.slot is not None:
        return policy.slot
    if policy.kind == "random":
        return random_slot(request.rank, request.capacity, request.seed)
    if policy.kind == "bottom":
        return _last_free(request.rank, used, request.capacity)
    return _first_free(request.rank, used)


def _check_free(slot: Slot, request: SlotRequest, others: Mapping[int, str], taken: Mapping[str, Slot]) -> None:
    """Refuse a slot past the capacity, or one that another concept has columns of.

    Args:
        others: the columns of other concepts, with an owner of each.

    Raises:
        UserError: it is one.
    """
    capacity, rank, narrowest = request.capacity, request.rank, request.narrowest
    if not slot.fits(capacity):
        reason = f" (the narrowest adapted weight, {narrowest}, has that many)" if narrowest else ""
        raise UserError(
            f"Slot {slot} is past the {capacity} columns of this base{reason}: "
            f"{capacity // rank} slots of rank {rank} fit, so one has to be released.",
            *([Fix("rank", str(rank // 2), "to have more of them")] if rank > 1 else []),
        )
    clash = next((others[column] for column in sorted(slot.from_top(capacity)) if column in others), None)
    if clash:
        raise UserError(
            f"Slot {slot} overlaps the columns {taken[clash]} of '{clash}', which is not released.",
            Fix("slot", "next", "to take the next free ones"),
        )


def _first_free(rank: int, used: Iterable[int]) -> Slot:
    """The first interval of ``rank`` columns that overlaps nothing."""
    start = 0
    for column in sorted(used):
        if start + rank <= column:
            break
        start = max(start, column + 1)
    return Slot.interval(start, start + rank)


def _last_free(rank: int, used: Collection[int], capacity: int) -> Slot:
    """The interval nearest the bottom that overlaps nothing, counted from the bottom."""
    for start in range(-rank, -capacity - 1, -1):
        if not any(capacity + column in used for column in range(start, start + rank)):
            return Slot.interval(start, start + rank)
    return Slot.interval(-capacity - rank, -capacity)  # past the capacity: refused by the caller with the reason
