"""Train a T2I-Adapter of one's own: pictures with sketches or keyposes in, a diffusers ``T2IAdapter`` folder out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import T2IAdapter
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ..config.control import ControlConfig
from ..config.settings import read_yaml, to_yaml
from ..core.errors import ELSEWHERE, Cancelled, Fix, NotFiniteError, UserError
from ..core.files import atomic_folder, check_writable, write_text
from ..core.hooks import QUIET, Event, Hooks
from ..core.machine import heading
from ..core.precision import autocast, is_half, loss_scaler, precision_note, resolve_mixed_precision, tf32
from ..core.rng import keyed_generator
from ..data.control_pairs import CHANNELS, ControlPair, Read, encode_pairs, pairs_digest, read_pairs
from ..models.base import Base, load_base, quiet_loading
from ..models.denoiser import Conditioning, Denoiser
from .batch import Batch
from .checkpoint import load_state, refuse_changed_settings, save_state, step_of
from .distributed import take_step
from .optimizers import lr_schedule
from .output import claimed

# How often each feature of diffusers' adapters was halved since the first one.
HALVED = {"full_adapter": (0, 1, 2, 3, 4, 5), "full_adapter_xl": (0, 0, 1, 1, 1, 1)}
SETTINGS = "settings.yaml"
CHUNK = 8  # captions encoded together

Words = dict[str, tuple[Tensor, Tensor | None]]  # caption to its embeddings and, for SDXL, the pooled one


def control_state_path(output: Path) -> Path:
    """Where a run's resumable state lies while it is unfinished."""
    return output.with_name(f"{output.name}.state.safetensors")


def train_control(
    config: ControlConfig,
    base: Base | None = None,
    resume: bool = False,
    hooks: Hooks = QUIET,
    read: Read | None = None,
) -> T2IAdapter:
    """Train a T2I-Adapter of ``base`` (default: the config's) and write ``output``; only the adapter is trained.

    Every random draw is keyed by (seed, step, sample) and the state beside the output holds everything else, so that
    k steps, a stop and ``resume`` give the same bits as an unbroken run on a CPU.

    Args:
        read: opens a condition; give what generating will open it with. Default: :func:`open_condition`.

    Raises:
        Cancelled: ``should_stop`` said so; the state is saved.
        NotFiniteError: NaN or infinity; the last good state is kept.
        UserError: no pairs, conditions of another shape, an output that is not ours, a state of other settings.
    """
    with claimed(config.output):
        prepare_control_output(config.output, resume, hooks)
        return train_claimed(config, base, resume, hooks, read)


def prepare_control_output(output: Path, resume: bool, hooks: Hooks) -> None:
    """Refuse to lose what is at the output: another program's folder, or a stopped training's state.

    Raises:
        UserError: so it is.
    """
    state = control_state_path(output)
    if output.exists() and not is_our_t2i_adapter(output):
        raise UserError(f"{output} exists and is not a folder of train-control.", ELSEWHERE)
    check_writable(output)
    if state.exists() and not resume:
        step = step_of(state)
        where = "A damaged state" if step is None else f"A training stopped at step {step}"
        raise UserError(
            f"{where} is in {state}, which has to be removed to start anew.",
            Fix("resume", "true", "to go on from there"),
        )
    if resume and not state.exists():
        if output.exists():
            raise UserError(f"{output} is done, with no state to go on from.", Fix("resume", "false", "to replace it"))
        hooks.notify(f"No state of a stopped training is beside {output}; starting at step 0.")


