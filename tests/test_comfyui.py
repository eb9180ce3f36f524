"""ComfyUI's own reader takes every key of the files that we export.

Run with ``COMFYUI_HOME`` at a checkout of ComfyUI, and ``COMFYUI_PYTHON`` at its interpreter if that is another one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_base
from families import make_tiny_klein, make_tiny_sdxl, make_tiny_z_image
from safetensors.torch import load_file, save_file
from test_lora_spellings import ORIGINAL

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.formats.native import save_adapter
from spectral_diffusion.merging.export import ExportOptions, export
from spectral_diffusion.methods import get_method
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.split_linear import fused_layers

MAKE = {"sd15": make_tiny_base, "sdxl": make_tiny_sdxl, "klein": make_tiny_klein, "z-image": make_tiny_z_image}
CLASSES = {"sd15": ["BaseModel"], "sdxl": ["SDXL"], "klein": ["Flux2", "Flux"], "z-image": ["Lumina2"]}
CASES = [("sd15", "kohya"), ("sd15", "comfyui"), ("sdxl", "kohya"), ("klein", "comfyui"), ("z-image", "comfyui")]
RANK = 2


def random_adapter(base_path: Path, output: Path) -> None:
    """A change in every layer that adapters have."""
    base = load_base(str(base_path), "cpu")
    sizes = {n: (len(w), w[0].numel()) for n, w in base.weights("attention+feed-forward").items()}
    parameters = {}
    for layer, (out, inside) in sizes.items():
        parameters |= {f"{layer}.A": torch.randn(RANK, inside), f"{layer}.B": torch.randn(out, RANK)}
    adapter = Adapter(
        name="rex", noun="dog", token="<rex>", method=get_method("lora"), rank=RANK, slot=None,
        targets="attention+feed-forward", base=str(base_path), fingerprint=base.fingerprint, parameters=parameters,
        sizes=sizes, frozen={}, vectors={}, fused=fused_layers(base.models), family=base.family.pipeline_class.__name__,
    )  # fmt: skip
    save_adapter(adapter, output)


def comfyui_names(family: str, base: Path, folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Names of a base's weights in ComfyUI: of the network, and of the text encoders.

    Stable Diffusion's are those of our single checkpoints. The transformers' are the original's, which
    ``test_lora_spellings`` compares with diffusers' tables.
    """
    if family in ("klein", "z-image"):
        names = {re.sub(r"\.\d\.", f".{block}.", name, count=1) for name in ORIGINAL[family] for block in range(4)}
        return {f"diffusion_model.{name}.weight": torch.zeros(8, 8) for name in names}, []
    checkpoint = folder / f"{family}.safetensors"
    adapter = folder / f"{family}-adapter.safetensors"
    export(adapter, checkpoint, "checkpoint")
    tensors = load_file(checkpoint)
    network = {
        name.removeprefix("model."): value
        for name, value in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    loaded = load_base(str(base), "cpu").models
    encoders = {"text_encoder": "clip_l.transformer.", "text_encoder_2": "clip_g.transformer."}
    text = [f"{encoders[part]}{n}" for part in encoders if part in loaded for n in loaded[part].state_dict()]
    return network, [name if ".text_model." in name else name.replace("mer.", "mer.text_model.", 1) for name in text]


def read(home: Path, cases: list[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What ComfyUI's reader says of the files."""
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).parent / "comfyui_reader.py"
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run([python, script, folder / "cases.json"], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_comfyui_takes_every_key(tmp_path: Path) -> None:
    home = os.environ.get("COMFYUI_HOME")
    if not home:
        pytest.skip("COMFYUI_HOME names no checkout of ComfyUI")
    cases: list[Mapping[str, Any]] = []
    for family, kind in CASES:
        base, adapter = tmp_path / family, tmp_path / f"{family}-adapter.safetensors"
        if not base.exists():
            MAKE[family](base)
            random_adapter(base, adapter)
        lora, model = tmp_path / f"{family}-{kind}.lora.safetensors", tmp_path / f"{family}.model.safetensors"
        export(adapter, lora, kind, ExportOptions(dtype="float32"))
        weights, text = comfyui_names(family, base, tmp_path)
        save_file(weights, model)
        cases.append({"lora": str(lora), "model": str(model), "text": text, "classes": CLASSES[family]})
    for (family, kind), found, case in zip(CASES, read(Path(home), cases, tmp_path), cases, strict=True):
        keys = [key for key in load_file(case["lora"]) if not key.endswith("alpha")]
        assert not found["left"], f"{family} {kind}: {found['left'][:5]}"
        assert not found["unknown"], f"{family} {kind}: {found['unknown'][:5]}"
        assert found["taken"] >= len(keys) // 2, f"{family} {kind}"


# ---------------------------------------------------------------------- A1111, by facts about its names

# Stable Diffusion 1.5's modules as kohya's trainers and A1111 name them: where there are attention blocks, and what is
# in one of them.
BLOCKS = [f"down_blocks_{b}_attentions_{a}" for b in range(3) for a in range(2)] + ["mid_block_attentions_0"]
BLOCKS += [f"up_blocks_{b}_attentions_{a}" for b in range(1, 4) for a in range(3)]
INSIDE = [f"attn{a}_to_{part}" for a in (1, 2) for part in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
TEXT = [f"self_attn_{part}_proj" for part in ("k", "v", "q", "out")] + ["mlp_fc1", "mlp_fc2"]


def test_names_are_those_that_a1111_knows() -> None:
    from spectral_diffusion.adapters.formats.lora import kohya_name
    from spectral_diffusion.models.architectures import build_meta
    from spectral_diffusion.models.targets import find_targets

    layers = find_targets(build_meta("sd15"), "attention+feed-forward+projection")
    network = {f"lora_unet_{block}_transformer_blocks_0_{part}" for block in BLOCKS for part in INSIDE}
    network |= {f"lora_unet_{block}_proj_{end}" for block in BLOCKS for end in ("in", "out")}
    text = {f"lora_te_text_model_encoder_layers_{layer}_{part}" for layer in range(12) for part in TEXT}
    assert (len(network), len(text)) == (192, 72)  # as every file of kohya's has them
    named = {kohya_name(layer, False) for layer in layers}
    assert named == network | text
