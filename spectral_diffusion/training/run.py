"""From a config to an adapter on disk: folder, base, slot, loop, files."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from ..adapter import Adapter, check_base
from ..base import Base, load_base
from ..config import TrainConfig, to_yaml, with_rates
from ..data.folder import Concept, load_concept
from ..errors import UserError
from ..files import check_settings, check_writable, write_settings
from ..formats.native import is_native, load_adapter, save_adapter
from ..layerwise import check_encoders
from ..linalg import sides
from ..methods import get_method
from ..progress import Progress, silent
from ..slots import LEDGER, ROWS, Ledger, Slot, collision_probability, parse_policy
from ..spectrum import capacity, spectrum_of
from ..tokens import check_name, known_tokens
from .loop import train
from .machines import device_of, processes
from .memory import memory_note
from .state import load_state

DEGENERATE = 1e-4  # relative gap of neighbouring singular values


def state_path(output: Path) -> Path:
    """Where a run's resumable state lies while it is unfinished."""
    return output.with_name(f"{output.stem}.state.safetensors")


def train_to_file(
    config: TrainConfig,
    resume: bool = False,
    progress: Progress = silent,
    should_stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda text: None,
    base: Base | None = None,
    force: bool = False,
) -> Adapter:
    """Train the config's concept and write ``output`` and ``output.yaml`` (the resolved settings).

    The concept's slot is reserved in the ledger beside the output before training starts. Of several processes, as
    ``accelerate launch`` starts them, the main one alone writes and tells.

    Args:
        force: resume although settings have changed.

    Raises:
        UserError: anything the person can mend; see also :func:`.loop.train`.
    """
    output = config.output
    if output.suffix != ".safetensors":
        raise UserError(f"The output {output} must end in .safetensors.")
    get_method(config.method)  # a misspelt one is told before any loading
    among = processes(config.device)
    if not among.main:
        progress, note = silent, ignore
    concept = load_concept(config.concept, config.name, config.token, config.noun)
    if concept.skipped:
        note(f"Skipped in {config.concept}: {'; '.join(concept.skipped)}.")
    for text in concept.notes:
        note(text)
    check_name(concept.name)
    if output.is_dir():
        raise UserError(f"The output {output} is a folder; choose another with -o.")
    check_writable(output)
    check_output(output)
    check_settings(output.with_suffix(".yaml"))
    base = base or load_base(config.base, device_of(config, among), config.dtype)
    if config.layerwise:
        check_encoders(base)
    if concept.token in known_tokens(base.pipeline.tokenizer):
        raise UserError(
            f"The base '{config.base}' already has the token {concept.token}; choose another with token=<name>."
        )
    start_from = None
    if config.continue_from:
        config, start_from = with_start(config, base, concept)
        note(f"Going on from {config.continue_from}: method, rank {config.rank}, targets and columns are its own.")
        if start_from.layerwise:
            note(f"Note: {start_from.token} has layer-wise vectors; what goes on from it keeps their mean.")
    config = with_rates(config)
    method = get_method(config.method)
    if config.normalise and not method.name.startswith("spectral-additive"):
        raise UserError(f"normalise=true scales the columns of spectral-additive; {method.name} has none to scale.")
    config = with_rank(config, [sides(weight) for weight in base.weights(config.targets).values()], note)
    slot = start_from.slot if start_from else None
    if method.slot and not start_from:
        config = among.share(with_slot_seed(config, resume))
        slot = among.share(reserve(config, base, concept) if among.main else None)
        assert slot is not None
        for text in slot_notes(config, slot, base):
            note(text)
    shapes = [sides(weight) for weight in base.weights(config.targets).values()]
    trained = method.total(shapes, config.rank)
    where = f"{method.slot or 'columns'} {slot}" if slot else f"rank {config.rank}"
    note(
        f"Concept '{concept.name}' ({len(concept.photos)} photos of a {concept.noun}) as {concept.token}: "
        f"{method.name}, {where}; {trained:,} numbers in {len(shapes)} layers."
    )
    if memory := memory_note(base, config, config.resolution or base.size):
        note(memory)
    adapter = train(
        config, base, concept, slot, state_path(output), resume, progress, should_stop, start_from, note, force, among
    )
    if among.main:
        save_adapter(adapter, output)
        write_settings(output.with_suffix(".yaml"), to_yaml(config))
        state_path(output).unlink(missing_ok=True)
    return adapter


def check_output(output: Path) -> None:
    """Refuse to write an adapter over anything but an adapter.

    Raises:
        UserError: it is something else, or damaged.
    """
    try:
        ours = not output.exists() or is_native(output)
    except UserError:
        ours = False
    if not ours:
        raise UserError(
            f"{output} is no adapter of this program, or a damaged one; choose another output with -o, or remove it."
        )


def ignore(text: str) -> None:
    """Tell nobody."""


