"""The overview of the concepts tab: a card per concept, the slot map, and problems."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.errors import UserError
from ..slots.ledger import LEDGER, ROWS, Ledger, Slot
from ..slots.picture import Stretch, color_of, stretches
from .adapter_headers import AdapterInfo, adapter_headers, owner_of_adapter
from .concepts import (
    about,
    concept_folder,
    concept_folders,
    is_picture,
    known_concepts,
    own_folders,
    photo_files,
    pocket_tokens,
    read_concept,
    thumbnail,
)
from .sentences import rendered
from .workspace import Workspace

CARD_PHOTOS = 3
CARD_SIDE = 160  # pixels
SHOWN = 64  # columns of the slot map, if no slot is further right


@dataclass(frozen=True)
class Card:
    """One concept. ``photos`` are the first ones as JPEGs, ``count`` is of all; ``problem`` is a sentence."""

    folder: str
    noun: str
    token: str
    count: int
    own: bool
    photos: list[bytes]
    adapters: list[AdapterInfo]
    problem: str = ""


@dataclass(frozen=True)
class Strip:
    """One base's spectrum: the concepts by columns (or rows, ``kind``).

    ``free`` counts those without an owner, ``beyond`` those further right that are not shown; ``reserved`` are names
    in the ledger without an adapter here.
    """

    base: str
    kind: str
    stretches: list[Stretch]
    slots: dict[str, Slot]
    free: int
    beyond: int
    reserved: set[str]


@dataclass(frozen=True)
class ConceptOverview:
    """The contents of the concepts tab.

    ``problems`` are sentences, ``notes`` those about the slot map; ``colors`` are CSS colors by adapter name.
    """

    cards: list[Card]
    strips: list[Strip]
    strangers: list[AdapterInfo]
    problems: list[str]
    notes: list[str]
    colors: dict[str, str] = field(default_factory=dict)

    @property
    def first_run(self) -> bool:
        """Whether nothing has been trained yet."""
        return not self.strangers and not any(card.adapters for card in self.cards)


def look(workspace: Workspace) -> ConceptOverview:
    """The present state of the workspace; unreadable files become problems."""
    adapters, problems = adapter_headers(workspace)
    details = known_concepts(workspace)
    owned: dict[str | None, list[AdapterInfo]] = {}
    for label in adapters:
        owned.setdefault(owner_of_adapter(label, details), []).append(label)
    own = own_folders(workspace)
    cards = [_card(workspace, name, name in own, owned.get(name, [])) for name in concept_folders(workspace)]
    ledgers, broken = _ledgers(workspace)
    names = sorted({label.name for label in adapters} | {name for entries in ledgers.values() for name in entries})
    shortened = [text.replace(f"{workspace.root}/", "") for text in [*problems, *broken]]
    return ConceptOverview(
        cards,
        strips(adapters, ledgers),
        owned.get(None, []),
        [*(f"{text} Take that file away or copy it again." for text in shortened), *token_clashes(details)],
        slot_clashes(adapters, ledgers),
        {name: "#{:02x}{:02x}{:02x}".format(*color_of(index)) for index, name in enumerate(names)},
    )


def _card(workspace: Workspace, name: str, own: bool, adapters: list[AdapterInfo]) -> Card:
    """A concept's card, also for a broken concept."""
    try:
        folder = concept_folder(workspace, name)
        _, noun, token = about(folder)
        files = photo_files(folder)
        paths = [path for path in files if is_picture(path)] or [photo.path for photo in read_concept(folder).photos]
    except UserError as error:
        return Card(name, "", "", 0, own, [], adapters, rendered(error))
    photos: list[bytes] = []
    broken = len(files) - len(paths) if files else 0
    problem = f"{broken} broken photo{'' if broken == 1 else 's'}" if broken > 0 else ""
    for path in paths:
        if len(photos) == CARD_PHOTOS:
            break
        try:
            photos.append(thumbnail(path, CARD_SIDE))
        except UserError as error:
            problem = f"{error}."
    return Card(name, noun, token, len(paths), own, photos, adapters, problem)


