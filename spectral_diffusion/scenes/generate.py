"""Draw scenes. Samplers and pipelines are diffusers' own; regions are processors and hooks on their U-Net."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from diffusers.loaders import TextualInversionLoaderMixin
from PIL import Image

from ..adapters.adapter import Adapter, check_base
from ..adapters.apply import Strength, component_scale, install_tokens, put_adapters
from ..adapters.formats.import_lora import import_lora
from ..adapters.formats.native import load_adapter
from ..adapters.formats.reading import is_foreign
from ..core.errors import ELSEWHERE, Cancelled, Fix, NotFiniteError, UserError, nearest
from ..core.files import check_writable
from ..core.hooks import QUIET, Event, Hooks
from ..core.precision import autocast, resolve_mixed_precision, tf32
from ..data.image_grid import labelled_sheet
from ..linalg import Factors
from ..models.base import Base, load_base
from ..models.tokens import collapse, expand, known_tokens
from ..models.vae import decode, in_portions, overflows, upcast
from .control import ControlMap, adapter_of, read_control_image, weighed
from .png_metadata import BASE, is_our_png, is_same, save_png, sources_of
from .prompts import foreign_syntax, prompts_in, tokens_in
from .regions import EncodedRegion, RegionalPrompts, changed, regional
from .scene import Region, Scene, adapter_files, open_on_black, region_mask

Bound = Sequence[tuple[Adapter, Strength]]  # the adapters of one region with their strengths
Preview = Callable[[int, list[Image.Image]], None]


def sampler(base: Base, name: str) -> Any:
    """A diffusers scheduler with the base's own noise schedule."""
    config = base.pipeline.scheduler.config
    if name == "ddim":
        return DDIMScheduler.from_config(config)
    if name == "euler":
        return EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")


def sample(
    base: Base, prompts: list[str], seeds: list[int], scene: Scene, hooks: Hooks = QUIET, **more: Any
) -> list[Image.Image]:
    """One picture per (prompt, seed); see :func:`sample_in_turn`."""
    return [image for images in sample_in_turn(base, prompts, seeds, scene, hooks, **more) for image in images]


