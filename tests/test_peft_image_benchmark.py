"""The experiments for PEFT's image benchmark, on a tiny klein: the benchmark itself needs a GPU and the hub."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from families import make_tiny_klein
from peft import PeftConfig, PeftModel, get_peft_model

from spectral_diffusion import SpectralConfig
from spectral_diffusion.methods import get_method

FOLDER = Path(__file__).parent.parent / "benchmarks" / "peft_image"
CONFIGS = sorted((FOLDER / "experiments").glob("*/*/adapter_config.json"))


def benchmark_script() -> Any:
    spec = importlib.util.spec_from_file_location("peft_image_run", FOLDER / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_klein(tmp_path_factory.mktemp("klein") / "klein")


def outputs(transformer: Any, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config
    ids = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, config.in_channels, 2, 2))
    words = torch.randn(1, 4, config.joint_attention_dim, generator=generator)
    found: torch.Tensor = transformer(
        hidden_states=torch.randn(1, 4, config.in_channels, generator=generator), timestep=torch.tensor([0.5]),
        guidance=None, encoder_hidden_states=words, txt_ids=Flux2KleinPipeline._prepare_text_ids(words), img_ids=ids,
        return_dict=False,
    )[0]  # fmt: skip
    return found


def test_there_are_five_experiments() -> None:
    assert len(CONFIGS) == 5


@pytest.mark.parametrize("path", CONFIGS, ids=[path.parent.name for path in CONFIGS])
def test_an_experiment_trains_as_the_benchmark_would(klein: Path, tmp_path: Path, path: Path) -> None:
    script = benchmark_script()
    config: Any = PeftConfig.from_pretrained(str(path.parent))
    assert (
        type(config) is SpectralConfig
        and config.slot == f"0:{config.r}"
        and get_method(config.method).slot == "columns"
    )
    config.slot, config.r = "0:2", 2  # the real layers have 3,072 columns
    pipeline = script.prepare(Flux2KleinPipeline.from_pretrained(str(klein)))
    before = outputs(pipeline.transformer)
    model: Any = get_peft_model(pipeline.transformer, config, autocast_adapter_dtype=True)
    assert torch.equal(outputs(model), before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part in ("to_qkv_mlp_proj.q", "to_qkv_mlp_proj.mlp_value", "attn.to_add_out", "ff_context.linear_out"):
        assert any(f".{part}." in name for name in trained), part
    assert not any("modulation" in name or "embed" in name for name in trained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        outputs(model).square().mean().backward()
        optimizer.step()
    after = outputs(model)
    assert not torch.allclose(after, before, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(outputs(model), before)
    model.save_pretrained(str(tmp_path))
    again = script.prepare(Flux2KleinPipeline.from_pretrained(str(klein)))
    assert torch.allclose(outputs(PeftModel.from_pretrained(again.transformer, str(tmp_path))), after, atol=1e-5)


@pytest.mark.slow
def test_the_script_runs_every_pending_experiment(klein: Path, tmp_path: Path) -> None:
    """With a stand-in for the benchmark that loads a pipeline, as its ``run.py`` does."""
    done = {"--".join(CONFIGS[0].parts[-3:-1])}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{next(iter(done))}.json").write_text("{}")
    (tmp_path / "run.py").write_text(
        "import json, sys\nfrom diffusers import Flux2KleinPipeline\nfrom peft import PeftConfig\n"
        f"pipeline = Flux2KleinPipeline.from_pretrained({str(klein)!r})\n"
        "layer = pipeline.transformer.single_transformer_blocks[0].attn.to_qkv_mlp_proj\n"
        "print(json.dumps([sys.argv[2], PeftConfig.from_pretrained(sys.argv[2]).method, type(layer).__name__]))\n"
    )
    ran = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 4 and {line[2] for line in lines} == {"SplitLinear"}
    assert {line[1] for line in lines} >= {"spectral-additive", "spectral-rotation"}
    assert not done & {"--".join(Path(line[0]).parts[1:]) for line in lines}
