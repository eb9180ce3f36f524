"""Train a T2I-Adapter of one's own: pictures with sketches or keyposes in, a diffusers ``T2IAdapter`` folder out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, T2IAdapter
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from ..base import Base, load_base, plain_is_quicker, quiet
from ..config import Settings, read_yaml, to_yaml
from ..data.folder import SUFFIXES, load_concept, open_photo
from ..data.samples import random_crop
from ..errors import NotFiniteError, UserError
from ..files import atomic_folder, check_writable, write_text
from ..progress import Event, Progress, silent
from ..randomness import keyed_generator
from .draws import Samples, draw_timestep, target_of
from .loop import Stopped
from .state import check_settings, load_state, save_state

CHANNELS = {"sketch": 1, "keypose": 3}
# How often each feature of diffusers' adapters was halved since the first one.
HALVED = {"full_adapter": (0, 1, 2, 3, 4, 5), "full_adapter_xl": (0, 0, 1, 1, 1, 1)}
SETTINGS = "settings.yaml"
CHUNK = 8  # pictures, or captions, encoded together

Read = Callable[[Path], Image.Image]
Words = dict[str, tuple[Tensor, Tensor | None]]  # caption to its embeddings and, for SDXL, the pooled one


class ConditionConfig(Settings):
    """Train a T2I-Adapter for a base from pictures with conditions."""

    folder: Path
    output: Path  # a diffusers T2IAdapter folder
    base: str = "pocket"
    kind: Literal["sketch", "keypose"] = "sketch"
    steps: int = Field(5000, ge=1, le=10_000_000)
    batch: int = Field(8, ge=1, le=1024)
    seed: int = Field(0, ge=0, lt=2**31)
    learning_rate: float = Field(1e-4, ge=0)
    decay: Literal["linear", "constant"] = "linear"
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    resolution: int | None = Field(None, ge=8, le=4096)  # short edge in pixels; default: the base's size
    crop_scale: float = Field(1.0, ge=1.0, le=2.0)  # short edge before the random crop, over the resolution
    crops: int = Field(1, ge=1, le=256)  # random crops per picture, encoded once
    flip: bool = False  # half of the views mirrored, but where the caption says left or right
    template: str = ""  # caption of a picture that has none; {} is concept.yaml's noun
    caption_dropout: float = Field(0.3, ge=0, le=1)  # share of empty captions, so that the condition has to say it
    timestep_power: float = Field(0.33, gt=0, le=4)  # t = T u^power; 1/3 has the mean of the paper's cubic draw
    save_every: int = Field(500, ge=1)
    device: str = "auto"
    dtype: str = "float32"  # of the frozen base; the adapter stays float32
    autocast: bool = False  # run the networks under bfloat16 autocast

    @field_validator("flip")
    @classmethod
    def _sides(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("kind") == "keypose":
            raise ValueError("a mirrored keypose has its left and right limbs in each other's colours")
        return value


@dataclass(frozen=True)
class Pair:
    """A picture, its condition and its caption."""

    picture: Path
    condition: Path
    caption: str


def state_path(output: Path) -> Path:
    """Where a run's resumable state lies while it is unfinished."""
    return output.with_name(f"{output.name}.state.safetensors")


