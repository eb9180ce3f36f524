"""Train a T2I-Adapter of one's own: pictures with sketches or keyposes in, a diffusers ``T2IAdapter`` folder out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import T2IAdapter
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from ..config.control import ControlConfig
from ..config.settings import read_yaml, to_yaml
from ..core.errors import ELSEWHERE, Cancelled, Fix, NotFiniteError, UserError
from ..core.files import atomic_folder, check_writable, write_text
from ..core.hooks import QUIET, Event, Hooks
from ..core.machine import heading
from ..core.outputs import check_only
from ..core.precision import autocast, is_half, loss_scaler, precision_note, resolve_mixed_precision, tf32
from ..core.rng import keyed_generator
from ..data.control_pairs import CHANNELS, ControlPair, Read, encode_pairs, pairs_digest, read_pairs
from ..models.base import Base
from ..models.denoiser import Conditioning, Denoiser
from ..models.loading import load_base, quiet_loading
from .batch import Batch
from .checkpoint import load_state, refuse_changed_settings, save_state, step_of
from .distributed import take_step
from .optimizers import lr_schedule
from .output import claimed
from .readings import Readings

# How often each feature of diffusers' adapters was halved since the first one.
HALVED = {"full_adapter": (0, 1, 2, 3, 4, 5), "full_adapter_xl": (0, 0, 1, 1, 1, 1)}
SETTINGS = "settings.yaml"
CHUNK = 8  # captions encoded together


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
        read: opens a control image; give what generating will open it with. Default: :func:`open_control_image`.

    Raises:
        Cancelled: ``should_stop`` said so; the state is saved.
        NotFiniteError: NaN or infinity; the last good state is kept.
        UserError: no pairs, conditions of another shape, an output that is not ours, a state of other settings.
    """
    with claimed(config.output):
        prepare_control_output(config.output, resume, hooks)
        return ControlTrainer(config, base, resume, hooks, read).train()


def prepare_control_output(output: Path, resume: bool, hooks: Hooks) -> None:
    """Refuse to lose what is at the output: another program's folder, or a stopped training's state.

    Raises:
        UserError: so it is.
    """
    state = control_state_path(output)
    if output.exists() and not is_our_t2i_adapter(output):
        raise UserError(f"{output} exists and is not a folder of train-control.", ELSEWHERE)
    check_only(output, {SETTINGS, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME})
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


