"""What families that match a flow have in common: straight paths from images to noise (Lipman et al. 2023)."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor, nn

from ..config.train import ObjectiveConfig
from ..core.errors import Fix, UserError
from ..linalg import Factors
from .denoiser import Conditioning, Denoiser
from .offload import is_offloaded, offload, release
from .original_names import PREFIX, OriginalNames
from .quantization import quantization_of

ROOM = 1.15  # of a module's own bytes, with what it computes
KOHYA = r"lora_|lycoris_"  # how names with underscores for dots begin
DOTTED = r"^(diffusion_model|transformer)\."  # how names with dots may begin
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
KEPT = 256  # encoded prompts
TOKENS, TIMESTEPS = 512, 1000  # of a prompt and of a schedule, as the pipelines have them


class FlowDenoiser(Denoiser):
    """x_σ = (1 − σ) x_0 + σ noise, and the network predicts the velocity noise − x_0. Timestep t is σ = (t + 1) / T."""

    network_name: ClassVar[str] = "transformer"
    network_parts: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder")
    resting: ClassVar[tuple[str, ...]] = ("text_encoder",)
    quantizable: ClassVar[bool] = True
    samplers: ClassVar[tuple[str, ...]] = ("euler",)
    thinking: ClassVar[bool] = False  # whether the chat template of prompts leaves room to think
    pipeline_options: ClassVar[tuple[str, ...]] = ()  # of the pipeline's config, which a new pipeline is given

    @classmethod
    def release(cls, pipeline: Any) -> None:
        if not is_offloaded(getattr(pipeline, cls.network_name)):  # else this program loaded it
            release(getattr(pipeline, cls.network_name))
        if pipeline.text_encoder is not None:
            release(pipeline.text_encoder)

    @classmethod
    def size_of(cls, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        return int(vae["sample_size"])

    @property
    def picture_multiple(self) -> int:
        return self.side_multiple  # a token is a whole patch

    @property
    def max_tokens(self) -> int:
        """The longest prompt in tokens."""
        config: Any = self.pipeline.text_encoder.config.get_text_config()
        return min(TOKENS, int(config.max_position_embeddings))

    def prompt_options(self, prompts: Sequence[str], negative: str | None) -> dict[str, Any]:
        # Encoded here, since the pipeline's noise takes the precision of its prompts, which autocast would lower.
        nothing = Conditioning.stack([self.encode([negative or ""])[0]] * len(prompts))
        return self.embedding_options(self.encode(prompts), nothing)

    @property
    def num_timesteps(self) -> int:
        return int(self.pipeline.scheduler.config.num_train_timesteps) if self.pipeline else TIMESTEPS

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """σ (n,) of timesteps (n,), in 0…1."""
        return (timesteps.float() + 1) / self.num_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self.sigmas(timesteps).view(-1, *[1] * (latents.dim() - 1)).to(latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    @cached_property
    def sampling_pipeline(self) -> Any:
        """Without the text encoder: prompts come encoded, and a resting part would name the wrong device."""
        return self.make_pipeline(self.pipeline.scheduler, text_encoders=False)

    @contextmanager
    def text_encoder_at_work(self) -> Iterator[None]:
        """Have the text encoder compute on the network's device for a while.

        If there is no room for both, the network makes room. If there is none even then, or if the network is
        quantized and so small that its leaving would not help, the encoder comes layer by layer.
        """
        encoder, device = self.pipeline.text_encoder, self.device
        if self.encoder_device == device:
            yield
            return
        swap = False
        try:
            if not has_room(encoder, device):
                swap = quantization_of(self.network) == "none" and not is_offloaded(self.network)
                if swap:
                    self.network.to("cpu")
                if device.type == "cuda" and not has_room(encoder, device):
                    offload(encoder, device)
                    yield
                    return
            encoder.to(device)
            yield
        finally:
            encoder.to("cpu")
            if swap:
                self.network.to(device)

    @property
    def encoder_device(self) -> torch.device:
        """Where the text encoder computes now."""
        device: torch.device = self.pipeline.text_encoder.device
        return device

    def encode(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Each prompt alone and once: these text encoders do not learn, and what they gave waits on the CPU."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if new:
            device = self.device
            with torch.no_grad(), torch.autocast(device.type, enabled=False), self.text_encoder_at_work():
                self._encoded |= {prompt: self._encode_new(prompt) for prompt in new}
        encoded = Conditioning.stack([self._encoded[prompt] for prompt in prompts]).to(self.device)
        for prompt in list(self._encoded)[:-KEPT]:
            del self._encoded[prompt]
            self._read.pop(prompt, None)
        return encoded

    @cached_property
    def _encoded(self) -> dict[str, Conditioning]:
        """The latest prompts, each without the first dimension."""
        return {}

    @cached_property
    def _read(self) -> dict[str, Tensor]:
        """The token ids of these prompts, with their templates."""
        return {}

    def unread_text(self, prompt: str) -> str:
        tokenizer = self.tokenizer_of(self.pipeline)
        over = self.extra_tokens(prompt)
        ids = tokenizer(prompt, truncation=False, add_special_tokens=False).input_ids
        return str(tokenizer.decode(ids[-over:])).strip() if over > 0 else ""

    def extra_tokens(self, prompt: str) -> int:
        """How many tokens a prompt has beyond the longest; 0 or less if it fits."""
        tokenizer = self.pipeline.tokenizer
        message = [{"role": "user", "content": prompt}]
        whole = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=self.thinking
        )
        return len(tokenizer(whole, truncation=False).input_ids) - self.max_tokens

    def word_columns(self, prompt: str, words: str) -> Tensor:
        """(length,) bool: which tokens of an encoded prompt belong to these words, in upper or lower case.

        What the text encoder was given says it, whatever template the pipeline puts around a prompt.
        """
        [row] = self.prompt_rows(self.encode([prompt]))
        tokenizer, ids = self.tokenizer_of(self.pipeline), self._read[prompt]
        if len(row) < len(ids):  # without padding, and without what a template puts in front
            ids = ids[ids != tokenizer.pad_token_id]
            ids = ids[len(ids) - len(row) :]
        ends = [len(tokenizer.decode(ids[: index + 1])) for index in range(len(ids))]
        text = tokenizer.decode(ids).lower()
        columns = torch.zeros(len(row), dtype=torch.bool)
        for match in re.finditer(re.escape(words.lower()), text):
            for index, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                columns[index] |= start < match.end() and match.start() < end
        return columns

    def _encode_new(self, prompt: str) -> Conditioning:
        """A prompt encoded, on the CPU; the ids that the text encoder was given are kept beside it."""
        seen: list[Tensor] = []
        table = self.pipeline.text_encoder.get_input_embeddings()
        handle = table.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].cpu()))
        try:
            encoded = self.encode_one(prompt).to("cpu")
        finally:
            handle.remove()
        if seen:
            self._read[prompt] = seen[0]
        return encoded

    @abstractmethod
    def encode_one(self, prompt: str) -> Conditioning:
        """A prompt as the network reads it, without the first dimension, while the text encoder is at work."""

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Keep the steps in float32: the scheduler takes the precision of the prediction, which autocast lowers."""

        def full(module: Any, inputs: Any, outputs: Any) -> Any:
            return (outputs[0].float(), *outputs[1:]) if isinstance(outputs, tuple) else outputs

        def own(module: Any, inputs: Any, options: dict[str, Any]) -> Any:  # not every pipeline casts the latents
            latents = options["hidden_states"].to(self.dtype)
            return inputs, {**options, "hidden_states": latents}

        handles = [
            self.network.register_forward_hook(full),
            self.network.register_forward_pre_hook(own, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def plain_attention_is_faster(self, half: bool, size: int) -> bool:
        return False  # transformers have no plain processor

    def check_objective(self, objective: ObjectiveConfig) -> None:
        if objective.snr_gamma:
            raise UserError(
                "Min-SNR weights are for bases that predict noise; this one matches a flow.",
                Fix("objective.snr_gamma", "0"),
            )

    def shifted(self, u: Tensor, shift: float) -> Tensor:
        """s u / (1 + (s − 1) u). A base whose sampler shifts by the size of the picture has no shift of its own."""
        config = self.pipeline.scheduler.config
        shift = shift or (1.0 if config.use_dynamic_shifting else float(config.shift))
        if shift == 1:
            return u
        moved: Tensor = FlowMatchEulerDiscreteScheduler(time_shift_type="linear").time_shift(shift, 1.0, u)
        return moved

    def timestep_weights(self, timesteps: Tensor, objective: ObjectiveConfig) -> Tensor | None:
        if objective.loss_weighting == "none":
            return None
        weights: Tensor = compute_loss_weighting_for_sd3(objective.loss_weighting, self.sigmas(timesteps))
        return weights

    def scheduler(self, name: str) -> Any:
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)

    def make_pipeline(self, scheduler: Any, control: Any = None, text_encoders: bool = True) -> Any:
        parts = {**self.pipeline.components, "scheduler": scheduler}
        kind = self.pipeline_class if control is None else self.controlnet_pipeline_class
        if control is not None:
            parts["controlnet"] = control
        if not text_encoders:
            parts["text_encoder"] = None
        options = {name: self.pipeline.config[name] for name in self.pipeline_options}
        pipeline = kind(**parts, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def convert_lora(self, name: str, change: Factors) -> dict[str, Factors]:
        """A change of a layer, as another program spells its name, as changes of layers by ``component.path``.

        diffusers' reader of the family finds the layers. It splits fused ones, every part with the whole ``down``.
        """
        if name in self.kohya_names:
            return {self.kohya_names[name]: change}
        if re.match(KOHYA, name):
            keys = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
        else:
            names, path = self.original_names or OriginalNames(()), re.sub(DOTTED, "", name)
            keys = f"{PREFIX}{path}.{names.down}", f"{PREFIX}{path}.{names.up}"
        try:
            found = self.pipeline_class.lora_state_dict({keys[0]: change.down, keys[1]: change.up})
            layers = [key.removesuffix(LORA_A) for key in found if key.endswith(LORA_A)]
            return {layer: Factors(found[layer + LORA_B], found[layer + LORA_A]) for layer in layers}
        except (ValueError, KeyError, IndexError, RuntimeError):  # none of its names
            return {}

    @cached_property
    def kohya_names(self) -> dict[str, str]:
        """Layers by their names and the original's in kohya's spelling; diffusers' readers do not know all.

        Layers that the original fuses are left to diffusers' reader.
        """
        paths = [path for path, module in self.network.named_modules() if isinstance(module, nn.Linear)]
        spelled = {path: path for path in paths}
        if self.original_names:
            found = {path: self.original_names.find(path) for path in paths}
            spelled |= {one[0]: path for path, one in found.items() if one and not one[1]}
        return {f"lora_unet_{name.replace('.', '_')}": f"{self.network_name}.{path}" for name, path in spelled.items()}


def has_room(module: nn.Module, device: torch.device) -> bool:
    """Whether a GPU has the memory for a module beside what is there; of other devices nobody can tell."""
    if device.type != "cuda":
        return False
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # this process keeps it ready
    free = int(torch.cuda.mem_get_info(device)[0]) + unused
    return free > ROOM * sum(p.numel() * p.element_size() for p in module.parameters())
