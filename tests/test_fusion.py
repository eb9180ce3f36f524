"""Fusion and generation: exact sums, stock diffusers opens the folder, sketches, seeds, settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_photos
from diffusers import StableDiffusionPipeline, T2IAdapter
from PIL import Image
from safetensors import safe_open

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.apply import put_adapters
from spectral_diffusion.adapters.formats.native import load_adapter, save_adapter
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import ControlImage, Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.inspection import inspect_path
from spectral_diffusion.linalg import Factors, top_band
from spectral_diffusion.merging.fuse import fuse_adapters, fuse_to_folder
from spectral_diffusion.merging.manifest import read_manifest
from spectral_diffusion.merging.merges import Contribution, get_merge
from spectral_diffusion.merging.merges.registry import MergeContext
from spectral_diffusion.merging.unfuse import unfuse
from spectral_diffusion.methods import get_method
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.scenes.png_metadata import read_settings
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.slots.ledger import Slot
from spectral_diffusion.training.run import train_to_file

ADDITIVE = get_method("spectral-additive")


def problem(slots: list[Slot]) -> tuple[torch.Tensor, list[Contribution]]:
    """A weight and one random float64 additive change per slot."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator, dtype=torch.float64)
    whole = top_band(weight, 24)
    out = []
    for index, slot in enumerate(slots):
        parameters = {
            "A_U": 0.1 * torch.randn(24, slot.rank, generator=generator, dtype=torch.float64),
            "A_V": 0.1 * torch.randn(40, slot.rank, generator=generator, dtype=torch.float64),
        }
        out.append(Contribution(f"c{index}", ADDITIVE, parameters, whole.select(slot.columns)._asdict(), slot))
    return weight, out


def dense(weight: torch.Tensor, contributions: list[Contribution], strength: float = 1.0) -> torch.Tensor:
    """(U + Σ λ A_U) S (V + Σ λ A_V)ᵀ − W over all columns, in float64."""
    U, S, V = top_band(weight, 24)
    A_U, A_V = torch.zeros_like(U), torch.zeros_like(V)
    for one in contributions:
        assert one.slot is not None
        A_U[:, list(one.slot.columns)] += strength * one.parameters["A_U"]
        A_V[:, list(one.slot.columns)] += strength * one.parameters["A_V"]
    return (U + A_U) * S @ (V + A_V).mT - weight


def settings(**more: object) -> FuseConfig:
    return FuseConfig(adapters=[Path("a")], output=Path("b"), **more)  # type: ignore[arg-type]


def merged(contributions: list[Contribution], form: str) -> torch.Tensor:
    found = get_merge("spectral").combine(contributions, MergeContext(get_merge("spectral").settings({"form": form})))
    assert isinstance(found, Factors)
    return found.delta()


DISJOINT = [Slot.interval(0, 4), Slot.interval(4, 6), Slot.interval(10, 18)]


def test_sum_of_disjoint_slots_is_one_change_of_all_columns() -> None:
    weight, contributions = problem(DISJOINT)
    delta = merged(contributions, "sum")
    assert (delta - dense(weight, contributions)).abs().max() <= 1e-12


def test_sum_of_overlapping_slots_is_not() -> None:
    weight, contributions = problem([Slot.interval(0, 4), Slot.interval(2, 6)])
    delta = merged(contributions, "sum")
    assert (delta - dense(weight, contributions)).abs().max() > 1e-3


