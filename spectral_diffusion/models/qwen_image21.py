"""Qwen-Image-2.1: a transformer whose text tokens see only what precedes them, prompts by a Qwen3-VL, RGBA latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch
from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel
from torch import Tensor

from ..core.machine import to_device
from .denoiser import AlignedTexts, Conditioning, SeveralTexts, TokenKind, unbound
from .flow import TOKENS
from .original_names import OriginalNames
from .qwen_vae import QwenVaeDenoiser

# ComfyUI's files have both halves of img_mlp's first layer in one, which diffusers' LoRA reader does not split.
ORIGINAL = OriginalNames(((r"(?!.*\.img_mlp\.(proj|gate_layer)$).+", r"\g<0>", ""),))
SLOT = 4  # image tokens for which a place in the prompt stands


class QwenImage21Denoiser(QwenVaeDenoiser):
    """Qwen-Image-2.1. The network takes σ for its time and gives the velocity.

    Guidance 1 is none, which the model is made for. The position of a picture's tokens follows from the length of its
    prompt, padding included: prompts of different lengths are predicted apart here, as each alone. The stock pipeline
    pads prompts that it samples together, which moves their pictures a little.
    """

    title: ClassVar[str] = "Qwen-Image-2.1"
    architecture: ClassVar[str] = "qwen-image-2.1"
    base_version: ClassVar[str] = "qwen_image_21"
    pipeline_class: ClassVar[Any] = QwenImage21Pipeline
    pipeline_options: ClassVar[tuple[str, ...]] = ("sample_sigmas",)
    text_part: ClassVar[str] = "processor"
    requires: ClassVar[tuple[str, ...]] = ("torchvision",)  # of its text processor, which also reads pictures
    network_class: ClassVar[Any] = QwenImage21Transformer2DModel

    attention: ClassVar[Literal["cross", "joint"]] = "joint"
    causal_text: ClassVar[bool] = True
    aligned_texts: ClassVar[AlignedTexts] = "pass"
    original_names: ClassVar[OriginalNames | None] = ORIGINAL

    @classmethod
    def tokenizer_of(cls, pipeline: Any) -> Any:
        return super().tokenizer_of(pipeline).tokenizer

    @property
    def side_multiple(self) -> int:
        return 2 * self.vae_scale  # a place in the prompt covers 2 × 2 cells

    @property
    def token_side(self) -> int:
        return self.vae_scale

    # ------------------------------------------------------------------ prompts

    def guidance_options(self, scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale}

    def encode_one(self, prompt: str) -> Conditioning:
        states = self.pipeline.encode_prompt([prompt], device=self.encoder_device)[0][0]
        return self.row_prompt(states)

    def extra_tokens(self, prompt: str) -> int:
        return 0  # this pipeline reads all of a prompt

    def embedding_options(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for name, part in (("prompt_embeds", positive), ("negative_prompt_embeds", negative)):
            states, lengths = part.tensors["encoder_hidden_states"], part.tensors["lengths"]
            places = torch.arange(states.shape[1])
            options |= {name: states, f"{name}_mask": (places < lengths[:, None].cpu()).to(states.device)}
        return options

    def prompt_rows(self, conditioning: Conditioning) -> list[Tensor]:
        states, lengths = conditioning.tensors["encoder_hidden_states"], conditioning.tensors["lengths"]
        return [row[:length] for row, length in zip(states, lengths.tolist(), strict=True)]

    def row_prompt(self, states: Tensor) -> Conditioning:
        return Conditioning({"encoder_hidden_states": states, "lengths": torch.tensor(len(states))})

    def hollow_conditioning(self, count: int, layers: int = 1) -> Conditioning:
        width = self.network.config.context_in_dim
        return Conditioning({"encoder_hidden_states": torch.empty(count, TOKENS, width, dtype=self.dtype)})

    # ------------------------------------------------------------------ regions

    def token_kind(self, layer: str) -> TokenKind:
        if ".transformer_blocks." not in layer:
            raise unbound(layer)
        return "both"

    @contextmanager
    def several_texts(self, pipeline: Any, texts: SeveralTexts) -> Iterator[None]:
        network: Any = self.network

        def whole(module: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            # Without the cache of the prompt's keys and values, which would keep what the first step's adapters did.
            texts.begin_pass()
            return inputs, options | {"kv_cache": None, "kv_cache_mode": None}

        def apart(rope: Any, inputs: Any, options: dict[str, Any], turns: Tensor) -> Tensor:
            """Each text with positions of its own, and the picture's behind the longest that it sees."""
            shapes, image = inputs
            count, lengths = int(image.sum()), texts.lengths(0)

            def behind(text: int) -> Tensor:
                alone = torch.arange(text + count, device=image.device) >= text
                found: Tensor = rope.forward(shapes, alone, **options)
                return found

            longest = behind(max(lengths))
            first = max(lengths[index] for index in texts.leading())
            return torch.cat([*(longest[:length] for length in lengths), behind(first)[first:]])

        def masked(attention: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask = texts.mask("both", len(options["hidden_states"]))
            return inputs, options | {"attention_mask": mask, "segments": None, "key_valid": None}

        with ExitStack() as stack:
            stack.callback(network.register_forward_pre_hook(whole, with_kwargs=True).remove)
            stack.callback(network.pos_embed.register_forward_hook(apart, with_kwargs=True).remove)
            for block in network.transformer_blocks:
                stack.callback(block.attn.register_forward_pre_hook(masked, with_kwargs=True).remove)
            yield

    # ------------------------------------------------------------------ prediction and files

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **extra: Any) -> Tensor:
        states, lengths = conditioning.tensors["encoder_hidden_states"], conditioning.tensors["lengths"]
        out: list[Tensor | None] = [None] * len(noisy)
        for length in lengths.unique().tolist():
            alike = (lengths == length).nonzero()[:, 0]
            chosen = to_device(alike, noisy.device)
            words = states[chosen, :length].to(self.dtype)
            predicted = self._predict_alike(noisy[chosen], timesteps[chosen], words, extra)
            for row, one in zip(alike.tolist(), predicted, strict=True):
                out[row] = one
        return torch.stack([row for row in out if row is not None])

    def _predict_alike(self, noisy: Tensor, timesteps: Tensor, words: Tensor, extra: Mapping[str, Any]) -> Tensor:
        """The predictions for prompts (n, length, width) of one length."""
        rows, columns = noisy.shape[-2:]
        count, length = words.shape[:2]
        places = torch.zeros(count, length + rows * columns // SLOT, dtype=torch.bool, device=noisy.device)
        places[:, length:] = True  # the picture's, behind the prompt
        predicted: Tensor = self.network(
            hidden_states=self.pack(noisy.to(self.dtype)),
            encoder_hidden_states=words,
            timestep=self.sigmas(timesteps),
            img_shapes=[[(1, rows, columns)]] * count,
            img_mask=places,
            return_dict=False,
            **extra,
        )[0]
        return self.unpack(predicted[:, -rows * columns :], rows, columns).float()

    def hollow_predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The network part by part: as a whole it looks at the values of its masks."""
        network, words = self.network, conditioning.tensors["encoder_hidden_states"]
        length, (rows, columns) = words.shape[1], noisy.shape[-2:]
        tokens = torch.cat([network.txt_in(words), network.img_in(self.pack(noisy.to(self.dtype)))], 1)
        turns = torch.empty(tokens.shape[1], network.config.attention_head_dim // 2, dtype=torch.complex64)
        picture = torch.arange(tokens.shape[1]) >= length
        time = network.time_text_embed(torch.zeros(len(noisy) + 1), tokens)  # the text's own is 0
        modulation, segments = network.modulation(time), [(0, length, True)]
        for block in network.transformer_blocks:
            inputs = (tokens, modulation, turns, None, picture, None, None, None, segments, None)
            checkpoint = network.gradient_checkpointing and torch.is_grad_enabled()
            tokens = network._gradient_checkpointing_func(block, *inputs) if checkpoint else block(*inputs)
        predicted = network.proj_out(network.norm_out(tokens, time, picture))
        return self.unpack(predicted[:, length:], rows, columns).float()
