"""One adapter's part of a fusion, computed into the cache, from which the fusion itself then reads it.

The activations while an adapter generates, and its teacher targets, depend on no other adapter. So the parts of many
adapters can be computed by as many processes; the fusion adds them up in the order in which it would have computed
them, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters.adapter import Adapter, check_base
from ..adapters.formats.import_lora import distinct, name_of
from ..adapters.formats.reading import is_foreign
from ..config.fuse import FuseConfig
from ..core.errors import Fix, UserError, nearest
from ..core.hooks import QUIET, Event, Hooks
from ..models.base import Base
from .fuse import check_fusion, open_base, read_inputs
from .manifest import adapters_in_fusion
from .merge_layers import Calibration, Targets, groups
from .merges.registry import get_merge
from .scales import scales_of
from .teacher_targets import adapter_targets, generic_targets

GENERIC = "generic prompts"  # the part that is no adapter's


def names_in(config: FuseConfig) -> list[str]:
    """The names of a fusion's adapters, as the fusion will call them.

    Raises:
        UserError: one cannot be read.
    """
    own = [a.name for path in config.adapters if not is_foreign(path) for a in adapters_in_fusion(path)]
    for path in filter(is_foreign, config.adapters):
        own.append(distinct(name_of(path), own))
    return own


def part_names(config: FuseConfig, names: list[str]) -> list[str]:
    """The parts of a fusion that its merge and its distillation can use: of generic prompts, then of every adapter.

    Raises:
        UserError: the merge has no such option, or calibrates stage by stage, where every stage needs the one before.
    """
    merge = get_merge(config.merge)
    merge.settings(config.options)  # a wrong one is refused before any job starts
    calibrates = merge.needs_activations
    if calibrates and config.calibration.calibrate_on != "adapter":
        raise UserError(
            "A calibration stage by stage cannot be shared out.", Fix("calibration.calibrate_on", "adapter")
        )
    if calibrates and not config.calibration.cache:
        raise UserError("The parts of a fusion meet in the cache.", Fix("calibration.cache", "true"))
    if not (calibrates or config.distill.steps):
        return []
    generic = config.distill.steps > 0 or config.calibration.prior_weight > 0
    return [*([GENERIC] if generic else []), *sorted(names)]


def compute_parts(config: FuseConfig, wanted: Sequence[str], hooks: Hooks = QUIET) -> None:
    """Compute parts of a fusion into the cache.

    Args:
        wanted: names of adapters, and :data:`GENERIC`.

    Raises:
        UserError: there is no such adapter, or as :func:`.fuse.fuse_to_folder`.
    """
    base, adapters = read_inputs(config, hooks)
    adapters = sorted(adapters, key=lambda adapter: adapter.name)
    names = part_names(config, [adapter.name for adapter in adapters])
    for name in wanted:
        if name not in names:
            raise UserError(f"The fusion has no part '{name}'{nearest(name, names)}; it has {', '.join(names)}.")
    for adapter in adapters:
        check_base(adapter, base, config.allow_base)
    check_fusion(base, adapters, config)
    targets = open_base(base, adapters)
    for index, name in enumerate(wanted):
        mine = next((adapter for adapter in adapters if adapter.name == name), None)
        if config.distill.steps:
            cached = config.distill.model_copy(update={"cache": True})
            if mine:
                adapter_targets(base, mine, scales_of(config, adapters).get(name, 1.0), cached, config.seed, hooks)
            else:
                generic_targets(base, cached, config.seed, hooks)
        if get_merge(config.merge).needs_activations:
            calibrate_part(base, adapters, mine, targets, config, hooks)
        hooks.raise_if_stopped()
        hooks.progress(Event("part", index + 1, len(wanted)))


def calibrate_part(
    base: Base, adapters: list[Adapter], mine: Adapter | None, targets: Targets, config: FuseConfig, hooks: Hooks
) -> None:
    """Record what the layers see with one adapter (None: none) into the cache."""
    if mine is None and not config.calibration.prior_weight:
        return
    layers = list(targets)
    for homes in groups(base, layers, adapters, config, hooks):
        group = {layer: targets[layer] for layer in homes}
        Calibration(base, adapters, group, layers, homes, config, hooks, max_bytes=0).see(mine)
