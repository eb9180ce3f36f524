"""Generate scenes into files: load a scene's files, check them, sample, and write each picture with its scene."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..adapters.adapter import Adapter, check_base
from ..adapters.apply import install_tokens, put_adapters
from ..adapters.formats.import_lora import import_lora
from ..adapters.formats.native import load_adapter
from ..adapters.formats.reading import is_foreign
from ..config.scene import Scene
from ..core.errors import ELSEWHERE, Fix, UserError, nearest
from ..core.files import check_writable
from ..core.hooks import QUIET, Hooks
from ..core.precision import resolve_mixed_precision
from ..data.image_grid import labelled_sheet
from ..data.image_io import open_on_black
from ..models.base import Base
from ..models.loading import load_base
from .auto_regions import AutoConcept, Box, concepts_named
from .control import ControlMap, read_control_image
from .png_metadata import BASE, is_our_png, is_same, save_png, sources_of
from .prompts import foreign_syntax, prompts_in, tokens_in
from .sampling import Bound, Preview, SceneInputs, SceneSampler
from .scene import adapter_files


def load_own(scene: Scene) -> dict[str, Adapter]:
    """The adapters of this program that a scene and its regions name, by file.

    Raises:
        UserError: one is missing or damaged.
    """
    return {name: load_adapter(Path(name)) for name in adapter_files(scene) if not is_foreign(Path(name))}


def load_foreign(scene: Scene, base: Base, own: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The others, which are LoRAs of other programs, read for this base.

    Raises:
        UserError: one is no LoRA for this base.
    """
    others = [name for name in adapter_files(scene) if name not in own]
    return {name: import_lora(Path(name), None, base.name, base=base) for name in others}


def bind(
    base: Base, scene: Scene, loaded: Mapping[str, Adapter], hooks: Hooks, fused: Collection[str] = ()
) -> list[Bound]:
    """Check every region's adapters against the base, and put their tokens in.

    Args:
        fused: the tokens that the base brings along, in lower case; their concepts act by them alone.

    Raises:
        UserError: an adapter does not belong on this base, or two different ones share a token.
    """
    owners: dict[str, str] = {}
    acting: set[str] = set()
    for path in dict.fromkeys(path for region in scene.regions for path in region.adapters):
        adapter = loaded[path]
        if adapter.token.lower() in fused:
            hooks.notify(f"Note: {adapter.token} is in the base already; {path} acts by that token alone.")
            continue
        acting.add(path)
        if warning := check_base(adapter, base, scene.allow_base):
            hooks.notify(warning)
        for token in adapter.tokens:
            if other := owners.get(token.lower()):  # tokenizers ignore case
                raise UserError(f"{path} and {other} share the token {token}; train one with another.")
            owners[token.lower()] = path
        if path not in scene.adapters:  # else it acts everywhere too, and its tokens are there
            install_tokens(base, adapter)
    return [
        [(loaded[path], strength) for path, strength in region.adapters.items() if path in acting]
        for region in scene.regions
    ]


def place(base: Base, scene: Scene, loaded: Mapping[str, Adapter], hooks: Hooks) -> list[AutoConcept]:
    """Let the scene's adapters act: in regions that are found where that is wanted, else everywhere; gives the former.

    Raises:
        UserError: an adapter does not belong on this base, or regions cannot be found.
    """
    named = concepts_named(base, scene, {path: loaded[path] for path in scene.adapters})
    for path in named:
        if path in scene.adapters:
            if warning := check_base(loaded[path], base, scene.allow_base):
                hooks.notify(warning)
            install_tokens(base, loaded[path])
    everywhere = [(loaded[path], strength) for path, strength in scene.adapters.items() if path not in named]
    for text in put_adapters(base, everywhere, scene.allow_base):
        hooks.notify(text)
    bound = {path: [(loaded[path], strength)] for path, strength in scene.adapters.items()}
    return [AutoConcept(token, bound.get(path, [])) for path, token in named.items()]


def truncated_text(base: Base, prompt: str) -> str:
    """The end of a prompt that the text encoder never sees; empty if it sees everything."""
    return base.denoiser.unread_text(base.spell(prompt, full=True))


def remarks(base: Base, scene: Scene, controls: Sequence[ControlMap]) -> Iterator[str]:
    """Notes before a scene is generated: truncated prompts, control images and masks of other proportions."""
    known, prompts = base.known_tokens, prompts_in(scene)
    for word in tokens_in(prompts):
        if word.lower() not in {token.lower() for token in known}:
            what = f"{word} is no token of this base or its adapters{nearest(word, known)}"
            yield f"Note: {what}; it is read as plain text."
    yield from (f"Note: {sentence}" for sentence in foreign_syntax(prompts))
    for prompt in prompts:
        if lost := truncated_text(base, prompt):
            yield f"Note: '{prompt[:40]}' is longer than this base reads; cut off: '{lost}'."
    if "sampler" in scene.model_fields_set and scene.sampler not in base.family.samplers:
        yield f"Note: sampler={scene.sampler} changes nothing: {base.family.title} has {base.family.samplers[0]} only."
    size = (scene.width or base.size, scene.height or base.size)
    shapes = [(f"{control.kind} {control.name}", control.image.size) for control in controls]
    shapes += [(f"mask {region.mask.name}", open_on_black(region.mask).size) for region in scene.regions if region.mask]
    for what, shape in dict.fromkeys(shapes):
        if shape[0] * size[1] != shape[1] * size[0]:
            was, now = "×".join(map(str, shape)), "×".join(map(str, size))
            yield f"Note: the {what} of {was} is stretched to the picture's {now}."


