"""The one place that knows how a family of models encodes prompts, adds noise, predicts and samples.

Training, prior images, distillation, calibration, validation and generation use a :class:`Denoiser` and never call a
network or a pipeline themselves. A family is one file beside this one: ``sd.py``, ``sdxl.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from torch import Tensor, nn

from ..config.train import ObjectiveConfig
from ..core.errors import Fix, UserError
from ..core.machine import to_device
from ..linalg import Factors, to_float64
from .offload import is_offloaded
from .original_names import OriginalNames
from .vae import pixels_per_cell

UNIFORM = ObjectiveConfig()
LENGTHS = "lengths"  # the name of prompts' lengths among what a network is given
NEEDS_FLOW = "for bases that match a flow; this one predicts noise or velocity."
OnStep = Callable[[int, Tensor], None]  # the number of the step just done, from 0, and its latents


@dataclass(frozen=True)
class Conditioning:
    """What a network is given with n prompts: tensors by the family's names, the first dimension n."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, chosen: Any) -> Conditioning:
        """Some of the prompts, by anything that indexes a tensor's first dimension."""
        return Conditioning({name: tensor[chosen] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on a device, but for the lengths of prompts, which the host reads."""
        device = torch.device(device)
        moved = {name: to_device(tensor, device) for name, tensor in self.tensors.items() if name != LENGTHS}
        kept = {LENGTHS: self.tensors[LENGTHS].cpu()} if LENGTHS in self.tensors else {}
        return Conditioning({**moved, **kept})

    @classmethod
    def stack(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Single prompts, each without the first dimension, as one batch; shorter ones are filled with zeros."""
        return cls({name: stack_padded([part.tensors[name] for part in parts]) for name in parts[0].tensors})


def stack_padded(rows: Sequence[Tensor]) -> Tensor:
    """Tensors (length, …) as one (n, longest, …), zeros behind the shorter ones; numbers as (n,)."""
    if rows[0].dim() == 0:
        return torch.stack(list(rows))
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


TokenKind = Literal["image", "text", "both"]
Controls = Literal["t2i", "controlnet", "reference"]  # a T2I-Adapter, a ControlNet, or the network as a picture
# Where texts begin at the same token: nowhere, in all prompts that are predicted together, or in all of a picture.
AlignedTexts = Literal["none", "pass", "all"]


class SeveralTexts(Protocol):
    """How a network with joint attention reads a prompt that consists of several texts, one behind the other."""

    def begin_pass(self) -> None:
        """The network starts to predict; for families that predict negative prompts after the others, not with them."""

    def lengths(self, row: int) -> list[int]:
        """The tokens of each text in a row of the batch, with those behind it that only align it."""

    def leading(self) -> list[int]:
        """The texts that image tokens see; the positions of a picture begin behind the longest of them."""

    def mask(self, kind: TokenKind, rows: int) -> Tensor | None:
        """What is added to the scores of attention (rows or 1, 1, tokens, tokens); None: nothing."""


def unbound(layer: str) -> UserError:
    """The error for an adapter's layer that no region can bind, as it lies outside the blocks."""
    return UserError(
        f"An adapter changes '{layer}', which is outside the blocks that a region can bind.",
        Fix("regions", so="without that adapter"),
    )


class Denoiser(ABC):
    """A family of models behind one interface.

    Args:
        models: the networks that adapters change, by component: text encoders and the denoising network.
        vae: the autoencoder.
        dtype: of the frozen networks.
        pipeline: the diffusers pipeline, where prompts are to be encoded or images sampled.
    """

    title: ClassVar[str]  # what people call the family
    pipeline_class: ClassVar[Any]
    network_name: ClassVar[str] = "unet"
    network_class: ClassVar[Any]
    encoders: ClassVar[Mapping[str, str]] = {}  # text encoders that adapters change and whose words are learned
    attention: ClassVar[Literal["cross", "joint"]]  # how the image reads text
    text_first: ClassVar[bool] = True  # in joint attention: the text's tokens before the image's
    causal_text: ClassVar[bool] = False  # in joint attention: a text's token sees what precedes it, and no image
    aligned_texts: ClassVar[AlignedTexts] = "none"
    token_multiple: ClassVar[int] = 1  # the padded length of texts and pictures is a multiple of it
    controls: ClassVar[Controls | None] = None  # what reads sketches and keyposes
    controlnet_class: ClassVar[Any] = None
    controlnet_pipeline_class: ClassVar[Any] = None
    default_controlnet: ClassVar[str] = ""  # on the hub: user/repository/file
    t2i_adapters: ClassVar[Mapping[str, str]] = {}  # kind of control image to a T2I-Adapter on the hub
    samplers: ClassVar[tuple[str, ...]] = ("dpm", "ddim", "euler")  # that one can choose from
    decodes_latents: ClassVar[bool] = False  # the pipeline itself, in the precision that its autoencoder wants
    supports_checkpoint: ClassVar[bool] = False  # one file in the original's spelling
    architecture: ClassVar[str] = ""  # ModelSpec's name of the family; empty where the layers decide
    base_version: ClassVar[str] = ""  # kohya's name of it
    original_names: ClassVar[OriginalNames | None] = None  # of its layers, in LoRA files for ComfyUI
    comfyui_reads_kohya: ClassVar[bool] = False  # ComfyUI's LoRA files of the family are kohya's
    text_part: ClassVar[str] = "tokenizer"  # of the pipeline, which reads the prompts
    requires: ClassVar[tuple[str, ...]] = ()  # packages besides this program's own, without which it cannot be loaded
    resting: ClassVar[tuple[str, ...]] = ()  # parts of the pipeline that stay on the CPU until they work
    quantizable: ClassVar[bool] = False  # whether the network may be loaded in 8 or 4 bits, or stay on the CPU
    network_parts: ClassVar[tuple[str, ...]] = ("unet",)  # of the pipeline, which share one dtype

    def __init__(
        self, models: Mapping[str, nn.Module], vae: nn.Module, dtype: torch.dtype, pipeline: Any = None
    ) -> None:
        self.models, self.dtype, self.pipeline = models, dtype, pipeline
        self.vae: Any = vae

    @classmethod
    def prepare(cls, pipeline: Any) -> None:
        """Make a loaded pipeline ready for adapters.

        Raises:
            ValueError: the pipeline is of this family but cannot be used; the text says why.
        """
        return  # most families need nothing

    @classmethod
    def tokenizer_of(cls, pipeline: Any) -> Any:
        """The tokenizer of a pipeline's prompts."""
        return getattr(pipeline, cls.text_part)

    @classmethod
    def release(cls, pipeline: Any) -> None:
        """Give a pipeline without adapters back as it was before :meth:`prepare`."""
        return

    # ------------------------------------------------------------------ the network

    @property
    def network(self) -> Any:
        """The denoising network."""
        return self.models[self.network_name]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        device: torch.device = self.network.device
        return device

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell, along one side."""
        return pixels_per_cell(self.vae)

    @property
    def size(self) -> int:
        """The side in pixels that the network was trained for."""
        return self.size_of(self.network.config, self.vae.config)

    @classmethod
    def size_of(cls, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """:attr:`size` by the configs of the network and the autoencoder."""
        return int(network["sample_size"]) * int(2 ** (len(vae["block_out_channels"]) - 1))

    # ------------------------------------------------------------------ latents

    def normalize(self, raw: Tensor) -> Tensor:
        """The autoencoder's latents (n, c, h, w) as the network reads them."""
        scaled: Tensor = raw * self.vae.config.scaling_factor
        return scaled

    def denormalize(self, latents: Tensor) -> Tensor:
        """The network's latents as the autoencoder reads them."""
        raw: Tensor = latents / self.vae.config.scaling_factor
        return raw

    def raw_output(self, latents: Tensor, height: int, width: int) -> Tensor:
        """What the pipeline gives as ``latent`` for pictures of that size in pixels, as the autoencoder reads it."""
        return self.denormalize(latents)

    def step_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The latents (n, c, h, w) of a step of the pipeline, for pictures of that size in pixels."""
        return latents

    @property
    def picture_multiple(self) -> int:
        """What the sides of pictures must be divisible by at least."""
        return self.vae_scale

    @property
    def side_multiple(self) -> int:
        """What the sides of pictures must be divisible by, so that no network has to round."""
        return self.vae_scale

    @property
    def token_side(self) -> int:
        """The side in pixels of what an image token of joint attention covers."""
        return self.side_multiple

    # ------------------------------------------------------------------ prompts

    def prompt_options(self, prompts: Sequence[str], negative: str | None) -> dict[str, Any]:
        """The pipeline's arguments for prompts and what guidance moves away from."""
        return {"prompt": list(prompts), "negative_prompt": negative and [negative] * len(prompts)}

    def unread_text(self, prompt: str) -> str:
        """The end of a prompt, as a pipeline takes it, that no text encoder sees; empty if it sees everything."""
        tokenizer = self.tokenizer_of(self.pipeline)
        ids = tokenizer(prompt, truncation=False, add_special_tokens=False).input_ids
        return str(tokenizer.decode(ids[tokenizer.model_max_length - 2 :])).strip()

    def word_columns(self, prompt: str, words: str) -> Tensor:
        """(length,) bool: which tokens of an encoded prompt belong to these words. Of families with joint attention."""
        raise TypeError(f"{self.title} learns its words, so their tokens are known")

    def guidance_options(self, scale: float) -> dict[str, Any]:
        """The pipeline's arguments for a guidance scale, which counts as this family's pipeline counts."""
        return {"guidance_scale": scale}

    @abstractmethod
    def encode(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Prompts as the network reads them, for pictures of ``size`` (height, width) in pixels; default: its own.

        An empty prompt is what guidance moves away from.
        """

    def encode_ids(
        self, ids: Mapping[str, Tensor], empty: Sequence[bool], size: tuple[int, int] | None = None
    ) -> Conditioning:
        """The same from token ids (n, length) by text encoder, with gradients. ``empty`` says which prompts are.

        A family without ``encoders`` has no words to learn, and none of this.
        """
        raise NotImplementedError

    @abstractmethod
    def embedding_options(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        """What the family's pipeline takes in place of prompts."""

    def prompt_rows(self, conditioning: Conditioning) -> list[Tensor]:
        """The states of each prompt (length, width), without its padding."""
        return list(conditioning.tensors["encoder_hidden_states"])

    def row_prompt(self, states: Tensor) -> Conditioning:
        """States (length, width) as a prompt, without the first dimension: what :meth:`prompt_rows` takes apart."""
        return Conditioning({"encoder_hidden_states": states})

    def effective_guidance(self, scale: float) -> float:
        """g of e + g (c − e), which a picture with this ``guidance_scale`` follows; 1 is none."""
        return max(scale, 1.0)

    # ------------------------------------------------------------------ noise and prediction

    @cached_property
    def schedule(self) -> DDPMScheduler:
        """The training noise schedule."""
        return DDPMScheduler.from_config(self.pipeline.scheduler.config)

    @property
    def num_timesteps(self) -> int:
        """How many timesteps the schedule has."""
        return len(self.schedule.alphas_cumprod)

    def check_objective(self, objective: ObjectiveConfig) -> None:
        """Raise a UserError where the loss asks for something that this family does not have."""
        if objective.timestep_shift not in (0, 1):
            raise UserError(f"A timestep shift is {NEEDS_FLOW}", Fix("objective.timestep_shift", "0"))
        if objective.loss_weighting != "none":
            raise UserError(
                f"The weights {objective.loss_weighting} are {NEEDS_FLOW}", Fix("objective.loss_weighting", "none")
            )

    def sample_timestep(self, generator: torch.Generator, power: float, objective: ObjectiveConfig = UNIFORM) -> Tensor:
        """t = T f(u^power), with u in 0…1 of the objective's density and f the family's shift towards noise."""
        u = compute_density_for_timestep_sampling(
            objective.timestep_density, 1, objective.logit_mean, objective.logit_std, objective.mode_scale,
            generator=generator,
        )[0]  # fmt: skip
        last = self.num_timesteps
        return (self.shifted(u.clamp(0, 1) ** power, objective.timestep_shift) * last).long().clamp(0, last - 1)

    def shifted(self, u: Tensor, shift: float) -> Tensor:
        """Times in 0…1, moved towards noise; 0 means the base's own shift."""
        return u

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents (n, c, h, w) at timesteps (n,)."""
        noisy: Tensor = self.schedule.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict: the noise ε or the velocity v.

        Raises:
            UserError: the base predicts something else.
        """
        kind = self.schedule.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            velocity: Tensor = self.schedule.get_velocity(latents, noise, timesteps)
            return velocity
        raise UserError(f"This base predicts '{kind}'; only epsilon and v_prediction can be trained.")

    def timestep_weights(self, timesteps: Tensor, objective: ObjectiveConfig) -> Tensor | None:
        """The objective's weights (n,) of the timesteps (n,); None where all count alike."""
        return min_snr_weights(self.schedule, timesteps, objective.snr_gamma)

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **extra: Any) -> Tensor:
        """The network's predictions (n, c, h, w) in float32.

        Args:
            extra: more keyword arguments of the network, such as a T2I-Adapter's features.
        """

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample_latents(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float,
        size: int | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents (n, c, h, w) of square images, one per prompt and generator, by the base's own sampler."""

        def tell(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step:
                on_step(step, tensors["latents"])
            return tensors

        side = size or self.size
        with self.sampling():
            latents: Tensor = self.sampling_pipeline(
                **self.prompt_options(prompts, None),
                width=side,
                height=side,
                num_inference_steps=num_inference_steps,
                **self.guidance_options(guidance_scale),
                generator=list(generators),
                output_type="latent",
                callback_on_step_end=tell,
            ).images
        return self.from_output(latents, side, side)

    @property
    def sampling_pipeline(self) -> Any:
        """The pipeline that :meth:`sample_latents` calls."""
        return self.pipeline

    @classmethod
    def place(cls, pipeline: Any, device: torch.device) -> None:
        """Move a pipeline to a device, except for its resting parts."""
        if not cls.resting:
            pipeline.to(device)
            return
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and not is_offloaded(part):
                part.to("cpu" if name in cls.resting else device)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """What a pipeline of this family needs while it samples."""
        yield

    def from_output(self, latents: Tensor, height: int, width: int) -> Tensor:
        """What the pipeline gives as ``latent`` for pictures of that size in pixels, as the network reads it."""
        return latents

    @abstractmethod
    def scheduler(self, name: str) -> Any:
        """A sampler by name (``dpm``, ``ddim``, ``euler``) with the base's own noise schedule."""

    @classmethod
    def misfit(cls, controlnet: Any, network: Any) -> str:
        """Why a ControlNet is not for a network; empty if it is."""
        return ""

    @abstractmethod
    def make_pipeline(self, scheduler: Any, control: Any = None, text_encoders: bool = True) -> Any:
        """A stock pipeline of the same parts with another scheduler, and perhaps a T2I-Adapter or ControlNet.

        Args:
            text_encoders: whether it holds them; without, it takes prompts by :meth:`embedding_options`.
        """

    def convert_lora(self, name: str, change: Factors) -> dict[str, Factors]:
        """A change of a layer, as another program spells its name, as changes of layers by ``component.path``.

        It is empty for a name that the family's reader does not know.
        """
        return {}

    # ------------------------------------------------------------------ speed and memory

    def token_kind(self, layer: str) -> TokenKind:
        """Which tokens a layer of a network with joint attention sees."""
        raise NotImplementedError

    def several_texts(self, pipeline: Any, texts: SeveralTexts) -> AbstractContextManager[None]:
        """While it is open, the network takes each prompt for several texts, each with positions of its own."""
        raise NotImplementedError

    def hollow_predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """:meth:`predict` with tensors that hold nothing; a network that looks at its inputs' values needs its own."""
        return self.predict(noisy, timesteps, conditioning)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the network reads."""
        return int(self.network.config.in_channels)

    @abstractmethod
    def hollow_conditioning(self, count: int, layers: int = 1) -> Conditioning:
        """The conditioning of a number of prompts, without values, to measure memory with.

        Args:
            layers: how often each prompt is encoded, for a concept's own vectors in every layer.
        """

    def set_lean_attention(self, device: str, half: bool, size: int) -> None:
        """Let a hollow network on a pretended CPU keep in its attention what it would on a device.

        Args:
            device: ``cuda`` or ``cpu``.
            half: whether it computes in half precision.
            size: side of the pictures in pixels.
        """
        return

    def plain_attention_is_faster(self, half: bool, size: int) -> bool:
        """Whether plain attention beats torch's fused one for images of that side; ``half``: in half precision."""
        return plain_attention_is_faster(self.device.type, half, size // self.vae_scale)

    @contextmanager
    def fast_attention(self, half: bool, size: int) -> Iterator[None]:
        """Use diffusers' plain attention while the context is open, where that is faster."""
        if not self.plain_attention_is_faster(half, size):
            yield
            return
        before = dict(self.network.attn_processors)
        self.network.set_attn_processor(AttnProcessor())
        try:
            yield
        finally:
            self.network.set_attn_processor(before)

    @contextmanager
    def compiled(self, on: bool) -> Iterator[None]:
        """Compile the network by torch.compile while the context is open, if ``on``."""
        if not on:
            yield
            return
        # Hooks come and go: regions and the strengths of validation images are some.
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            self.network.compile()
            try:
                yield
            finally:
                self.network._compiled_call_impl = None

    @contextmanager
    def gradient_checkpointing(self, on: bool) -> Iterator[None]:
        """Keep only the blocks' inputs for the backward pass while the context is open, if ``on``."""
        if on:
            self.network.enable_gradient_checkpointing()
        try:
            yield
        finally:
            if on:
                self.network.disable_gradient_checkpointing()


def plain_attention_is_faster(device: str, half: bool, side: int) -> bool:
    """Whether plain attention beats the fused one: on a CPU in half precision, for latents below 64 cells a side.

    In float32 the fused one takes half the time where there are many cells, and it never keeps the scores.
    """
    return device == "cpu" and half and side < 64


def min_snr_weights(schedule: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor | None:
    """Min-SNR-γ weights (n,) of the timesteps (Hang et al. 2023); None where γ is 0.

    min(snr, γ) / snr where ε is predicted and min(snr, γ) / (snr + 1) where v is, so that both weigh the error of the
    image alike. A step that is all noise (snr 0) counts 1 for ε and 0 for v.
    """
    if gamma == 0:
        return None
    snr = to_float64(compute_snr(schedule, timesteps))
    if schedule.config.prediction_type == "v_prediction":
        weights = snr.clamp_max(gamma) / (snr + 1)
    else:
        weights = (gamma / snr).clamp_max(1)  # γ / 0 is infinite, so 1
    return weights.float().to(timesteps.device)
