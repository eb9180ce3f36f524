"""The public Python API: ``import spectral_diffusion as sd``.

A stock diffusers pipeline goes in, objects come out, and files are written only where ``output=`` asks for them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from torch import Tensor

from .adapters import adapter as core
from .adapters import apply
from .adapters.attach import has_adapters
from .adapters.formats.card import MARK
from .adapters.formats.native import load_adapter, save_adapter
from .adapters.snapshot import copy_tokenizers, snapshot
from .config.fuse import MergeConfig
from .config.presets import preset_settings, settings_for
from .config.scene import Box, ControlImage
from .config.scene import Region as SceneRegion
from .config.scene import Scene as SceneSettings
from .config.settings import build
from .config.train import TrainConfig
from .core.errors import Cancelled, Fix, UserError
from .core.files import write_text
from .core.hooks import QUIET, Event, Hooks
from .core.hub import hub_problem
from .core.outputs import refuse_overwriting_page
from .data.folder import describe, load_concept, open_photo
from .hub import ADAPTER_FILE, CARD, adapter_card, publish
from .linalg import Factors
from .merging.export import ExportOptions
from .merging.export import export as export_file
from .merging.fuse import fuse_adapters
from .metrics.encoders import load_encoder
from .models.base import Base, base_of
from .models.fingerprint import Fingerprint
from .models.loading import load_base
from .scenes.auto_regions import AutoConcept, concepts_named
from .scenes.control import read_control_image
from .scenes.sampling import sample
from .training.output import refuse_other_output
from .training.run import train_to_file

LOADED = "_spectral_diffusion_loaded"  # the attribute of a pipeline that has a LoadedAdapters


@dataclass(frozen=True)
class LoadedAdapters:
    """What a pipeline was before :func:`load_adapters`: its fingerprint, and how to restore it."""

    fingerprint: Fingerprint
    restore: Callable[[], None]


class Adapter(core.Adapter):
    """One trained concept. Get one from :func:`train` or :meth:`from_pretrained`; it can be a key of a mapping."""

    @classmethod
    def of(cls, adapter: core.Adapter) -> Adapter:
        """The public form of the library's internal object."""
        return cls(**{item.name: getattr(adapter, item.name) for item in fields(adapter)})

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> Adapter:
        """Load an adapter file, a folder that :meth:`save_pretrained` wrote, or a repository of the hub.

        Raises:
            UserError: no adapter is found.
        """
        path = Path(source)
        if path.is_dir():
            path = path / ADAPTER_FILE
        elif not path.exists() and path.suffix != ".safetensors" and str(source).count("/") == 1:
            from huggingface_hub import hf_hub_download

            try:
                path = Path(hf_hub_download(str(source), ADAPTER_FILE, revision=revision))
            except Exception as error:  # the hub's client raises nearly everything
                raise UserError(f"Cannot load '{source}' from the hub: {hub_problem(error)}.") from error
        return cls.of(load_adapter(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``adapter.safetensors`` and a model card into a folder, as a hub repository has them.

        Raises:
            UserError: the folder has a ``README.md`` that is no card of this program, or another program's
                ``adapter.safetensors``.
        """
        folder = Path(folder)
        refuse_overwriting_page(folder / CARD, MARK)
        refuse_other_output(folder / ADAPTER_FILE)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self, folder / ADAPTER_FILE)
        write_text(folder / CARD, adapter_card(self))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str = "",
        consent: bool = False,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload the adapter and its card; returns the repository's address.

        Args:
            license: as the hub spells it, such as ``openrail++``.
            consent: your word that you may share what it shows.
            token: a login for this call alone; default: the hub client's own.

        Raises:
            UserError: no license or consent, or the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / ADAPTER_FILE
            save_adapter(self, file)
            return publish(file, repo_id, license, consent, private, token)

    def save(self, path: str | Path) -> None:
        """Write one ``.safetensors`` file."""
        save_adapter(self, Path(path))

    def export(self, path: str | Path, format: str = "kohya", **options: Any) -> list[Path]:
        """Write it for other programs.

        Args:
            format: ``kohya`` (A1111; ComfyUI but for Z-Image), ``comfyui`` (the original code's layer names),
                ``diffusers``, ``embedding``, ``folder`` or ``checkpoint``.
            options: ``rank``, ``dtype`` and ``picture`` of :class:`.merging.export.ExportOptions`.

        Raises:
            UserError: an unknown format, or the output exists and is not ours.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{self.name}.safetensors"
            save_adapter(self, file)
            return export_file(file, Path(path), format, ExportOptions(**options))

    def delta(self, layer: str, weight: Tensor | None = None) -> Tensor:
        """ΔW (out, in) of a layer; ``weight`` is the base's, for methods that need it (DoRA, OFT, SVDiff).

        Raises:
            UserError: the layer is not adapted, or the weight is needed.
        """
        if layer not in self.sizes:
            raise UserError(f"'{self.name}' does not adapt the layer {layer}.")
        return Factors(*self.factors(layer, weight)).delta()


Pipeline = Any  # a diffusers StableDiffusionPipeline or StableDiffusionXLPipeline
Scales = Mapping[core.Adapter, float] | Sequence[core.Adapter]


def train(
    base: Pipeline | str,
    photos: str | Path,
    *,
    class_noun: str | None = None,
    output: str | Path | None = None,
    config: str | Path | None = None,
    callbacks: Sequence[Callable[[Event], None]] = (),
    hooks: Hooks = QUIET,
    **settings: Any,
) -> Adapter:
    """Train one concept from a folder of photos, with the defaults of the command line.

    Args:
        base: a loaded pipeline, or what :func:`.models.loading.load_base` takes.
        class_noun: such as ``dog``; default: ``concept.yaml`` of the folder, else its name.
        output: an adapter file to write; without it, nothing is written.
        config: a preset by name or a YAML file; default: the preset of the base.
        callbacks: called after every training step with an :class:`Event`.
        hooks: progress, messages, and whether to stop: the state is then saved beside ``output``, for ``resume=True``;
            without an ``output`` nothing is kept.
        settings: any other of :class:`TrainConfig`, such as ``method``, ``rank``, ``steps`` or ``prior={…}``; also
            ``resume`` and ``force``. ``slot`` may be a :class:`Slot`; ``next`` is the first free one of the
            ``ledger``, a file that is ``slots.json`` beside the output by default, and without one the first.

    Raises:
        UserError: one sentence on what is wrong, such as adapters that are loaded on the pipeline.
        Cancelled: ``hooks.should_stop`` said so.
    """

    def show(event: Event) -> None:
        hooks.progress(event)
        for callback in callbacks if event.stage == "train" else ():
            callback(event)

    run = {name: settings.pop(name) for name in ("resume", "force") if name in settings}
    settings |= {name: str(settings[name]) for name in ("slot", "ledger") if settings.get(name) is not None}
    chosen = None if config is None else str(config)
    loading: Mapping[str, Any] = settings
    if isinstance(base, str):  # a preset may say how it is loaded
        named = {"concept": photos, "base": base, "output": "any.safetensors"}
        loading = settings_for(TrainConfig, "train", named, settings, config=chosen).model_dump(include=set(LOADING))
    with _borrowed(base, loading) as loaded, tempfile.TemporaryDirectory() as scratch:
        _check_no_adapters(loaded)
        name = settings.get("name") or describe(Path(photos)).name
        given = {
            "concept": photos, "base": loaded.name, "class_noun": class_noun,
            "output": str(output or Path(scratch) / f"{name}.safetensors"),
        }  # fmt: skip
        given = {key: value for key, value in given.items() if value is not None}
        resolved = settings_for(TrainConfig, "train", given, settings, config=chosen)
        every = replace(hooks, progress=show)
        try:
            return Adapter.of(train_to_file(resolved, hooks=every, base=loaded, **run))
        except Cancelled as stopped:
            if output is not None:
                raise
            raise Cancelled("Stopped; nothing is kept, as no output was given to keep it beside.") from stopped


def load_adapters(pipeline: Pipeline, adapters: Scales, allow_base: bool = False) -> list[str]:
    """Let adapters act on a pipeline at their scales, tokens included; returns warnings. Call it once.

    Raises:
        UserError: an adapter is of another base, two share a token, or some are loaded already.
    """
    base = base_of(pipeline)
    _check_no_adapters(base)
    setattr(pipeline, LOADED, LoadedAdapters(base.fingerprint, snapshot(base)))
    try:
        return apply.put_adapters(base, list(_scales(adapters).items()), allow_base)
    except BaseException:
        unload_adapters(pipeline)
        raise


def unload_adapters(pipeline: Pipeline) -> None:
    """Remove every adapter and its tokens; the pipeline is as it was before :func:`load_adapters`."""
    loaded: LoadedAdapters | None = getattr(pipeline, LOADED, None)
    if loaded is None:
        return
    loaded.restore()
    base_of(pipeline).family.release(pipeline)
    delattr(pipeline, LOADED)


def fuse(
    pipeline: Pipeline | str,
    adapters: Scales,
    method: str | None = None,
    distill_steps: int = 0,
    *,
    hooks: Hooks = QUIET,
    **settings: Any,
) -> Pipeline:
    """A new pipeline with the adapters merged into its weights, their tokens included; the given one is untouched.

    Args:
        method: the merge, such as ``spectral``, ``gradient``, ``ties``; default: that of the base's preset, else
            ``spectral``.
        distill_steps: steps of distillation after the merge.
        settings: any other of :class:`.config.fuse.MergeConfig`, such as ``options={…}`` or ``calibration={…}``.

    Raises:
        UserError: adapters are loaded on the pipeline, or see :func:`.merging.fuse.fuse_adapters`.
    """
    scales = _scales(adapters)
    given: dict[str, Any] = {"scales": {adapter.name: scale for adapter, scale in scales.items()}}
    if method:
        given["merge"] = method
    if distill_steps:
        given["distill"] = {"steps": distill_steps}

    def resolved(name: str) -> MergeConfig:
        return build(MergeConfig, preset_settings(name, "fuse"), given, settings)

    if isinstance(pipeline, str):
        config = resolved(pipeline)
        base = load_base(pipeline, config.device)
    else:
        with _borrowed(pipeline) as source:
            _check_no_adapters(source)
            base = base_of(copy.deepcopy(source.pipeline), source.name)
        config = resolved(base.name)
    for adapter in scales:
        if warning := core.check_base(adapter, base, config.allow_base):
            hooks.notify(warning)
    fuse_adapters(base, list(scales), config, hooks)
    base.family.release(base.pipeline)
    return base.pipeline


@dataclass
class Region:
    """A box of the picture with a prompt of its own.

    Attributes:
        box: left, top, right, bottom, in fractions of the picture.
        adapter: a concept that acts only here; one that is fused into the pipeline acts by its token alone.
        prompt: default: the adapter's token.
    """

    box: Box
    adapter: core.Adapter | None = None
    prompt: str | None = None
    scale: float = 1.0
    negative_prompt: str | None = None


@dataclass
class Scene:
    """One picture of several things.

    Attributes:
        controls: control images, as files.
        settings: any other setting of a scene file, such as ``num_inference_steps`` or ``width``.
    """

    prompt: str = ""
    regions: Sequence[Region] = ()
    controls: Sequence[ControlImage] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def generate(
    pipeline: Pipeline | str,
    scene: Scene | str,
    seeds: Sequence[int] = (0,),
    *,
    hooks: Hooks = QUIET,
    **settings: Any,
) -> list[Image.Image]:
    """Generate a scene (or a plain prompt) once per seed.

    Args:
        pipeline: a stock pipeline, fused or with adapters loaded.
        settings: of the scene, such as ``guidance_scale``.

    Raises:
        UserError: a region or a control image that does not fit.
        Cancelled: ``hooks.should_stop`` said so.
    """
    scene = Scene(scene) if isinstance(scene, str) else scene
    with _borrowed(pipeline, {**scene.settings, **settings}) as base:
        regions, bound = [], []
        known = {token.lower() for token in base.known_tokens}
        for region in scene.regions:
            prompt = region.prompt or (region.adapter.token if region.adapter else "")
            regions.append(SceneRegion(box=region.box, prompt=prompt, negative_prompt=region.negative_prompt))
            acting = region.adapter is not None and region.adapter.token not in known
            bound.append([(region.adapter, region.scale)] if acting and region.adapter else [])
        layer = {"prompt": scene.prompt, "regions": regions, "controls": list(scene.controls), "seeds": list(seeds)}
        config = build(SceneSettings, preset_settings(base.name, "generate"), dict(scene.settings), settings, layer)
        drawings = [read_control_image(control) for control in config.controls]
        by_token = {adapter.token: adapter for pairs in bound for adapter, _ in pairs}
        for adapter in by_token.values():
            if warning := core.check_base(adapter, base, config.allow_base):
                hooks.notify(warning)
        base = _with_tokens(base, list(by_token.values()))
        concepts = [AutoConcept(token) for token in concepts_named(base, config, {}).values()]
        inputs = {"controls": drawings, "bound": bound, "concepts": concepts}
        return sample(base, [config.prompt] * len(seeds), list(seeds), config, hooks, **inputs)


def identity(
    images: Sequence[Image.Image], references: Mapping[core.Adapter | str, str | Path], encoder: str = "pocket"
) -> dict[str, float]:
    """How much images look like each concept's photos: the mean cosine to all of them, by concept.

    Args:
        references: concept to its folder of photos.
        encoder: ``pocket`` for the pocket base, else the folder or hub id of a CLIP or DINOv2 model.

    Raises:
        UserError: no such encoder, or a folder without photos.
    """
    model = load_encoder(encoder)
    shown = model.embed(list(images))
    scores = {}
    for concept, folder in references.items():
        photos = [open_photo(photo.path) for photo in load_concept(Path(folder)).photos]
        name = concept if isinstance(concept, str) else concept.name
        scores[name] = float((shown @ model.embed(photos).mT).mean())
    return scores


LOADING = ("device", "dtype", "quantization", "layer_offload")  # the settings that say how a base is loaded


def _base(pipeline: Pipeline | str, settings: Mapping[str, Any]) -> Base:
    """A loaded pipeline's base, or that of a name, loaded as the settings say.

    Raises:
        UserError: the settings say how to load a pipeline that is loaded.
    """
    asked = {name: settings[name] for name in LOADING if name in settings}
    if isinstance(pipeline, str):
        return load_base(pipeline, **asked)
    for name in ("quantization", "layer_offload"):
        if asked.get(name, "none") not in ("none", False):
            raise UserError(
                f"The pipeline is loaded already, so {name} comes too late; name the base, or load the pipeline so.",
                Fix(name, so="left out"),
            )
    return base_of(pipeline)


@contextmanager
def _borrowed(pipeline: Pipeline | str, settings: Mapping[str, Any] = MappingProxyType({})) -> Iterator[Base]:
    """The base that a pipeline is, for a while; without loaded adapters the pipeline is as before afterwards."""
    base = _base(pipeline, settings)
    loaded: LoadedAdapters | None = getattr(base.pipeline, LOADED, None)
    if loaded:
        base.fingerprint = loaded.fingerprint  # of the weights without the adapters
    try:
        yield base
    finally:
        if not hasattr(base.pipeline, LOADED):
            base.family.release(base.pipeline)


def _check_no_adapters(base: Base) -> None:
    """Refuse a pipeline with adapters on it: they would be trained on top of, or fused without a word.

    Raises:
        UserError: there are some.
    """
    if hasattr(base.pipeline, LOADED):
        raise UserError("Adapters are loaded on this pipeline already; call unload_adapters first.")
    if has_adapters(base.models):
        raise UserError("A LoRA is loaded on this pipeline; call its unload_lora_weights() first.")


def _scales(adapters: Scales) -> dict[core.Adapter, float]:
    return dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)


def _with_tokens(base: Base, adapters: Sequence[core.Adapter]) -> Base:
    """The base with the tokens of adapters that act in regions only; itself if there are none."""
    if not adapters:
        return base
    pipeline = base.denoiser.make_pipeline(base.pipeline.scheduler)
    other = base_of(pipeline, base.name)
    for encoder in other.tokenizers:
        setattr(pipeline, encoder, copy.deepcopy(getattr(pipeline, encoder)))
    other = base_of(pipeline, base.name)
    copy_tokenizers(other)
    for adapter in adapters:
        apply.install_tokens(other, adapter)
    return other