def generate_to_file(
    scene: Scene,
    hooks: Hooks = QUIET,
    preview: Preview | None = None,
    resume: bool = False,
    expected: Mapping[str, str] | None = None,
    base: Base | None = None,
    every: int = 1,
) -> list[Path]:
    """Generate a scene's pictures and write each, with its scene inside, as soon as it is done.

    One picture goes to ``output``; several to ``<stem>-<seed>.png`` each, and a contact sheet to ``output``.

    Args:
        resume: leave out batches whose pictures exist already, made from this very scene and its files.
        expected: what an earlier picture of the scene was made from; a note names every file that has changed since.
        base: the scene's base if it is loaded already; the scene's adapters stay loaded on it.
        every: steps from one preview to the next.

    Raises:
        UserError: anything that the user can fix.
    """
    if scene.output.suffix.lower() != ".png":
        raise UserError(f"The output {scene.output} must end in .png.")
    if not scene.prompt.strip():
        raise UserError("A prompt is needed.", Fix("prompt", '"a photo of <rex> on the beach"'))
    seeds = scene.every_seed()
    if scene.only_seed is not None and scene.only_seed not in seeds:
        raise UserError(f"only_seed={scene.only_seed} is none of the seeds {', '.join(map(str, seeds[:8]))}.")
    controls = [read_control_image(control) for control in scene.controls]
    own = load_own(scene)
    check_writable(scene.output)
    for path in {scene.output, *output_files(scene).values()}:
        if path.exists() and not is_our_png(path):
            raise UserError(f"{path} was not generated by this program, and would be lost.", ELSEWHERE)
    base = base or load_base(scene.base, scene.device, scene.dtype, scene.quantization, scene.layer_offload)
    scene = with_precision(scene, base)
    sources = sources_of(scene, base)
    for name, before in (expected or {}).items():
        if name in sources and sources[name] != before:
            what = f"The base {scene.base}" if name == BASE else name
            hooks.notify(f"Note: {what} has changed since that picture was made; this one will differ.")
    loaded = {**own, **load_foreign(scene, base, own)}
    fused = {token.lower() for token in base.known_tokens}
    concepts = place(base, scene, loaded, hooks)
    scene = scene.model_copy(update={"auto_regions": bool(concepts)})  # settled, for the picture made again
    bound = bind(base, scene, loaded, hooks, fused)
    for text in remarks(base, scene, controls):
        hooks.notify(text)

    inputs = SceneInputs(controls, bound, concepts, preview, every)
    written = write_images(base, scene, sources, inputs, hooks, resume)
    if len(written) > 1:
        save_png(labelled_sheet(written, [str(seed) for seed in seeds]), scene.output, scene, sources)
        written.insert(0, scene.output)
    return written


def with_precision(scene: Scene, base: Base) -> Scene:
    """A scene whose mixed precision is settled, so that its pictures can be made again elsewhere."""
    precision = resolve_mixed_precision(scene.mixed_precision, base.device, base.dtype)
    return scene.model_copy(update={"mixed_precision": precision})


def output_files(scene: Scene) -> dict[int, Path]:
    """The output file of every seed."""
    seeds = scene.every_seed()
    if len(seeds) == 1 or scene.only_seed is not None:
        return dict.fromkeys(seeds, scene.output)
    return {seed: scene.output.with_name(f"{scene.output.stem}-{seed}.png") for seed in seeds}


def write_images(
    base: Base,
    scene: Scene,
    sources: Mapping[str, str],
    inputs: SceneInputs,
    hooks: Hooks = QUIET,
    resume: bool = False,
) -> list[Path]:
    """Generate and write a scene's single pictures, without a sheet, on a base with its adapters loaded.

    ``sources`` is the result of :func:`.png_metadata.sources_of` before loading; the rest as :func:`generate_to_file`.
    """
    scene = with_precision(scene, base)
    seeds, files = scene.every_seed(), output_files(scene)
    batches = [seeds[start : start + scene.batch_size] for start in range(0, len(seeds), scene.batch_size)]
    if scene.only_seed is not None:  # the batch decides its last bits, so its neighbors are generated again too
        batches = [batch for batch in batches if scene.only_seed in batch]
    written: list[Path] = []
    places: list[dict[str, Box]] = []
    sampler: SceneSampler | None = None  # one for all batches: it loads control networks and encodes the regions
    for batch in batches:
        embedded = {
            seed: scene.model_copy(update={"seeds": batch, "only_seed": seed, "seed": seed, "num_images": 1})
            for seed in batch
        }
        paths = {seed: files[seed] for seed in batch if scene.only_seed in (None, seed)}
        if not (resume and all(is_same(path, embedded[seed], sources) for seed, path in paths.items())):
            places.clear()
            sampler = sampler or SceneSampler(base, scene, replace(inputs, on_found=places.append), hooks)
            images = sampler.batch([scene.prompt] * len(batch), batch, 0, 1)
            for seed, image, found in zip(batch, images, places or [{}] * len(batch), strict=True):
                if seed in paths:
                    save_png(image, paths[seed], embedded[seed], sources, found)
        written += paths.values()
    return written
