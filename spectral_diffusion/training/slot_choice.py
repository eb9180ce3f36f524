"""A training's rank and slot: settled from the settings, and reserved in the ledger beside the output."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.train import TrainConfig
from ..core.errors import Fix, UserError
from ..core.hooks import QUIET, Hooks
from ..methods import get_method
from ..models.base import Base
from ..slots.ledger import LEDGER, ROWS, Ledger, Slot, SlotRequest, collision_probability, parse_policy
from ..svd_cache import capacity, spectrum_of
from .checkpoint import load_state
from .output import state_path

DEGENERATE = 1e-4  # relative gap of neighbouring singular values


def with_rank(config: TrainConfig, shapes: Sequence[tuple[int, int]], hooks: Hooks = QUIET) -> TrainConfig:
    """Settle the rank: the largest within the budget if there is one, else the given one if the method allows it.

    Raises:
        UserError: no rank fits the budget, with the counts next to it; or the rank is none of the method's.
    """
    method = get_method(config.method)
    allowed = method.ranks(shapes)
    if not allowed:
        raise UserError(f"The method {method.name} fits no rank to these layers; choose other targets.")

    if config.param_budget is not None:
        counts = sorted((method.total(shapes, rank), rank) for rank in allowed)
        within = [(total, rank) for total, rank in counts if total <= config.param_budget]
        steps = ", ".join(f"{total:,}" for total, _ in counts[: len(within) + 2][-4:])
        if not within:
            raise UserError(
                f"{method.name} cannot train as few as {config.param_budget:,} numbers here: its steps are {steps} ….",
                Fix("param_budget", str(counts[0][0])),
                Fix("method", so="to choose another"),
            )
        total, rank = within[-1]
        hooks.notify(
            f"{method.name} at rank {rank} trains {total:,} of {config.param_budget:,} numbers (its steps: {steps})."
        )
        return config.model_copy(update={"rank": rank})
    if tuple(allowed) == (1,):
        return config.model_copy(update={"rank": 1})  # a method without a rank
    if config.rank not in allowed:
        near = sorted(sorted(allowed, key=lambda rank: abs(rank - config.rank))[:3])
        raise UserError(
            f"{method.name} cannot have rank {config.rank} on these layers; near it are {', '.join(map(str, near))}.",
            *(Fix("rank", str(rank)) for rank in near[:1]),
        )
    return config


def earlier_settings(config: TrainConfig, resume: bool) -> dict[str, Any]:
    """The settings of the run that is to be resumed, as its state keeps them; nothing without one."""
    state = state_path(config.output)
    return dict(load_state(state)[1].get("config", {})) if resume and state.exists() else {}


def with_slot_seed(config: TrainConfig, resume: bool) -> TrainConfig:
    """Settle the seed of a random slot: given, the interrupted run's, or fresh. It is recorded in the file."""
    if config.slot_seed is not None or not parse_policy(config.slot, config.rank).is_random:
        return config
    seed = earlier_settings(config, resume).get("slot_seed")
    return config.model_copy(update={"slot_seed": secrets.randbits(31) if seed is None else seed})


def reserve(config: TrainConfig, base: Base, name: str) -> Slot:
    """A concept's slot, from the ledger beside the output unless it is sampled privately."""
    own = base.fingerprint
    return ledger_of(config).reserve(own.exact, name, slot_request(config, base), rounded=(own.half, own.brain))


def ledger_of(config: TrainConfig) -> Ledger:
    """The ledger that a training reserves its slot in."""
    rows = get_method(config.method).slot == "rows"
    beside = config.ledger.with_name(ROWS) if config.ledger and rows else config.ledger
    return Ledger(beside) if beside else Ledger.beside(config.output, ROWS if rows else LEDGER)


def slot_request(config: TrainConfig, base: Base) -> SlotRequest:
    """What a training asks of the ledger."""
    sizes, method = base.sizes(config.target_modules), get_method(config.method)
    columns, narrowest = capacity(sizes)
    if method.slot == "rows":
        narrowest = min(sizes, key=lambda layer: sizes[layer][1])
        columns = sizes[narrowest][1]
    policy = method.slot_policy if config.slot == "next" else config.slot
    return SlotRequest(config.rank, policy, columns, narrowest, config.slot_seed or 0)


def reserve_together(configs: Mapping[str, TrainConfig], base: Base, resume: bool = False) -> dict[str, TrainConfig]:
    """Reserve the slots of several trainings on one base in one step: all of them or none.

    Args:
        configs: by the concept's name; all write into one folder.

    Returns:
        The settings with rank and slot seed settled, with which each training finds its slot in the ledger.

    Raises:
        UserError: a slot is taken, or there is no room for all.
    """
    settled = {}
    for name, config in configs.items():
        config = with_rank(config, list(base.sizes(config.target_modules).values()))
        settled[name] = with_slot_seed(config, resume) if get_method(config.method).slot else config
    by_ledger: dict[Ledger, dict[str, SlotRequest]] = {}
    for name, config in settled.items():
        if get_method(config.method).slot and not config.init_from_adapter:
            by_ledger.setdefault(ledger_of(config), {})[name] = slot_request(config, base)
    own = base.fingerprint
    for ledger, requests in by_ledger.items():
        ledger.reserve_all(own.exact, requests, rounded=(own.half, own.brain))
    return settled


def slot_notes(config: TrainConfig, slot: Slot, base: Base) -> list[str]:
    """Notes on a slot before training: the chance of a clash, an unstable border."""
    notes = []
    policy = parse_policy(config.slot, config.rank)
    if policy.kind == "sampled":
        pool = min(policy.pool, capacity(base.sizes(config.target_modules))[0])
        chance = collision_probability(config.rank, pool)
        notes.append(
            f"Columns {slot} were sampled from the top {pool} (slot_seed={config.slot_seed}); another sampled concept "
            f"shares one with a chance of {chance:.0%}. Fusion reports the real overlap."
        )
    if slot.bottom == 0 and get_method(config.method).slot == "columns":
        gap, layer = spectrum_of(base.weights(config.target_modules), slot.top).smallest_gap(slot.columns)
        if gap < DEGENERATE:
            notes.append(
                f"Note: at the border of columns {slot} two singular values of {layer} differ by {gap:.0e} only; "
                "neighbouring slots may mix there on another machine."
            )
    return notes
