"""Fuse adapters into a diffusers folder that stock diffusers opens, and remember how it was made."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..adapters.adapter import Adapter, check_base, shared_columns
from ..adapters.apply import add_words
from ..adapters.formats.import_lora import distinct, import_lora, name_of
from ..adapters.formats.native import save_adapter
from ..adapters.formats.reading import is_foreign
from ..config.fuse import FuseConfig, MergeConfig
from ..config.settings import to_yaml
from ..core.errors import Fix, UserError, nearest
from ..core.files import atomic_folder, check_writable, write_json, write_text
from ..core.hooks import QUIET, Hooks
from ..core.machine import heading
from ..core.precision import MixedPrecision, precision_note, resolve_mixed_precision, tf32
from ..linalg import Factors
from ..models.base import Base
from ..models.loading import load_base
from ..models.per_layer_tokens import mean_note, use_means
from ..models.targets import find_targets
from ..training.memory import is_large
from .distill import distill
from .manifest import (
    ADAPTERS,
    MANIFEST,
    MERGED,
    SETTINGS,
    adapters_in_fusion,
    check_fusion_output,
    check_not_base,
    manifest_of,
    save_pipeline,
    write_merged,
)
from .memory import check_distillation_memory
from .merge_layers import add_change, merge_layers
from .merges.registry import get_merge
from .scales import owner, scales_of
from .student import Student
from .teacher_targets import check_words, prepare_targets


def check_together(adapters: list[Adapter], strength: Mapping[str, float]) -> None:
    """Check that names and tokens are distinct and every scale names an adapter.

    Raises:
        UserError: they are not.
    """
    for first, second in itertools.combinations(adapters, 2):
        if first.name == second.name:
            raise UserError(
                f"Two adapters are called '{first.name}', so one of them has to be trained again.",
                Fix("name", so="to give it another"),
            )
        for token, other_token in itertools.product(first.tokens, second.tokens):
            if token.lower() == other_token.lower():  # tokenizers ignore case
                shared = f"'{first.name}' and '{second.name}' share the token {token}"
                if {"imported"} & {*first.config, *second.config}:
                    raise UserError(f"{shared}; leave one out.")
                raise UserError(
                    f"{shared}, so one of them has to be trained again.", Fix("token", so="to give it another")
                )
    names = [adapter.name for adapter in adapters]
    parts = {component for adapter in adapters for component in (layer.split(".")[0] for layer in adapter.layers)}
    for key in strength:
        name, component = owner(key, names)
        if name not in names or (component and component not in parts):
            raise UserError(
                f"A strength names '{key}'{nearest(key, names)}, but the adapters are {', '.join(names)} "
                f"(and their components {', '.join(sorted(parts))})."
            )


def fuse_adapters(
    base: Base,
    adapters: list[Adapter],
    config: MergeConfig,
    hooks: Hooks = QUIET,
    install: bool = True,
) -> dict[str, Factors] | None:
    """Add the adapters' merged ΔW to the weights of ``base`` and their tokens to its tokenizer, in place.

    Adapters act in canonical order (by name), so the result does not depend on how they were listed; sums are
    formed in float64 and rounded once. Then the result is distilled, if the config says so. ``install`` says whether
    their tokens are still to be put in; layer-wise ones are their mean afterwards, as in a stock pipeline. Returns the
    merged factors by layer; None where a merge, or the distillation of whole weights, gave dense changes.

    Raises:
        UserError: two adapters share a name or a token, a strength names none of them, the merge is not for them,
            an adapter without a token or unknown targets in the distillation.
        NotFiniteError: the distillation met NaN or infinity.
        Cancelled: ``hooks.should_stop`` said so; the base is then half changed.
    """
    adapters = sorted(adapters, key=lambda adapter: adapter.name)
    check_fusion(base, adapters, config)
    targets = open_base(base, adapters, install)
    trainable_layers = {**targets, **extra_modules(base, config, targets)}
    teacher_targets = None
    precision: MixedPrecision = "no"
    if config.distill.steps:  # before anything is fused: the base is one of the teachers
        precision = resolve_mixed_precision(config.mixed_precision, base.device, base.dtype)
        if is_large(base):
            hooks.notify(check_distillation_memory(base, trainable_layers, config.distill, precision))
        scales = scales_of(config, adapters)
        teacher_targets = prepare_targets(base, adapters, scales, config.distill, config.seed, hooks)
    merged = merge_layers(base, adapters, targets, config, hooks)
    if teacher_targets:
        tokens = [token for adapter in adapters for token in adapter.tokens]
        with tf32(base.device, config.allow_tf32):
            student = Student(base, trainable_layers, tokens, config.distill.rank, config.seed)
            correction = distill(student, teacher_targets, config.distill, config.seed, precision, hooks)
        return with_correction(trainable_layers, merged, correction)
    return merged


def open_base(base: Base, adapters: Sequence[Adapter], install: bool = True) -> dict[str, nn.Linear | nn.Conv2d]:
    """Put the adapters' tokens into the base if they are to be put in; returns the layers that any of them changes."""
    use_means(base)
    targets: dict[str, nn.Linear | nn.Conv2d] = {}
    for adapter in adapters:
        targets |= find_targets(base.models, adapter.targets)
        if install:
            add_words(base, adapter)
    return {name: layer for name, layer in targets.items() if any(name in adapter.sizes for adapter in adapters)}