def train_condition(
    config: ConditionConfig,
    base: Base | None = None,
    resume: bool = False,
    progress: Progress = silent,
    should_stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda text: None,
    read: Read | None = None,
) -> T2IAdapter:
    """Train a T2I-Adapter of ``base`` (default: the config's) and write ``output``; only the adapter is trained.

    Every random draw is keyed by (seed, step, sample) and the state beside the output holds everything else, so that
    k steps, a stop and ``resume`` give the same bits as an unbroken run on a CPU.

    Args:
        read: opens a condition; give what generating will open it with. Default: :func:`open_condition`.

    Raises:
        Stopped: ``should_stop`` said so; the state is saved.
        NotFiniteError: NaN or infinity; the last good state is kept.
        UserError: no pairs, conditions of another shape, an output that is not ours, a state of other settings.
    """
    output, state = config.output, state_path(config.output)
    if output.exists() and not is_ours(output):
        raise UserError(f"{output} exists and is not a folder of train-condition; choose another output with -o.")
    check_writable(output)
    pairs = read_pairs(config, note)
    base = base or load_base(config.base, config.device, config.dtype)
    pipeline, unet = base.pipeline, base.pipeline.unet
    shape = fitting_shape(unet, pipeline.vae_scale_factor, config.kind)
    size = fitting_size(config, base, shape["downscale_factor"])
    adapter = new_adapter(shape, config.seed).to(base.device).train()
    parameters = dict(adapter.named_parameters())
    note(
        f"{len(pairs)} pictures with a {config.kind}, {size} px; a {shape['adapter_type']} of "
        f"{sum(p.numel() for p in parameters.values()):,} numbers for {len(shape['channels'])} levels of the U-Net."
    )
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    half = config.autocast or base.dtype != torch.float32
    if plain_is_quicker(base.device.type, half, size // pipeline.vae_scale_factor):
        unet.set_attn_processor(AttnProcessor())
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    belongs = {"base": base.fingerprint.exact, "pairs": digest(pairs)}
    start = restore(state, optimizer, parameters, config, belongs) if resume and state.exists() else 0
    words = encode_captions(base, [pair.caption for pair in pairs])
    latents, conditions = encode_pairs(pairs, pipeline.vae, config, size, progress, read)
    running: float | None = None

    for step in range(start, config.steps):
        if should_stop():
            keep(state, parameters, optimizer, step, config, belongs)
            raise Stopped(f"Stopped at step {step} of {config.steps}; --resume goes on from there.")
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps if config.decay == "linear" else 1.0)

        samples, shown = draw(step, pairs, latents, conditions, config, len(noise_schedule.alphas_cumprod))
        noisy = noise_schedule.add_noise(samples.latents, samples.noise, samples.timesteps)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=config.autocast):
            features = [feature.to(base.dtype) for feature in adapter(shown.to(base.device))]
            predicted = unet(
                noisy.to(base.dtype),
                samples.timesteps,
                **conditioning(words, samples.prompts, base, size),
                down_intrablock_additional_residuals=features,
            ).sample.float()
        loss = F.mse_loss(predicted, target_of(noise_schedule, samples))

        optimizer.zero_grad()
        loss.backward()
        total = nn.utils.clip_grad_norm_(list(parameters.values()), config.clip)
        if not torch.isfinite(loss) or not torch.isfinite(total):
            kept = f"the last good state is kept in {state.name}" if state.exists() else "nothing was saved yet"
            raise NotFiniteError(f"Training met NaN or infinity at step {step}: lower the learning rate ({kept}).")
        optimizer.step()

        value = float(loss.detach())
        running = value if running is None else 0.98 * running + 0.02 * value
        progress(Event("train", step + 1, config.steps, {"loss": running}))
        if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            keep(state, parameters, optimizer, step + 1, config, belongs)

    keep(state, parameters, optimizer, config.steps, config, belongs)  # until the folder is written
    adapter.eval().requires_grad_(False)
    with atomic_folder(output) as new:
        with quiet():
            adapter.save_pretrained(new)
        write_text(new / SETTINGS, to_yaml(config))
    state.unlink(missing_ok=True)
    return adapter


def read_pairs(config: ConditionConfig, note: Callable[[str], None]) -> list[Pair]:
    """The folder's pictures that have a condition, with their captions.

    Pictures and captions lie as for a concept (:func:`..data.folder.load_concept`). A picture's condition has its name
    in ``sketch/`` or ``keypose/`` or else ``conditions/``, or lies beside it as ``<name>.sketch.png`` or as
    ``<name>_sketch.png``, which ``conditions sketch`` writes.

    Raises:
        UserError: no picture has one, or one shows another frame than its picture.
    """
    folder, kind = config.folder, config.kind
    concept = load_concept(folder, name="it")
    drawing = re.compile(rf"(.+)[._]({'|'.join(CHANNELS)})")
    drawn = {photo.path: found for photo in concept.photos if (found := drawing.fullmatch(photo.path.stem))}
    beside = {path.with_name(found[1]): path for path, found in drawn.items() if found[2] == kind}
    apart: dict[str, Path] = {}
    for place in (folder / "conditions", folder / kind):
        if place.is_dir():
            apart |= {path.stem: path for path in sorted(place.iterdir()) if path.suffix.lower() in SUFFIXES}
    pairs, skipped, bare, wordless = [], list(concept.skipped), 0, 0
    for photo in concept.photos:
        if photo.path in drawn:
            continue
        condition = beside.get(photo.path.with_suffix("")) or apart.get(photo.path.stem)
        if condition is None:
            bare += 1
            continue
        try:
            frames = [open_photo(path).size for path in (photo.path, condition)]
        except UserError as error:
            skipped.append(str(error))
            continue
        check_frames(photo.path, condition, *frames)
        wordless += photo.caption is None
        caption = photo.caption or config.template
        pairs.append(Pair(photo.path, condition, caption.replace("<TOK>", concept.noun).replace("{}", concept.noun)))
    if not pairs:
        raise UserError(
            f"{folder} holds no picture with a {kind}; put {kind} images of the pictures' names into {folder / kind}."
        )
    if bare:
        skipped.append(f"{bare} without a {kind}")
    if skipped:
        note(f"Skipped in {folder}: {'; '.join(skipped)}.")
    if wordless:
        note(f"Without a caption: {wordless} pictures, read as '{config.template}'; template= says another.")
    return pairs


