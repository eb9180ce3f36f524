"""LyCORIS, which knows nothing of us, reads our kohya files: by the names that it gives itself, and by merging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import save_file
from torch import nn

from spectral_diffusion.adapters.formats.lora import kohya_tensors
from spectral_diffusion.linalg import Factors
from spectral_diffusion.models.architectures import build_meta
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.targets import find_targets

pytest.importorskip("lycoris")
from lycoris import LycorisNetwork, create_lycoris_from_weights
from lycoris.kohya import LycorisNetworkKohya
from lycoris.logging import logger

EVERYTHING = "attention+feed-forward+projection+conv"


@pytest.fixture(autouse=True)
def reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS as it is, but for a list in which its 4.1.3 names the time embedding twice and then stops."""
    monkeypatch.setattr(LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [])
    monkeypatch.setattr(logger, "disabled", True)


def as_kohya_saw_it(model: nn.Module) -> nn.Module:
    """A text encoder with the ``text_model`` level that transformers dropped in 5.6 and kohya's names kept."""
    return model if hasattr(model, "text_model") else nn.ModuleDict({"text_model": model})


def known_to_lycoris(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The names that LyCORIS' kohya network gives, and the layer that it means by each."""
    texts = [as_kohya_saw_it(model) for name, model in models.items() if name != "unet"]
    with torch.device("meta"):
        network = LycorisNetworkKohya(texts if len(texts) > 1 else texts[0], models["unet"], warn_on_unmatched=False)
    return {one.lora_name: one.org_module[0] for one in network.loras}


def numbered(layers: dict[str, nn.Linear | nn.Conv2d], xl: bool) -> dict[str, torch.Tensor]:
    """Our kohya tensors where up · down is the layer's number, to see which layer a name ends at."""
    made = {name: Factors(torch.full((1, 1), index + 1.0), torch.ones(1, 1)) for index, name in enumerate(layers)}
    return kohya_tensors(made, {}, torch.float32, xl)


def numbers(tensors: dict[str, torch.Tensor], up: str, down: str) -> dict[str, int]:
    """Name to the number that the layer has."""
    names = [key.removesuffix(f".{up}") for key in tensors if key.endswith(f".{up}")]
    return {name: round(float(tensors[f"{name}.{up}"] * tensors[f"{name}.{down}"])) - 1 for name in names}


def test_lycoris_calls_every_layer_of_stable_diffusion_what_we_call_it() -> None:
    models = build_meta("sd15")
    known = known_to_lycoris(models)
    layers = find_targets(models, EVERYTHING)
    modules = list(layers.values())
    found = numbers(numbered(layers, False), "lora_up.weight", "lora_down.weight")
    assert len(found) == len(layers) == 328
    for name, index in found.items():
        assert known[name] is modules[index], name


def test_lycoris_and_diffusers_find_every_layer_of_xl() -> None:
    """LyCORIS names a U-Net as it is built, and kohya's is the original's: that spelling diffusers' converter reads."""
    models = build_meta("sdxl")
    known = known_to_lycoris(models)
    layers = find_targets(models, EVERYTHING)
    ours, modules = numbered(layers, True), list(layers.values())
    found = numbers(ours, "lora_up.weight", "lora_down.weight")
    texts = {name: index for name, index in found.items() if not name.startswith("lora_unet_")}
    assert len(found) == len(layers) == 1035 and len(texts) == 264
    for name, index in texts.items():
        assert known[name] is modules[index], name
    state, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(ours, models["unet"].config))
    unet = convert_unet_state_dict_to_peft({key: value for key, value in state.items() if key.startswith("unet.")})
    read = numbers(unet, "lora_B.weight", "lora_A.weight")
    assert read == {layer: index for index, layer in enumerate(layers) if layer.startswith("unet.")}


def test_lycoris_merges_our_file_as_we_do(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(tiny_base), "cpu")
    layers = find_targets(base.models, EVERYTHING)
    generator = torch.Generator().manual_seed(0)
    factors, kernels = {}, {}
    for index, (name, layer) in enumerate(layers.items()):
        out, rank = len(layer.weight), 2 + index % 3  # ranks differ, alpha does not
        shapes = (out, rank), (rank, layer.weight[0].numel())
        factors[name] = Factors(*(0.3 * torch.randn(shape, generator=generator) for shape in shapes))
        if isinstance(layer, nn.Conv2d):
            kernels[name] = tuple(layer.weight.shape[1:])
    file = tmp_path / "ours.safetensors"
    save_file(kohya_tensors(factors, kernels, torch.float32), file)
    before = {part: {key: value.clone() for key, value in m.state_dict().items()} for part, m in base.models.items()}
    merged = 0
    for part, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te")):
        monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", prefix)
        model = base.models[part] if part == "unet" else as_kohya_saw_it(base.models[part])
        network, _ = create_lycoris_from_weights(1.0, str(file), model)
        network.merge_to()
        merged += len(network.loras)
    assert merged == len(layers)
    for part, model in base.models.items():
        for key, value in model.state_dict().items():
            change, name = value - before[part][key], f"{part}.{key}".removesuffix(".weight")
            wanted = factors[name].delta().reshape(value.shape) if name in factors else torch.zeros_like(value)
            assert torch.allclose(change, wanted, atol=1e-5), key
