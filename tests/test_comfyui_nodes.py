"""The nodes for ComfyUI, with stand-ins for the modules of ComfyUI that they call."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_photos
from safetensors.torch import load_file

import spectral_diffusion as sd
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.training.run import train_to_file

NODES = Path(__file__).parent.parent / "integrations" / "comfyui"


class Patched:
    """A model or a text encoder that remembers which LoRAs act on it."""

    def __init__(self, loras: tuple[Any, ...] = ()) -> None:
        self.loras, self.model_options = loras, {}

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        return [[tokens, {"loras": len(self.loras)}]]


def comfy_modules(root: Path) -> dict[str, types.ModuleType]:
    """``comfy`` and ``folder_paths``, as far as the nodes use them."""
    names = ("comfy", "comfy.hooks", "comfy.sd", "comfy.utils", "folder_paths")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    folders: dict[str, list[str]] = {kind: [str(root / kind)] for kind in ("checkpoints", "loras", "embeddings")}

    def load_lora_for_models(model: Any, clip: Any, lora: Any, *strengths: float) -> tuple[Any, Any]:
        return tuple(part and Patched((*part.loras, (lora, strengths[i]))) for i, part in enumerate((model, clip)))  # type: ignore[return-value]

    def set_mask_conds(
        conds: list[Any], strength: float, set_cond_area: str, opt_mask: Any = None, opt_hooks: Any = None
    ) -> list[Any]:
        return [[[t, {**d, "mask": opt_mask, "hooks": opt_hooks}] for t, d in cond] for cond in conds]

    def full_path(kind: str, name: str) -> str:
        for folder in folders[kind]:
            if (Path(folder) / name).is_file():
                return str(Path(folder) / name)
        raise FileNotFoundError(name)

    for name in ("hooks", "sd", "utils"):
        setattr(modules["comfy"], name, modules[f"comfy.{name}"])
    modules["comfy.sd"].load_lora_for_models = load_lora_for_models
    modules["comfy.utils"].load_torch_file = lambda path, safe_load: load_file(path)
    modules["comfy.hooks"].create_hook_lora = lambda lora, model, clip: (len(lora), model, clip)
    modules["comfy.hooks"].set_mask_conds = set_mask_conds
    paths = modules["folder_paths"]
    paths.models_dir = str(root)
    paths.get_temp_directory = lambda: str(root / "temp")
    paths.add_model_folder_path = lambda kind, path: folders.setdefault(kind, []).append(path)
    paths.get_folder_paths = folders.__getitem__
    paths.get_filename_list = lambda kind: [
        file.name for folder in folders[kind] if Path(folder).is_dir() for file in Path(folder).glob("*.safetensors")
    ]
    paths.get_full_path_or_raise = full_path
    return modules


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two adapters in the slots 0 and 1, as ComfyUI's models folder has it."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("rex", "mug")):
        config = TrainConfig(
            concept=make_photos(root / "photos" / name, seed=seed), base=str(tiny_base), device="cpu", steps=1,
            output=root / "spectral_adapters" / f"{name}.safetensors", rank=2, prior={"loss_weight": 0.0},
        )  # fmt: skip
        train_to_file(config)
    return root


@pytest.fixture
def nodes(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, module in comfy_modules(adapters).items():
        monkeypatch.setitem(sys.modules, name, module)
    (adapters / "temp").mkdir(exist_ok=True)
    monkeypatch.syspath_prepend(str(NODES.parent))
    yield importlib.import_module("comfyui").nodes
    for name in ("comfyui", "comfyui.nodes"):
        sys.modules.pop(name, None)


def test_an_adapter_acts_with_its_exact_change_and_word(nodes: Any, adapters: Path) -> None:
    node = nodes.NODE_CLASS_MAPPINGS["SpectralAdapter"]()
    assert "rex.safetensors" in node.INPUT_TYPES()["required"]["adapter"][0]
    model, clip, word = node.load(Patched(), Patched(), "rex.safetensors", 0.8)
    assert word == "embedding:spectral_rex"
    [(lora, strength)] = model.loras
    assert strength == 0.8 and len(clip.loras) == 1
    rex = sd.Adapter.from_pretrained(adapters / "spectral_adapters" / "rex.safetensors")
    layer = next(name for name in rex.layers if name.endswith("attn1.to_q"))
    name = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
    change = lora[f"{name}.lora_up.weight"].float() @ lora[f"{name}.lora_down.weight"].float()
    change *= float(lora[f"{name}.alpha"]) / len(lora[f"{name}.lora_down.weight"])
    assert torch.allclose(change, rex.delta(layer), atol=2e-3 * float(rex.delta(layer).abs().max()))
    vectors = load_file(adapters / "temp" / "spectral_words" / "spectral_rex.safetensors")
    assert torch.equal(vectors["<rex>"].float(), rex.vectors["text_encoder"].float())


def test_adapters_of_one_slot_are_named(nodes: Any, caplog: pytest.LogCaptureFixture) -> None:
    node = nodes.SpectralAdapter()
    model, clip, _ = node.load(Patched(), Patched(), "rex.safetensors", 1.0)
    model, clip, _ = node.load(model, clip, "mug.safetensors", 1.0)
    assert len(model.loras) == 2 and not caplog.records
    node.load(model, clip, "rex.safetensors", 1.0)
    assert "'rex'" in caplog.text and "share columns" in caplog.text


def test_a_region_has_its_prompt_mask_and_adapter(nodes: Any) -> None:
    node, mask = nodes.SpectralRegion(), object()
    first = node.encode(Patched(), "rex.safetensors", mask, "a photo of <rex>", "blurry", 0.7)
    positive, negative = node.encode(Patched(), "mug.safetensors", mask, "<token> on a table", "", 1.0, *first)
    assert [text for text, _ in positive] == ["a photo of embedding:spectral_rex", "embedding:spectral_mug on a table"]
    assert [text for text, _ in negative] == ["blurry", ""]
    assert all(about["mask"] is mask and about["loras"] == 1 for _, about in (*positive, *negative))
    assert positive[0][1]["hooks"][1:] == (0.7, 0.0)  # the network's change by a hook, the text encoder's in the prompt


def test_adapters_are_fused_into_a_lora(nodes: Any, adapters: Path) -> None:
    lines = "rex.safetensors = 0.5\nmug.safetensors"
    assert nodes.SpectralFuse().fuse(lines, "", "spectral", 0, "lora", "both") == ("both.safetensors",)
    assert (adapters / "loras" / "both.safetensors").is_file()
    assert {file.stem for file in (adapters / "embeddings").iterdir()} == {"both_rex", "both_mug"}
    assert not list((adapters / "spectral_fused").iterdir())
    with pytest.raises(sd.UserError, match="already"):
        nodes.SpectralFuse().fuse(lines, "", "spectral", 0, "lora", "both")
    with pytest.raises(sd.UserError, match="no strength"):
        nodes.SpectralFuse().fuse("rex.safetensors = much", "", "spectral", 0, "lora", "other")
    # What no LoRA holds is kept as a folder.
    with pytest.raises(sd.UserError, match="kept as a diffusers folder"):
        nodes.SpectralFuse().fuse(lines, "", "ties", 0, "lora", "voted")
    assert (adapters / "spectral_fused" / "voted" / "model_index.json").is_file()
