"""The inputs of an evaluation: adapters or a fusion, scenes, pictures, references, encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.apply import Strength
from ..adapters.formats.native import load_adapter
from ..config.evaluate import EvaluateConfig
from ..config.scene import Scene
from ..config.settings import build, read_yaml
from ..core.assets import preset_of
from ..core.errors import Fix, UserError
from ..core.files import is_folder
from ..core.names import check_name
from ..merging.fuse import check_together
from ..merging.manifest import adapters_in_fusion, lasting, read_manifest
from ..merging.scales import scale_of
from ..metrics.encoders import Encoder, encoders_here, load_encoder
from ..models.tokens import typed_tokens
from ..scenes.prompts import positive_prompts
from ..scenes.scene import read_scene
from .references import Subject, read_references
from .region_crops import scene_in
from .summary import ALONE

PICTURES = "pictures"  # the folder of generated images inside the output


@dataclass(frozen=True)
class EvaluationInputs:
    """The adapters to evaluate by file, and their base; ``fused`` is the folder if they were fused."""

    adapters: Mapping[Path, Adapter]
    base: str
    fused: Path | None = None

    @property
    def together(self) -> str:
        """The name of the setting with all of them enabled."""
        if self.fused:
            return "fused"
        return "sum" if len(self.adapters) > 1 else ALONE


def load_inputs(config: EvaluateConfig) -> EvaluationInputs | None:
    """The adapters that the settings name; None if they name none.

    Raises:
        UserError: they do not fit together, or one has no token.
    """
    if not config.adapters:
        return None
    folders = [path for path in config.adapters if is_folder(path)]
    if folders and len(config.adapters) > 1:
        raise UserError(f"Give adapter files, or one fused folder such as {folders[0]} alone.")
    if folders:
        [fused] = folders
        loaded, manifest = adapters_in_fusion(fused), read_manifest(fused)
        assert manifest is not None
        files = [fused / concept["file"] for concept in manifest["concepts"].values()]
        inputs = EvaluationInputs(dict(zip(files, loaded, strict=True)), config.base or manifest["base"], fused)
    else:
        loaded_by_path = {path: load_adapter(path) for path in config.adapters}
        inputs = EvaluationInputs(loaded_by_path, config.base or next(iter(loaded_by_path.values())).base)
    check_together(list(inputs.adapters.values()), config.scales)
    for path, adapter in inputs.adapters.items():
        check_name(adapter.name)
        if not adapter.token:
            raise UserError(f"{path} has no token of its own, so no prompt can ask for it; train it with one.")
    return inputs


def evaluation_scales(config: EvaluateConfig, inputs: EvaluationInputs) -> dict[Path, Strength]:
    """The scale of each adapter in the sum, by file."""
    out: dict[Path, Strength] = {}
    for path, adapter in inputs.adapters.items():
        parts = dict.fromkeys(layer.split(".", 1)[0] for layer in adapter.layers)
        each = {part: scale_of(config.scales, adapter.name, f"{part}.") for part in parts}
        out[path] = each if len(set(each.values())) > 1 else next(iter(each.values()), 1.0)
    return out


def generation_settings(config: EvaluateConfig) -> dict[str, Any]:
    """The settings that a scene shares with an evaluation."""
    shared = {
        "num_inference_steps",
        "guidance_scale",
        "sampler",
        "negative_prompt",
        "batch_size",
        "allow_base",
        "device",
        "dtype",
        "quantization",
        "layer_offload",
        "mixed_precision",
        "allow_tf32",
    }
    return config.model_dump(include=shared)


def read_scenes(config: EvaluateConfig, inputs: EvaluationInputs | None) -> dict[str, Scene]:
    """The scenes by name; one without a base and adapters is generated with all adapters of the evaluation.

    Raises:
        UserError: a file is not a scene, or its base and adapters are unknown.
    """
    out: dict[str, Scene] = {}
    for path in config.scenes:
        layer = read_scene(path)
        regions = layer.get("regions") if isinstance(layer.get("regions"), list) else []
        bound = any(isinstance(region, dict) and region.get("adapters") for region in regions or [])
        from_inputs: dict[str, Any] = {}
        if inputs and "base" not in layer:
            named = bool(layer.get("adapters")) or bound
            from_inputs["base"] = lasting(str(inputs.fused) if inputs.fused and not named else inputs.base)
            if not named and not inputs.fused:
                from_inputs["adapters"] = {
                    str(file): strength for file, strength in evaluation_scales(config, inputs).items()
                }
        name = f"scene {path.stem}" if f"scene {path.stem}" not in out else f"scene {path.stem} {len(out)}"
        defaults = {**generation_settings(config), "seed": config.seed, "num_images": config.num_images}
        where = {"output": config.output / PICTURES / name.replace(" ", "-") / "scene.png"}
        out[name] = build(Scene, layer, {**defaults, **from_inputs, **layer}, where, file=str(path))
    return out


def read_pictures(folder: Path) -> dict[Path, Scene]:
    """The single pictures of a folder that this program made, with their scenes.

    Raises:
        UserError: no such folder, or none in it.
    """
    if not is_folder(folder):
        raise UserError(f"No such folder of pictures: {folder}.")
    scenes = {path: scene for path in sorted(folder.rglob("*.png")) if (scene := scene_in(path))}
    if not scenes:
        raise UserError(f"{folder} holds no picture made by this program; only its PNGs record where each concept is.")
    return scenes


def subjects(config: EvaluateConfig, inputs: EvaluationInputs | None, scenes: Sequence[Scene]) -> list[Subject]:
    """The concepts to measure: those of the adapters, else those of the references that a prompt names.

    Raises:
        UserError: there are no references, or no prompt names one of them.
    """
    if inputs:
        return [Subject(a.name, a.noun, a.token, trained_on(path)) for path, a in inputs.adapters.items()]
    if config.references is None:
        raise UserError(
            "Pictures without their adapters need photos of each concept to be compared with.",
            Fix("references", so="to name a folder of them"),
        )
    named = {token for scene in scenes for token in typed_tokens(" ".join(positive_prompts(scene)))}
    concepts, _ = read_references(config.references)
    matching = [
        Subject(concept.name, concept.noun, concept.token) for concept in concepts if concept.token.lower() in named
    ]
    if not matching:
        have, want = ", ".join(concept.token for concept in concepts), ", ".join(sorted(named)) or "no token"
        raise UserError(f"The pictures' prompts name {want}, but {config.references} holds {have}.")
    return matching


def trained_on(path: Path) -> Path | None:
    """The photo folder named in the settings beside an adapter; relative to the working folder or to the settings."""
    settings = path.with_suffix(".yaml")
    if not settings.is_file():
        return None
    named = read_yaml(settings).get("concept")
    if not isinstance(named, str):
        return None
    beside = settings.parent / named
    return beside if is_folder(beside) and not is_folder(named) else Path(named)


def choose_encoders(names: Sequence[str], bases: Sequence[str], device: str = "cpu") -> list[Encoder]:
    """The encoders of those names; by default the pocket one for pocket bases, else local CLIP and DINOv2.

    Args:
        device: where they compute.

    Raises:
        UserError: one is not on this machine, or none suits these bases.
    """
    if names:
        return [load_encoder(name, device) for name in dict.fromkeys(names)]
    if all(preset_of(base) for base in bases):
        return [load_encoder("pocket", device)]
    local = encoders_here(device)
    if not local:
        raise UserError(
            "No encoder that knows photographs is on this machine; a CLIP or DINOv2 model has to be downloaded first.",
            Fix("encoders", so="to name it"),
        )
    return local