def test_mean_is_the_sum_over_k() -> None:
    _, contributions = problem(DISJOINT)
    assert torch.allclose(merged(contributions, "mean") * 3, merged(contributions, "sum"), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("slots", [DISJOINT, [Slot.interval(0, 4), Slot.interval(2, 6)]])
def test_paper_form_scales_the_factors(slots: list[Slot]) -> None:
    weight, contributions = problem(slots)
    delta = merged(contributions, "paper")
    assert (delta - dense(weight, contributions, 1 / len(slots))).abs().max() <= 1e-12


def test_paper_form_needs_factors() -> None:
    _, contributions = problem(DISJOINT)
    lora = Contribution("mug", get_method("lora"), {"A": torch.zeros(2, 40), "B": torch.zeros(24, 2)}, {}, None)
    with pytest.raises(UserError, match="'mug' is lora"):
        merged([*contributions, lora], "paper")
    assert merged([*contributions, lora], "sum").shape == (24, 40)


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two spectral adapters in two slots and a LoRA one, of the tiny random base."""
    folder = tmp_path_factory.mktemp("adapters")
    files = []
    for index, (name, method) in enumerate(
        (("dog", "spectral-additive"), ("mug", "spectral-additive"), ("cup", "lora"))
    ):
        photos = make_photos(folder / name, seed=index)
        files.append(folder / f"{name}.safetensors")
        train_to_file(
            TrainConfig(
                concept=photos, output=files[-1], base=str(tiny_base), method=method, rank=2, steps=8,
                learning_rate=0.05, text_encoder_learning_rate=0.05, device="cpu",
            )
        )  # fmt: skip
    return files


def config_for(base: Path | str, **more: object) -> Scene:
    return Scene(**{"base": str(base), "num_inference_steps": 3, "prompt": "<dog> and <mug>", "device": "cpu", **more})  # type: ignore[arg-type]


def test_fused_folder_opens_in_stock_diffusers_and_draws_what_the_adapters_draw(
    trained: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    fused = tmp_path / "fused"
    assert fuse_to_folder(FuseConfig(adapters=trained, output=fused, scales={"mug": 0.5}, device="cpu")) == []
    stock = StableDiffusionPipeline.from_pretrained(fused)
    assert stock.unet.dtype == torch.float32
    assert all(len(stock.tokenizer.tokenize(word)) == 1 for word in ("<dog>", "<dog>_1", "<mug>", "<cup>_1"))

    base = load_base(str(tiny_base), "cpu")
    adapters = [(load_adapter(path), 0.5 if path.stem == "mug" else 1.0) for path in trained]
    put_adapters(base, adapters)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = {}
    for name, pipe in (("stock", stock), ("live", base.pipeline)):
        words = pipe.maybe_convert_prompt("<dog> with <mug>", pipe.tokenizer)
        tokens = pipe.tokenizer(words, padding="max_length", max_length=32, return_tensors="pt").input_ids
        with torch.no_grad():
            ids[name] = pipe.unet(latents, 10, pipe.text_encoder(tokens)[0]).sample
    assert torch.allclose(ids["stock"], ids["live"], atol=2e-5)
    plain = load_base(str(tiny_base), "cpu").pipeline.unet.state_dict()
    assert any(not torch.equal(plain[n], w) for n, w in stock.unet.state_dict().items())

    recipe = read_manifest(fused)
    assert recipe and set(recipe["concepts"]) == {"dog", "mug", "cup"}
    found = inspect_path(fused)
    assert abs(found["cosines"]["dog · mug"]) < 1 and found["norms"]["dog"] > 0


def test_fusion_does_not_depend_on_the_order_of_the_files(trained: list[Path], tmp_path: Path) -> None:
    for name, files in (("a", trained), ("b", trained[::-1])):
        fuse_to_folder(FuseConfig(adapters=files, output=tmp_path / name, device="cpu"))
    one, two = (StableDiffusionPipeline.from_pretrained(tmp_path / name).unet.state_dict() for name in "ab")
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_an_adapter_at_strength_zero_changes_nothing(trained: list[Path], tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    before = {n: w.clone() for n, w in base.weights().items()}
    fuse_adapters(base, [load_adapter(trained[0])], settings(scales={"dog": 0.0}))
    assert all(torch.equal(before[n], w) for n, w in base.weights().items())


def test_refusals(trained: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    dog = load_adapter(trained[0])
    base = load_base(str(tiny_base), "cpu")
    with pytest.raises(UserError, match="Two adapters are called 'dog'"):
        fuse_adapters(base, [dog, dog], settings())
    twin = load_adapter(trained[1])
    twin.token = dog.token
    with pytest.raises(UserError, match="share the token <dog>"):
        fuse_adapters(base, [dog, twin], settings())
    twin.token = "<Dog>"  # which the tokenizer reads as the other
    with pytest.raises(UserError, match="share the token <dog>"):
        fuse_adapters(base, [dog, twin], settings())
    with pytest.raises(UserError, match=r"names 'dgo' \(did you mean 'dog'\?\)"):
        fuse_adapters(base, [dog], settings(scales={"dgo": 1}))
    with pytest.raises(UserError, match="Unknown merge 'spectrl'"):
        fuse_adapters(base, [dog], settings(merge="spectrl"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match="is not a fused folder"):
        fuse_to_folder(FuseConfig(adapters=[trained[0]], output=tmp_path / "mine", device="cpu"))
    assert (tmp_path / "mine" / "diary.txt").exists()


def test_overlapping_slots_are_told(trained: list[Path], tmp_path: Path) -> None:
    shifted: Adapter = load_adapter(trained[1])
    shifted.slot = load_adapter(trained[0]).slot
    save_adapter(shifted, tmp_path / "mug.safetensors")
    notes = fuse_to_folder(
        FuseConfig(adapters=[trained[0], tmp_path / "mug.safetensors"], output=tmp_path / "f", device="cpu")
    )
    assert notes == ["'dog' (0:2) and 'mug' (0:2) share 2 columns; they will disturb each other."]


def test_pictures_repeat_and_do_not_depend_on_their_neighbours(trained: list[Path], tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    put_adapters(base, [(load_adapter(trained[0]), 1.0)])
    config = config_for(tiny_base)
    first = sample(base, ["<dog>"] * 3, [5, 6, 7], config)
    again = sample(base, ["<dog>"], [6], config)
    assert first[0].tobytes() != first[1].tobytes()
    difference = torch.tensor(list(first[1].tobytes())).float() - torch.tensor(list(again[0].tobytes())).float()
    assert difference.abs().max() <= 1


def test_an_unknown_token_is_told(trained: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    config = config_for(
        tiny_base, adapters={str(trained[0]): 1.0}, prompt="<dgo>", output=tmp_path / "o.png", num_inference_steps=1
    )
    generate_to_file(config, hooks=Hooks(notify=notes.append))
    assert notes == [
        "Note: <dgo> is no token of this base or its adapters (did you mean '<dog>'?); it is read as plain text."
    ]


def test_generate_writes_pictures_with_their_settings(trained: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.png"
    config = config_for(tiny_base, adapters={str(trained[0]): 0.5}, prompt="<dog>", seed=3, num_images=2, output=output)
    paths = generate_to_file(config)
    assert [p.name for p in paths] == ["out.png", "out-3.png", "out-4.png"]
    settings = read_settings(paths[2])
    assert settings["seed"] == 4 and settings["adapters"] == {str(trained[0]): 0.5}
    assert settings["seeds"] == [3, 4] and settings["only_seed"] == 4
    single = generate_to_file(Scene(**settings, output=tmp_path / "again.png", device="cpu"))
    with Image.open(single[0]) as again, Image.open(paths[2]) as before:
        assert again.tobytes() == before.tobytes()  # its neighbours were drawn again too


def test_a_fusion_in_half_precision_comes_apart_in_it_too(trained: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    """The weights are those of the float32 fusion of the rounded base, rounded once; unfusing gives the same bits."""

    def config(name: str, count: int) -> FuseConfig:
        return FuseConfig(adapters=trained[:count], output=tmp_path / name, dtype="bfloat16", device="cpu")

    fuse_to_folder(config("both", 2))
    fuse_to_folder(config("one", 1))
    both = load_base(str(tmp_path / "both"), "cpu", "bfloat16")
    files = {file.parent.name for file in (tmp_path / "both").rglob("*.safetensors")}
    assert {"unet", "text_encoder", "vae"} <= files
    with safe_open(str(tmp_path / "both/unet/diffusion_pytorch_model.safetensors"), "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    base = load_base(str(tiny_base), "cpu", "bfloat16")
    base.pipeline.to(torch.float32)
    fuse_adapters(base, [load_adapter(file) for file in trained[:2]], config("both", 2))
    for layer, weight in base.weights().items():
        assert torch.equal(weight.bfloat16(), both.weights()[layer])
    unfuse(tmp_path / "both", [load_adapter(trained[1]).name], tmp_path / "rest", device="cpu")
    rest, one = (load_base(str(tmp_path / name), "cpu", "bfloat16").fingerprint.exact for name in ("rest", "one"))
    assert rest == one


@pytest.fixture(scope="module")
def sketch_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("t2i")
    T2IAdapter(in_channels=1, channels=[16, 24], num_res_blocks=1, downscale_factor=2).save_pretrained(folder)
    return folder


def test_a_sketch_changes_the_picture(tiny_base: Path, sketch_adapter: Path, tmp_path: Path) -> None:
    drawing = Image.new("L", (32, 16))
    drawing.paste(255, (4, 4, 20, 12))
    drawing.save(tmp_path / "sketch.png")
    pictures = []
    for name, weight in (("none", 0.0), ("half", 0.5), ("full", 1.0)):
        config = config_for(
            tiny_base,
            prompt="a dog",
            width=32,
            height=16,
            output=tmp_path / f"{name}.png",
            controls=[
                ControlImage(file=tmp_path / "sketch.png", conditioning_scale=weight, adapter=str(sketch_adapter))
            ],
        )
        with Image.open(generate_to_file(config)[0]) as picture:
            assert picture.size == (32, 16)
            pictures.append(picture.tobytes())
    assert len(set(pictures)) == 3


def test_bands_of_a_contribution_are_used_as_stored() -> None:
    """One flipped column pair is the same band; one flipped side alone is another change."""
    _, [one] = problem([Slot.interval(0, 4)])
    flip = torch.tensor([1.0, -1.0, 1.0, 1.0]).double()
    flipped = {**one.frozen, "U": one.frozen["U"] * flip, "V": one.frozen["V"] * flip}
    pair = Contribution("x", ADDITIVE, {n: p * flip for n, p in one.parameters.items()}, flipped, one.slot)
    wrong = Contribution("x", ADDITIVE, one.parameters, flipped, one.slot)
    assert torch.allclose(pair.factors().delta(), one.factors().delta())
    assert not torch.allclose(wrong.factors().delta(), one.factors().delta(), atol=1e-3)


@pytest.mark.parametrize("method", ["spectral-additive", "lora"])
def test_adapters_of_every_layer_kind_train_load_stack_and_fuse(
    photos: Path, tiny_base: Path, tmp_path: Path, method: str
) -> None:
    config = TrainConfig(
        concept=photos, output=tmp_path / "rex.safetensors", base=str(tiny_base), rank=2, steps=3, device="cpu",
        method=method, target_modules="attention+feed-forward+projection+conv", learning_rate=1e-2,
    )  # fmt: skip
    train_to_file(config)
    adapter = load_adapter(config.output)
    assert any("resnets" in layer for layer in adapter.layers) and adapter.norm() > 0
    pictures = []
    unfused = load_base(str(tiny_base), "cpu")
    put_adapters(unfused, [(adapter, 1.0)])
    fused = load_base(str(tiny_base), "cpu")
    fuse_adapters(fused, [adapter], settings())
    for base in (unfused, fused, load_base(str(tiny_base), "cpu")):
        with torch.no_grad():
            text = base.pipeline.text_encoder(torch.arange(32)[None])[0]
            pictures.append(base.pipeline.unet(torch.ones(1, 4, 8, 8), 10, text).sample)
    assert torch.allclose(pictures[0], pictures[1], atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-4)
