"""The same methods on language models, through PEFT's own entry point: tiny random DeBERTa-v2, Mistral and Llama."""

from __future__ import annotations

import json
import subprocess
import sys
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

from spectral_diffusion import SpectralConfig
from spectral_diffusion.methods import all_methods, get_method
from tools.pocket.models import build_tokenizer

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


@pytest.mark.parametrize("method", ["spectral-additive", "spectral-rotation"])
def test_convolutions_pad_as_they_did_and_groups_are_refused(method: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"))
    config = SpectralConfig(r=2, method=method, slot="0:2", target_modules=["0"])
    tuned = get_peft_model(net, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "spectral_delta" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    acting = tuned(x)
    assert torch.allclose(tuned.merge_and_unload()(x), acting, atol=1e-5)
    with pytest.raises(ValueError, match="a convolution in 3 groups"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 6, 3, groups=3)), config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classify", "generate"])
def test_the_example_for_the_papers_tables_runs(kind: str, tmp_path: Path) -> None:
    """On a tiny random model from a folder and JSON lines, as it would on DeBERTa and Mistral."""
    script = Path(__file__).parent.parent / "examples" / "language.py"
    tokenizer = build_tokenizer()
    size = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    common = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "classify":
        model: nn.Module = DebertaV2ForSequenceClassification(DebertaV2Config(**size, **common))
    else:
        model = LlamaForCausalLM(LlamaConfig(**size, **common))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"sentence": f"a {word} dog", "label": index % 2, "question": word, "answer": "a cat"}
        for index, word in enumerate(["red", "blue"] * 4)
    ]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = "glue-deberta" if kind == "classify" else "gsm8k-mistral"
    words = [
        f"model={tmp_path / 'model'}",
        f"data={tmp_path / 'data'}",
        f"output={tmp_path / 'out'}",
        "batch_size=4",
        "epochs=1",
        "rank=2",
        "gradient_accumulation_steps=1",
        "dtype=float32",
        "method=spectral-rotation",
    ]
    config = script.parent.parent / "configs" / "paper" / f"{name}.yaml"
    done = subprocess.run([sys.executable, script, config, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["trained"] > 0 and "eval_loss" in result["test"]
    wrong = subprocess.run([sys.executable, script, config, "epochz=1"], capture_output=True, text=True)
    assert "did you mean 'epochs'" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_the_small_experiment_runs(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "examples" / "top_or_bottom.py"
    words = ["--seeds", "1", "--pretraining", "10", "--steps", "10"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    methods = json.loads(done.stdout)["methods"]
    assert len({methods[name]["trained"] for name in ("top", "bottom", "random", "lora")}) == 1
