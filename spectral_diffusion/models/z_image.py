"""Z-Image: a transformer over image and text tokens, prompts of any length by a Qwen3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch
from diffusers import ZImageControlNetModel, ZImageControlNetPipeline, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor

from .denoiser import Conditioning, Controls, SeveralTexts, TokenKind, unbound
from .flow import TOKENS, FlowDenoiser
from .original_names import OriginalNames

# diffusers' reader splits the fused layer under these endings only (0.41 and later); ComfyUI reads all of them.
ORIGINAL = OriginalNames(
    (
        (r"(.+\.attention)\.to_([qkv])", r"\1.qkv", r"\2"),
        (r"(.+\.attention)\.to_out\.0", r"\1.out", ""),
        (r".+", r"\g<0>", ""),
    ),
    down="lora.down.weight",
    up="lora.up.weight",
    in_kohya=False,
)

UNION = (  # edges, soft edges, depth and poses in one network
    "alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union/Z-Image-Turbo-Fun-Controlnet-Union.safetensors"
)
BLOCKS: dict[str, TokenKind] = {"noise_refiner": "image", "context_refiner": "text", "layers": "both"}


class ZImageDenoiser(FlowDenoiser):
    """Z-Image and Z-Image-Turbo. The network takes 1 − σ for its time and gives the negative velocity."""

    title: ClassVar[str] = "Z-Image"
    architecture: ClassVar[str] = "z-image"
    base_version: ClassVar[str] = "zimage"
    pipeline_class: ClassVar[Any] = ZImagePipeline
    network_class: ClassVar[Any] = ZImageTransformer2DModel

    attention: ClassVar[Literal["cross", "joint"]] = "joint"
    text_first: ClassVar[bool] = False
    token_multiple: ClassVar[int] = SEQ_MULTI_OF
    thinking: ClassVar[bool] = True
    original_names: ClassVar[OriginalNames | None] = ORIGINAL
    controls: ClassVar[Controls | None] = "controlnet"
    controlnet_class: ClassVar[Any] = ZImageControlNetModel
    controlnet_pipeline_class: ClassVar[Any] = ZImageControlNetPipeline
    default_controlnet: ClassVar[str] = UNION

    @property
    def side_multiple(self) -> int:
        return 2 * self.vae_scale  # a token is a patch of 2 × 2 cells

    def normalize(self, raw: Tensor) -> Tensor:
        config = self.vae.config
        latents: Tensor = (raw - config.shift_factor) * config.scaling_factor
        return latents

    def denormalize(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        raw: Tensor = latents / config.scaling_factor + config.shift_factor
        return raw

    # ------------------------------------------------------------------ prompts

    def encode_one(self, prompt: str) -> Conditioning:
        device = self.encoder_device  # the network may have made room
        [row] = self.pipeline._encode_prompt([prompt], device, max_sequence_length=self.max_tokens)
        return self.row_prompt(row)

    def effective_guidance(self, scale: float) -> float:
        return 1 + max(scale, 0.0)  # this pipeline adds scale (c − e) to c

    def hollow_conditioning(self, count: int, layers: int = 1) -> Conditioning:
        width = self.network.config.cap_feat_dim
        return Conditioning({"encoder_hidden_states": torch.empty(count, TOKENS, width, dtype=self.dtype)})

    def embedding_options(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {"prompt_embeds": _rows(positive), "negative_prompt_embeds": _rows(negative)}

    def prompt_rows(self, conditioning: Conditioning) -> list[Tensor]:
        return _rows(conditioning)

    def row_prompt(self, states: Tensor) -> Conditioning:
        return Conditioning({"encoder_hidden_states": states, "lengths": torch.tensor(len(states))})

    # ------------------------------------------------------------------ control images and regions

    @classmethod
    def misfit(cls, controlnet: Any, network: Any) -> str:
        for name in ("dim", "n_heads"):
            own, other = network.config[name], controlnet.config[name]
            if own != other:
                return f"{name} is {other} there and {own} here"
        last = max(controlnet.config.control_layers_places)
        return f"it has a layer {last}" if last >= network.config.n_layers else ""

    def token_kind(self, layer: str) -> TokenKind:
        block = layer.split(".")[1]
        if block not in BLOCKS or "adaLN" in layer:
            raise unbound(layer)
        return BLOCKS[block]

    @contextmanager
    def several_texts(self, pipeline: Any, texts: SeveralTexts) -> Iterator[None]:
        network: Any = self.network
        control: Any = pipeline.components.get("controlnet")
        together = network.patchify_and_embed

        def apart(images: list[Tensor], prompts: list[Tensor], *sizes: int) -> tuple[list[Any], ...]:
            rows = []
            for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
                split = prompt.split(texts.lengths(row))
                # Each text with the picture behind it: patches, captions, sizes, positions (2), padding (2).
                patches, captions, size, at, captions_at, padding, captions_padding = together(
                    [image] * len(split), list(split), *sizes
                )
                # diffusers gives a padded caption more positions than tokens; the rest would move the next one's.
                captions_at = [ids[: len(text)] for ids, text in zip(captions_at, captions, strict=True)]
                first = max(texts.leading(), key=lambda index: len(captions[index]))
                rows.append(
                    (patches[first], torch.cat(captions), size[first], at[first], torch.cat(captions_at),
                     padding[first], torch.cat(captions_padding))
                )  # fmt: skip
            return tuple(list(column) for column in zip(*rows, strict=True))

        def masked(kind: TokenKind) -> Callable[..., Any]:
            def hook(attention: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                mask = texts.mask(kind, len(inputs[0]))
                return inputs, options if mask is None else options | {"attention_mask": mask.to(inputs[0])}

            return hook

        def masked_by_length(attention: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            both = texts.mask("both", len(inputs[0]))
            whole = both is not None and both.shape[-1] == inputs[0].shape[1]
            return masked("both" if whole else "image")(attention, inputs, options)

        with ExitStack() as stack:
            for name, kind in BLOCKS.items():
                for block in getattr(network, name):
                    hook = block.attention.register_forward_pre_hook(masked(kind), with_kwargs=True)
                    stack.callback(hook.remove)
            # A ControlNet has blocks of its own besides the network's refiners; some take both kinds of tokens in turn.
            for block in [*control.control_layers, *(control.control_noise_refiner or ())] if control else []:
                hook = block.attention.register_forward_pre_hook(masked_by_length, with_kwargs=True)
                stack.callback(hook.remove)
            for reader in (network, control) if control else (network,):
                reader.patchify_and_embed = apart
                stack.callback(delattr, reader, "patchify_and_embed")
            yield

    # ------------------------------------------------------------------ prediction and sampling

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **extra: Any) -> Tensor:
        frames = list(noisy.to(self.dtype).unsqueeze(2).unbind(0))
        words = [row.to(self.dtype) for row in _rows(conditioning)]
        time = 1 - self.sigmas(timesteps)
        predicted = self.network(frames, time, words, return_dict=False, **extra)[0]
        return -torch.stack([frame.float() for frame in predicted]).squeeze(2)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        yield  # this pipeline keeps its steps in float32 itself


def _rows(conditioning: Conditioning) -> list[Tensor]:
    """The prompts' states without their padding."""
    states, lengths = conditioning.tensors["encoder_hidden_states"], conditioning.tensors.get("lengths")
    if lengths is None:
        return list(states)
    return [row[:length] for row, length in zip(states, lengths.tolist(), strict=True)]
