"""Take concepts out of a fusion again: the rest is fused anew, so that the bits are those of a fresh fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..adapters.adapter import Adapter, check_base
from ..adapters.formats.native import save_adapter
from ..config.fuse import FuseConfig
from ..config.settings import build
from ..core.errors import ELSEWHERE, Fix, UserError, nearest
from ..core.files import atomic_folder, write_json
from ..core.hooks import QUIET, Hooks
from ..linalg import Factors
from ..models.base import ENCODERS, NETWORKS
from ..models.loading import load_base
from ..models.targets import find_targets
from .fuse import device_for, fuse_to_folder
from .manifest import (
    ADAPTERS,
    MANIFEST,
    MERGED,
    adapters_in_fusion,
    check_fusion_output,
    check_not_base,
    manifest_of,
    read_manifest,
    save_pipeline,
    write_merged,
)
from .merges import get_merge
from .scales import owner, scale_of


def settings_of(folder: Path, adapters: Sequence[Path], output: Path, device: str = "auto") -> FuseConfig:
    """The settings that a folder was fused with, for other adapters.

    Raises:
        UserError: not a fused folder.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} is not a fused folder: it holds no {MANIFEST}.")
    changed = {"base": manifest["base"], "device": device, "adapters": list(adapters), "output": output}
    return build(FuseConfig, manifest["settings"], changed, {"scales": manifest["scales"]}, file=f"{folder}/{MANIFEST}")


def settings_without(config: FuseConfig, names: Sequence[str], remove: Sequence[str]) -> FuseConfig:
    """The settings of a fusion of ``names`` without those of some of its concepts."""
    named = get_merge(config.merge).name_options
    scales = {key: value for key, value in config.scales.items() if owner(key, names)[0] not in remove}
    options = {
        key: [name for name in value if name not in remove] if key in named else value
        for key, value in config.options.items()
    }
    return config.model_copy(update={"scales": scales, "options": options})


def check_rest(folder: Path, kept: Sequence[Adapter], config: FuseConfig, remove: Sequence[str]) -> None:
    """Refuse to take out what the fusion's merge cannot do without, such as np-lora's only style.

    Raises:
        UserError: the merge is not for the rest.
    """
    try:
        get_merge(config.merge).accept(kept, config)
    except UserError as error:
        raise UserError(
            f"Without {', '.join(remove)} the rest cannot be fused by {config.merge}; fuse the adapters that are "
            f"left in {folder}/{ADAPTERS} by another merge."
        ) from error


def unfuse(
    folder: Path,
    remove: Sequence[str],
    output: Path,
    subtract: bool = False,
    base_name: str | None = None,
    device: str = "auto",
    hooks: Hooks = QUIET,
) -> None:
    """Write ``folder`` without some of its concepts to ``output``.

    The rest is fused again from the base and the kept adapters, so the result has the bits of a fusion that never
    knew the removed ones; without any left it has the base's. Where the base is not available ``subtract`` takes the
    removed changes off the float32 weights instead and reports a bound of the error.

    Raises:
        UserError: an unknown concept, or a base that is not available.
    """
    config = settings_of(folder, [folder], output, device)
    adapters = adapters_in_fusion(folder)
    names = [adapter.name for adapter in adapters]
    for name in remove:
        if name not in names:
            raise UserError(f"No concept '{name}' in {folder}{nearest(name, names)}; there are {', '.join(names)}.")
    if output.resolve() == folder.resolve():
        raise UserError(f"{folder} may hold the only copy of what is taken out.", ELSEWHERE)
    check_fusion_output(output)
    kept = [adapter for adapter in adapters if adapter.name not in remove]
    config = settings_without(config, names, remove)
    check_not_base(output, str(base_name or config.base))
    if kept:
        check_rest(folder, kept, config, remove)
    if subtract:
        _subtract(folder, list(remove), config, hooks)
        return
    config = config.model_copy(update={"base": base_name or config.base})
    try:
        base = load_base(str(config.base), device_for(config), config.dtype)
    except UserError as error:
        raise UserError(
            f"{error.message} It is needed to fuse the rest anew.",
            Fix("base", so="to say where it is"),
            Fix("subtract", "true", "to come close without it"),
        ) from error
    for text in (check_base(adapter, base, config.allow_base) for adapter in adapters):
        if text:
            hooks.notify(f"Warning: {text}")
    manifest = read_manifest(folder) or {}
    exact = manifest.get("base_fingerprint", base.fingerprint.exact) == base.fingerprint.exact
    if not exact:
        hooks.notify(
            f"Note: {folder} was fused on the base in another precision, so the result has not the same last bits."
        )
    if kept:
        paths = [folder / manifest["concepts"][adapter.name]["file"] for adapter in kept]
        fuse_to_folder(config.model_copy(update={"adapters": paths}), hooks, base)
        return
    with atomic_folder(output) as new:
        save_pipeline(base.pipeline.to("cpu"), new)
    hooks.notify(f"{output} is the base again{', to the last bit' if exact else ''}.")