class ControlTrainer:
    """One training of a T2I-Adapter: frozen base, encoded pairs, adapter, optimizer and saved state.

    The output must be claimed. ``train`` reads from top to bottom.
    """

    def __init__(self, config: ControlConfig, base: Base | None, resume: bool, hooks: Hooks, read: Read | None) -> None:
        self.config, self.hooks = config, hooks
        self.state = control_state_path(config.output)
        resuming = resume and self.state.exists()
        self.pairs = read_pairs(config, hooks)
        self.base = base or load_base(config.base, config.device, config.dtype)
        self.denoiser = self.base.denoiser
        self._create_adapter()
        self._settle_precision(load_state(self.state)[1].get("config", {}) if resuming else {})
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.lr_factor = lr_schedule(config.lr_scheduler, config.steps)
        self.belongs = {"base": self.base.fingerprint.exact, "pairs": pairs_digest(self.pairs)}
        self.start = self.restore() if resuming else 0
        self.captions = encode_captions(self.base, [pair.caption for pair in self.pairs], self.size)
        vae = self.base.pipeline.vae
        self.latents, self.control_images = encode_pairs(self.pairs, vae, self.config, self.size, hooks, read)
        self.readings = Readings(self.base.device, config.steps)
        self.running_loss: float | None = None

    # ------------------------------------------------------------------ set-up

    def _create_adapter(self) -> None:
        """Make the adapter that fits the base; it is all that is trainable."""
        shape = fitting_shape(self.denoiser.network, self.base.pipeline.vae_scale_factor, self.config.kind)
        self.size = self.config.resolution or self.base.size
        self.base.check_side(self.size, "resolution", shape["downscale_factor"])
        self.adapter = new_adapter(shape, self.config.seed).to(self.base.device).train()
        self.trained: dict[str, nn.Parameter] = dict(self.adapter.named_parameters())
        self.hooks.notify(
            f"{len(self.pairs)} pictures with a {self.config.kind}, {self.size} px; a {shape['adapter_type']} of "
            f"{sum(p.numel() for p in self.trained.values()):,} numbers for {len(shape['channels'])} levels of the "
            "U-Net."
        )

    def _settle_precision(self, saved: Mapping[str, Any]) -> None:
        """Resolve the mixed precision, which a resumed training takes from its saved settings unless one is asked."""
        config, base = self.config, self.base
        asked = config.mixed_precision if config.mixed_precision != "auto" else saved.get("mixed_precision", "auto")
        self.precision = resolve_mixed_precision(asked, base.device, base.dtype)
        precision_note(asked, self.precision, base.device, config.allow_tf32, self.hooks.notify)
        self.config = config.model_copy(update={"mixed_precision": self.precision})
        self.scaler = loss_scaler(base.device, self.precision, base.dtype)
        if self.denoiser.plain_attention_is_faster(is_half(self.precision, base.dtype), self.size):
            self.denoiser.network.set_attn_processor(AttnProcessor())

    # ------------------------------------------------------------------ the loop

    def train(self) -> T2IAdapter:
        """All steps, then the adapter and its folder."""
        config = self.config
        for step in range(self.start, config.steps):
            if self.hooks.should_stop():
                self.save(step)
                raise Cancelled(f"Stopped at step {step} of {config.steps}; it can be resumed.")
            self.train_step(step)
            self.report(step + 1)
            if (step + 1) % config.checkpointing_steps == 0 and step + 1 < config.steps:
                self.save(step + 1)
        return self.finish()

    def train_step(self, step: int) -> None:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.lr_factor(step)
        loss = self.compute_loss(step)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        norm = take_step(self.optimizer, self.trained.values(), self.scaler, self.config.max_grad_norm)
        self.readings.add(step, loss, norm)

    def compute_loss(self, step: int) -> Tensor:
        """Mean squared error of the frozen U-Net's predictions with the adapter's features added."""
        base, denoiser = self.base, self.denoiser
        batch, control = sample_control_batch(
            step, self.pairs, self.latents, self.control_images, self.config, denoiser
        )
        noisy = denoiser.add_noise(batch.latents, batch.noise, batch.timesteps)
        with tf32(base.device, self.config.allow_tf32), autocast(base.device, self.precision):
            features = [feature.to(base.dtype) for feature in self.adapter(control.to(base.device))]
            captions = Conditioning.stack([self.captions[prompt] for prompt in batch.prompts]).to(base.device)
            predicted = denoiser.predict(
                noisy, batch.timesteps, captions, down_intrablock_additional_residuals=features
            )
        return F.mse_loss(predicted, denoiser.target(batch.latents, batch.noise, batch.timesteps))

    def read(self) -> None:
        """Take in the losses of the steps since the last reading.

        Raises:
            NotFiniteError: a loss or a gradient was NaN or infinite.
        """
        losses, wrong = self.readings.read()
        if wrong is not None:
            kept = (
                f"the last good state is kept in {self.state.name}" if self.state.exists() else "nothing was saved yet"
            )
            raise NotFiniteError(f"Training met NaN or infinity at step {wrong}: lower the learning rate ({kept}).")
        for loss in losses:
            self.running_loss = loss if self.running_loss is None else 0.98 * self.running_loss + 0.02 * loss

    def report(self, done: int) -> None:
        """Report the running mean of the loss after ``done`` steps."""
        if self.running_loss is None or self.readings.is_due(done):
            self.read()
        self.hooks.progress(Event("train", done, self.config.steps, {"loss": self.running_loss}))

    def finish(self) -> T2IAdapter:
        """Write the adapter's folder; the state is kept until then."""
        self.save(self.config.steps)
        self.adapter.eval().requires_grad_(False)
        with atomic_folder(self.config.output) as new:
            with quiet_loading():
                self.adapter.save_pretrained(new)
            write_text(new / SETTINGS, heading() + to_yaml(self.config, shared=True))
        self.state.unlink(missing_ok=True)
        return self.adapter

    # ------------------------------------------------------------------ the state

    def save(self, step: int) -> None:
        """Save everything that the training needs to go on exactly here."""
        self.read()
        meta = {
            "step": step, "config": comparable_control_settings(self.config), "belongs": self.belongs,
            "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        save_state(self.state, self.trained, self.optimizer, meta)

    def restore(self) -> int:
        """Load the saved state into adapter and optimizer; returns the step to go on with.

        Raises:
            UserError: it was made with other settings, on another base or from other pictures.
        """
        tensors, meta = load_state(self.state, self.optimizer)
        refuse_changed_settings(self.state, meta, comparable_control_settings(self.config))
        shapes = {name: parameter.shape for name, parameter in self.trained.items()}
        fits = {name: tensor.shape for name, tensor in tensors.items()} == shapes
        if meta.get("belongs") != self.belongs or not fits:
            raise UserError(
                f"{self.state} was made on another base or from other pictures, and has to be removed to start anew."
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[name])
        if meta.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(meta["scaler"])
        return int(meta["step"])


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