def with_rank(config: TrainConfig, shapes: Sequence[tuple[int, int]], note: Callable[[str], None]) -> TrainConfig:
    """Settle the rank: the largest within the budget if there is one, else the given one if the method allows it.

    Raises:
        UserError: no rank fits the budget, with the counts next to it; or the rank is none of the method's.
    """
    method = get_method(config.method)
    allowed = method.ranks(shapes)
    if not allowed:
        raise UserError(f"The method {method.name} fits no rank to these layers; choose other targets.")

    if config.budget is not None:
        counts = sorted((method.total(shapes, rank), rank) for rank in allowed)
        within = [(total, rank) for total, rank in counts if total <= config.budget]
        steps = ", ".join(f"{total:,}" for total, _ in counts[: len(within) + 2][-4:])
        if not within:
            raise UserError(
                f"{method.name} cannot train as few as {config.budget:,} numbers here: its steps are {steps} …; "
                "raise --budget or choose another method."
            )
        total, rank = within[-1]
        note(f"{method.name} at rank {rank} trains {total:,} of {config.budget:,} numbers (its steps: {steps}).")
        return config.model_copy(update={"rank": rank})
    if tuple(allowed) == (1,):
        return config.model_copy(update={"rank": 1})  # a method without a rank
    if config.rank not in allowed:
        near = sorted(sorted(allowed, key=lambda rank: abs(rank - config.rank))[:3])
        raise UserError(
            f"{method.name} cannot have rank {config.rank} on these layers; near it are {', '.join(map(str, near))}."
        )
    return config


def with_start(config: TrainConfig, base: Base, concept: Concept) -> tuple[TrainConfig, Adapter]:
    """The adapter that training goes on from, and the settings that it fixes.

    Raises:
        UserError: it is of another kind or another base.
    """
    assert config.continue_from is not None
    adapter = load_adapter(config.continue_from)
    if not adapter.method.name.startswith("spectral-rotation"):
        raise UserError(
            f"--continue needs a spectral-rotation adapter, whose turned columns are orthonormal again; "
            f"{config.continue_from} is {adapter.method.name}."
        )
    check_base(adapter, base)
    if concept.token in adapter.tokens:
        raise UserError(
            f"{config.continue_from} has the token {concept.token} already; choose another with token=<name>."
        )
    fixed = {"method": adapter.method.name, "rank": adapter.rank, "targets": adapter.targets, "budget": None}
    return config.model_copy(update={**fixed, "slot": str(adapter.slot)}), adapter


def with_slot_seed(config: TrainConfig, resume: bool) -> TrainConfig:
    """Settle the seed of a drawn slot: given, the interrupted run's, or fresh. It is recorded in the file."""
    if config.slot_seed is not None or not parse_policy(config.slot, config.rank).draws:
        return config
    state, seed = state_path(config.output), None
    if resume and state.exists():
        _, meta = load_state(state)
        seed = meta.get("config", {}).get("slot_seed")
    return config.model_copy(update={"slot_seed": secrets.randbits(31) if seed is None else seed})


def reserve(config: TrainConfig, base: Base, concept: Concept) -> Slot:
    """The concept's slot, from the ledger beside the output unless it is drawn privately."""
    weights = base.weights(config.targets)
    columns, narrowest = capacity(weights)
    rows = get_method(config.method).slot == "rows"
    if rows:
        narrowest = min(weights, key=lambda layer: sides(weights[layer])[1])
        columns = sides(weights[narrowest])[1]
    ledger = Ledger.beside(config.output, ROWS if rows else LEDGER)
    own = base.fingerprint
    return ledger.reserve(
        own.exact, concept.name, config.rank, config.slot, columns, narrowest, config.slot_seed or 0,
        rounded=(own.half, own.brain),
    )  # fmt: skip


def slot_notes(config: TrainConfig, slot: Slot, base: Base) -> list[str]:
    """What a person should know of a slot before training: chances of a clash, a shaky border."""
    notes = []
    policy = parse_policy(config.slot, config.rank)
    weights = base.weights(config.targets)
    if policy.kind == "sampled":
        pool = min(policy.pool, capacity(weights)[0])
        chance = collision_probability(config.rank, pool)
        notes.append(
            f"Columns {slot} were drawn from the top {pool} (slot_seed={config.slot_seed}); another concept drawn so "
            f"shares one with a chance of {chance:.0%}. Fusion tells the real overlap."
        )
    if slot.bottom == 0 and get_method(config.method).slot == "columns":
        gap, layer = spectrum_of(weights, slot.top).borders(slot.columns)
        if gap < DEGENERATE:
            notes.append(
                f"Note: at the border of columns {slot} two singular values of {layer} differ by {gap:.0e} only; "
                "neighbouring slots may mix there on another machine."
            )
    return notes
