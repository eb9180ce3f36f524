"""Fuse adapters into a diffusers folder that stock diffusers opens, and remember how it was made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter import Adapter, check_base, shared_columns
from ..base import Base, load_base, quiet
from ..config import FuseConfig, to_yaml
from ..errors import UserError, nearest
from ..files import atomic_folder, write_json, write_text
from ..formats.importing import distinct, import_lora, name_of
from ..formats.native import save_adapter
from ..formats.reading import is_foreign
from ..layerwise import mean_note, use_means
from ..linalg import Factors, exact, sides
from ..methods.targets import find_targets
from ..progress import Event, Progress, silent
from ..training.memory import available, gib, is_large
from .activations import Activations
from .collect import cached, collect
from .folder import (
    ADAPTERS,
    MERGED,
    RECIPE,
    SETTINGS,
    check_apart,
    check_output,
    load_adapters,
    recipe_of,
    write_merged,
)
from .memory import memory_to_watch, room_to_teach
from .registry import Contribution, Merge, get_merge
from .teach import prepare, teach

Seen = dict[str, Activations]


def check_together(adapters: list[Adapter], strength: Mapping[str, float]) -> None:
    """Names and tokens distinct, strengths of adapters that are there.

    Raises:
        UserError: not so.
    """
    for one, other in itertools.combinations(adapters, 2):
        if one.name == other.name:
            raise UserError(f"Two adapters are called '{one.name}'; train one of them again with another name=.")
        for token, others in itertools.product(one.tokens, other.tokens):
            if token.lower() == others.lower():  # a tokenizer does not tell upper case from lower
                mend = (
                    "leave one out" if {"imported"} & {*one.config, *other.config} else "train one with another token="
                )
                raise UserError(f"'{one.name}' and '{other.name}' share the token {token}; {mend}.")
    names = [adapter.name for adapter in adapters]
    parts = {component for adapter in adapters for component in (layer.split(".")[0] for layer in adapter.layers)}
    for key in strength:
        name, component = owner(key, names)
        if name not in names or (component and component not in parts):
            raise UserError(
                f"--strength names '{key}'{nearest(key, names)}, but the adapters are {', '.join(names)} "
                f"(and their components {', '.join(sorted(parts))})."
            )


def owner(key: str, names: Iterable[str]) -> tuple[str, str]:
    """``rex`` or ``rex.unet`` as (name, component); a name may hold dots itself."""
    if key in names:
        return key, ""
    name, _, component = key.rpartition(".")
    return (name, component) if name else (key, "")


def strength_of(strength: Mapping[str, float], name: str, layer: str) -> float:
    """λ of one adapter in one layer: its own, times that of the layer's component if there is one."""
    return strength.get(name, 1.0) * strength.get(f"{name}.{layer.split('.', 1)[0]}", 1.0)


def strengths_of(config: FuseConfig, adapters: Iterable[Adapter]) -> dict[str, dict[str, float]]:
    """λ of every adapter by component."""
    components = {layer.split(".", 1)[0] for adapter in adapters for layer in adapter.layers}
    return {a.name: {part: strength_of(config.strength, a.name, f"{part}.") for part in components} for a in adapters}


