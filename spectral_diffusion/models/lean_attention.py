"""Attention that keeps no matrix of scores, as CUDA's does: to measure memory on a pretended CPU."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor


class LeanAttention(AttnProcessor):
    """A U-Net's attention by torch's memory-efficient operator, whatever the device."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        out = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
        return attn.to_out[0](out.transpose(1, 2).flatten(2).to(hidden_states.dtype))
