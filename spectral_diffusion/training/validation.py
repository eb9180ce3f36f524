"""Validation during training: sample grids, a tracker, likeness, a card. None of it affects training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from .. import pocket
from ..adapters.adapter import Adapter
from ..adapters.attach import InjectedAdapter
from ..config.train import TrainConfig, ValidationConfig
from ..core.errors import Fix, UserError, reason
from ..core.files import atomic
from ..core.hooks import Hooks
from ..core.precision import MixedPrecision, autocast
from ..data.folder import Concept, open_photo
from ..data.image_grid import enlarged, labelled_grid
from ..metrics.identity import IdentityEncoder, identity_score, load_identity_encoder
from ..models.base import Base
from ..models.denoiser import Denoiser
from ..models.prompt_encoder import PromptEncoder
from ..models.vae import on_white
from .card import write_card
from .optimizers import EMA
from .status import add_point

BETTER = 0.005  # how much more alike the samples must be to count as better


def samples_folder(output: Path) -> Path:
    """The folder of a training's sample grids."""
    return output.with_name(f"{output.stem}-samples")


@contextmanager
def at_strength(injected: InjectedAdapter, strength: float) -> Iterator[None]:
    """Scale ΔW by λ, whatever the method: the difference of each layer's output from its base's is scaled."""

    def scale(layer: Any, inputs: Any, keywords: Any, output: Tensor) -> Tensor:
        unchanged: Tensor = layer.get_base_layer()(*inputs, **keywords)
        return unchanged + strength * (output - unchanged)

    layers: list[Any] = [] if strength == 1 else list(injected.layers.values())
    handles = [layer.register_forward_hook(scale, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def validation_images(
    base: Base,
    encoder: PromptEncoder,
    injected: InjectedAdapter,
    subject: str,
    config: ValidationConfig,
    precision: MixedPrecision = "no",
) -> list[list[Image.Image]]:
    """A row per prompt, a picture per strength, from the seeds seed, seed + 1, … of the rows.

    The networks, their processors and every random state stay as they are.
    """
    denoiser = base.denoiser
    # Without text encoders: prompts come encoded, and the pipeline would take the encoders' precision for its own.
    pipe = denoiser.make_pipeline(denoiser.scheduler("dpm"), text_encoders=False)
    prompts = [prompt.replace("{}", subject) for prompt in config.prompts]
    seeds = [config.seed + row for row in range(len(prompts))]
    columns = []
    slicing, pipe.vae.use_slicing = pipe.vae.use_slicing, True  # decoded one by one: they would take the most memory
    try:
        for strength in config.scales:
            with torch.no_grad(), torch.random.fork_rng([]), at_strength(injected, strength):
                options = denoiser.embedding_options(encoder(prompts), encoder([""] * len(prompts)))
                with network_autocast(denoiser, precision), denoiser.sampling():
                    images = pipe(
                        width=encoder.size, height=encoder.size, num_inference_steps=config.num_inference_steps,
                        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                        **options, **denoiser.guidance_options(config.guidance_scale),
                    ).images  # fmt: skip
                columns.append([on_white(image) for image in images])
    finally:
        pipe.vae.use_slicing = slicing
    return [list(row) for row in zip(*columns, strict=True)]


@contextmanager
def network_autocast(denoiser: Denoiser, precision: MixedPrecision) -> Iterator[None]:
    """Run the network alone under autocast: an autoencoder may overflow in half precision."""
    if precision == "no":
        yield
        return
    network: Any = denoiser.network
    forward = network.forward

    def inside(*inputs: Any, **options: Any) -> Any:
        with autocast(denoiser.device, precision):
            return forward(*inputs, **options)

    network.forward = inside
    try:
        yield
    finally:
        del network.forward


class Validator:
    """Called after every step; generates grids, records metrics, and reports when the likeness has stopped rising.

    Grids and records are written beside the adapter's file.

    Args:
        active: whether this process is the one that writes.

    Attributes:
        precision: autocast's, with which the network has to be used.
    """

    precision: MixedPrecision = "no"

    def __init__(self, config: TrainConfig, concept: Concept, base: Base, hooks: Hooks, active: bool = True) -> None:
        self.path, self.config, self.concept, self.base, self.note = config.output, config, concept, base, hooks.notify
        self.active = active
        self.curve: list[tuple[int, float]] = []
        self.samples: list[tuple[int, str]] = []
        self.likeness: list[tuple[int, float]] = []
        self.rested = 0  # grids since the likeness rose
        self._stride = 1
        self.encoder = self._encoder() if config.validation.every and active else None
        self._lone = not PartialState._shared_state  # nothing else in this process has accelerate's state
        self.tracker = start_tracker(config, self.path, concept.name) if active else None

    def __enter__(self) -> Validator:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.tracker:
            self.tracker.finish()
            if self._lone:
                PartialState._reset_state()

    @property
    def plateau(self) -> bool:
        """Whether training may stop: no grid improved the likeness for ``early_stopping_patience`` grids in a row."""
        return 0 < self.config.validation.early_stopping_patience <= self.rested

    def is_due(self, step: int) -> bool:
        """Whether there is a grid after ``step`` steps."""
        every = self.config.validation.every
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def __call__(
        self, step: int, loss: float, rate: float, encoder: PromptEncoder, injected: InjectedAdapter, average: EMA
    ) -> dict[str, Any]:
        """Look at the networks after a step; returns the figures to show."""
        figures: dict[str, Any] = {"loss": loss}
        if not self.active:
            return figures
        self._stride = add_point(self.curve, step, loss, self._stride)
        if self.is_due(step):
            with average.applied():
                injected.prune()
                rows = validation_images(
                    self.base, encoder, injected, self.concept.subject, self.config.validation, self.precision
                )
            figures |= self._keep(step, rows)
        if self.tracker:
            numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
            self.tracker.log({**numbers, "rate": rate}, step=step)
        return figures

    def _keep(self, step: int, rows: list[list[Image.Image]]) -> dict[str, Any]:
        """Write a grid; one that cannot be written is no reason to stop."""
        figures: dict[str, Any] = {}
        file = samples_folder(self.path) / f"step-{step:06d}.png"
        try:
            with atomic(file) as temporary:
                shown = [[enlarged(image, 96) for image in row] for row in rows]
                titles = [f"scale {value:g}" for value in self.config.validation.scales]
                labelled_grid(shown, column_labels=titles).save(temporary, "PNG")
            self.samples.append((step, str(file)))
            figures["sample"] = str(file)
        except (UserError, OSError) as error:
            self.note(f"Note: the samples of step {step} could not be written ({reason(error)}).")
        if self.encoder:
            strongest = max(range(len(self.config.validation.scales)), key=self.config.validation.scales.__getitem__)
            alike = float(identity_score(self.encoder, [row[strongest] for row in rows], self.references).mean())
            best = max((value for _, value in self.likeness), default=-1.0)
            self.rested = 0 if alike > best + BETTER else self.rested + 1
            self.likeness.append((step, alike))
            figures["likeness"] = alike
        return figures

    def _encoder(self) -> IdentityEncoder | None:
        """The pocket bases' identity encoder, which knows their world; there is none for others."""
        if not pocket.is_pocket(self.base.name):
            if self.config.validation.early_stopping_patience:
                self.note(
                    "Note: only the pocket bases have an identity encoder; validation.early_stopping_patience stops "
                    "nothing here."
                )
            return None
        own = [photo for photo in self.concept.photos if self.concept.token_of(photo) == self.concept.token]
        self.references = [open_photo(photo.path) for photo in own]
        return load_identity_encoder()

    def finish(self, adapter: Adapter) -> None:
        """Write the card, if one is wanted; a full disk is no reason to lose the adapter."""
        if self.active and self.config.validation.model_card:
            try:
                write_card(adapter, self.config, self.curve, self.samples, self.likeness)
            except UserError as error:
                self.note(f"Note: {error}")

    def state(self) -> dict[str, Any]:
        """The state that a resume needs, JSON-able."""
        return {
            "curve": self.curve, "stride": self._stride, "samples": self.samples, "likeness": self.likeness,
            "rested": self.rested,
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Take :meth:`state` back."""
        self.curve = [(int(step), float(value)) for step, value in state.get("curve", [])]
        self.samples = [(int(step), str(file)) for step, file in state.get("samples", [])]
        self.likeness = [(int(step), float(value)) for step, value in state.get("likeness", [])]
        self._stride, self.rested = int(state.get("stride", 1)), int(state.get("rested", 0))


def start_tracker(config: TrainConfig, path: Path, name: str) -> Any:
    """One of accelerate's trackers, logging into ``<stem>-log/``; None if none is wanted.

    Raises:
        UserError: its package is not installed, or it cannot start.
    """
    tracker_name = config.validation.log_with
    if tracker_name == "none":
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if tracker_name not in [str(tracker_type.value) for tracker_type in get_available_trackers()]:
        extra = (
            "pip install 'spectral-diffusion[log]'" if tracker_name == "tensorboard" else f"pip install {tracker_name}"
        )
        raise UserError(f"The tracker {tracker_name} is not installed ({extra}).", Fix("validation.log_with", "none"))
    PartialState(cpu=not torch.cuda.is_available())  # the trackers read the main process from it
    kind = LOGGER_TYPE_TO_CLASS[tracker_name]
    folder = {"logging_dir": str(path.with_name(f"{path.stem}-log"))} if kind.requires_logging_directory else {}
    try:
        tracker = kind(re.sub(r"[^\w.-]+", "-", name), **folder)
        tracker.start()
    except Exception as error:  # each has its own ways to fail: no key, no network
        raise UserError(f"The tracker {tracker_name} could not start: {reason(error)}.") from error
    return tracker