def fuse_adapters(
    base: Base,
    adapters: list[Adapter],
    config: FuseConfig,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
    install: bool = True,
) -> dict[str, Factors] | None:
    """Add the adapters' merged ΔW to the weights of ``base`` and their tokens to its tokenizer, in place.

    Adapters act in canonical order (by name), so the result does not depend on how they were listed; sums are
    formed in float64 and rounded once. Then the result is taught, if the config says so. ``install`` says whether
    their tokens are still to be put in; layer-wise ones are their mean afterwards, as in a stock pipeline. Returns the
    merged factors by layer; None where a merge gave dense changes, or teaching did.

    Raises:
        UserError: two adapters share a name or a token, a strength names none of them, the merge is not for them,
            teaching meets an adapter without a word of its own or unknown targets.
        NotFiniteError: teaching met NaN or infinity.
    """
    adapters = sorted(adapters, key=lambda adapter: adapter.name)
    check_together(adapters, config.strength)
    merge = get_merge(config.merge)
    merge.check(adapters)
    use_means(base)
    targets: dict[str, nn.Linear | nn.Conv2d] = {}
    for adapter in adapters:
        targets |= find_targets(base.models, adapter.targets)
        for token, vectors in adapter.tokens.items() if install else ():
            base.install(token, vectors)
    layers = [layer for layer in targets if any(layer in adapter.sizes for adapter in adapters)]
    learners = [targets[layer] for layer in layers] + taught_besides(base, config, set(layers))
    lessons = None
    if config.teach.steps:  # before anything is fused: the base is one of the teachers
        if is_large(base):
            note(room_to_teach(base, [layer.weight for layer in learners], config.teach))
        lessons = prepare(base, adapters, strengths_of(config, adapters), config.teach, config.seed, progress)
    merged: dict[str, Factors] = {}
    dense = False
    done = 0
    for stage in stages(layers, merge, config):
        seen, ordinary = watch(
            base, adapters, {name: targets[name] for name in stage}, layers, merge, config, progress, note
        )
        for layer in stage:
            weight = targets[layer].weight
            contributions = contribute(adapters, layer, weight, config, seen)
            found = merge.combine(contributions, config, ordinary.get(layer))
            if isinstance(found, Factors):
                merged[layer] = found
                delta = found.delta()
            else:
                dense, delta = True, found
            with torch.no_grad():
                before = exact(weight)
                weight.copy_((before + delta.view(weight.shape).to(before.device)).to(weight.dtype))
            done += 1
            progress(Event("fuse", done, len(layers), {"layer": layer}))
    if lessons:
        weights, tokens = [layer.weight for layer in learners], [t for a in adapters for t in a.tokens]
        teach(base, lessons, weights, tokens, config.teach, config.seed, progress)
    return None if dense or lessons else merged


def taught_besides(base: Base, config: FuseConfig, adapted: Container[str]) -> list[nn.Linear | nn.Conv2d]:
    """The layers of ``teach.targets`` that no adapter changes.

    Raises:
        UserError: unknown targets.
    """
    if not (config.teach.steps and config.teach.targets):
        return []
    try:
        found = find_targets(base.models, config.teach.targets)
    except UserError as error:
        raise UserError(f"teach.targets: {error}") from error
    return [layer for name, layer in found.items() if name not in adapted]


def contribute(
    adapters: list[Adapter], layer: str, weight: Tensor, config: FuseConfig, seen: Mapping[str, Seen]
) -> list[Contribution]:
    """What every adapter brings to one layer; one without the layer wants it to stay as it is."""
    found = []
    for adapter in adapters:
        there = layer in adapter.sizes
        found.append(
            Contribution(
                adapter.name,
                adapter.method,
                adapter.parameters_of(layer) if there else {},
                adapter.frozen_of(layer, weight.detach().cpu()) if there else {},
                adapter.slot,
                strength_of(config.strength, adapter.name, layer),
                seen.get(adapter.name, {}).get(layer),
                None if there else sides(weight),
                layer,
            )
        )
    return found


def stages(layers: list[str], merge: Merge, config: FuseConfig) -> list[list[str]]:
    """The layers in the order in which they are fused: all at once, or as Mix-of-Show does."""
    if not merge.activations or config.gradient.staging == "own":
        return [layers]
    return [list(stage) for _, stage in itertools.groupby(sorted(layers, key=stage_of), stage_of)]


def stage_of(layer: str) -> int:
    """Mix-of-Show's order: text encoders, then the keys and values that read them, then the rest."""
    if layer.startswith("text_encoder"):
        return 0
    return 1 if ".attn2.to_k" in layer or ".attn2.to_v" in layer else 2