def train_claimed(
    config: ControlConfig,
    base: Base | None,
    resume: bool,
    hooks: Hooks,
    read: Read | None,
) -> T2IAdapter:
    """:func:`train_condition`, once its output may be written."""
    output, state = config.output, control_state_path(config.output)
    pairs = read_pairs(config, hooks)
    base = base or load_base(config.base, config.device, config.dtype)
    pipeline, denoiser, unet = base.pipeline, base.denoiser, base.denoiser.network
    shape = fitting_shape(unet, pipeline.vae_scale_factor, config.kind)
    size = fitting_size(config, base, shape["downscale_factor"])
    adapter = new_adapter(shape, config.seed).to(base.device).train()
    parameters = dict(adapter.named_parameters())
    hooks.notify(
        f"{len(pairs)} pictures with a {config.kind}, {size} px; a {shape['adapter_type']} of "
        f"{sum(p.numel() for p in parameters.values()):,} numbers for {len(shape['channels'])} levels of the U-Net."
    )
    resumed = load_state(state)[1].get("config", {}) if resume and state.exists() else {}
    asked = config.mixed_precision if config.mixed_precision != "auto" else resumed.get("mixed_precision", "auto")
    precision = resolve_mixed_precision(asked, base.device, base.dtype)
    precision_note(asked, precision, base.device, config.allow_tf32, hooks.notify)
    config = config.model_copy(update={"mixed_precision": precision})
    scaler = loss_scaler(base.device, precision, base.dtype)
    if denoiser.plain_attention_is_faster(is_half(precision, base.dtype), size):
        unet.set_attn_processor(AttnProcessor())
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    belongs = {"base": base.fingerprint.exact, "pairs": pairs_digest(pairs)}
    start = restore(state, optimizer, parameters, config, belongs) if resume and state.exists() else 0
    captions = encode_captions(base, [pair.caption for pair in pairs], size)
    latents, conditions = encode_pairs(pairs, pipeline.vae, config, size, hooks, read)
    running: float | None = None
    lr_factor = lr_schedule(config.lr_scheduler, config.steps)

    for step in range(start, config.steps):
        if hooks.should_stop():
            keep(state, parameters, optimizer, step, config, belongs)
            raise Cancelled(f"Stopped at step {step} of {config.steps}; it can be resumed.")
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * lr_factor(step)

        samples, shown = sample_control_batch(step, pairs, latents, conditions, config, denoiser)
        noisy = denoiser.add_noise(samples.latents, samples.noise, samples.timesteps)
        with tf32(base.device, config.allow_tf32), autocast(base.device, precision):
            features = [feature.to(base.dtype) for feature in adapter(shown.to(base.device))]
            given = Conditioning.stack([captions[prompt] for prompt in samples.prompts]).to(base.device)
            predicted = denoiser.predict(noisy, samples.timesteps, given, down_intrablock_additional_residuals=features)
        loss = F.mse_loss(predicted, denoiser.target(samples.latents, samples.noise, samples.timesteps))

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if not torch.isfinite(loss) or not take_step(optimizer, parameters.values(), scaler, config.max_grad_norm):
            kept = f"the last good state is kept in {state.name}" if state.exists() else "nothing was saved yet"
            raise NotFiniteError(f"Training met NaN or infinity at step {step}: lower the learning rate ({kept}).")

        value = float(loss.detach())
        running = value if running is None else 0.98 * running + 0.02 * value
        hooks.progress(Event("train", step + 1, config.steps, {"loss": running}))
        if (step + 1) % config.checkpointing_steps == 0 and step + 1 < config.steps:
            keep(state, parameters, optimizer, step + 1, config, belongs)

    keep(state, parameters, optimizer, config.steps, config, belongs)  # until the folder is written
    adapter.eval().requires_grad_(False)
    with atomic_folder(output) as new:
        with quiet_loading():
            adapter.save_pretrained(new)
        write_text(new / SETTINGS, heading() + to_yaml(config, shared=True))
    state.unlink(missing_ok=True)
    return adapter


@torch.no_grad()
def encode_captions(base: Base, captions: Sequence[str], size: int) -> dict[str, Conditioning]:
    """Each caption, and the empty one, through the frozen text encoders once; kept on the CPU."""
    encoded: dict[str, Conditioning] = {}
    texts = list(dict.fromkeys(["", *captions]))
    with quiet_loading():
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            found = base.denoiser.encode(chunk, (size, size)).to("cpu")
            encoded |= {text: found[index] for index, text in enumerate(chunk)}
    return encoded


