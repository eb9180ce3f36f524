"""Krea 2: a transformer over text and image tokens, prompts by many layers of a Qwen3-VL, fused by the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor

from .denoiser import AlignedTexts, Conditioning, SeveralTexts, TokenKind, unbound
from .flow import TOKENS
from .original_names import OriginalNames
from .qwen_vae import QwenVaeDenoiser

ORIGINAL = OriginalNames((
    (r"transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"blocks.\1.attn.w\2", ""),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"blocks.\1.attn.wo", ""),
    (r"transformer_blocks\.(\d+)\.attn\.to_gate", r"blocks.\1.attn.gate", ""),
    (r"transformer_blocks\.(\d+)\.ff\.(gate|up|down)", r"blocks.\1.mlp.\2", ""),
    (r"text_fusion\.(\w+)\.(\d+)\.attn\.to_([qkv])", r"txtfusion.\1.\2.attn.w\3", ""),
    (r"text_fusion\.(\w+)\.(\d+)\.attn\.to_out\.0", r"txtfusion.\1.\2.attn.wo", ""),
    (r"text_fusion\.(\w+)\.(\d+)\.attn\.to_gate", r"txtfusion.\1.\2.attn.gate", ""),
    (r"text_fusion\.(\w+)\.(\d+)\.ff\.(gate|up|down)", r"txtfusion.\1.\2.mlp.\3", ""),
    (r"text_fusion\.projector", "txtfusion.projector", ""),
    (r"img_in", "first", ""),
    (r"final_layer\.linear", "last.linear", ""),
    (r"time_embed\.linear_1", "tmlp.0", ""),
    (r"time_embed\.linear_2", "tmlp.2", ""),
    (r"time_mod_proj", "tproj.1", ""),
    (r"txt_in\.linear_1", "txtmlp.1", ""),
    (r"txt_in\.linear_2", "txtmlp.3", ""),
), diffusers_reads_kohya=False)  # fmt: skip


class Krea2Denoiser(QwenVaeDenoiser):
    """Krea 2, Raw and Turbo. The network takes σ for its time and gives the velocity.

    Prompts are the states (length, layers, width) of several layers of the text encoder. The stock pipeline pads them
    to 512 tokens between prompt and template. Padding is masked and tokens of text have no position, so it is left out
    here, with the same result up to rounding.
    """

    title: ClassVar[str] = "Krea 2"
    architecture: ClassVar[str] = "krea-2"
    base_version: ClassVar[str] = "krea2"
    pipeline_class: ClassVar[Any] = Krea2Pipeline
    pipeline_options: ClassVar[tuple[str, ...]] = ("text_encoder_select_layers", "is_distilled", "patch_size")
    network_class: ClassVar[Any] = Krea2Transformer2DModel

    attention: ClassVar[Literal["cross", "joint"]] = "joint"
    aligned_texts: ClassVar[AlignedTexts] = "all"
    original_names: ClassVar[OriginalNames | None] = ORIGINAL

    # ------------------------------------------------------------------ prompts

    def effective_guidance(self, scale: float) -> float:
        return 1 + max(scale, 0.0)  # this pipeline adds the difference from nothing to the prompt's prediction

    def encode_one(self, prompt: str) -> Conditioning:
        device = self.encoder_device
        states, mask = self.pipeline.encode_prompt([prompt], device, max_sequence_length=self.max_tokens)
        return self.row_prompt(states[0][mask[0]])  # which of the tokens are the prompt's

    def extra_tokens(self, prompt: str) -> int:
        ids = self.pipeline.tokenizer(prompt, truncation=False, add_special_tokens=False).input_ids
        return len(ids) + int(self.pipeline.prompt_template_encode_num_suffix_tokens) - self.max_tokens

    def embedding_options(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        # The pipeline counts the positions once, so both have one length.
        count = len(positive)
        both = Conditioning.stack([part[row] for part in (positive, negative) for row in range(count)]).tensors
        states, mask = both["encoder_hidden_states"], both["encoder_attention_mask"]
        return {
            "prompt_embeds": states[:count], "prompt_embeds_mask": mask[:count],
            "negative_prompt_embeds": states[count:], "negative_prompt_embeds_mask": mask[count:],
        }  # fmt: skip

    def prompt_rows(self, conditioning: Conditioning) -> list[Tensor]:
        states, masks = conditioning.tensors["encoder_hidden_states"], conditioning.tensors["encoder_attention_mask"]
        return [row[own] for row, own in zip(states, masks, strict=True)]

    def row_prompt(self, states: Tensor) -> Conditioning:
        own = torch.ones(len(states), dtype=torch.bool, device=states.device)
        return Conditioning({"encoder_hidden_states": states, "encoder_attention_mask": own})

    def hollow_conditioning(self, count: int, layers: int = 1) -> Conditioning:
        config = self.network.config
        states = torch.empty(count, TOKENS, config.num_text_layers, config.text_hidden_dim, dtype=self.dtype)
        mask = torch.ones(count, TOKENS, dtype=torch.bool)
        return Conditioning({"encoder_hidden_states": states, "encoder_attention_mask": mask})

    # ------------------------------------------------------------------ regions

    def token_kind(self, layer: str) -> TokenKind:
        if ".text_fusion.refiner_blocks." in layer:
            return "text"
        if ".transformer_blocks." not in layer:
            raise unbound(layer)
        return "both"

    @contextmanager
    def several_texts(self, pipeline: Any, texts: SeveralTexts) -> Iterator[None]:
        network: Any = self.network

        def masked(kind: TokenKind) -> Callable[..., Any]:
            def hook(attention: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                return inputs, options | {"attention_mask": texts.mask(kind, len(inputs[0]))}

            return hook

        with ExitStack() as stack:
            stack.callback(network.register_forward_pre_hook(lambda module, inputs: texts.begin_pass()).remove)
            kinds: dict[TokenKind, Any] = {
                "text": network.text_fusion.refiner_blocks,
                "both": network.transformer_blocks,
            }
            for kind, blocks in kinds.items():
                for block in blocks:
                    handle = block.attn.register_forward_pre_hook(masked(kind), with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    # ------------------------------------------------------------------ prediction and files

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **extra: Any) -> Tensor:
        words, (rows, columns) = conditioning.tensors["encoder_hidden_states"], noisy.shape[-2:]
        grid = (rows // self.patch, columns // self.patch)
        predicted: Tensor = self.network(
            hidden_states=self.pack(noisy.to(self.dtype)),
            encoder_hidden_states=words.to(self.dtype),
            timestep=self.sigmas(timesteps),
            position_ids=Krea2Pipeline.prepare_position_ids(words.shape[1], *grid, noisy.device),
            encoder_attention_mask=conditioning.tensors["encoder_attention_mask"],
            return_dict=False,
            **extra,
        )[0]
        return self.unpack(predicted, rows, columns).float()
