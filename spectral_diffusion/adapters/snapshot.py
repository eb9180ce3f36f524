"""What adapters and tokens change of a loaded base, recorded so that it can be restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from ..models.base import ENCODERS, Base
from ..models.per_layer_tokens import remove_per_layer
from ..models.tokens import embedding_of
from .attach import remove_adapters


def snapshot(base: Base) -> Callable[[], None]:
    """Record a base's state; the returned function restores it bit for bit, without later adapters and tokens.

    Until then the pipeline has copies of its tokenizers, so that the recorded ones stay as they are.
    """
    tables = {name: embedding_of(base.models[name]) for name in base.tokenizers}
    configs: dict[str, Any] = {name: base.models[name].config for name in tables}
    sizes = {name: config.vocab_size for name, config in configs.items()}
    tokenizers = copy_tokenizers(base)
    precision = base.pipeline.vae.dtype

    def restore() -> None:
        remove_adapters(base.models)
        remove_per_layer(base)
        # A pipeline may have been stopped while decoding in float32; one that was moved stays as it is.
        if base.pipeline.vae.dtype != precision and base.denoiser.network.dtype == base.dtype:
            nn.Module.to(base.pipeline.vae, precision)
        for name, table in tables.items():
            now = embedding_of(base.models[name]).weight  # the pipeline may have been moved
            cast(Any, base.models[name]).set_input_embeddings(table.to(now.device, now.dtype))
            configs[name].vocab_size = sizes[name]
        for name, tokenizer in tokenizers.items():
            setattr(base.pipeline, name, tokenizer)

    return restore


def copy_tokenizers(base: Base) -> dict[str, Any]:
    """Give a pipeline copies of its tokenizers, which tokens can be added to; returns the originals by part."""
    names = dict.fromkeys((*ENCODERS.values(), base.family.text_part))
    originals = {name: part for name in names if (part := getattr(base.pipeline, name, None)) is not None}
    for name, tokenizer in originals.items():
        setattr(base.pipeline, name, copy.deepcopy(tokenizer))
    return originals