def sample_control_batch(
    step: int,
    pairs: Sequence[ControlPair],
    latents: Tensor,
    conditions: Tensor,
    config: ControlConfig,
    denoiser: Denoiser,
) -> tuple[Batch, Tensor]:
    """What one step sees: pictures with noise, timesteps and captions; and their conditions (n, 1 or 3, h, w), 0…1."""
    batch, noises, times, prompts, shown = [], [], [], [], []
    for sample in range(config.batch_size):
        generator = keyed_generator(config.seed, "condition", step, sample)
        pair, view = (int(torch.randint(n, (), generator=generator)) for n in latents.shape[:2])
        times.append(denoiser.sample_timestep(generator, config.timestep_power))
        dropped = float(torch.rand((), generator=generator)) < config.caption_dropout
        noises.append(torch.randn(latents.shape[2:], generator=generator))
        batch.append(latents[pair, view])
        shown.append(conditions[pair, view])
        prompts.append("" if dropped else pairs[pair].caption)
    device = latents.device
    samples = Batch(torch.stack(batch), torch.stack(noises).to(device), torch.stack(times).to(device), prompts)
    return samples, torch.stack(shown).float() / 255


def feature_shapes_of(unet: nn.Module) -> list[tuple[int, int]]:
    """Channels and halvings of the latents where a U-Net adds a T2I-Adapter's features, one after the other.

    A CrossAttnDownBlock2D adds a feature before it halves its input, a DownBlock2D after.
    """
    places, halved = [], 0
    channels_of: Any = unet.config
    for block, channels in zip(unet.down_blocks, channels_of.block_out_channels, strict=True):  # type: ignore[arg-type]
        after = halved + (1 if block.downsamplers else 0)
        places.append((channels, halved if getattr(block, "has_cross_attention", False) else after))
        halved = after
    if unet.mid_block is not None:
        places.append((channels_of.block_out_channels[-1], halved))
    return places


def fitting_shape(unet: nn.Module, scale: int, kind: str) -> dict[str, Any]:
    """The arguments of the T2IAdapter that reaches most levels of a U-Net whose VAE shrinks pictures by ``scale``.

    ``full_adapter`` fits Stable Diffusion 1.x and 2.x and ``full_adapter_xl``, which starts at half the latents' size,
    fits XL (:func:`added_at`).
    """
    settings: Any = unet.config
    places = feature_shapes_of(unet)

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


def fitting_size(config: ControlConfig, base: Base, step: int) -> int:
    """The side of the training pictures in pixels.

    Raises:
        UserError: the adapter cannot shrink it evenly.
    """
    size = config.resolution or base.size
    if size % step:
        near = sorted({max(step, size // step * step), (size // step + 1) * step})
        raise UserError(
            f"resolution={size} does not fit the base '{base.name}', which needs a multiple of {step}.",
            *(Fix("resolution", str(side)) for side in near),
        )
    return size


def new_adapter(shape: Mapping[str, Any], seed: int) -> T2IAdapter:
    """An untrained adapter; its first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(keyed_generator(seed, "t2i").get_state())
        return T2IAdapter(**shape)


def is_our_t2i_adapter(folder: Path) -> bool:
    """Whether a folder was written here before, so that it may be replaced."""
    try:
        return (folder / "config.json").is_file() and read_yaml(folder / SETTINGS).get("kind") in CHANNELS
    except UserError:
        return False


def comparable_control_settings(config: ControlConfig) -> dict[str, Any]:
    """The settings that decide the result: all but where things lie and how often states are saved."""
    return config.model_dump(mode="json", exclude={"folder", "output", "checkpointing_steps", "device"})


def keep(
    state: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    config: ControlConfig,
    belongs: Mapping[str, str],
) -> None:
    """Save everything that the run needs to go on exactly here."""
    save_state(
        state,
        parameters,
        optimizer,
        {"step": step, "config": comparable_control_settings(config), "belongs": dict(belongs)},
    )


def restore(
    state: Path,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    config: ControlConfig,
    belongs: Mapping[str, str],
) -> int:
    """Load a saved state into place; returns the step to go on with.

    Raises:
        UserError: it was made with other settings, on another base or from other pictures.
    """
    tensors, meta = load_state(state, optimizer)
    refuse_changed_settings(state, meta, comparable_control_settings(config))
    fits = set(tensors) == set(parameters) and all(tensors[n].shape == parameters[n].shape for n in parameters)
    if meta.get("belongs") != belongs or not fits:
        raise UserError(
            f"{state} was made on another base or from other pictures, and has to be removed to start anew."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return int(meta["step"])
