"""Sample the pictures of a scene: diffusers' own pipelines and samplers, with processors and hooks for regions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.loaders import TextualInversionLoaderMixin
from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.apply import Strength, component_scale
from ..config.scene import Region, Scene
from ..core.errors import Cancelled, Fix, NotFiniteError, UserError
from ..core.hooks import QUIET, Event, Hooks
from ..core.precision import autocast, resolve_mixed_precision, tf32
from ..linalg import Factors
from ..models.attention_maps import LARGEST, capture_attention_maps
from ..models.base import Base
from ..models.denoiser import Denoiser
from ..models.token_maps import capture_token_maps
from ..models.vae import decode, decode_batch, in_portions, overflows, upcast
from .auto_regions import (
    TOKEN_SMOOTHING,
    AttentionTotals,
    AutoConcept,
    Box,
    Enough,
    boxes_of,
    coarse_steps,
    columns_of,
    own_prompt,
    word_columns_of,
)
from .control import ControlMap, control_network, weighed
from .found_regions import FoundConcept, FoundRegions
from .region_mask import region_mask
from .regions import EncodedRegion, RegionalPrompts, changed, regional
from .token_regions import TokenRegions, window_of

Bound = Sequence[tuple[Adapter, Strength]]  # the adapters of one region with their strengths
RegionState = RegionalPrompts | TokenRegions | FoundRegions
Preview = Callable[[int, list[Image.Image]], None]


@dataclass(frozen=True)
class SceneInputs:
    """The inputs of a scene besides its settings.

    Attributes:
        controls: the control images, read already.
        bound: per region of the scene the adapters that act only there.
        concepts: what regions are found for, if the scene has none; every prompt names all of them.
        preview: called after steps 1, 1 + ``every``, …, with the step's number and the unfinished pictures.
    """

    controls: Sequence[ControlMap] = ()
    bound: Sequence[Bound] = ()
    concepts: Sequence[AutoConcept] = ()
    preview: Preview | None = None
    every: int = 1
    on_step: Callable[[int], None] | None = None  # called after every step with its number, from 1
    on_found: Callable[[dict[str, Box]], None] | None = None  # called for every picture with the places of its concepts


def sample(
    base: Base, prompts: list[str], seeds: list[int], scene: Scene, hooks: Hooks = QUIET, **inputs: Any
) -> list[Image.Image]:
    """One picture per (prompt, seed); see :func:`sample_in_turn` and :class:`SceneInputs`."""
    turns = sample_in_turn(base, prompts, seeds, scene, hooks, SceneInputs(**inputs))
    return [image for images in turns for image in images]


def sample_in_turn(
    base: Base,
    prompts: list[str],
    seeds: list[int],
    scene: Scene,
    hooks: Hooks = QUIET,
    inputs: SceneInputs = SceneInputs(),
) -> Generator[list[Image.Image], None, None]:
    """One picture per (prompt, seed), ``scene.batch_size`` together. A picture's noise depends on its seed alone.

    Raises:
        Cancelled: ``should_stop`` said so after a step.
        UserError: a region or a control image that does not fit.
    """
    sampling = SceneSampler(base, scene, inputs, hooks)
    batches = range(0, len(prompts), scene.batch_size)
    for index, start in enumerate(batches):
        stop = start + scene.batch_size
        yield sampling.batch(prompts[start:stop], seeds[start:stop], index, len(batches))


class SceneSampler:
    """The pipeline of a scene, with its regions encoded and its control images fitted; samples batch after batch.

    Raises:
        UserError: a region or a control image that does not fit.
    """

    def __init__(self, base: Base, scene: Scene, inputs: SceneInputs, hooks: Hooks) -> None:
        self.base, self.scene, self.inputs, self.hooks = base, scene, inputs, hooks
        self.width, self.height = size = (scene.width or base.size, scene.height or base.size)
        base.check_side(self.width, "width")
        base.check_side(self.height, "height")
        if inputs.concepts:
            coarse = scene.model_copy(update={"num_inference_steps": coarse_steps(base, scene), "compile": False})
            quiet = Hooks(should_stop=hooks.should_stop)
            self.coarse = SceneSampler(base, coarse, SceneInputs(inputs.controls), quiet)
        self.pipe, self.options = stock_pipeline(base, scene, inputs.controls, size)
        self.large = base.family.decodes_latents
        bound = inputs.bound or [()] * len(scene.regions)
        with torch.no_grad():
            self.regions = [
                encode_region(base, region, own, size, scene.negative_prompt)
                for region, own in zip(scene.regions, bound, strict=True)
            ]
            self.found = [changes_of(base, concept.bound) for concept in inputs.concepts]
        acting = [*(region.deltas for region in self.regions), *(unet for _, unet in self.found)]
        self.layers = modules_of(base, dict.fromkeys(name for deltas in acting for name in deltas))
        self.precision = resolve_mixed_precision(scene.mixed_precision, base.device, base.dtype)
        # Pipelines with textual inversion expand <rex> to <rex> <rex>_1 themselves; the SD sketch pipeline does not.
        self.full = not isinstance(self.pipe, TextualInversionLoaderMixin)

    def batch(self, prompts: Sequence[str], seeds: Sequence[int], index: int, batches: int) -> list[Image.Image]:
        """The pictures of batch ``index`` of ``batches``."""
        if not self.found:
            return self._batch(prompts, seeds, self._regional_state(len(prompts)), index, batches)
        if self.base.family.attention == "cross":
            return self._batch(prompts, seeds, self._found_regions(prompts, seeds), index, batches)
        images, count = [], len(prompts)
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):  # each has regions of its own
            state = self._found_tokens(prompt, seed)
            images += self._batch([prompt], [seed], state, index * count + number, batches * count)
        return images

    def _batch(
        self, prompts: Sequence[str], seeds: Sequence[int], state: RegionState, index: int, batches: int
    ) -> list[Image.Image]:
        """The pictures of a batch whose regions are settled."""
        scene, pipe = self.scene, self.pipe
        chunk = [self.base.spell(prompt, self.full) for prompt in prompts]
        # SDXL takes zeros, not the encoded empty prompt, where there is none.
        negative = self.base.spell(scene.negative_prompt, self.full) if scene.negative_prompt else None
        reader = state if isinstance(state, TokenRegions) else self.base.denoiser
        prompt_options = reader.prompt_options(chunk, negative)
        with (
            torch.no_grad(),
            tf32(self.base.device, scene.allow_tf32),
            warnings.catch_warnings(),
            self._regions_applied(state),
            weighed(self.inputs.controls, scene.regions, [region.area for region in self.regions]),
            in_portions(pipe.vae, self.height, self.width),
            self.base.denoiser.sampling(),
            self.base.denoiser.compiled(scene.compile),
            decoding_checked(pipe.vae, self.base.dtype) if self.large else nullcontext(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, about itself
            with autocast(self.base.device, self.precision):
                output = pipe(
                    **prompt_options,
                    num_inference_steps=scene.num_inference_steps,
                    **self.base.denoiser.guidance_options(scene.guidance_scale),
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                    width=self.width,
                    height=self.height,
                    output_type="pil" if self.large else "latent",
                    **self.options,
                    **self._control_options(len(chunk)),
                    **self._callback(state, index, batches),
                ).images
            return finished(pipe, output, self.base.denoiser, (self.height, self.width))

    @torch.no_grad()
    def _found_regions(self, prompts: Sequence[str], seeds: Sequence[int]) -> FoundRegions:
        """The regions of a batch without any, found by coarse pictures from the same noise."""
        base, concepts = self.base, self.inputs.concepts
        tokens = [concept.token for concept in concepts]
        size = (self.height // base.denoiser.vae_scale, self.width // base.denoiser.vae_scale)
        totals = AttentionTotals(torch.stack([columns_of(base, prompts, token) for token in tokens]), size)
        largest = max(LARGEST, -(-size[0] // 2) * -(-size[1] // 2))  # every network attends at half of the latents
        with ExitStack() as stack:
            for text, _ in self.found:
                stack.enter_context(changed(modules_of(base, text), text))
            maps = stack.enter_context(capture_attention_maps(base.denoiser.network, True, largest))
            assert maps is not None
            self.coarse.inputs = replace(self.coarse.inputs, on_step=partial(totals.after_step, maps))
            stack.enter_context(suppress(Enough))
            self.coarse.batch(prompts, seeds, 0, 1)
        masks = totals.masks()
        self._report_places(tokens, masks)
        found = []
        for token, (text, unet) in zip(tokens, self.found, strict=True):
            own = [base.spell(own_prompt(prompt, token, tokens)) for prompt in prompts]
            with changed(modules_of(base, text), text):
                states = base.denoiser.prompt_rows(base.denoiser.encode([*own, base.spell(self.scene.negative_prompt)]))
            negative = states[-1].expand(len(own), *states[-1].shape)
            found.append(FoundConcept(torch.stack(states[:-1]), negative, unet))
        scene = self.scene
        window = window_of(scene.region_start, scene.region_end, scene.num_inference_steps)
        return FoundRegions(found, masks, scene.region_isolation, scene.global_prompt_weight, window)

    @torch.no_grad()
    def _found_tokens(self, prompt: str, seed: int) -> TokenRegions:
        """The regions of a transformer's picture without any, found by a coarse picture from the same noise."""
        base, scene = self.base, self.scene
        tokens = [concept.token for concept in self.inputs.concepts]
        columns = torch.stack([word_columns_of(base, prompt, token) for token in tokens])
        grid = (self.height // base.denoiser.token_side, self.width // base.denoiser.token_side)
        totals = AttentionTotals(columns[:, None], grid, coarse_steps(base, scene), TOKEN_SMOOTHING)
        with capture_token_maps(base.denoiser, grid[0] * grid[1], columns.shape[1]) as maps, suppress(Enough):
            self.coarse.inputs = replace(self.coarse.inputs, on_step=partial(totals.after_step, maps))
            self.coarse.batch([prompt], [seed], 0, 1)
        [masks] = totals.masks()
        self._report_places(tokens, masks[None])
        regions = []
        for token, mask, (_, changes) in zip(tokens, masks, self.found, strict=True):
            own = base.spell(own_prompt(prompt, token, tokens))
            positive, negative = base.denoiser.prompt_rows(
                base.denoiser.encode([own, base.spell(scene.negative_prompt)])
            )
            area = F.interpolate(mask[None, None].float(), (self.height, self.width))[0, 0]
            regions.append(EncodedRegion(area, positive, negative, changes))
        window = window_of(scene.region_start, scene.region_end, scene.num_inference_steps)
        return TokenRegions(base, regions, grid, scene.global_prompt_weight, scene.region_isolation, window)

    def _report_places(self, tokens: Sequence[str], masks: torch.Tensor) -> None:
        """Report the places that were found in each picture."""
        if on_found := self.inputs.on_found:
            for mask in masks:
                on_found(boxes_of(tokens, mask))

    def _regional_state(self, count: int) -> RegionState:
        """The regions at step 0 of a batch."""
        scene, denoiser = self.scene, self.base.denoiser
        window = window_of(scene.region_start, scene.region_end, scene.num_inference_steps)
        share, isolation = scene.global_prompt_weight, scene.region_isolation
        if scene.regions and self.base.family.attention == "joint":
            grid = (self.height // denoiser.token_side, self.width // denoiser.token_side)
            return TokenRegions(self.base, self.regions, grid, share, isolation, window)
        size = (self.height // denoiser.vae_scale, self.width // denoiser.vae_scale)
        return RegionalPrompts(self.regions, size, count, share, isolation, window)

    def _regions_applied(self, state: RegionState) -> AbstractContextManager[None]:
        """Let the regions act while the context is open."""
        if isinstance(state, TokenRegions):
            return state.applied(self.pipe, self.layers)
        if isinstance(state, FoundRegions):
            return state.applied(self.base.denoiser.network, self.layers)
        return regional(self.base.denoiser.network, state, self.layers) if self.scene.regions else nullcontext()

    def _control_options(self, count: int) -> dict[str, Any]:
        """The control images for a batch; several as a list of lists."""
        images = [[control.at(self.width, self.height)] * count for control in self.inputs.controls]
        if self.base.family.controls == "reference":
            return {}  # the same for all pictures: among the pipeline's options
        name = "control_image" if self.base.family.controls == "controlnet" else "image"
        return {name: images if len(images) > 1 else images[0]} if images else {}

    def _callback(self, state: RegionState, index: int, batches: int) -> dict[str, Any]:
        """The pipeline's callback after a step: progress, previews, and the step for the regions."""
        steps, preview = self.scene.num_inference_steps, self.inputs.preview

        def after(step: int, latents: torch.Tensor) -> None:
            if self.hooks.should_stop():
                raise Cancelled("Stopped.")
            if not torch.isfinite(latents).all():
                raise not_finite(self.base.dtype)
            state.step = step + 1
            if self.inputs.on_step:
                self.inputs.on_step(step + 1)
            self.hooks.progress(Event("generate", index * steps + step + 1, batches * steps))
            if preview and step % self.inputs.every == 0:
                preview(step + 1, decoded(self.base, latents, self.width, self.height))

        def after_with_state(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            after(step, tensors["latents"])
            return tensors

        # The pipeline with T2I-Adapters still has the older callback; both give the step.
        if self.inputs.controls and self.base.family.controls == "t2i":
            return {"callback": lambda step, timestep, latents: after(step, latents)}
        return {"callback_on_step_end": after_with_state}


def finished(pipe: Any, output: Any, denoiser: Denoiser, size: tuple[int, int]) -> list[Image.Image]:
    """The pictures of a pipeline that gave latents, as it would have decoded them; in float32 if they overflow else.

    ``size`` is their height and width in pixels.

    XL's decodes in float32 by itself where its autoencoder's config says so, and gave pictures.

    Raises:
        NotFiniteError: the autoencoder gave NaN or infinity.
    """
    if not isinstance(output, torch.Tensor):
        return list(output)
    pixels = decode_batch(pipe.vae, denoiser.raw_output(output, *size))
    if overflows(pipe.vae) and not torch.isfinite(pixels).all():
        with upcast(pipe.vae):
            pixels = decode_batch(pipe.vae, denoiser.raw_output(output.float(), *size))
    if not torch.isfinite(pixels).all():
        raise not_finite(output.dtype)
    return list(pipe.image_processor.postprocess(pixels))


def not_finite(dtype: torch.dtype) -> NotFiniteError:
    """The error for a picture of NaN."""
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
    base: Base, scene: Scene, controls: Sequence[ControlMap], size: tuple[int, int]
) -> tuple[Any, dict[str, Any]]:
    """The diffusers pipeline that samples a scene with the base's own parts, and the options of its control images.

    Raises:
        UserError: a control image that does not fit.
    """
    if controls and scene.regions and base.family.controls == "reference":
        raise UserError(
            f"{base.family.title} reads a control image as a reference picture, which regions do not know.",
            Fix("controls", so="left empty"),
            Fix("regions", so="left empty"),
        )
    network, options = control_network(base, controls, size) if controls else (None, {})
    scheduler, encoders = base.denoiser.scheduler(scene.sampler), bool(base.tokenizers)
    return base.denoiser.make_pipeline(scheduler, network, text_encoders=encoders), options


def decoded(base: Base, latents: torch.Tensor, width: int, height: int) -> list[Image.Image]:
    """The latents of a pipeline's step as pictures."""
    denoiser = base.denoiser
    raw = denoiser.denormalize(denoiser.step_latents(latents, height, width))
    return list(base.pipeline.image_processor.postprocess(decode(base.pipeline.vae, raw)))


def encode_region(base: Base, region: Region, bound: Bound, size: tuple[int, int], negative: str = "") -> EncodedRegion:
    """A region with its prompts encoded, by its own adapters' text encoder too, and its changes of the U-Net.

    ``negative`` is the scene's prompt, of a region that has none of its own.
    """
    text, unet = changes_of(base, bound)
    without = negative if region.negative_prompt is None else region.negative_prompt
    encoders = modules_of(base, text)
    with changed(encoders, text):
        encoded = base.denoiser.encode([base.spell(prompt) for prompt in (region.prompt, without)])
        positive, unwanted = base.denoiser.prompt_rows(encoded)
    return EncodedRegion(region_mask(region, *size), positive, unwanted, unet)


def changes_of(base: Base, bound: Bound) -> tuple[dict[str, Factors], dict[str, Factors]]:
    """What adapters at their strengths change together: of text encoders, and of the denoising network, by layer."""
    text: dict[str, Factors] = {}
    unet: dict[str, Factors] = {}
    like = torch.empty(0, device=base.device, dtype=base.dtype)
    for adapter, strength in bound:
        weights = base.weights(adapter.targets) if adapter.needs_base else {}
        for layer in adapter.layers:
            up, down = adapter.factors(layer, weights.get(layer))
            part = text if layer.split(".", 1)[0] in base.tokenizers else unet
            earlier = part.get(layer)
            up = up * component_scale(strength, layer.split(".", 1)[0])
            up, down = up.to(like), down.to(like)  # once, not at every step
            part[layer] = (
                Factors(torch.cat([earlier.up, up], 1), torch.cat([earlier.down, down], 0))
                if earlier
                else Factors(up, down)
            )
    return text, unet


def modules_of(base: Base, names: Iterable[str]) -> dict[str, Any]:
    """Modules by ``component.path``, with whatever adapters are around them: those may never call what is inside."""
    return {name: base.models[name.split(".", 1)[0]].get_submodule(name.split(".", 1)[1]) for name in names}
