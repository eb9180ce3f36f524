"""LoRA files of transformers in the spellings of ComfyUI, kohya and diffusers: the same change in and out, or an error.

What diffusers' readers make of each spelling is pinned here: if a version of diffusers reads one in another way,
``test_diffusers_reads_the_spelling`` says which, and ``models/flow.py`` and the family's file have to follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import seldom
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from families import make_tiny_klein, make_tiny_z_image
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.formats.fused_projections import stack_rows, trimmed
from spectral_diffusion.adapters.formats.import_lora import import_lora
from spectral_diffusion.adapters.formats.native import load_adapter, save_adapter
from spectral_diffusion.cli import speller
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.linalg import Factors
from spectral_diffusion.merging.export import ExportOptions, export
from spectral_diffusion.methods import get_method
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.families import FAMILIES
from spectral_diffusion.models.fingerprint import Fingerprint
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.split_linear import fused_layers

RANK, ALPHA = 2, 3.0
EXACT = ExportOptions(dtype="float32")
NEAR = 1e-6  # of the largest change of a layer
DOUBLE, SINGLE, LAYER = "transformer_blocks.0.", "single_transformer_blocks.1.attn.", "layers.1."
ORIGINAL = {  # name in the original's code to the layers of diffusers, in the order of its rows
    "klein": {
        "double_blocks.0.img_attn.qkv": [f"{DOUBLE}attn.to_{part}" for part in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"{DOUBLE}attn.add_{part}_proj" for part in "qkv"],
        "double_blocks.0.img_attn.proj": [f"{DOUBLE}attn.to_out.0"],
        "double_blocks.0.txt_attn.proj": [f"{DOUBLE}attn.to_add_out"],
        "double_blocks.0.img_mlp.0": [f"{DOUBLE}ff.linear_in"],
        "double_blocks.0.img_mlp.2": [f"{DOUBLE}ff.linear_out"],
        "double_blocks.0.txt_mlp.0": [f"{DOUBLE}ff_context.linear_in"],
        "double_blocks.0.txt_mlp.2": [f"{DOUBLE}ff_context.linear_out"],
        "single_blocks.1.linear1": [f"{SINGLE}to_qkv_mlp_proj"],
        "single_blocks.1.linear2": [f"{SINGLE}to_out"],
    },
    "z-image": {
        "layers.1.attention.qkv": [f"{LAYER}attention.to_{part}" for part in "qkv"],
        "layers.1.attention.out": [f"{LAYER}attention.to_out.0"],
        "layers.1.feed_forward.w1": [f"{LAYER}feed_forward.w1"],
        "layers.1.feed_forward.w2": [f"{LAYER}feed_forward.w2"],
        "layers.1.feed_forward.w3": [f"{LAYER}feed_forward.w3"],
        "context_refiner.0.attention.qkv": [f"context_refiner.0.attention.to_{part}" for part in "qkv"],
    },
}
ENDINGS = {"AB": ("lora_A.weight", "lora_B.weight"), "down-up": ("lora_down.weight", "lora_up.weight"),
           "dots": ("lora.down.weight", "lora.up.weight")}  # fmt: skip
PIPELINES = {"klein": diffusers.Flux2KleinPipeline, "z-image": diffusers.ZImagePipeline}
Files = dict[str, Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("bases")
    return {"klein": make_tiny_klein(folder / "klein"), "z-image": make_tiny_z_image(folder / "z-image")}


@pytest.fixture(scope="module")
def loaded(bases: Files) -> dict[str, Base]:
    return {name: load_base(str(path), "cpu") for name, path in bases.items()}


@pytest.fixture(params=["klein", "z-image"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors that may share memory."""
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)


def width(base: Path, path: str) -> tuple[int, int]:
    """The (out, in) of a layer of a base's transformer, as diffusers has it."""
    layer = DiffusionPipeline.from_pretrained(str(base)).transformer.get_submodule(path)
    return layer.out_features, layer.in_features