def sample_in_turn(
    base: Base,
    prompts: list[str],
    seeds: list[int],
    scene: Scene,
    hooks: Hooks = QUIET,
    drawings: Sequence[ControlMap] = (),
    bound: Sequence[Bound] = (),
    preview: Preview | None = None,
    every: int = 1,
) -> Generator[list[Image.Image], None, None]:
    """One picture per (prompt, seed), ``scene.batch`` together. A picture's noise depends on its seed alone.

    Args:
        drawings: the conditions, read already.
        bound: per region of the scene the adapters that act only there.
        preview: called after steps 1, 1 + ``every``, …, with the step's number and the unfinished pictures.

    Raises:
        Cancelled: ``should_stop`` said so after a step.
        UserError: a region or a condition that does not fit.
    """
    width, height = scene.width or base.size, scene.height or base.size
    pipe, options = stock_pipeline(base, scene, drawings, (width, height))
    tokens, large = known_tokens(base.pipeline.tokenizer), isinstance(base.pipeline, StableDiffusionXLPipeline)
    latent_size = (height // base.pipeline.vae_scale_factor, width // base.pipeline.vae_scale_factor)
    with torch.no_grad():
        areas = [
            area_of(base, region, bound[index] if bound else (), width, height, scene.negative_prompt)
            for index, region in enumerate(scene.regions)
        ]
    layers = modules_of(base, dict.fromkeys(name for area in areas for name in area.deltas))
    precision = resolve_mixed_precision(scene.mixed_precision, base.device, base.dtype)
    first, last = (round(share * scene.num_inference_steps, 6) for share in (scene.region_start, scene.region_end))
    window = (math.floor(first), math.ceil(last))
    # Pipelines with textual inversion expand <rex> to <rex> <rex>_1 by themselves; the SD sketch pipeline does not.
    spell = collapse if isinstance(pipe, TextualInversionLoaderMixin) else expand

    negative = scene.negative_prompt or None  # SDXL takes zeros, not the encoded empty prompt, where there is none
    total = math.ceil(len(prompts) / scene.batch_size) * scene.num_inference_steps
    for start in range(0, len(prompts), scene.batch_size):
        chunk = [spell(prompt, tokens) for prompt in prompts[start : start + scene.batch_size]]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + scene.batch_size]]
        state = RegionalPrompts(
            areas, latent_size, len(chunk), scene.global_prompt_weight, scene.region_isolation, window
        )  # step 0 again
        if drawings:
            images = [[drawing.at(width, height)] * len(chunk) for drawing in drawings]
            options["image"] = images if len(drawings) > 1 else images[0]
        done = start // scene.batch_size * scene.num_inference_steps

        def tell(step: int, latents: torch.Tensor, state: RegionalPrompts = state, done: int = done) -> None:
            if hooks.should_stop():
                raise Cancelled("Stopped.")
            if not torch.isfinite(latents).all():
                raise not_finite(base.dtype)
            state.step = step + 1
            hooks.progress(Event("generate", done + step + 1, total))
            if preview and step % every == 0:
                preview(step + 1, decoded(base, latents))

        # The adapter pipeline still has the older callback; both tell the step.
        if drawings:
            options["callback"] = lambda step, timestep, latents, tell=tell: tell(step, latents)
        else:
            options["callback_on_step_end"] = lambda pipe, step, timestep, state, tell=tell: (
                tell(step, state["latents"]) or state
            )
        with (
            torch.no_grad(),
            tf32(base.device, scene.allow_tf32),
            warnings.catch_warnings(),
            regional(pipe.unet, state, layers),
            weighed(drawings, scene.regions, [area.place for area in areas]),
            in_portions(pipe.vae, height, width),
            decoding_checked(pipe.vae, base.dtype) if large else nullcontext(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, about itself
            with autocast(base.device, precision):
                drawn = pipe(
                    prompt=chunk,
                    negative_prompt=negative and [spell(negative, tokens)] * len(chunk),
                    num_inference_steps=scene.num_inference_steps,
                    guidance_scale=scene.guidance_scale,
                    generator=generators,
                    width=width,
                    height=height,
                    output_type="pil" if large else "latent",
                    **options,
                ).images
            found = finished(pipe, drawn)
        yield found


def finished(pipe: Any, drawn: Any) -> list[Image.Image]:
    """The pictures of a pipeline that gave latents, as it would have decoded them; in float32 if they overflow else.

    XL's decodes in float32 by itself where its autoencoder's config says so, and gave pictures.

    Raises:
        NotFiniteError: the autoencoder gave NaN or infinity.
    """
    if not isinstance(drawn, torch.Tensor):
        return list(drawn)
    pixels = pipe.vae.decode(drawn / pipe.vae.config.scaling_factor, return_dict=False)[0]
    if overflows(pipe.vae) and not torch.isfinite(pixels).all():
        with upcast(pipe.vae):
            pixels = pipe.vae.decode(drawn.float() / pipe.vae.config.scaling_factor, return_dict=False)[0]
    if not torch.isfinite(pixels).all():
        raise not_finite(drawn.dtype)
    return list(pipe.image_processor.postprocess(pixels))


def not_finite(dtype: torch.dtype) -> NotFiniteError:
    """What is said of a picture of NaN."""
    if dtype == torch.float32:
        return NotFiniteError(
            "The picture is NaN or infinite: lower the strengths of its adapters, or look at the base's weights."
        )
    return NotFiniteError(
        "The picture is NaN or infinite in half precision.", Fix("dtype", "bfloat16"), Fix("dtype", "float32")
    )


@contextmanager
def decoding_checked(vae: AutoencoderKL, dtype: torch.dtype) -> Iterator[None]:
    """Refuse NaN where a pipeline decodes by itself.

    Raises:
        NotFiniteError: the autoencoder gave NaN or infinity.
    """

    def check(module: Any, inputs: Any, out: torch.Tensor) -> None:
        if not torch.isfinite(out).all():
            raise not_finite(dtype)

    handle = vae.decoder.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def stock_pipeline(
    base: Base, scene: Scene, drawings: Sequence[ControlMap], size: tuple[int, int]
) -> tuple[Any, dict[str, Any]]:
    """The diffusers pipeline that draws a scene with the base's own parts, and the options of its conditions.

    Raises:
        UserError: a condition that does not fit.
    """
    options: dict[str, Any] = {}
    adapter = None
    if drawings:
        adapter, options["adapter_conditioning_scale"] = adapter_of(base, drawings, size)
    return base.denoiser.make_pipeline(sampler(base, scene.sampler), adapter), options


def decoded(base: Base, latents: torch.Tensor) -> list[Image.Image]:
    """Latents as pictures."""
    return list(base.pipeline.image_processor.postprocess(decode(base.pipeline.vae, latents)))


def area_of(base: Base, region: Region, bound: Bound, width: int, height: int, negative: str = "") -> EncodedRegion:
    """A region with its prompts encoded, by its own adapters' text encoder too, and its changes of the U-Net.

    ``negative`` is the scene's prompt, of a region that has none of its own.
    """
    text: dict[str, Factors] = {}
    unet: dict[str, Factors] = {}
    like = torch.empty(0, device=base.device, dtype=base.dtype)
    for adapter, strength in bound:
        weights = base.weights(adapter.targets) if adapter.needs_base else {}
        for layer in adapter.layers:
            up, down = adapter.factors(layer, weights.get(layer))
            part = unet if layer.startswith("unet.") else text
            held = part.get(layer)
            up = up * component_scale(strength, layer.split(".", 1)[0])
            up, down = up.to(like), down.to(like)  # once, not at every step
            part[layer] = (
                Factors(torch.cat([held.up, up], 1), torch.cat([held.down, down], 0)) if held else Factors(up, down)
            )
    without = negative if region.negative_prompt is None else region.negative_prompt
    encoders = modules_of(base, text)
    tokens = known_tokens(base.pipeline.tokenizer)
    with changed(encoders, text):
        encoded = base.denoiser.encode([collapse(words, tokens) for words in (region.prompt, without)])
        positive, apart = encoded.tensors["encoder_hidden_states"]
    return EncodedRegion(region_mask(region, width, height), positive, apart, unet)


def modules_of(base: Base, names: Iterable[str]) -> dict[str, Any]:
    """Modules by ``component.path``, with whatever adapters are around them: those may never call what is inside."""
    return {name: base.models[name.split(".", 1)[0]].get_submodule(name.split(".", 1)[1]) for name in names}


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


def bind(base: Base, scene: Scene, loaded: Mapping[str, Adapter], hooks: Hooks) -> list[Bound]:
    """Check every region's adapters against the base, and put their tokens in.

    Raises:
        UserError: an adapter does not belong on this base, or two different ones share a token.
    """
    owners: dict[str, str] = {}
    for path in dict.fromkeys(path for region in scene.regions for path in region.adapters):
        adapter = loaded[path]
        if warning := check_base(adapter, base, scene.allow_base):
            hooks.notify(warning)
        for token in adapter.tokens:
            if other := owners.get(token.lower()):  # a tokenizer does not tell upper case from lower
                raise UserError(f"{path} and {other} share the token {token}; train one with another.")
            owners[token.lower()] = path
        install_tokens(base, adapter)
    return [[(loaded[path], strength) for path, strength in region.adapters.items()] for region in scene.regions]


def cut_words(base: Base, prompt: str) -> str:
    """The end of a prompt that the text encoder never sees; empty if it sees everything."""
    tokenizer = base.pipeline.tokenizer
    written = expand(collapse(prompt, known_tokens(tokenizer)), known_tokens(tokenizer))
    ids = tokenizer(written, truncation=False, add_special_tokens=False).input_ids
    return str(tokenizer.decode(ids[tokenizer.model_max_length - 2 :])).strip()


def remarks(base: Base, scene: Scene, drawings: Sequence[ControlMap]) -> Iterator[str]:
    """What a person should know before the scene is drawn: words that are not read, drawings and masks out of shape."""
    known, prompts = known_tokens(base.pipeline.tokenizer), prompts_in(scene)
    for word in tokens_in(prompts):
        if word.lower() not in {token.lower() for token in known}:
            what = f"{word} is no token of this base or its adapters{nearest(word, known)}"
            yield f"Note: {what}; it is read as plain text."
    yield from (f"Note: {sentence}" for sentence in foreign_syntax(prompts))
    for prompt in prompts:
        if lost := cut_words(base, prompt):
            yield f"Note: '{prompt[:40]}' is longer than this base reads; cut off: '{lost}'."
    size = (scene.width or base.size, scene.height or base.size)
    shapes = [(f"{drawing.kind} {drawing.name}", drawing.image.size) for drawing in drawings]
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
    """Draw a scene's pictures and write each, with its scene inside, as soon as it is done.

    One picture goes to ``output``; several to ``<stem>-<seed>.png`` each, and a contact sheet to ``output``.

    Args:
        resume: leave out batches whose pictures are there already, made from this very scene and its files.
        expected: what an earlier picture of the scene was made from; a note tells of every file that has changed since.
        base: the scene's base if it is loaded already; what the scene puts on it stays there.
        every: steps from one preview to the next.

    Raises:
        UserError: anything the person can mend.
    """
    if scene.output.suffix.lower() != ".png":
        raise UserError(f"The output {scene.output} must end in .png.")
    if not scene.prompt.strip():
        raise UserError("A prompt is needed.", Fix("prompt", '"a photo of <rex> on the beach"'))
    seeds = scene.every_seed()
    if scene.only_seed is not None and scene.only_seed not in seeds:
        raise UserError(f"only_seed={scene.only_seed} is none of the seeds {', '.join(map(str, seeds[:8]))}.")
    drawings = [read_control_image(condition) for condition in scene.controls]
    own = load_own(scene)
    check_writable(scene.output)
    for path in {scene.output, *encoded_regions(scene).values()}:
        if path.exists() and not is_our_png(path):
            raise UserError(f"{path} was not drawn by this program, and would be lost.", ELSEWHERE)
    base = base or load_base(scene.base, scene.device, scene.dtype)
    scene = with_precision(scene, base)
    sources = sources_of(scene, base)
    for name, before in (expected or {}).items():
        if name in sources and sources[name] != before:
            what = f"The base {scene.base}" if name == BASE else name
            hooks.notify(f"Note: {what} has changed since that picture was made; this one will differ.")
    loaded = {**own, **load_foreign(scene, base, own)}
    adapters = [(loaded[path], strength) for path, strength in scene.adapters.items()]
    for text in put_adapters(base, adapters, scene.allow_base):
        hooks.notify(text)
    bound = bind(base, scene, loaded, hooks)
    for text in remarks(base, scene, drawings):
        hooks.notify(text)

    written = draw_to_files(base, scene, sources, drawings, bound, hooks, preview, resume, every)
    if len(written) > 1:
        save_png(labelled_sheet(written, [str(seed) for seed in seeds]), scene.output, scene, sources)
        written.insert(0, scene.output)
    return written


def with_precision(scene: Scene, base: Base) -> Scene:
    """A scene whose mixed precision is settled, so that its pictures can be made again elsewhere."""
    precision = resolve_mixed_precision(scene.mixed_precision, base.device, base.dtype)
    return scene.model_copy(update={"mixed_precision": precision})


def encoded_regions(scene: Scene) -> dict[int, Path]:
    """Where the picture of every seed goes."""
    seeds = scene.every_seed()
    if len(seeds) == 1 or scene.only_seed is not None:
        return dict.fromkeys(seeds, scene.output)
    return {seed: scene.output.with_name(f"{scene.output.stem}-{seed}.png") for seed in seeds}


def draw_to_files(
    base: Base,
    scene: Scene,
    sources: Mapping[str, str],
    drawings: Sequence[ControlMap] = (),
    bound: Sequence[Bound] = (),
    hooks: Hooks = QUIET,
    preview: Preview | None = None,
    resume: bool = False,
    every: int = 1,
) -> list[Path]:
    """Draw and write a scene's single pictures, without a sheet, on a base on which its adapters act already.

    ``sources`` is what :func:`.pictures.sources_of` told before they did; the rest as :func:`generate_to_file`.
    """
    scene = with_precision(scene, base)
    seeds, place = scene.every_seed(), encoded_regions(scene)
    batches = [seeds[start : start + scene.batch_size] for start in range(0, len(seeds), scene.batch_size)]
    if scene.only_seed is not None:  # how it was drawn decides its last bits, so its neighbours are drawn again too
        batches = [batch for batch in batches if scene.only_seed in batch]
    written: list[Path] = []
    for batch in batches:
        embedded = {
            seed: scene.model_copy(update={"seeds": batch, "only_seed": seed, "seed": seed, "num_images": 1})
            for seed in batch
        }
        paths = {seed: place[seed] for seed in batch if scene.only_seed in (None, seed)}
        if not (resume and all(is_same(path, embedded[seed], sources) for seed, path in paths.items())):
            prompts = [scene.prompt] * len(batch)
            turn = sample_in_turn(base, prompts, batch, scene, hooks, drawings, bound, preview, every)
            with closing(turn):
                for seed, image in zip(batch, next(turn), strict=True):
                    if seed in paths:
                        save_png(image, paths[seed], embedded[seed], sources)
        written += paths.values()
    return written