def watch(
    base: Base,
    adapters: list[Adapter],
    stage: dict[str, nn.Linear | nn.Conv2d],
    layers: list[str],
    merge: Merge,
    config: FuseConfig,
    progress: Progress,
    note: Callable[[str], None],
) -> tuple[dict[str, Seen], Seen]:
    """What each adapter's layers of a stage see, and what they see on ordinary prompts; nothing if nobody asks.

    In a staged fusion the earlier stages are fused already and the adapter acts on this one and the later ones.
    """
    if not merge.activations:
        return {}, {}
    settings, own = config.gradient, config.gradient.staging == "own"
    sizes = {layer: next(adapter.sizes[layer] for adapter in adapters if layer in adapter.sizes) for layer in stage}
    need = memory_to_watch(sizes, sum(max(1, len(adapter.tokens)) for adapter in adapters), settings)
    free = available(torch.device("cpu"))
    if free is not None and need > free:
        raise UserError(
            f"Watching {len(stage)} layers needs {gib(need)} of memory and {gib(free)} are free; fuse fewer adapters "
            "at once, set gradient.staging=fused, or take a merge that watches nothing, such as spectral."
        )
    note(f"Watching {len(stage)} layers needs up to {need / 2**20:.0f} MiB.")
    first = stage_of(next(iter(stage)))
    acting = None if own else {layer for layer in layers if stage_of(layer) >= first}

    def see(adapter: Adapter | None) -> Seen:
        def make() -> Seen:
            return collect(base, adapter, stage, settings, config.seed, progress, acting)

        return cached(base, adapter, stage, settings, config.seed, make) if own and settings.cache else make()

    for adapter in adapters:
        if not adapter.token:
            note(f"'{adapter.name}' has no word of its own, so it is watched on ordinary prompts, as the anchor is.")
    ordinary = see(None) if settings.anchor > 0 else {}
    return {adapter.name: see(adapter) for adapter in adapters}, ordinary


def overlaps(adapters: list[Adapter]) -> list[str]:
    """A sentence for every two adapters whose slots share columns."""
    return [
        f"'{a.name}' ({a.slot}) and '{b.name}' ({b.slot}) share {shared} {a.method.slot}; they will disturb each other."
        for a, b in itertools.combinations(adapters, 2)
        if (shared := shared_columns(a, b))
    ]


def device_for(config: FuseConfig) -> str:
    """Where to fuse: on the CPU if nobody said otherwise and no network has to run, since float32 may not fit a GPU."""
    runs = get_merge(config.merge).activations or config.teach.steps > 0
    return config.device if runs or config.device != "auto" else "cpu"


def fuse_to_folder(
    config: FuseConfig,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
    base: Base | None = None,
) -> list[str]:
    """Fuse the config's adapters and write the folder; returns warnings to show.

    The folder is a float32 diffusers pipeline with every token in its tokenizer, ``recipe.json``, the resolved
    settings, the merged factors, and the adapters themselves in ``adapters/``. An older fusion there is replaced
    whole. A fused folder among ``adapters`` stands for the adapters inside it; LoRA files of other programs are
    imported.

    Raises:
        UserError: see :func:`fuse_adapters` and the loading rule.
    """
    output = config.output
    check_output(output)
    foreign = [path for path in config.adapters if is_foreign(path)]
    adapters = [adapter for path in config.adapters if path not in foreign for adapter in load_adapters(path)]
    if not adapters and config.base is None:
        raise UserError(
            f"{config.adapters[0]} is not an adapter of this program; a LoRA of another needs its base named by --base."
        )
    check_apart(output, config.base or adapters[0].base)
    base = base or load_base(config.base or adapters[0].base, device_for(config))
    fingerprint = base.fingerprint.exact
    for path in foreign:
        name = distinct(name_of(path), [adapter.name for adapter in adapters])
        adapters.append(import_lora(path, None, base.name, name, base=base))
        if name != Path(path).stem:
            note(f"{path} is called '{name}' here.")
    warnings = [text for adapter in adapters if (text := check_base(adapter, base, config.allow_base))]
    warnings += overlaps(adapters)
    for adapter in adapters:
        if adapter.layerwise:
            note(mean_note(adapter.name))
    merged = fuse_adapters(base, adapters, config, progress, note)
    with atomic_folder(output) as new:
        with quiet():
            base.pipeline.to("cpu").save_pretrained(new)
        files = {}
        for adapter in adapters:
            files[adapter.name] = f"{ADAPTERS}/{adapter.name}.safetensors"
            save_adapter(adapter, new / files[adapter.name])
        if merged:
            write_merged(new / MERGED, merged)
        write_json(new / RECIPE, recipe_of(config, adapters, files, fingerprint))
        write_text(new / SETTINGS, to_yaml(config))
    return warnings
