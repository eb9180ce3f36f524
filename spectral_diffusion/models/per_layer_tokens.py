"""Tokens whose vectors differ for every cross-attention layer of the U-Net (P+, Voynov et al. 2023; Gu et al. 2023).

Prompts are then encoded once per layer. The encodings go one after the other through everything that carries common
ones, as (b, layers · length, width), and each layer's attention processor takes its own part.

The embedding table holds the vectors of every layer as rows of their own. Its buffer ``ladder`` (words, 1 + layers)
says for each such word its id and the ids of its rows: whoever puts another table back has taken the tokens off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.errors import UserError
from .base import Base
from .tokens import add_rows, embedding_of, split_words

ORDER = ("down_blocks", "mid_block", "up_blocks")  # in which a U-Net's parts run; they are not registered so


def check_encoders(base: Base) -> None:
    """Refuse bases with two text encoders.

    Raises:
        UserError: this is one.
    """
    if len(base.tokenizers) > 1:
        raise UserError(
            f"per_layer_tokens=true needs a base with one text encoder, and '{base.name}' has two: use "
            "per_layer_tokens=false."
        )


def cross_attention(unet: Any) -> list[str]:
    """The U-Net's cross-attention processors by name, in the order in which they run."""
    names = [name for name in unet.attn_processors if ".attn2." in name]
    return sorted(names, key=lambda name: ORDER.index(name.split(".", 1)[0]))


class PerLayerAttention:
    """A diffusers attention processor that hands the part of layer ``index`` of ``count`` to the inner one.

    What is not ``count`` times as long as one prompt's ``length`` passes as it is.
    """

    def __init__(self, inner: Any, index: int, count: int, length: int) -> None:
        self.inner, self.index, self.count, self.length = inner, index, count, length

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *rest: Any,
        **more: Any,
    ) -> Tensor:  # fmt: skip
        text = encoder_hidden_states
        if text is not None and text.shape[1] == self.count * self.length:
            text = text[:, self.index * self.length : (self.index + 1) * self.length]
        out: Tensor = self.inner(attn, hidden_states, text, *rest, **more)
        return out


def wrapped(unet: Any, length: int) -> dict[str, Any]:
    """The U-Net's processors by name, those of cross-attention wrapped once."""
    names, found = cross_attention(unet), dict(unet.attn_processors)
    for index, name in enumerate(names):
        if not isinstance(found[name], PerLayerAttention):
            found[name] = PerLayerAttention(found[name], index, len(names), length)
    return found


def spread(ids: Tensor, ladder: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (b, length) with a word of the ladder once per layer, with that layer's ids; all others once.

    Returns:
        Ids (m, length), the prompt (m,) that each row is of, and the row (b, layers) that each layer reads.
    """
    count = ladder.shape[1] - 1
    holds = torch.isin(ids, ladder[:, 0]).any(1)
    times = torch.where(holds, count, 1)
    first = times.cumsum(0) - times
    prompt = torch.arange(len(ids), device=ids.device).repeat_interleave(times)
    layer = torch.arange(len(prompt), device=ids.device) - first[prompt]
    rows = ids[prompt]
    for word in ladder:
        rows = torch.where(rows == word[0], word[1:][layer][:, None], rows)
    return rows, prompt, first[:, None] + torch.arange(count, device=ids.device) * holds[:, None]


class LongForm:
    """Hooks of a text encoder that give the long form of every prompt while its table has a ladder.

    Args:
        length: words of a prompt; ``end``: the id of the word that ends it.
    """

    def __init__(self, length: int, end: int) -> None:
        self.length, self.end = length, end
        self.place: Tensor | None = None
        self.handles: list[RemovableHandle] = []

    def before(self, encoder: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Replace ids by those of all layers."""
        ladder, self.place = getattr(embedding_of(encoder), "ladder", None), None
        if ladder is None:
            return None
        ids, *others = inputs or (keywords["input_ids"],)
        rows, prompt, self.place = spread(self.cut(ids), ladder)
        keywords = {name: value for name, value in keywords.items() if name != "input_ids"}
        if keywords.get("attention_mask") is not None:
            keywords["attention_mask"] = keywords["attention_mask"][:, : self.length][prompt]
        return (rows, *others), keywords

    def cut(self, ids: Tensor) -> Tensor:
        """Pipelines let a negative prompt be as long as the encoded one, which is longer than an encoder reads."""
        if ids.shape[1] <= self.length:
            return ids
        ids = ids[:, : self.length].clone()
        ids[(ids != self.end).all(1), -1] = self.end
        return ids

    def after(self, encoder: Any, inputs: Any, output: Any) -> Any:
        """Put the encodings of all layers one after the other."""
        place = self.place
        if place is None:
            return None

        def long(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(long, value))
            return value[place].flatten(1, 2) if value.dim() == 3 else value[place[:, 0]]

        for name, value in list(output.items()):
            output[name] = long(value)
        return output


def long_forms(encoder: nn.Module) -> list[LongForm]:
    """The hooks of this kind that a text encoder has."""
    owners = [getattr(hook, "__self__", None) for hook in encoder._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, LongForm)]