@pytest.fixture(scope="module")
def originals(bases: Files) -> dict[str, dict[str, Factors]]:
    """Random factors of rank 2 by the original's names, for both families."""
    torch.manual_seed(0)
    found: dict[str, dict[str, Factors]] = {}
    for name, base in bases.items():
        transformer = DiffusionPipeline.from_pretrained(str(base)).transformer
        for original, layers in ORIGINAL[name].items():
            parts = [transformer.get_submodule(layer) for layer in layers]
            up = torch.randn(sum(part.out_features for part in parts), RANK)
            found.setdefault(name, {})[original] = Factors(up, torch.randn(RANK, parts[0].in_features))
    return found


def wanted(family: str, factors: Mapping[str, Factors], scale: float = 1.0) -> dict[str, Tensor]:
    """The change (out, in) of every layer of diffusers that factors under the original's names stand for."""
    changes: dict[str, Tensor] = {}
    for original, pair in factors.items():
        layers = ORIGINAL[family][original]
        changes |= dict(zip(layers, (scale * pair.delta()).chunk(len(layers)), strict=True))
    return changes


def spelled(factors: Mapping[str, Factors], prefix: str, ending: str, alpha: float | None = None) -> dict[str, Tensor]:
    """The tensors of a file: names with dots, or with underscores for kohya's prefix."""
    tensors: dict[str, Tensor] = {}
    for original, pair in factors.items():
        name = prefix + (original.replace(".", "_") if prefix.endswith("_") else original)
        tensors |= {f"{name}.{key}": value for key, value in zip(ENDINGS[ending], pair[::-1], strict=True)}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def changes_of(adapter: Adapter) -> dict[str, Tensor]:
    """The change of every layer of the transformer by its path, split layers as a whole."""
    deltas = {layer: Factors(*adapter.factors(layer)).delta() for layer in adapter.layers}
    for whole, rows in adapter.fused.items():
        width = next((deltas[f"{whole}.{part}"].shape[1] for part in rows if f"{whole}.{part}" in deltas), 0)
        if width:
            parts = [deltas.pop(f"{whole}.{part}", torch.zeros(count, width)) for part, count in rows.items()]
            deltas[whole] = torch.cat(parts)
    return {layer.removeprefix("transformer."): delta for layer, delta in deltas.items()}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], near: float = NEAR) -> bool:
    """Whether every layer's change is the same up to a share of its largest number."""
    return set(found) == set(expected) and all(
        float((found[layer] - delta).abs().max()) <= near * float(delta.abs().max())
        for layer, delta in expected.items()
    )


