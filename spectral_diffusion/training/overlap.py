"""A penalty that keeps a new adapter out of the directions of earlier ones.

After SeqLoRA (arXiv:2605.22743), which trains adapters one after another with bases kept orthogonal; here the earlier
adapters stay as they are and the new one alone gives way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, check_base
from ..adapters.attach import InjectedAdapter
from ..adapters.formats.native import content_hash, load_adapter
from ..config.train import TrainConfig
from ..core.errors import Fix, UserError
from ..core.hooks import QUIET, Hooks
from ..data.folder import Concept
from ..linalg import Factors, flatten, frobenius_norm, row_space
from ..models.base import Base
from .checkpoint import load_state
from .output import STATE, concept_in, state_path

DEAD = 1e-12  # |ΔW| below it is no change: a layer that a schedule pruned, or that was never trained
SHARED = 1e-5  # of the largest singular value: below it directions of two adapters are the same


class EarlierSpaces(NamedTuple):
    """What earlier adapters use of one layer, float32.

    Attributes:
        outputs: an orthonormal basis (out, k) of what their changes write.
        inputs: one (in, k) of what they read.
        energy: the mean |ΔW|² of these adapters.
    """

    outputs: Tensor
    inputs: Tensor
    energy: float


def earlier_spaces(adapters: Sequence[Adapter], weights: Mapping[str, Tensor]) -> dict[str, EarlierSpaces]:
    """The spaces of these adapters by layer, for the layers in ``weights`` that one of them changes; on the CPU."""
    spaces = {}
    for layer in weights if adapters else ():
        having = [adapter for adapter in adapters if layer in adapter.sizes]
        if not having:
            continue
        weight = flatten(weights[layer]) if any(adapter.needs_base for adapter in having) else None
        changes = [
            Factors(*(part.detach().cpu().float() for part in adapter.factors(layer, weight))) for adapter in having
        ]
        changes = [change for change in changes if frobenius_norm(change) > DEAD]
        if not changes:
            continue
        energy = sum(frobenius_norm(change) ** 2 for change in changes)
        outputs = joint_space([Factors(change.down.mT, change.up.mT) for change in changes])
        inputs = joint_space(changes)
        narrow = outputs.shape[1] < len(outputs) and inputs.shape[1] < len(inputs)
        if narrow:  # where they use every direction there is none to turn to
            spaces[layer] = EarlierSpaces(outputs.float(), inputs.float(), energy / len(changes))
    return spaces


def joint_space(changes: Sequence[Factors]) -> Tensor:
    """An orthonormal basis (in, k) of all inputs that these changes read; what they share counts once."""
    U, S, _ = torch.linalg.svd(torch.cat([row_space(change) for change in changes], 1), full_matrices=False)
    return U[:, SHARED * S.max() < S]


def overlap_penalty(adapter: InjectedAdapter, spaces: Mapping[str, EarlierSpaces]) -> Tensor:
    """(‖Qᵀ ΔW‖² + ‖ΔW P‖²) / 2 over the earlier adapters' mean |ΔW|², averaged over the layers of both.

    Q and P are bases of what the earlier adapters write and read. It is 0 for a change that is orthogonal to theirs on
    both sides, and about 1 for one like theirs.
    """
    parts = []
    for layer, space in spaces.items():
        up, down = adapter.factors(layer)
        written, read = space.outputs.mT @ up, down @ space.inputs
        outputs = ((written.mT @ written) * (down @ down.mT)).sum()
        inputs = ((up.mT @ up) * (read @ read.mT)).sum()
        parts.append((outputs + inputs) / (2 * space.energy))
    return torch.stack(parts).mean()


def earlier_adapters(
    config: TrainConfig, base: Base, concept: Concept, start: Adapter | None, resume: bool, hooks: Hooks = QUIET
) -> list[Adapter]:
    """The adapters that the penalty keeps off: the given ones, else those beside the output of the same base.

    An older adapter of one of these concepts, or the one that training goes on from, is not among the latter. A resumed
    training without given ones takes those that it began with.

    Raises:
        UserError: some are given without a penalty, one of them is damaged or of another base, or one that the training
            began with is missing.
    """
    options = config.interference
    if not options.overlap_weight:
        if options.earlier_adapters:
            raise UserError(
                "interference.earlier_adapters does nothing without the penalty.",
                Fix("interference.overlap_weight", "0.1"),
            )
        return []
    if options.earlier_adapters:
        adapters = [load_adapter(path) for path in options.earlier_adapters]
        for adapter in adapters:
            check_base(adapter, base)
        return adapters
    own = {single.token.lower() for single in (concept, *concept.joint)}
    own |= {token.lower() for token in start.tokens} if start else set()
    adapters = []
    for path in sorted(config.output.parent.glob("*.safetensors")):
        if path == config.output or path.name.endswith(STATE) or not concept_in(path)[0]:
            continue
        try:
            adapter = load_adapter(path)
        except UserError:
            hooks.notify(f"Note: {path} cannot be read, so the penalty does not keep off it.")
            continue
        if own & {token.lower() for token in adapter.tokens}:
            continue
        with suppress(UserError):  # of another base
            check_base(adapter, base)
            adapters.append(adapter)
    state = state_path(config.output)
    if resume and state.exists():
        began = load_state(state)[1].get("belongs", {}).get("earlier", "").split()
        adapters = [adapter for adapter in adapters if content_hash(adapter) in began]
        if len(adapters) < len(began):
            raise UserError(
                f"{state} began with {len(began)} adapters beside it to keep off; {len(adapters)} are left. Put the "
                "others back.",
                Fix("resume", "false", "to start anew"),
            )
    if not adapters:
        hooks.notify("Note: no adapter of this base is beside the output, so interference.overlap_weight does nothing.")
    return adapters
