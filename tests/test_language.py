"""The same methods on language models, through PEFT's own entry point: tiny random DeBERTa-v2, Mistral and Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from spectral_diffusion.methods import all_methods, get_method
from spectral_diffusion.methods.tuner import SpectralConfig

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
GROUPED = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 32}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "deberta-v2": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(**SMALL, max_position_embeddings=32, pos_att_type="p2c|c2p", relative_attention=True)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
}
OURS = [name for name, method in all_methods().items() if not method.peft]


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def settings(method: str) -> SpectralConfig:
    rank = 1 if method == "svdiff" else 2
    return SpectralConfig(r=rank, method=method, slot="0:2" if get_method(method).slot else "")


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("method", OURS)
def test_train_save_load_and_merge(kind: str, method: str, tmp_path: Path) -> None:
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    model = build(kind)
    before = model(ids).logits
    tuned = get_peft_model(model, settings(method))
    assert torch.equal(tuned(ids).logits, before)
    trained = [p for n, p in tuned.named_parameters() if "spectral_delta" in n]
    assert trained and all(p.requires_grad for p in trained)
    tuned(ids).logits.square().mean().backward()
    assert sum(float(p.grad.abs().sum()) for p in trained if p.grad is not None) > 0
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    after = tuned(ids).logits
    assert not torch.allclose(after, before, atol=1e-4)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(kind), tmp_path).eval()
    assert torch.equal(again(ids).logits, after)
    assert torch.allclose(again.merge_and_unload()(ids).logits, after, atol=1e-5)