def check_frames(picture: Path, condition: Path, one: tuple[int, int], other: tuple[int, int]) -> None:
    """Say that a condition's sides (width, height) are not in its picture's proportions, up to a pixel.

    Raises:
        UserError: they are not.
    """
    scale = one[0] / other[0]
    if abs(other[1] * scale - one[1]) > max(1.0, scale):
        sides = ["×".join(map(str, frame)) for frame in (other, one)]
        raise UserError(
            f"{condition} has {sides[0]} pixels, {picture.name} {sides[1]}: a condition shows the same frame as its "
            "picture; save it in the same proportions."
        )


def open_condition(path: Path, kind: str) -> Image.Image:
    """A condition as RGB; a sketch in gray, white strokes on black whichever way round it came."""
    image = open_photo(path)
    if kind != "sketch":
        return image
    gray = image.convert("L")
    dark = sum(value * count for value, count in enumerate(gray.histogram())) <= 127 * gray.width * gray.height
    return (gray if dark else gray.point(lambda value: 255 - value)).convert("RGB")


@torch.no_grad()
def encode_pairs(
    pairs: Sequence[Pair],
    vae: AutoencoderKL,
    config: ConditionConfig,
    size: int,
    progress: Progress,
    read: Read | None = None,
) -> tuple[Tensor, Tensor]:
    """All views of all pairs; a view cuts picture and condition alike.

    Returns:
        Latents (pairs, views, channels, h, w) float32 on the VAE's device; conditions (pairs, views, 1 or 3, size,
        size) uint8 on the CPU.
    """
    weight = next(vae.parameters())
    rows, shown = [], []
    for index, pair in enumerate(pairs):
        picture = open_photo(pair.picture)
        condition = (read(pair.condition) if read else open_condition(pair.condition, config.kind)).convert("RGB")
        if condition.size != picture.size:
            condition = condition.resize(picture.size, Image.Resampling.LANCZOS)
        views = []
        for view in range(config.crops * (1 + config.flip)):
            both = torch.stack(
                [
                    random_crop(image, size, config.crop_scale, keyed_generator(config.seed, "crop", index, view))
                    for image in (picture, condition)
                ]
            )
            mirrored = config.flip and view % 2 and not re.search(r"\b(left|right)\b", pair.caption.lower())
            views.append(both.flip(-1) if mirrored else both)
        pictures, conditions = torch.stack(views, 1)
        latents = [vae.encode(part.to(weight)).latent_dist.mean.float() for part in pictures.split(CHUNK)]
        rows.append(torch.cat(latents))
        shown.append(((conditions + 1) * 127.5).round().to(torch.uint8)[:, : CHANNELS[config.kind]])
        progress(Event("encode", index + 1, len(pairs)))
    return torch.stack(rows) * vae.config.scaling_factor, torch.stack(shown)


@torch.no_grad()
def encode_captions(base: Base, captions: Sequence[str]) -> Words:
    """Each caption, and the empty one, through the frozen text encoders once; kept on the CPU."""
    words: Words = {}
    texts = list(dict.fromkeys(["", *captions]))
    with quiet():
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            encoded, pooled = base.encode(chunk)
            pooled_each = [None] * len(chunk) if pooled is None else pooled.cpu()
            words |= dict(zip(chunk, zip(encoded.cpu(), pooled_each, strict=True), strict=True))
    return words


def conditioning(words: Words, prompts: Sequence[str], base: Base, size: int) -> dict[str, Any]:
    """The U-Net's keyword arguments for prompts that are encoded already."""
    embeddings, pooled = zip(*(words[prompt] for prompt in prompts), strict=True)
    out: dict[str, Any] = {"encoder_hidden_states": torch.stack(embeddings).to(base.device)}
    if pooled[0] is not None:  # SDXL, which is also told the picture's size
        times = torch.tensor([(size, size, 0, 0, size, size)] * len(prompts), device=base.device)
        out["added_cond_kwargs"] = {"text_embeds": torch.stack(pooled).to(base.device), "time_ids": times}
    return out