def lengthen(base: Base, encoder: str) -> list[RemovableHandle]:
    """Hook a text encoder once; returns the handles of the hooks that are new."""
    model, tokenizer = base.models[encoder], base.tokenizers[encoder]
    if long_forms(model):
        return []
    form = LongForm(tokenizer.model_max_length, tokenizer.eos_token_id)
    form.handles = [
        model.register_forward_pre_hook(form.before, with_kwargs=True), model.register_forward_hook(form.after)
    ]  # fmt: skip
    return form.handles


@contextmanager
def per_layer_attention(base: Base, wanted: bool) -> Iterator[None]:
    """Let layer-wise tokens act on a base while the context is open, over whatever processors it has now."""
    if not wanted:
        yield
        return
    unet, before = base.pipeline.unet, dict(base.pipeline.unet.attn_processors)
    handles = [handle for encoder in base.tokenizers for handle in lengthen(base, encoder)]
    unet.set_attn_processor(wrapped(unet, base.pipeline.tokenizer.model_max_length))
    try:
        yield
    finally:
        unet.set_attn_processor(before)
        for handle in handles:
            handle.remove()


def install_per_layer(base: Base, token: str, vectors: Mapping[str, Tensor]) -> None:
    """Let an installed token have vectors (layers, n, width) of its own in every cross-attention layer.

    Raises:
        UserError: the base has two text encoders or another number of layers.
    """
    check_encoders(base)
    unet = base.pipeline.unet
    count = len(cross_attention(unet))
    for encoder, rows in vectors.items():
        if len(rows) != count:
            raise UserError(
                f"{token} has vectors for {len(rows)} layers, and '{base.name}' has {count}; train it again."
            )
        model, tokenizer = base.models[encoder], base.tokenizers[encoder]
        # A | between the brackets makes them no tokens that anybody writes; they only keep the rows' ids from others.
        names = [word for layer in range(count) for word in split_words(f"{token[:-1]}|{layer}>", rows.shape[1])]
        add_rows(tokenizer, model, names, rows.flatten(0, 1))
        own = torch.tensor(tokenizer.convert_tokens_to_ids(split_words(token, rows.shape[1])))
        each = torch.tensor(tokenizer.convert_tokens_to_ids(names)).view(count, -1)
        table = embedding_of(model)
        ladder = torch.cat([own[None], each]).mT.to(table.weight.device)
        earlier = getattr(table, "ladder", None)
        table.register_buffer("ladder", ladder if earlier is None else torch.cat([earlier, ladder]), persistent=False)
        lengthen(base, encoder)
    unet.set_attn_processor(wrapped(unet, base.pipeline.tokenizer.model_max_length))


def remove_per_layer(base: Base) -> None:
    """Take off what :func:`install_per_layer` put on the U-Net and the text encoders."""
    for encoder in base.tokenizers:
        for form in long_forms(base.models[encoder]):
            for handle in form.handles:
                handle.remove()
    network = base.denoiser.network
    processors = dict(getattr(network, "attn_processors", {}))
    if any(isinstance(processor, PerLayerAttention) for processor in processors.values()):
        network.set_attn_processor(
            {name: p.inner if isinstance(p, PerLayerAttention) else p for name, p in processors.items()}
        )


def use_means(base: Base) -> None:
    """Let every token on a base be what stock pipelines see of it: the mean of its layers' vectors."""
    for encoder in base.tokenizers:
        embedding_of(base.models[encoder])._buffers.pop("ladder", None)


def mean_note(name: str) -> str:
    """The warning about an adapter whose layer-wise vectors cannot be written."""
    return f"Note: {name} has layer-wise vectors; a stock pipeline cannot hold them, so their mean is written."