def _ledgers(workspace: Workspace) -> tuple[dict[tuple[str, str], dict[str, Slot]], list[str]]:
    """(base fingerprint, kind) to the ledger's entries, and a sentence for each unreadable ledger."""
    ledgers, problems = {}, []
    for kind, file in (("columns", LEDGER), ("rows", ROWS)):
        try:
            for base, entries in Ledger(workspace.adapters / file).read().items():
                ledgers[base, kind] = entries
        except UserError as error:
            problems.append(rendered(error))
    return ledgers, problems


def strips(adapters: list[AdapterInfo], ledgers: dict[tuple[str, str], dict[str, Slot]]) -> list[Strip]:
    """A strip per base and kind of slot: the adapters' slots, and those reserved in the ledger."""
    groups: dict[tuple[str, str], list[AdapterInfo]] = {key: [] for key in ledgers}
    for label in adapters:
        if label.kind and label.slot:
            groups.setdefault((label.fingerprint, label.kind), []).append(label)
    out = []
    for (base, kind), mine in groups.items():
        entries = ledgers.get((base, kind), {})
        slots = entries | {label.name: label.slot for label in mine if label.slot}
        if not slots:
            continue
        needed = max(max(slot.top, slot.bottom) for slot in slots.values())
        capacity = min([label.capacity for label in mine] or [max(SHOWN, needed)])
        capacity = max(capacity, needed)
        bottom = any(slot.bottom for slot in slots.values())
        shown = capacity if bottom else min(capacity, max(SHOWN, -(-needed // 16) * 16))
        runs = stretches(slots, shown)
        free = sum(run.stop - run.start for run in runs if not run.owners) + capacity - shown
        names = {label.name for label in mine}
        title = mine[0].base if mine else _base_name(base)
        out.append(Strip(title, kind, runs, slots, free, capacity - shown, set(entries) - names))
    return out


def _base_name(fingerprint: str) -> str:
    return f"a base ({fingerprint[:8]}) that no adapter here was trained on yet"


def token_clashes(details: dict[str, tuple[str, str, str]]) -> list[str]:
    """A sentence for every token that two concepts use, or that belongs to the pocket base."""
    claimed: dict[str, list[str]] = {}
    for folder, (_, _, token) in details.items():
        if token:
            claimed.setdefault(token, []).append(folder)
    out = [
        f"'{names[0]}' and '{names[1]}' both use the token {token}; give one of them another under 'Name and token'."
        for token, names in claimed.items()
        if len(names) > 1
    ]
    for token in sorted(set(claimed) & pocket_tokens()):
        out.append(f"The token {token} of '{claimed[token][0]}' belongs to the pocket base; choose another.")
    return out


def slot_clashes(adapters: list[AdapterInfo], ledgers: dict[tuple[str, str], dict[str, Slot]]) -> list[str]:
    """A sentence where two adapters of a base share columns, or an adapter and the ledger disagree."""
    out = []
    for index, adapter in enumerate(adapters):
        if adapter.slot is None or adapter.kind is None:
            continue
        for other in adapters[index + 1 :]:
            same = (adapter.fingerprint, adapter.kind) == (other.fingerprint, other.kind)
            if same and other.slot and (shared := adapter.slot.shared(other.slot)):
                out.append(
                    f"The adapters '{adapter.path.stem}' ({adapter.slot}) and '{other.path.stem}' ({other.slot}) share "
                    f"{shared} {adapter.kind}, so fused they disturb each other; train one of them again."
                )
        entries = ledgers.get((adapter.fingerprint, adapter.kind), {})
        trained = {label.name for label in adapters}
        for name, slot in entries.items():
            if name not in trained and slot.overlaps(adapter.slot):
                out.append(
                    f"'{name}' has reserved the {adapter.kind} {slot}, but the adapter '{adapter.path.stem}' occupies "
                    f"{adapter.slot}; train '{name}' with another slot."
                )
    unknown = [
        f"'{adapter.path.stem}' ({adapter.slot})"
        for adapter in adapters
        if adapter.slot and adapter.kind and adapter.name not in ledgers.get((adapter.fingerprint, adapter.kind), {})
    ]
    if unknown:
        who = "came from elsewhere: no ledger here keeps its place" if len(unknown) == 1 else ""
        who = who or "came from elsewhere: no ledger here keeps their places"
        out.append(f"{', '.join(unknown)} {who}, so a later training may take the same columns.")
    return out