def draw(
    step: int, pairs: Sequence[Pair], latents: Tensor, conditions: Tensor, config: ConditionConfig, timesteps: int
) -> tuple[Samples, Tensor]:
    """What one step sees: pictures with noise, timesteps and captions; and their conditions (n, 1 or 3, h, w), 0…1."""
    batch, noises, times, prompts, shown = [], [], [], [], []
    for sample in range(config.batch):
        generator = keyed_generator(config.seed, "condition", step, sample)
        pair, view = (int(torch.randint(n, (), generator=generator)) for n in latents.shape[:2])
        times.append(draw_timestep(generator, config.timestep_power, timesteps))
        dropped = float(torch.rand((), generator=generator)) < config.caption_dropout
        noises.append(torch.randn(latents.shape[2:], generator=generator))
        batch.append(latents[pair, view])
        shown.append(conditions[pair, view])
        prompts.append("" if dropped else pairs[pair].caption)
    device = latents.device
    samples = Samples(torch.stack(batch), torch.stack(noises).to(device), torch.stack(times).to(device), prompts)
    return samples, torch.stack(shown).float() / 255


def fitting_shape(unet: nn.Module, scale: int, kind: str) -> dict[str, Any]:
    """The arguments of the T2IAdapter that reaches most levels of a U-Net whose VAE shrinks pictures by ``scale``.

    A CrossAttnDownBlock2D adds a feature before it halves its input, a DownBlock2D after; so ``full_adapter`` fits
    Stable Diffusion 1.x and 2.x and ``full_adapter_xl``, which starts at half the latents' size, fits XL.
    """
    settings: Any = unet.config
    places, halved = [], 0  # channels and halvings where the U-Net adds a feature
    for block, channels in zip(unet.down_blocks, settings.block_out_channels, strict=True):  # type: ignore[arg-type]
        after = halved + (1 if block.downsamplers else 0)
        places.append((channels, halved if getattr(block, "has_cross_attention", False) else after))
        halved = after
    if unet.mid_block is not None:
        places.append((settings.block_out_channels[-1], halved))

    def reach(adapter: str) -> int:
        for index, ((channels, halvings), level) in enumerate(zip(places, HALVED[adapter], strict=False)):
            widens = adapter == "full_adapter_xl" and index >= 3 and channels != places[index - 1][0]  # it cannot
            if halvings - places[0][1] != level or widens:
                return index
        return min(len(places), len(HALVED[adapter]))

    chosen = max(HALVED, key=reach)
    layers = settings.layers_per_block
    return {
        "in_channels": CHANNELS[kind],
        "channels": [channels for channels, _ in places[: reach(chosen)]],
        "num_res_blocks": layers if isinstance(layers, int) else layers[0],
        "downscale_factor": scale * 2 ** places[0][1],
        "adapter_type": chosen,
    }


def fitting_size(config: ConditionConfig, base: Base, step: int) -> int:
    """The side of the training pictures in pixels.

    Raises:
        UserError: the adapter cannot shrink it evenly.
    """
    size = config.resolution or base.size
    if size % step:
        near = sorted({max(step, size // step * step), (size // step + 1) * step})
        raise UserError(
            f"resolution={size} does not fit the base '{base.name}', which needs a multiple of {step}; "
            f"take resolution={' or '.join(map(str, near))}."
        )
    return size


def new_adapter(shape: Mapping[str, Any], seed: int) -> T2IAdapter:
    """An untrained adapter; its first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(keyed_generator(seed, "t2i").get_state())
        return T2IAdapter(**shape)


def is_ours(folder: Path) -> bool:
    """Whether a folder was written here before, so that it may be replaced."""
    try:
        return (folder / "config.json").is_file() and read_yaml(folder / SETTINGS).get("kind") in CHANNELS
    except UserError:
        return False


def digest(pairs: Sequence[Pair]) -> str:
    """Which pictures, conditions and captions a run sees."""
    hashed = hashlib.sha256()
    for pair in pairs:
        for part in (pair.picture.read_bytes(), pair.condition.read_bytes(), pair.caption.encode()):
            hashed.update(hashlib.sha256(part).digest())
    return hashed.hexdigest()[:32]


def comparable(config: ConditionConfig) -> dict[str, Any]:
    """The settings that decide the result: all but where things lie and how often states are saved."""
    return config.model_dump(mode="json", exclude={"folder", "output", "save_every", "device"})


def keep(
    state: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    config: ConditionConfig,
    belongs: Mapping[str, str],
) -> None:
    """Save everything that the run needs to go on exactly here."""
    save_state(state, parameters, optimizer, {"step": step, "config": comparable(config), "belongs": dict(belongs)})


def restore(
    state: Path,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    config: ConditionConfig,
    belongs: Mapping[str, str],
) -> int:
    """Load a saved state into place; returns the step to go on with.

    Raises:
        UserError: it was made with other settings, on another base or from other pictures.
    """
    tensors, meta = load_state(state, optimizer)
    check_settings(state, meta, comparable(config))
    fits = set(tensors) == set(parameters) and all(tensors[n].shape == parameters[n].shape for n in parameters)
    if meta.get("belongs") != belongs or not fits:
        raise UserError(f"{state} was made on another base or from other pictures; train without --resume.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return int(meta["step"])