def check_fusion(base: Base, adapters: list[Adapter], config: MergeConfig) -> None:
    """Refuse what cannot be fused, before any work.

    Raises:
        UserError: two adapters that cannot be together, a merge that is not for them, settings that are not for the
            base, or weights that half precision would keep from learning.
    """
    check_together(adapters, config.scales)
    get_merge(config.merge).accept(adapters, config)
    if config.distill.steps:
        base.check_side(config.distill.resolution or base.size, "distill.resolution")
        check_words(adapters)
    if base.quantization != "none":
        raise UserError(
            f"The base '{base.name}' is quantized, and adapters are fused into whole weights; load it without.",
            Fix("quantization", "none"),
        )
    if config.distill.steps and not config.distill.rank and base.dtype != torch.float32:
        raise UserError(
            f"Distilling whole weights needs them in float32, and they are {str(base.dtype).removeprefix('torch.')}.",
            Fix("distill.rank", "16", "to learn corrections of the weights"), Fix("dtype", "float32"),
        )  # fmt: skip


def with_correction(
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    merged: dict[str, Factors] | None,
    correction: Mapping[str, Factors] | None,
) -> dict[str, Factors] | None:
    """Add a learned correction to the weights; returns the whole changes, or None where one is dense."""
    if correction is None:
        return None
    for layer, change in correction.items():
        add_change(layers[layer].weight, change, layer)
    if merged is None:
        return None
    whole = dict(merged)
    for layer, (up, down) in correction.items():
        before = merged.get(layer, Factors(up[:, :0], down[:0]))
        whole[layer] = Factors(torch.cat([before.up, up], 1), torch.cat([before.down, down]))
    return whole


def extra_modules(base: Base, config: MergeConfig, adapted: Container[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of ``distill.target_modules`` that no adapter changes.

    Raises:
        UserError: unknown targets.
    """
    if not (config.distill.steps and config.distill.target_modules):
        return {}
    try:
        modules = find_targets(base.models, config.distill.target_modules)
    except UserError as error:
        raise UserError(f"distill.target_modules: {error.message}", *error.fixes) from error
    return {name: layer for name, layer in modules.items() if name not in adapted}


def overlaps(adapters: list[Adapter]) -> list[str]:
    """A sentence for every two adapters whose slots share columns."""
    return [
        f"'{a.name}' ({a.slot}) and '{b.name}' ({b.slot}) share {shared} {a.method.slot}; they will disturb each other."
        for a, b in itertools.combinations(adapters, 2)
        if (shared := shared_columns(a, b))
    ]


def device_for(config: MergeConfig) -> str:
    """The device to fuse on: the CPU by default if no network has to run, since float32 may not fit a GPU."""
    runs = get_merge(config.merge).needs_activations or config.distill.steps > 0
    return config.device if runs or config.device != "auto" else "cpu"


def read_inputs(config: FuseConfig, hooks: Hooks = QUIET, base: Base | None = None) -> tuple[Base, list[Adapter]]:
    """The base, loaded unless it is given, and the adapters of a fusion's settings.

    Raises:
        UserError: one cannot be read, or nothing names the base.
    """
    foreign = [path for path in config.adapters if is_foreign(path)]
    adapters = [adapter for path in config.adapters if path not in foreign for adapter in adapters_in_fusion(path)]
    if not adapters and config.base is None:
        raise UserError(
            f"{config.adapters[0]} is not an adapter of this program, and a LoRA of another names no base.",
            Fix("base", so="to name it"),
        )
    check_not_base(config.output, config.base or adapters[0].base)
    base = base or load_base(config.base or adapters[0].base, device_for(config), config.dtype)
    for path in foreign:
        name = distinct(name_of(path), [adapter.name for adapter in adapters])
        adapters.append(import_lora(path, None, base.name, name, base=base))
        if name != Path(path).stem:
            hooks.notify(f"{path} is called '{name}' here.")
    return base, adapters


def fuse_to_folder(
    config: FuseConfig,
    hooks: Hooks = QUIET,
    base: Base | None = None,
) -> list[str]:
    """Fuse the config's adapters and write the folder; returns warnings to show.

    The folder is a diffusers pipeline in ``config.dtype`` with every token in its tokenizer, ``manifest.json``, the
    resolved settings, the merged factors, and the adapters themselves in ``adapters/``. An older fusion there is
    replaced whole. A fused folder among ``adapters`` means the adapters inside it; LoRA files of other programs are
    imported.

    Raises:
        UserError: see :func:`fuse_adapters` and the loading rule.
    """
    output = config.output
    check_fusion_output(output)
    base, adapters = read_inputs(config, hooks, base)
    precision: MixedPrecision = "no"  # as nothing but a distillation is computed in another
    if config.distill.steps:
        precision = resolve_mixed_precision(config.mixed_precision, base.device, base.dtype)
        precision_note(config.mixed_precision, precision, base.device, config.allow_tf32, hooks.notify)
    config = config.model_copy(update={"mixed_precision": precision})
    fingerprint = base.fingerprint.exact
    parts = (part for part in base.pipeline.components.values() if isinstance(part, nn.Module))
    check_writable(output, sum(weight.nbytes for part in parts for weight in part.parameters()))
    warnings = [text for adapter in adapters if (text := check_base(adapter, base, config.allow_base))]
    warnings += overlaps(adapters)
    if (advice := get_merge(config.merge).advise(len(adapters))) and not config.distill.steps:
        hooks.notify(f"Note: {advice}")
    for adapter in adapters:
        if adapter.per_layer_vectors:
            hooks.notify(mean_note(adapter.name))
    merged = fuse_adapters(base, adapters, config, hooks)
    with atomic_folder(output) as new:
        save_pipeline(base.pipeline.to("cpu"), new)
        files = {}
        for adapter in adapters:
            files[adapter.name] = f"{ADAPTERS}/{adapter.name}.safetensors"
            save_adapter(adapter, new / files[adapter.name])
        if merged:
            write_merged(new / MERGED, merged)
        write_json(new / MANIFEST, manifest_of(config, adapters, files, fingerprint))
        write_text(new / SETTINGS, heading() + to_yaml(config, shared=True))
    return warnings