def read_as_comfyui(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changes of the original's weights by ComfyUI's rules: a weight's name, an ending, perhaps alpha."""
    changes: dict[str, Tensor] = {}
    for key, up in tensors.items():
        if match := re.fullmatch(r"diffusion_model\.(.+)\.(lora_up|lora_B|lora\.up)\.weight", key):
            kind = {"lora_up": "lora_down", "lora_B": "lora_A", "lora.up": "lora.down"}[match[2]]
            name = f"diffusion_model.{match[1]}"
            down, alpha = tensors[f"{name}.{kind}.weight"], tensors.get(f"{name}.alpha")
            changes[f"{match[1]}.weight"] = up @ down * (1.0 if alpha is None else float(alpha) / len(down))
    assert 2 * len(changes) == len(tensors)
    return changes


@pytest.fixture(scope="module")
def adapters(bases: Files, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """An adapter with another rank-2 change in every layer that the presets name, and one with a single-block half."""
    folder, files = tmp_path_factory.mktemp("adapters"), {}
    for name, path in bases.items():
        base = load_base(str(path), "cpu")
        sizes = {layer: tuple(weight.shape) for layer, weight in base.weights("attention+feed-forward").items()}
        generator, parameters = torch.Generator().manual_seed(1), {}
        for layer, (out, inside) in sizes.items():
            parameters[f"{layer}.A"] = torch.randn(RANK, inside, generator=generator)
            parameters[f"{layer}.B"] = torch.randn(out, RANK, generator=generator)
        adapter = Adapter(
            name="rex", noun="dog", token="<rex>", method=get_method("lora"), rank=RANK, slot=None,
            targets="attention+feed-forward", base=str(path), fingerprint=base.fingerprint, parameters=parameters,
            sizes=sizes, frozen={}, vectors={}, fused=fused_layers(base.models),
            family=base.family.pipeline_class.__name__,
        )  # fmt: skip
        files[name] = folder / f"{name}.safetensors"
        save_adapter(adapter, files[name])
    return files


# ---------------------------------------------------------------------- ComfyUI's files, out and in again


def test_a_comfyui_file_changes_the_original_checkpoint(family: str, adapters: Files, tmp_path: Path) -> None:
    """Read by ComfyUI's rules into the original's weights, and these converted by diffusers' own table."""
    export(adapters[family], tmp_path / "out.safetensors", "comfyui", EXACT)
    tensors = load_file(tmp_path / "out.safetensors")
    changes = read_as_comfyui(tensors)
    names = {name.removesuffix(".weight") for name in changes}
    assert set(ORIGINAL[family]) - {"context_refiner.0.attention.qkv"} <= names
    convert: Any = {
        "klein": convert_flux2_transformer_checkpoint_to_diffusers,
        "z-image": convert_z_image_transformer_checkpoint_to_diffusers,
    }[family]
    found = {key.removesuffix(".weight"): delta for key, delta in convert(dict(changes)).items()}
    assert same(found, changes_of(load_adapter(adapters[family])))
    for name in names:
        down = next(value for key, value in tensors.items() if re.search(f"{re.escape(name)}\\.lora(_A|\\.down)", key))
        parts = 3 if name.endswith("qkv") else 5 if name.endswith("linear1") else 1
        assert len(down) == parts * RANK, name


def test_a_comfyui_file_comes_back_as_the_same_adapter(
    family: str, loaded: dict[str, Base], adapters: Files, tmp_path: Path
) -> None:
    export(adapters[family], tmp_path / "out.safetensors", "comfyui", EXACT)
    other = import_lora(tmp_path / "out.safetensors", tmp_path / "in.safetensors", "", base=loaded[family])
    own = load_adapter(adapters[family])
    assert same(changes_of(other), changes_of(own)) and other.layers == own.layers
    assert other.rank == RANK and load_adapter(tmp_path / "in.safetensors").family == own.family  # no block of zeros
    export(tmp_path / "in.safetensors", tmp_path / "again.safetensors", "comfyui", EXACT)
    first, again = (read_as_comfyui(load_file(tmp_path / f"{name}.safetensors")) for name in ("out", "again"))
    assert same(again, first)
    export(adapters[family], tmp_path / "half.safetensors", "comfyui")
    half = import_lora(tmp_path / "half.safetensors", None, "", base=loaded[family])
    assert same(changes_of(half), changes_of(own), 1e-3)


def test_stock_diffusers_changes_the_same_weights(family: str, bases: Files, adapters: Files, tmp_path: Path) -> None:
    export(adapters[family], tmp_path / "out.safetensors", "comfyui", EXACT)
    pipeline = DiffusionPipeline.from_pretrained(str(bases[family]))
    pipeline.load_lora_weights(str(tmp_path / "out.safetensors"))
    found = {
        name: module.get_delta_weight("default_0").detach()
        for name, module in pipeline.transformer.named_modules()
        if hasattr(module, "get_delta_weight") and module.active_adapters
    }
    assert same(found, changes_of(load_adapter(adapters[family])))


def test_parts_that_share_their_down_keep_its_rank(
    family: str, loaded: dict[str, Base], originals: dict[str, dict[str, Factors]], tmp_path: Path
) -> None:
    save(spelled(originals[family], "diffusion_model.", "AB"), tmp_path / "web.safetensors")
    import_lora(tmp_path / "web.safetensors", tmp_path / "in.safetensors", "", base=loaded[family])
    export(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "comfyui", EXACT)
    tensors = load_file(tmp_path / "out.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {RANK}
    expected = {f"{name}.weight": pair.delta() for name, pair in originals[family].items()}
    assert same(read_as_comfyui(tensors), expected)


def test_what_comfyui_cannot_read_is_told(family: str, adapters: Files, tmp_path: Path) -> None:
    notes: dict[str, list[str]] = {"kohya": [], "comfyui": []}
    for kind, told in notes.items():
        export(adapters[family], tmp_path / "out.safetensors", kind, hooks=Hooks(notify=told.append))
    assert not notes["comfyui"]
    assert [note for note in notes["kohya"] if "for it, choose comfyui" in note] == notes["kohya"]
    assert bool(notes["kohya"]) == (family == "z-image")


def test_rows_are_stacked_with_every_down_once() -> None:
    torch.manual_seed(0)
    one, two = torch.randn(2, 5), torch.randn(3, 5)
    parts = {"a": Factors(torch.randn(4, 2), one), "b": None, "c": Factors(torch.randn(4, 3), two),
             "d": Factors(torch.randn(6, 2), one.clone())}  # fmt: skip
    whole = stack_rows(parts, {"a": 4, "b": 1, "c": 4, "d": 6})
    assert whole.down.shape == (5, 5)
    blocks = whole.delta().split([4, 1, 4, 6])
    assert not blocks[1].any()
    for block, name in zip(blocks, "abcd", strict=True):
        assert name == "b" or torch.allclose(block, parts[name].delta())  # type: ignore[union-attr]
    first = trimmed(Factors(whole.up[:4], whole.down))
    assert first.down.shape == (2, 5) and torch.equal(first.delta(), parts["a"].delta())  # type: ignore[union-attr]
    assert trimmed(Factors(torch.zeros(4, 2), one)).down.shape == (1, 5)


@pytest.mark.parametrize("kind", seldom(["kohya", "comfyui"], {"comfyui"}))
def test_every_layer_but_one_has_a_name_there(
    family: str, loaded: dict[str, Base], bases: Files, tmp_path: Path, kind: str
) -> None:
    """Embeddings and modulations too, which no preset adapts. FLUX.2's norm_out has its halves the other way round."""
    base = loaded[family]
    fused = fused_layers(base.models)
    layers = [*base.weights("re:.*"), *fused]
    layers = [layer for layer in layers if not layer.startswith(tuple(f"{whole}." for whole in fused))]
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        out, inside = width(bases[family], layer.removeprefix("transformer."))
        tensors |= {f"{layer}.lora_A.weight": torch.randn(1, inside), f"{layer}.lora_B.weight": torch.randn(out, 1)}
    save(tensors, tmp_path / "all.safetensors")
    own = import_lora(tmp_path / "all.safetensors", tmp_path / "in.safetensors", "", base=loaded[family])
    if family == "klein" and kind == "comfyui":
        with pytest.raises(
            UserError, match=r"has no such layer as transformer\.norm_out\.linear\. Use format=diffusers"
        ):
            export(tmp_path / "in.safetensors", tmp_path / "out.safetensors", kind, EXACT)
        own = replace(
            own, sizes={layer: size for layer, size in own.sizes.items() if "norm_out" not in layer},
            parameters={name: value for name, value in own.parameters.items() if "norm_out" not in name},
        )  # fmt: skip
        save_adapter(own, tmp_path / "in.safetensors")
    export(tmp_path / "in.safetensors", tmp_path / "out.safetensors", kind, EXACT)
    other = import_lora(tmp_path / "out.safetensors", None, "", base=loaded[family])
    assert same(changes_of(other), changes_of(own))


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", ""])
def test_for_stable_diffusion_comfyui_is_kohya(tmp_path: Path, name: str) -> None:
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    layers = [layer, *(["text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"] if "XL" in name else [])]
    adapter = Adapter(
        name="rex", noun="dog", token="", method=get_method("lora"), rank=1, slot=None, targets="attention",
        base="base", fingerprint=Fingerprint("a", "b", "c"), frozen={}, vectors={}, family=name,
        parameters={f"{layer}.{factor}": torch.ones(4, 1) if factor == "B" else torch.ones(1, 4)
                    for layer in layers for factor in "AB"},
        sizes=dict.fromkeys(layers, (4, 4)),
    )  # fmt: skip
    save_adapter(adapter, tmp_path / "rex.safetensors")
    for kind in ("kohya", "comfyui"):
        export(tmp_path / "rex.safetensors", tmp_path / f"{kind}.safetensors", kind)
    files = [tmp_path / f"{kind}.safetensors" for kind in ("kohya", "comfyui")]
    kohya, comfyui = map(load_file, files)
    assert list(kohya) == list(comfyui) and all(torch.equal(kohya[key], comfyui[key]) for key in kohya)
    assert any(key.startswith("lora_unet_") for key in kohya)
    with safe_open(files[0], "pt") as one, safe_open(files[1], "pt") as two:
        assert one.metadata() == two.metadata()


def test_a_change_of_full_rank_comes_near(
    family: str, loaded: dict[str, Base], bases: Files, adapters: Files, tmp_path: Path
) -> None:
    """OFT's change is no product of thin factors: the rule of the other spellings holds, and the error is told."""
    own = load_adapter(adapters[family])
    layer = next(iter(own.sizes))
    out, inside = own.sizes[layer]
    shapes = get_method("oft").shapes(out, inside, 1)
    parameters = {f"{layer}.{name}": 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    adapter = replace(own, method=get_method("oft"), rank=1, sizes={layer: (out, inside)}, parameters=parameters)
    save_adapter(adapter, tmp_path / "oft.safetensors")
    notes: list[str] = []
    options = replace(EXACT, rank=8, device="cpu")
    export(tmp_path / "oft.safetensors", tmp_path / "out.safetensors", "comfyui", options, Hooks(notify=notes.append))
    assert any("away from the exact change" in note for note in notes)
    other = import_lora(tmp_path / "out.safetensors", None, "", base=loaded[family])
    weight = loaded[family].weights()[layer]
    exact = adapter.factors(layer, weight).delta()
    assert 0 < float((other.factors(layer).delta() - exact).norm()) < 0.9 * float(exact.norm())


def test_an_adapter_that_names_no_family_is_not_guessed(family: str, adapters: Files, tmp_path: Path) -> None:
    save_adapter(replace(load_adapter(adapters[family]), family=""), tmp_path / "old.safetensors")
    for kind in ("kohya", "comfyui"):
        with pytest.raises(UserError, match="does not say which family of bases it is for") as caught:
            export(tmp_path / "old.safetensors", tmp_path / "out.safetensors", kind)
    assert caught.value.render(speller(["export"])).endswith(
        "--format diffusers for a file with the names of diffusers."
    )
    export(tmp_path / "old.safetensors", tmp_path / "out.safetensors", "diffusers")


def test_a_family_without_such_names_says_so(adapters: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in FAMILIES:
        monkeypatch.setattr(one, "original_names", None)
    with pytest.raises(UserError, match=r"No names that ComfyUI reads are known .* Use format=diffusers"):
        export(adapters["klein"], tmp_path / "out.safetensors", "comfyui")


# ---------------------------------------------------------------------- other programs' files


@pytest.mark.parametrize("alpha", seldom([None, ALPHA], {ALPHA}))
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "transformer."])
def test_original_names_are_read_with_every_ending(
    family: str, loaded: dict[str, Base], originals: dict[str, dict[str, Factors]], tmp_path: Path,
    prefix: str, ending: str, alpha: float | None,
) -> None:  # fmt: skip
    save(spelled(originals[family], prefix, ending, alpha), tmp_path / "web.safetensors")
    adapter = import_lora(tmp_path / "web.safetensors", None, "", base=loaded[family])
    assert same(changes_of(adapter), wanted(family, originals[family], (alpha or RANK) / RANK))
    assert adapter.rank == RANK


@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_kohyas_names_of_the_original_are_read(
    family: str, loaded: dict[str, Base], originals: dict[str, dict[str, Factors]], tmp_path: Path, alpha: float | None
) -> None:
    save(spelled(originals[family], "lora_unet_", "down-up", alpha), tmp_path / "web.safetensors")
    adapter = import_lora(tmp_path / "web.safetensors", None, "", base=loaded[family])
    assert same(changes_of(adapter), wanted(family, originals[family], (alpha or RANK) / RANK))


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "transformer.", "base_model.model.", "lora_unet_"])
def test_diffusers_names_are_read_with_every_ending(
    family: str, loaded: dict[str, Base], bases: Files, tmp_path: Path, prefix: str, ending: str, alpha: float | None
) -> None:
    """As ai-toolkit, PEFT, diffusers and musubi-tuner write them."""
    torch.manual_seed(0)
    paths = (
        ["attn.to_q", "attn.to_out.0", "ff.linear_in"]
        if family == "klein"
        else ["attention.to_q", "attention.to_out.0"]
    )
    layers = [f"{DOUBLE if family == 'klein' else LAYER}{path}" for path in paths]
    factors = {}
    for layer in layers:
        out, inside = width(bases[family], layer)
        factors[layer] = Factors(torch.randn(out, RANK), torch.randn(RANK, inside))
    save(spelled(factors, prefix, ending, alpha), tmp_path / "web.safetensors")
    adapter = import_lora(tmp_path / "web.safetensors", None, "", base=loaded[family])
    expected = {layer: (alpha or RANK) / RANK * pair.delta() for layer, pair in factors.items()}
    assert same(changes_of(adapter), expected)


# (family, prefix, ending, alpha): what the stock reader takes itself; the importer respells the rest to one of them.
READ = [
    ("klein", "diffusion_model.", "AB", None),
    ("klein", "lora_unet_", "down-up", None),
    ("klein", "lora_unet_", "down-up", ALPHA),
    ("z-image", "diffusion_model.", "dots", None),
    ("z-image", "diffusion_model.", "dots", ALPHA),
    ("z-image", "lora_unet_", "down-up", ALPHA),
]


@pytest.mark.parametrize(("name", "prefix", "ending", "alpha"), READ)
def test_diffusers_reads_the_spelling(
    originals: dict[str, dict[str, Factors]], name: str, prefix: str, ending: str, alpha: float | None
) -> None:
    """The contract with ``lora_state_dict``: under these keys it finds these layers, with these changes."""
    says = (
        f"diffusers {diffusers.__version__} reads {name}'s LoRAs with {prefix}… and {ENDINGS[ending][0]} in another way"
    )
    try:
        found = PIPELINES[name].lora_state_dict(spelled(originals[name], prefix, ending, alpha))
    except Exception as error:
        pytest.fail(f"{says}: {error}")
    ends = {".lora_A.weight", ".lora_B.weight"}
    assert all(key.startswith("transformer.") and key.endswith(tuple(ends)) for key in found), says
    layers = {key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in found if "lora_A" in key}
    deltas = {
        layer: found[f"transformer.{layer}.lora_B.weight"] @ found[f"transformer.{layer}.lora_A.weight"]
        for layer in layers
    }
    assert same(deltas, wanted(name, originals[name], (alpha or RANK) / RANK)), says


def test_the_exports_endings_are_those_of_the_contract() -> None:
    names = {one.pipeline_class: one.original_names for one in FAMILIES}
    for name, pipeline in PIPELINES.items():
        original = names[pipeline]
        assert original is not None
        taken = {
            ENDINGS[ending] for family, prefix, ending, _ in READ if (family, prefix) == (name, "diffusion_model.")
        }
        assert taken == {(original.down, original.up)}


def test_spellings_may_be_mixed_but_no_layer_has_two_changes(
    family: str, loaded: dict[str, Base], originals: dict[str, dict[str, Factors]], tmp_path: Path
) -> None:
    names = list(originals[family])
    halves = [{name: originals[family][name] for name in names[start::2]} for start in (0, 1)]
    mixed = spelled(halves[0], "diffusion_model.", "AB") | spelled(halves[1], "lora_unet_", "down-up", ALPHA)
    save(mixed, tmp_path / "mixed.safetensors")
    adapter = import_lora(tmp_path / "mixed.safetensors", None, "", base=loaded[family])
    assert same(changes_of(adapter), wanted(family, halves[0]) | wanted(family, halves[1], ALPHA / RANK))
    fused = {names[0]: originals[family][names[0]]}
    part, other = ORIGINAL[family][names[0]][0], wanted(family, fused)
    own = spelled({part: Factors(fused[names[0]].up.chunk(3)[0], fused[names[0]].down)}, "transformer.", "AB")
    for share, fits in ((1.0, True), (2.0, False)):
        twice = {key: share * value if "lora_B" in key else value for key, value in own.items()}
        save(spelled(fused, "diffusion_model.", "AB") | twice, tmp_path / "twice.safetensors")
        if fits:
            adapter = import_lora(tmp_path / "twice.safetensors", None, "", base=loaded[family])
            assert same(changes_of(adapter), other)
            continue
        with pytest.raises(UserError, match=f"changes transformer.{part} twice, as .* take one of them out"):
            import_lora(tmp_path / "twice.safetensors", None, "", base=loaded[family])


def test_a_fused_layer_beside_its_parts_says_the_same_twice(
    loaded: dict[str, Base], originals: dict[str, dict[str, Factors]], tmp_path: Path
) -> None:
    """As some trainers of Z-Image write it, with dots between all words."""
    qkv = originals["z-image"]["layers.1.attention.qkv"]
    parts = {f"layers.1.attention.to.{part}": Factors(up, qkv.down) for part, up in zip("qkv", qkv.up.chunk(3))}
    tensors = spelled({"layers.1.attention.qkv": qkv, **parts}, "", "dots")
    save(tensors, tmp_path / "web.safetensors")
    adapter = import_lora(tmp_path / "web.safetensors", None, "", base=loaded["z-image"])
    assert same(changes_of(adapter), wanted("z-image", {"layers.1.attention.qkv": qkv}))


def test_half_precision_files_are_scaled_in_full(
    family: str, loaded: dict[str, Base], originals: dict[str, dict[str, Factors]], tmp_path: Path
) -> None:
    brain = {name: Factors(pair.up.bfloat16(), pair.down.bfloat16()) for name, pair in originals[family].items()}
    for prefix, ending in (("diffusion_model.", "AB"), ("diffusion_model.", "down-up"), ("lora_unet_", "down-up")):
        tensors = {key: value.bfloat16() for key, value in spelled(brain, prefix, ending, ALPHA).items()}
        save(tensors, tmp_path / "web.safetensors")
        adapter = import_lora(tmp_path / "web.safetensors", None, "", base=loaded[family])
        full = {name: Factors(pair.up.float(), pair.down.float()) for name, pair in brain.items()}
        assert same(changes_of(adapter), wanted(family, full, ALPHA / RANK))


def test_a_saved_network_is_scaled_by_its_alpha(
    family: str, loaded: dict[str, Base], bases: Files, tmp_path: Path
) -> None:
    """``save_lora_adapter`` writes names without a component; PEFT's folder has its alpha in a config."""
    torch.manual_seed(0)
    transformer = DiffusionPipeline.from_pretrained(str(bases[family])).transformer
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k"], init_lora_weights=False))
    transformer.save_lora_adapter(tmp_path / "saved")
    adapter = import_lora(tmp_path / "saved", None, "", base=loaded[family])
    expected = {
        name: module.get_delta_weight("default").detach()
        for name, module in transformer.named_modules()
        if name.endswith((".to_q", ".to_k"))
    }
    assert same(changes_of(adapter), expected)
    tensors = load_file(tmp_path / "saved" / "pytorch_lora_weights.safetensors")
    (tmp_path / "peft").mkdir()
    save({f"base_model.model.{key}": value for key, value in tensors.items()},
              tmp_path / "peft" / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "lora_alpha": 6, "r": 2}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    adapter = import_lora(tmp_path / "peft", None, "", base=loaded[family])
    assert same(changes_of(adapter), expected)


# ---------------------------------------------------------------------- what is refused, in one sentence


def refusal(base: Base, file: Path, tensors: Mapping[str, Tensor]) -> str:
    """The sentence about a file with these tensors."""
    save(dict(tensors), file)
    with pytest.raises(UserError) as caught:
        import_lora(file, None, "", base=base)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    return caught.value.message


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_a_lora_of_the_other_family_is_called_that(
    family: str,
    loaded: dict[str, Base],
    bases: Files,
    originals: dict[str, dict[str, Factors]],
    tmp_path: Path,
    prefix: str,
) -> None:
    other = next(name for name in bases if name != family)
    tensors = spelled(originals[other], prefix, "down-up", ALPHA)
    message = refusal(loaded[family], tmp_path / "web.safetensors", tensors)
    assert "a LoRA for another kind of network: this base has no layer" in message


def test_a_name_that_is_left_over_is_told(
    family: str, loaded: dict[str, Base], originals: dict[str, dict[str, Factors]], tmp_path: Path
) -> None:
    """diffusers would leave it out with a warning, or refuse the file with a list of keys."""
    pair = next(iter(originals[family].values()))
    for prefix, strange in (("diffusion_model.", "head.gate"), ("lora_unet_", "head_gate"), ("lora_te1_", "q_proj")):
        tensors = spelled(originals[family], "lora_unet_" if prefix.endswith("_") else prefix, "down-up")
        tensors |= spelled({strange: pair}, prefix, "down-up")
        message = refusal(loaded[family], tmp_path / "web.safetensors", tensors)
        count = len(originals[family]) + 1
        assert message.endswith(f"1 of its {count} layers are not in this one, {prefix}{strange} among them.")


def test_layers_of_a_larger_network_are_told(
    family: str, loaded: dict[str, Base], originals: dict[str, dict[str, Factors]], tmp_path: Path
) -> None:
    name = next(iter(originals[family]))
    deeper = {re.sub(r"\d", "7", name, count=1): originals[family][name]}
    tensors = spelled(originals[family] | deeper, "diffusion_model.", "AB")
    message = refusal(loaded[family], tmp_path / "web.safetensors", tensors)
    assert f"not in this one, diffusion_model.{next(iter(deeper))} among them" in message
    wide = {key: torch.cat([value, value], 1 if "lora_A" in key else 0) for key, value in tensors.items()}
    wide = {key: value for key, value in wide.items() if ".7." not in key}
    assert "is of another size" in refusal(loaded[family], tmp_path / "web.safetensors", wide)


@pytest.mark.parametrize(
    ("key", "kind"),
    [("dora_scale", "DoRA"), ("lora_magnitude_vector", "DoRA"), ("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa"),
     ("diff_b", "")],
)  # fmt: skip
def test_relatives_of_lora_are_called_by_their_name(
    family: str, loaded: dict[str, Base], originals: dict[str, dict[str, Factors]], tmp_path: Path, key: str, kind: str
) -> None:
    name = f"diffusion_model.{next(iter(originals[family]))}.{key}"
    alone = {name: torch.ones(2, 2)}
    beside = alone | spelled(originals[family], "diffusion_model.", "AB")
    for tensors in (alone, beside):
        message = refusal(loaded[family], tmp_path / "web.safetensors", tensors)
        assert f"is no plain LoRA{f', but a {kind}' if kind else ''} (it holds {name})" in message


def test_empty_and_damaged_files_are_called_that(
    family: str, loaded: dict[str, Base], originals: dict[str, dict[str, Factors]], tmp_path: Path
) -> None:
    file, base = tmp_path / "web.safetensors", loaded[family]
    assert "is not a LoRA file" in refusal(base, file, {})
    tensors = spelled(originals[family], "diffusion_model.", "AB", ALPHA)
    name = f"diffusion_model.{next(iter(originals[family]))}"
    zero = {key: torch.zeros_like(value) for key, value in tensors.items() if not key.endswith("alpha")}
    if family == "klein":  # whose split layers leave unchanged parts out
        zero = {key: value for key, value in zero.items() if "linear1" in key}
        assert "changes no layer" in refusal(base, file, zero)
    lacking = {key: value for key, value in tensors.items() if key != f"{name}.lora_B.weight"}
    assert f"{name} lacks one of its two factors" in refusal(base, file, lacking)
    broken = {**tensors, f"{name}.lora_B.weight": torch.ones(6, RANK + 1)}
    assert f"the factors of {name} do not fit each other" in refusal(base, file, broken)
    infinite = {**tensors, f"{name}.alpha": torch.tensor(float("inf"))}
    assert f"{name} holds NaN, infinity" in refusal(base, file, infinite)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"web\.safetensors"):
        import_lora(file, None, "", base=base)