def _subtract(folder: Path, remove: list[str], config: FuseConfig, hooks: Hooks) -> None:
    """Take the removed adapters' changes off the fused weights."""
    merge = get_merge(config.merge)
    if not merge.is_sum(merge.settings(config.options)):
        raise UserError(f"Only plain sums can be subtracted from; {folder} was merged by {config.merge}: get its base.")
    if config.distill.steps:
        raise UserError(f"Only plain sums can be subtracted from; {folder} was distilled after merging: get its base.")
    check_float32(folder)
    fused = load_base(str(folder), "cpu")
    adapters = adapters_in_fusion(folder)
    manifest = read_manifest(folder) or {}
    strength = manifest["scales"]
    gone: dict[str, Tensor] = {}
    targets: dict[str, nn.Linear | nn.Conv2d] = {}
    for adapter in adapters:
        if adapter.name not in remove:
            continue
        if adapter.needs_base:
            raise UserError(f"'{adapter.name}' is {adapter.method.name}, whose ΔW can only be computed with the base.")
        targets |= find_targets(fused.models, adapter.targets)
        for layer in adapter.layers:
            up, down = (part.double() for part in adapter.factors(layer))
            delta = scale_of(strength, adapter.name, layer) * (up @ down)
            gone[layer] = gone[layer] + delta if layer in gone else delta
    bound = 0.0
    with torch.no_grad():
        for layer, delta in gone.items():
            weight = targets[layer].weight
            bound = max(bound, float(weight.abs().max()) * torch.finfo(torch.float32).eps)
            weight.copy_((weight.double() - delta.view(weight.shape)).float())
    kept = [adapter for adapter in adapters if adapter.name not in remove]
    with atomic_folder(config.output) as new:
        save_pipeline(fused.pipeline, new)
        files = {adapter.name: f"{ADAPTERS}/{adapter.name}.safetensors" for adapter in kept}
        for adapter in kept:
            save_adapter(adapter, new / files[adapter.name])
        if kept:
            write_json(new / MANIFEST, manifest_of(config, kept, files, manifest.get("base_fingerprint")))
        if kept and not any(adapter.needs_base for adapter in kept):  # whose ΔW cannot be computed here
            write_merged(new / MERGED, summed(kept, strength))
    hooks.notify(
        f"Subtracted, not fused anew: every weight is within {bound:.1e} of what a fresh fusion has, and the removed "
        "tokens stay in the tokenizer."
    )


def check_float32(folder: Path) -> None:
    """Refuse a folder whose weights are rounded: subtracting would bring the rounding's errors, not the base, back.

    Raises:
        UserError: a weight of a denoising network or a text encoder is not float32.
    """
    for part in (*NETWORKS, *ENCODERS):
        for file in sorted((folder / part).glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if tensors.get_slice(name).get_dtype() not in {"F32", "F64", "I64"}:
                        raise UserError(f"{file} is not float32, and rounding has eaten the rest: get the base.")


def summed(adapters: Sequence[Adapter], strength: Mapping[str, float]) -> dict[str, Factors]:
    """Σ λ_i ΔW_i by layer, as factors."""
    out: dict[str, Factors] = {}
    for adapter in sorted(adapters, key=lambda adapter: adapter.name):
        for layer in adapter.layers:
            up, down = adapter.factors(layer)
            up = up * scale_of(strength, adapter.name, layer)
            earlier = out.get(layer)
            out[layer] = (
                Factors(torch.cat([earlier.up, up], 1), torch.cat([earlier.down, down], 0))
                if earlier
                else Factors(up, down)
            )
    return out
