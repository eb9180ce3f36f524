"""FLUX.2 klein and its like on tiny random bases: training, fusing, drawing and taking out, with every method."""

from __future__ import annotations

import ast
import inspect
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_photos, seldom, two_families
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from families import MAKERS, make_tiny_klein
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import spectral_diffusion
import spectral_diffusion as sd
from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.apply import add_words, put_adapters
from spectral_diffusion.adapters.attach import AdapterSpec, inject_adapter
from spectral_diffusion.adapters.formats.import_lora import import_lora
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.app import estimates
from spectral_diffusion.config.fuse import CalibrationConfig, DistillConfig, FuseConfig
from spectral_diffusion.config.scene import ControlImage, Region, Scene
from spectral_diffusion.config.train import (
    ObjectiveConfig,
    OptimizerConfig,
    PriorPreservationConfig,
    TrainConfig,
    ValidationConfig,
)
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.merging.export import ExportOptions, export
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.unfuse import unfuse
from spectral_diffusion.methods import all_methods, get_method
from spectral_diffusion.models.base import base_of
from spectral_diffusion.models.families import FAMILIES
from spectral_diffusion.models.loading import load_base, native_size
from spectral_diffusion.models.offload import is_offloaded
from spectral_diffusion.models.split_linear import SplitLinear, join_layers
from spectral_diffusion.models.stored_weights import LayerWeights
from spectral_diffusion.scenes.control import read_control_image
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.svd_cache import spectrum_of
from spectral_diffusion.training.memory import estimate
from spectral_diffusion.training.run import train_to_file

FUSED = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_klein(tmp_path_factory.mktemp("klein") / "klein")


def settings(base: Path, output: Path, photos: Path, **more: Any) -> TrainConfig:
    given = {"rank": 2, "steps": 3, "device": "cpu", "noise_offset": 0.0, "learning_rate": 1e-2, **more}
    return TrainConfig(concept=photos, output=output, base=str(base), **given)


@pytest.fixture(scope="module")
def pair(family: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pair")
    files = []
    for seed, (name, noun) in enumerate((("rex", "dog"), ("mug", "cup"))):
        photos = make_photos(folder / name, seed=seed)
        config = settings(family, folder / f"{name}.safetensors", photos, class_noun=noun)
        train_to_file(config)
        files.append(config.output)
    return files


def drawn(pipeline: Any, prompt: str = "a dog") -> torch.Tensor:
    denoiser = base_of(pipeline).denoiser
    images: torch.Tensor = pipeline(
        **denoiser.prompt_options([prompt], None), **denoiser.guidance_options(2.0), width=32, height=32,
        num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    return images


def test_a_split_layer_computes_and_saves_as_the_whole(klein: Path, tmp_path: Path) -> None:
    stock = Flux2KleinPipeline.from_pretrained(str(klein))
    stock.set_progress_bar_config(disable=True)
    layer = stock.transformer.get_submodule(FUSED)
    x, whole = torch.randn(1, 5, layer.in_features), layer.weight.detach().clone()
    want, keys = layer(x), set(stock.transformer.state_dict())
    base = base_of(stock)
    split: Any = stock.transformer.get_submodule(FUSED)
    assert isinstance(split, SplitLinear) and torch.equal(split(x), want)
    assert torch.equal(torch.cat([part(x) for part in split.children()], -1), want) or torch.allclose(split(x), want)
    assert set(stock.transformer.state_dict()) == keys
    with torch.no_grad():
        base.weights()[f"transformer.{FUSED}.k"].add_(1.0)  # a view: the whole follows
    moved = stock.transformer.state_dict()[f"{FUSED}.weight"] - whole
    rows = list(split.rows().values())
    assert [round(float(block.mean()), 5) for block in moved.split(rows)] == [0, 1, 0, 0, 0]
    stock.to(torch.float64)
    assert split(x.double()).dtype == torch.float64
    stock.to(torch.float32).save_pretrained(tmp_path)
    again = Flux2KleinPipeline.from_pretrained(str(tmp_path)).transformer.get_submodule(FUSED)
    assert type(again) is torch.nn.Linear and torch.equal(again.weight, split._whole)
    join_layers(stock.transformer)
    assert type(stock.transformer.get_submodule(FUSED)) is torch.nn.Linear


@pytest.mark.parametrize(
    "method", seldom(sorted(all_methods()), ("spectral-additive", "spectral-rotation", "lora", "dora", "oft"))
)
def test_every_method_trains(family: Path, photos: Path, tmp_path: Path, method: str) -> None:
    rank = 1 if method in {"svdiff", "oft"} else 2
    losses: list[float] = []
    hooks = Hooks(
        progress=lambda event: losses.append(event.metrics.get("loss", 0.0)) if event.stage == "train" else None
    )
    config = settings(family, tmp_path / "rex.safetensors", photos, method=method, rank=rank)
    adapter = train_to_file(config, hooks=hooks)
    assert len(losses) == 3
    if family.name == "klein":
        assert load_adapter(config.output).fused[f"transformer.{FUSED}"]["q"] == 32
    assert not adapter.vectors and adapter.trigger == "rex rex"
    base = load_base(str(family), "cpu")
    add_words(base, adapter)
    assert base.spell("<rex> and <REX>") == "rex rex and rex rex"  # as tokenizers ignore case
    weights = base.weights()
    assert any(bool(adapter.factors(layer, weights[layer]).delta().any()) for layer in adapter.layers)


def test_a_stopped_run_resumes_bit_for_bit(family: Path, photos: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "prior": PriorPreservationConfig(loss_weight=1.0, num_images=2, cut_mix_prob=0.5, batch_size=1),
        "validation": ValidationConfig(every=2, num_inference_steps=2),
        "optimizer": OptimizerConfig(ema_decay=0.5),
    }
    whole = train_to_file(settings(family, tmp_path / "a" / "rex.safetensors", photos, **more))
    asked: list[bool]
    config, asked = settings(family, tmp_path / "b" / "rex.safetensors", photos, **more), []
    hooks = Hooks(
        progress=lambda event: asked.append(event.stage == "train" and event.done == 1), should_stop=lambda: any(asked)
    )
    with pytest.raises(Cancelled):
        train_to_file(config, hooks=hooks)
    resumed = train_to_file(config, resume=True)
    assert all(torch.equal(whole.parameters[name], value) for name, value in resumed.parameters.items())


@two_families
@pytest.mark.parametrize("merge", ["spectral", "gradient", "ties"])
def test_a_fusion_is_a_stock_checkpoint_and_comes_apart_again(
    family: Path, pair: list[Path], tmp_path: Path, merge: str
) -> None:
    small = CalibrationConfig(num_images=2, num_inference_steps=2)
    config = FuseConfig(adapters=pair, output=tmp_path / "both", merge=merge, calibration=small, device="cpu")
    fuse_to_folder(config)
    before, after = (
        load_base(str(folder), "cpu").weights("attention+feed-forward") for folder in (family, config.output)
    )
    adapters = [load_adapter(path) for path in pair]
    for layer, weight in before.items():
        if layer not in adapters[0].sizes:
            assert torch.equal(after[layer], weight)
        elif merge == "spectral":
            change = sum(adapter.factors(layer).delta().double() for adapter in adapters)
            assert torch.allclose(after[layer].double(), weight.double() + change, atol=1e-6)
    if family.name == "klein":
        stock = DiffusionPipeline.from_pretrained(str(config.output)).transformer.get_submodule(FUSED)
        whole = torch.cat([after[f"transformer.{FUSED}.{part}"] for part in ("q", "k", "v", "mlp_gate", "mlp_value")])
        assert torch.equal(stock.weight, whole)
    alone = config.model_copy(update={"adapters": pair[:1], "output": tmp_path / "one"})
    for _ in range(2 if merge == "spectral" else 1):  # the second replaces the first
        fuse_to_folder(alone)
    unfuse(tmp_path / "both", ["mug"], tmp_path / "rest", device="cpu")
    one, rest = (load_base(str(tmp_path / name), "cpu").fingerprint.exact for name in ("one", "rest"))
    assert one == rest


def test_distillation_brings_the_fusion_nearer(family: Path, pair: list[Path], tmp_path: Path) -> None:
    events: list[float] = []
    distill = DistillConfig(steps=12, num_images=2, num_prior_images=2, noises_per_image=2, learning_rate=1e-3)
    config = FuseConfig(adapters=pair, output=tmp_path / "both", distill=distill, device="cpu")
    fuse_to_folder(
        config, Hooks(progress=lambda event: events.extend(event.metrics[k] for k in ["loss"] if k in event.metrics))
    )
    assert len(events) == 12 and sum(events[-3:]) < sum(events[:3])


def test_an_adapter_draws_as_its_fusion(family: Path, pair: list[Path], tmp_path: Path) -> None:
    scene = Scene(prompt="a <rex> on the beach", base=str(family), output=tmp_path / "on.png", device="cpu",
                  num_inference_steps=2, mixed_precision="no", adapters={str(pair[0]): 40.0})  # fmt: skip
    notes: list[str] = []
    generate_to_file(scene, Hooks(notify=notes.append))
    fuse_to_folder(FuseConfig(adapters=pair[:1], output=tmp_path / "fused", device="cpu", scales={"rex": 40}))
    fused = scene.model_copy(update={"base": str(tmp_path / "fused"), "adapters": {}, "output": tmp_path / "in.png"})
    generate_to_file(fused, Hooks(notify=notes.append))
    plain = scene.model_copy(update={"adapters": {}, "output": tmp_path / "plain.png"})
    generate_to_file(plain.model_copy(update={"prompt": "a rex dog on the beach"}))
    on, inside, without = (np.asarray(Image.open(tmp_path / f"{name}.png"), float) for name in ("on", "in", "plain"))
    assert np.abs(on - inside).max() <= 1 < np.abs(on - without).max()
    assert not any("no token" in note for note in notes)


def test_what_a_base_learns_no_words_for_is_said(family: Path, photos: Path, pair: list[Path], tmp_path: Path) -> None:
    notes: list[str] = []
    train_to_file(settings(family, tmp_path / "rex.safetensors", photos), hooks=Hooks(notify=notes.append))
    assert any("'rex rex'" in note for note in notes)
    with pytest.raises(UserError, match=r"this one matches a flow"):
        train_to_file(settings(family, tmp_path / "a.safetensors", photos, objective=ObjectiveConfig(snr_gamma=5)))
    for more in ({"per_layer_tokens": True}, {"objective": ObjectiveConfig(attention_loss_weight=0.1)}):
        with pytest.raises(UserError, match="learns no words"):
            train_to_file(settings(family, tmp_path / "b.safetensors", photos, **more))
    base = load_base(str(family), "cpu")
    Image.new("L", (32, 32)).save(tmp_path / "sketch.png")
    drawing = read_control_image(ControlImage(file=tmp_path / "sketch.png"))
    if base.family.controls is None:
        with pytest.raises(UserError, match="Sketches and keyposes work on"):
            sample(base, ["a dog"], [0], Scene(prompt="a dog", device="cpu"), controls=[drawing])


@two_families
@pytest.mark.parametrize("kind", ["kohya", "comfyui", "diffusers"])
@pytest.mark.parametrize("what", seldom(["adapter", "fusion"], {"fusion"}))
def test_stock_diffusers_draws_with_an_export(
    family: Path, pair: list[Path], tmp_path: Path, kind: str, what: str
) -> None:
    """Loaded by stock load_lora_weights it changes the picture as the fused checkpoint does."""
    files = pair if what == "fusion" else pair[:1]
    fuse_to_folder(FuseConfig(adapters=files, output=tmp_path / "both", device="cpu", scales={"rex": 20.0}))
    source = tmp_path / "both"
    if what == "adapter":
        fuse_to_folder(FuseConfig(adapters=files, output=tmp_path / "one", device="cpu"))
        source = files[0]
    output, notes = tmp_path / "out.safetensors", []
    written = export(source, output, kind, ExportOptions(dtype="float32"), Hooks(notify=notes.append))
    assert [path.suffix for path in written] == [".safetensors", ".md"]  # there are no vectors to write
    with safe_open(output, "pt") as file:
        assert "rex dog" in file.metadata()["modelspec.trigger_phrase"]
        assert family.name in file.metadata()["modelspec.architecture"].replace("flux-2-", "")
    if family.name == "krea-2" and kind == "kohya":
        assert any("diffusers does not read" in note for note in notes)
        return
    wanted = drawn(DiffusionPipeline.from_pretrained(str(tmp_path / ("both" if what == "fusion" else "one"))))
    stock = DiffusionPipeline.from_pretrained(str(family))
    before = drawn(DiffusionPipeline.from_pretrained(str(family)))
    stock.load_lora_weights(str(output))
    stock.set_progress_bar_config(disable=True)
    denoiser = base_of(DiffusionPipeline.from_pretrained(str(family))).denoiser
    found = stock(
        **denoiser.prompt_options(["a dog"], None), **denoiser.guidance_options(2.0), width=32, height=32,
        num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    effect = float((wanted - before).abs().max())
    assert effect > 1e-5 and float((found - wanted).abs().max()) <= 1e-3 * effect + 1e-6


def test_an_export_to_what_the_family_has_not_is_refused(pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no single checkpoint"):
        export(pair[0], tmp_path / "a.safetensors", "checkpoint")
    with pytest.raises(UserError, match="no embedding"):
        export(pair[0], tmp_path / "a.safetensors", "embedding")


def test_nothing_is_subtracted_from_a_fusion_in_half_precision(pair: list[Path], tmp_path: Path) -> None:
    fuse_to_folder(FuseConfig(adapters=pair, output=tmp_path / "both", dtype="bfloat16", device="cpu"))
    with pytest.raises(UserError, match="is not float32"):
        unfuse(tmp_path / "both", ["mug"], tmp_path / "rest", subtract=True, device="cpu")
    assert not (tmp_path / "rest").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_half_precision_trains_and_draws(
    family: Path, photos: Path, pair: list[Path], tmp_path: Path, dtype: str
) -> None:
    config = settings(family, tmp_path / "rex.safetensors", photos, dtype=dtype, steps=1)
    train_to_file(config)
    scene = Scene(prompt="a <rex>", base=str(family), output=tmp_path / "out.png", device="cpu", dtype=dtype,
                  num_inference_steps=1, adapters={str(pair[0]): 1.0})  # fmt: skip
    generate_to_file(scene)
    assert np.asarray(Image.open(scene.output)).std() > 0


def test_each_prompt_is_encoded_once_and_as_alone(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser: Any = load_base(str(family), "cpu").denoiser
    asked: list[str] = []
    encode_one = denoiser.encode_one
    monkeypatch.setattr(denoiser, "encode_one", lambda prompt: (asked.append(prompt), encode_one(prompt))[1])
    monkeypatch.setattr("spectral_diffusion.models.flow.KEPT", 3)
    together = denoiser.encode(["a dog", "", "a very long red cup", "a dog"])
    assert asked == ["a dog", "", "a very long red cup"] and len(together) == 4
    again = denoiser.encode(["a very long red cup"])
    assert len(asked) == 3
    for name, tensor in again.tensors.items():
        assert torch.equal(tensor[0], together.tensors[name][2]) and not tensor.requires_grad
    denoiser.encode(["one", "two", "three", "four"])
    denoiser.encode(["a dog", "four"])
    assert asked[3:] == ["one", "two", "three", "four", "a dog"]  # the latest three are kept


def test_what_is_longer_than_the_text_encoder_reads_is_said(family: Path, pair: list[Path], tmp_path: Path) -> None:
    """Tokens are bytes here, 96 with the template; the tokenizer itself knows no limit, as the real ones."""
    notes: list[str] = []
    scene = Scene(prompt="a <rex> " + "by a windy bay " * 5 + "with a boat", base=str(family), device="cpu",
                  output=tmp_path / "out.png", num_inference_steps=1, adapters={str(pair[0]): 1.0})  # fmt: skip
    generate_to_file(scene, Hooks(notify=notes.append))
    unread = family.name != "qwen-image-2.1"  # whose pipeline reads all of it
    assert any("boat" in note for note in notes) == unread
    if not unread:
        return
    photos = make_photos(tmp_path / "rex", seed=0)
    behind = settings(family, tmp_path / "a.safetensors", photos, templates=["by a windy bay " * 8 + "{}"])
    with pytest.raises(UserError, match="is in the part that is cut off"):
        train_to_file(behind)
    notes.clear()
    train_to_file(
        settings(family, tmp_path / "b.safetensors", photos, templates=["{} " + "by a windy bay " * 8], steps=1),
        hooks=Hooks(notify=notes.append),
    )
    assert any("longer than this base reads; cut off" in note for note in notes)


def test_a_sampler_that_the_family_has_not_is_said(klein: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    scene = Scene(prompt="a dog", base=str(klein), device="cpu", output=tmp_path / "a.png", num_inference_steps=1)
    generate_to_file(scene, Hooks(notify=notes.append))
    assert not any("sampler" in note for note in notes)
    asked = Scene(**scene.model_dump(exclude_unset=True) | {"sampler": "ddim", "output": tmp_path / "b.png"})
    generate_to_file(asked, Hooks(notify=notes.append))
    assert any("sampler=ddim changes nothing: FLUX.2 klein has euler only" in note for note in notes)


def test_guidance_in_a_target_is_that_of_the_pipeline(family: Path) -> None:
    """What a step of the sampler is given is e + g (c − e), with the g that distillation computes with."""
    base = load_base(str(family), "cpu")
    denoiser, given = base.denoiser, []
    scheduler = base.pipeline.scheduler
    step = scheduler.step

    def watched(velocity: torch.Tensor, time: torch.Tensor, latents: torch.Tensor, **more: Any) -> Any:
        given.append((velocity.clone(), latents.clone()))
        return step(velocity, time, latents, **more)

    scheduler.step = watched
    drawn(base.pipeline, "a dog")  # with guidance 2
    (velocity, latents), size = given[0], (32, 32)
    noisy = denoiser.step_latents(latents, *size)
    last = torch.tensor([denoiser.num_timesteps - 1])
    words, empty = (denoiser.predict(noisy, last, denoiser.encode([text])) for text in ("a dog", ""))
    scale = denoiser.effective_guidance(2.0)
    want = empty + scale * (words - empty)
    assert torch.allclose(denoiser.step_latents(velocity, *size), want, atol=1e-4 * float(want.norm()))
    assert (words - empty).norm() > 1e-3 * want.norm()


def test_whole_weights_of_fused_parts_learn_though_the_network_moves(klein: Path) -> None:
    """The optimizer holds the parts' parameters, so a move must keep them; new weights of a part are noticed."""
    transformer: Any = base_of(Flux2KleinPipeline.from_pretrained(str(klein))).pipeline.transformer
    split = transformer.get_submodule(FUSED)
    before = [id(part.weight) for part in split.parts()]
    transformer.to("cpu")
    transformer.to(torch.float64)
    transformer.to(torch.float32)
    assert [id(part.weight) for part in split.parts()] == before
    state = {name: 2 * value for name, value in transformer.state_dict().items()}
    transformer.load_state_dict(state, assign=True)
    x = torch.randn(1, 3, split.in_features)
    assert torch.equal(split(x), torch.nn.functional.linear(x, state[f"{FUSED}.weight"]))
    assert torch.equal(transformer.state_dict()[f"{FUSED}.weight"], state[f"{FUSED}.weight"])
    part = split.parts()[1]
    part.forward = lambda x: x.new_zeros(*x.shape[:-1], part.out_features)  # as hooks that offload or cast replace it
    assert not split(x)[..., 32:64].any() and split(x)[..., :32].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["klein", "z-image", "krea-2", "qwen-image-2.1"],
    indirect=True,
)
def test_the_memory_of_a_large_base_is_computed_and_said(
    family: Path, pair: list[Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(family), "cpu")
    config = settings(family, tmp_path / "rex.safetensors", photos, batch_size=4)

    def peak(**more: Any) -> int:
        found = estimate(base.models, base.pipeline.vae, config.model_copy(update=more), 32, "cuda")
        return found.phases["training"]

    whole = peak()
    assert 2.8 * peak(batch_size=1) < whole and peak(gradient_checkpointing=True) < 0.8 * whole
    monkeypatch.setattr("spectral_diffusion.training.memory.SMALL", 0)
    notes: list[str] = []
    train_to_file(config, hooks=Hooks(notify=notes.append))
    distill = DistillConfig(steps=1, num_images=2, num_prior_images=2, noises_per_image=2)
    fuse = FuseConfig(adapters=pair, output=tmp_path / "both", distill=distill, device="cpu")
    fuse_to_folder(fuse, Hooks(notify=notes.append))
    assert sum("Memory: about" in note for note in notes) == 2


@pytest.mark.parametrize("kind", ["kohya", "comfyui", "diffusers"])
def test_an_export_is_imported_as_the_same_change(family: Path, pair: list[Path], tmp_path: Path, kind: str) -> None:
    export(pair[0], tmp_path / "out.safetensors", kind, ExportOptions(dtype="float32"))
    other = import_lora(tmp_path / "out.safetensors", tmp_path / "in.safetensors", str(family), device="cpu")
    own = load_adapter(pair[0])
    assert set(other.layers) == set(own.layers)
    for layer in own.layers:
        delta = own.factors(layer).delta()
        assert torch.allclose(other.factors(layer).delta(), delta, atol=1e-5 * float(delta.abs().max()) + 1e-9)
    fuse_to_folder(FuseConfig(adapters=[tmp_path / "in.safetensors", pair[1]], output=tmp_path / "f", device="cpu"))


def test_loras_of_other_networks_are_refused(family: Path, pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    export(pair[0], tmp_path / "klein.safetensors", "kohya")
    named = r"LoRA for (flux-2-klein|z-image|krea-2|qwen-image-2|a video or diffusion transformer)"
    with pytest.raises(UserError, match=named):
        import_lora(tmp_path / "klein.safetensors", None, str(tiny_base), device="cpu")
    plain = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 4)}
    plain |= {key.replace("lora_A", "lora_B"): torch.ones(4, 1) for key in plain}
    save_file(plain, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match="this base has no layer unet"):
        import_lora(tmp_path / "sd.safetensors", None, str(family), device="cpu")
    dora = {"diffusion_model.single_blocks.0.linear1.dora_scale": torch.ones(288)}
    save_file(dora, tmp_path / "dora.safetensors")
    with pytest.raises(UserError, match="no plain LoRA"):
        import_lora(tmp_path / "dora.safetensors", None, str(family), device="cpu")


def test_only_models_knows_the_families() -> None:
    """Nothing else imports a family's file, or asks for a family's pipeline or the name of its network."""
    package = Path(spectral_diffusion.__file__).parent
    files = {path.stem for path in (package / "models").glob("*.py")}
    families = {Path(str(inspect.getsourcefile(family))).stem for family in FAMILIES}
    names = {name for family in FAMILIES for name in (family.__name__, family.pipeline_class.__name__)}
    assert families < files
    for path in sorted(package.rglob("*.py")):
        if path.parent.name == "models":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").endswith(tuple(f"models.{name}" for name in families)), path
            assert not (isinstance(node, ast.Name) and node.id in names), path
            assert not (isinstance(node, ast.Attribute) and node.attr == "network_name"), path


LEFT, RIGHT, ALL = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module", params=["klein", "z-image", "krea-2", "qwen-image-2.1"])
def joint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base of a family that has regions: with text of one length first, or image tokens and any lengths."""
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "base")


@pytest.fixture
def latents(joint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draws a scene; gives the latents (1, c, h, w) instead of the picture."""

    def finished(pipe: Any, output: torch.Tensor, denoiser: Any, size: tuple[int, int]) -> list[torch.Tensor]:
        return [denoiser.raw_output(output, *size)]

    monkeypatch.setattr("spectral_diffusion.scenes.sampling.finished", finished)

    def draw(prompt: str, *regions: Region, bound: Any = (), on: Any = None, **more: Any) -> torch.Tensor:
        given = {"num_inference_steps": 2, "device": "cpu", "mixed_precision": "no", "guidance_scale": 3.0, **more}
        scene = Scene(prompt=prompt, regions=list(regions), **given)
        [found] = sample(on or load_base(str(joint), "cpu"), [prompt], [1], scene, bound=bound)
        return found  # type: ignore[return-value]

    return draw


@pytest.fixture(scope="module")
def strong(joint: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter that changes the picture a lot."""
    folder = tmp_path_factory.mktemp("strong")
    more = {"learning_rate": 0.3, "class_noun": "dog", "target_modules": "attention+feed-forward"}
    return train_to_file(settings(joint, folder / "rex.safetensors", make_photos(folder / "rex"), **more))


def test_one_region_over_everything_is_its_prompt_alone(latents: Any, joint: Path, strong: Adapter) -> None:
    alone, over = latents("a red cup"), latents("a beach", Region(box=ALL, prompt="a red cup"))
    assert torch.allclose(alone, over, atol=1e-5) and not torch.allclose(alone, latents("a beach"), atol=1e-4)
    everywhere = load_base(str(joint), "cpu")
    put_adapters(everywhere, [(strong, 1.0)])
    wanted = latents("a <rex>", on=everywhere)
    base = load_base(str(joint), "cpu")
    add_words(base, strong)
    region = Region(box=ALL, prompt="a <rex>")
    assert torch.allclose(latents("a beach", region, bound=[[(strong, 1.0)]], on=base), wanted, atol=1e-4)
    assert not torch.allclose(wanted, alone, atol=1e-2)


def test_a_region_binds_layers_that_read_texts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Krea 2's second stage of text fusion; not the first, whose tokens are layers of the text encoder."""
    monkeypatch.setattr("spectral_diffusion.scenes.sampling.finished", lambda pipe, output, *rest: [output])
    folder = MAKERS["krea-2"](tmp_path / "base")
    more = {"learning_rate": 0.3, "class_noun": "dog"}
    photos = make_photos(tmp_path / "rex")

    def trained(blocks: str) -> Adapter:
        targets = rf"re:transformer\.text_fusion\.{blocks}\..*\.(to_v|up|down)"
        return train_to_file(
            settings(folder, tmp_path / f"{blocks}.safetensors", photos, target_modules=targets, **more)
        )

    def drawn(base: Any, prompt: str, *regions: Region, bound: Any = ()) -> torch.Tensor:
        scene = Scene(
            prompt=prompt, regions=list(regions), num_inference_steps=2, device="cpu", mixed_precision="no"
        )  # fmt: skip
        return sample(base, [prompt], [1], scene, bound=bound)[0]  # type: ignore[return-value]

    text = trained("refiner_blocks")
    plain, everywhere = load_base(str(folder), "cpu"), load_base(str(folder), "cpu")
    put_adapters(everywhere, [(text, 1.0)])
    wanted, cup = drawn(everywhere, "a red cup"), Region(box=ALL, prompt="a red cup")
    assert torch.allclose(drawn(plain, "a beach", cup, bound=[[(text, 1.0)]]), wanted, atol=1e-4)
    assert not torch.allclose(drawn(plain, "a red cup"), wanted, atol=1e-3)
    with pytest.raises(UserError, match="outside the blocks that a region can bind"):
        drawn(plain, "a beach", cup, bound=[[(trained("layerwise_blocks"), 1.0)]])


def test_regions_hold_for_texts_and_pictures_that_need_padding(latents: Any, joint: Path, strong: Adapter) -> None:
    """36 tokens of a picture and texts of different lengths, with an adapter at every one of them."""
    base = load_base(str(joint), "cpu")
    more = {"width": 6 * base.denoiser.side_multiple, "height": 6 * base.denoiser.side_multiple}
    words = "a red cup that stands on a very long table"
    alone = latents(words, **more)
    for isolation in (0.0, 1.0):
        over = latents("a beach", Region(box=ALL, prompt=words), region_isolation=isolation, **more)
        assert torch.allclose(alone, over, atol=1e-5)
    everywhere = load_base(str(joint), "cpu")
    put_adapters(everywhere, [(strong, 1.0)])
    wanted = latents(words, on=everywhere, **more)
    region = Region(box=ALL, prompt=words)
    assert torch.allclose(latents("a beach", region, bound=[[(strong, 1.0)]], **more), wanted, atol=1e-4)
    assert not torch.allclose(wanted, alone, atol=1e-2)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_pictures_of_one_batch_have_their_own_prompts_and_regions(
    joint: Path, strong: Adapter, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    """Texts of different lengths, a region over a part, tokens that pad: together as one by one.

    Qwen-Image-2.1's pipeline puts all pictures of a batch behind its longest prompt.
    """
    monkeypatch.setattr("spectral_diffusion.scenes.sampling.finished", lambda pipe, output, *rest: list(output))
    base = load_base(str(joint), "cpu")
    side = 6 * base.denoiser.side_multiple
    prompts = ["a beach", "a house that stands on a very long and windy beach"]
    if base.denoiser.aligned_texts == "pass":
        prompts = ["a beach", "a field"]
    scene = Scene(
        prompt="a beach", regions=[Region(box=LEFT, prompt="a red cup")], num_inference_steps=2, device="cpu",
        mixed_precision="no", guidance_scale=guidance, width=side, height=side, batch_size=2,
    )  # fmt: skip
    bound = [[(strong, 1.0)]]
    together = sample(base, prompts, [1, 2], scene, bound=bound)
    alone = [sample(base, [prompt], [seed], scene, bound=bound)[0] for prompt, seed in zip(prompts, (1, 2))]
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_words_and_adapters_of_a_region_leave_the_other_half_alone(latents: Any, joint: Path, strong: Adapter) -> None:
    """Isolated regions are two pictures: nothing of one moves the other by a bit.

    Every text has a twin of the same length, as other lengths are added up in another order.
    """
    left, dog = Region(box=LEFT, prompt="a red cup"), Region(box=RIGHT, prompt="a dog")
    before = latents("a beach", left, dog, region_isolation=1.0)
    words = latents("a beach", left, Region(box=RIGHT, prompt="a fox"), region_isolation=1.0)
    bound = latents("a beach", left, dog, region_isolation=1.0, bound=[[], [(strong, 1.0)]])
    half = before.shape[-1] // 2
    for after in (words, bound):
        assert torch.equal(after[..., :half], before[..., :half])
        assert float((after - before)[..., half:].abs().max()) > 1e-4
    mixed = latents("a beach", left, dog)
    other = latents("a beach", left, Region(box=RIGHT, prompt="a fox"))
    assert not torch.equal(mixed[..., :half], other[..., :half])  # image tokens see each other


def test_outside_regions_and_after_their_steps_the_global_prompt_acts(latents: Any) -> None:
    left = Region(box=LEFT, prompt="a red cup")
    one, two = (latents(prompt, left, region_isolation=1.0) for prompt in ("a beach", "a field"))
    half = one.shape[-1] // 2
    assert torch.equal(one[..., :half], two[..., :half]) and not torch.equal(one[..., half:], two[..., half:])
    everywhere = Region(box=ALL, prompt="a red cup")
    always, early, shared = (
        latents("a beach", everywhere, **more) for more in ({}, {"region_end": 0.5}, {"global_prompt_weight": 1.0})
    )
    assert all(not torch.allclose(always, other, atol=1e-5) for other in (early, shared, latents("a beach")))
    assert not torch.allclose(early, latents("a beach"), atol=1e-5)
    with pytest.raises(UserError, match="covers no token"):
        latents("a beach", Region(box=(0, 0, 0.01, 0.01), prompt="a cup"))


def test_the_app_estimates_from_the_configs(family: Path) -> None:
    config = TrainConfig(concept=Path("x"), output=Path("y"), base=str(family), rank=2, device="cpu")
    found = estimates.estimate_training(config)
    assert found.trained != "0" and found.time == "not known yet"
    assert estimates.memory_estimate(config)[0].startswith("about ")


def test_the_size_of_pictures_is_read_from_the_configs(family: Path, tmp_path: Path) -> None:
    configs = tmp_path / "configs"  # without any weights
    shutil.copytree(family, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    assert native_size(str(configs)) == load_base(str(family), "cpu").size


def test_the_python_api(family: Path, photos: Path, tmp_path: Path) -> None:
    """Train on a stock pipeline, load, unload, fuse, generate: the pipeline that came in is the one that is left."""
    pipeline = DiffusionPipeline.from_pretrained(str(family))
    pipeline.set_progress_bar_config(disable=True)
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    modules = [type(module) for module in pipeline.transformer.modules()]
    quick = {"steps": 2, "rank": 2, "learning_rate": 0.1, "noise_offset": 0.0}
    rex = sd.train(pipeline, photos, class_noun="dog", **quick)
    assert [type(module) for module in pipeline.transformer.modules()] == modules
    sd.load_adapters(pipeline, {rex: 1.0})
    assert base_of(pipeline).spell("a <rex>") == "a rex dog"
    sd.unload_adapters(pipeline)
    assert [type(module) for module in pipeline.transformer.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in pipeline.transformer.state_dict().items())
    assert base_of(pipeline).spell("a <rex>") == "a <rex>"
    fused = sd.fuse(pipeline, [rex])
    assert [type(module) for module in fused.transformer.modules()] == modules
    assert base_of(fused).spell("a <rex>") == "a rex dog" and base_of(pipeline).spell("a <rex>") == "a <rex>"
    assert not torch.equal(drawn(fused), drawn(pipeline))
    fused.save_pretrained(tmp_path / "fused")
    again = DiffusionPipeline.from_pretrained(str(tmp_path / "fused"))
    assert base_of(again).spell("a <rex>") == "a rex dog"
    joint = base_of(pipeline).family.attention == "joint"
    scene = sd.Scene("a <rex>", regions=[sd.Region((0, 0, 0.5, 1), rex)] if joint else [])
    [image] = sd.generate(pipeline, scene, seeds=[0], num_inference_steps=2, width=32, height=32)
    assert [type(module) for module in pipeline.transformer.modules()] == modules and image.size == (32, 32)
    assert base_of(pipeline).spell("a <rex>") == "a <rex>"


def test_the_text_encoder_rests_on_the_cpu_until_it_works(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for a GPU: where both do not fit, the network makes room, and everything is put back."""
    base = load_base(str(family), "cpu")
    denoiser: Any = base.denoiser
    moves: list[tuple[str, str]] = []
    for name in ("transformer", "text_encoder"):
        monkeypatch.setattr(getattr(base.pipeline, name), "to", lambda to, name=name: moves.append((name, str(to))))
    with denoiser.text_encoder_at_work():
        assert not moves  # both are on one device
    monkeypatch.setattr(type(denoiser), "device", property(lambda self: torch.device("mps")))
    with pytest.raises(RuntimeError, match="stop"), denoiser.text_encoder_at_work():
        assert moves == [("transformer", "cpu"), ("text_encoder", "mps")]
        raise RuntimeError("stop")
    assert moves[2:] == [("text_encoder", "cpu"), ("transformer", "mps")]
    moves.clear()
    monkeypatch.setattr("spectral_diffusion.models.flow.has_room", lambda module, device: True)
    with denoiser.text_encoder_at_work():
        pass
    assert moves == [("text_encoder", "mps"), ("text_encoder", "cpu")]
    moves.clear()
    base.family.place(base.pipeline, torch.device("cpu"))
    assert set(moves) == {("transformer", "cpu"), ("text_encoder", "cpu")}
    given: list[Any] = []  # ids go where the text encoder is, though the network has made room

    def watched(prompts: list[str], device: Any, **more: Any) -> None:
        given.append(device)
        raise RuntimeError("seen")

    for name in ("encode_prompt", "_encode_prompt"):
        monkeypatch.setattr(base.pipeline, name, watched, raising=False)
    monkeypatch.setattr(type(base.pipeline.text_encoder), "device", property(lambda self: torch.device("meta")))
    with pytest.raises(RuntimeError, match="seen"):
        denoiser.encode_one("a dog")
    assert given == [torch.device("meta")]


def test_a_side_that_is_no_multiple_of_a_token_is_refused(family: Path, pair: list[Path], tmp_path: Path) -> None:
    step = load_base(str(family), "cpu").denoiser.side_multiple
    side, photos = step * 5 // 2, make_photos(tmp_path / "rex", seed=0)
    near = f"={side} does not fit the base .*, which needs a multiple of {step}"
    scene = Scene(prompt="a dog", base=str(family), device="cpu", output=tmp_path / "a.png", num_inference_steps=1)
    for name in ("width", "height"):
        with pytest.raises(UserError, match=name + near):
            generate_to_file(scene.model_copy(update={name: side}))
    with pytest.raises(UserError, match="resolution" + near) as error:
        train_to_file(settings(family, tmp_path / "a.safetensors", photos, resolution=side))
    assert [fix.value for fix in error.value.fixes] == [str(2 * step), str(3 * step)]
    distill = DistillConfig(steps=1, rank=2, resolution=side)
    with pytest.raises(UserError, match="distill.resolution" + near):
        fuse_to_folder(FuseConfig(adapters=pair, output=tmp_path / "both", device="cpu", distill=distill))


@two_families
@pytest.mark.parametrize("method", ["spectral-additive", "spectral-rotation", "lora"])
def test_an_offloaded_network_trains_and_draws_the_same(
    family: Path, photos: Path, tmp_path: Path, method: str
) -> None:
    """On a CPU every layer comes and goes without moving; only the order of additions differs."""
    adapters, pictures = [], []
    for index, offloaded in enumerate((False, True)):
        config = settings(
            family, tmp_path / str(index) / "rex.safetensors", photos, method=method, gradient_checkpointing=True,
            layer_offload=offloaded,
        )  # fmt: skip
        train_to_file(config)
        adapters.append(load_adapter(config.output))
        scene = Scene(
            base=str(family), device="cpu", prompt="<rex>", adapters={str(config.output): 1.0}, width=32, height=32,
            num_inference_steps=2, output=tmp_path / f"{index}.png", layer_offload=offloaded,
        )  # fmt: skip
        [picture] = generate_to_file(scene)
        pictures.append(np.asarray(Image.open(picture), dtype=float))
    assert adapters[0].fingerprint == adapters[1].fingerprint
    for name, value in adapters[0].parameters.items():
        assert torch.allclose(value, adapters[1].parameters[name], atol=2e-3), name
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_layers_of_an_offloaded_network_compute_where_they_are_called(klein: Path) -> None:
    base = load_base(str(klein), "cpu", layer_offload=True)
    network = base.denoiser.network
    assert is_offloaded(network)
    layer = network.transformer_blocks[0].attn.to_q
    assert "forward" in vars(layer)
    injected = inject_adapter(base.models, AdapterSpec(get_method("lora"), 2), "one")
    assert all(parameter.device == base.device for _, parameter in injected.named_parameters())
    assert torch.equal(base.weights()["transformer.transformer_blocks.0.attn.to_q"], layer.weight)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"quantization": "int8"}, "computes in half precision"),
        ({"quantization": "nf4", "dtype": "bfloat16"}, "needs bitsandbytes|needs a GPU"),
        ({"quantization": "int8", "dtype": "bfloat16"}, "quantization=int8 needs torchao; install it with pip"),
        ({"quantization": "int4", "dtype": "bfloat16"}, "Unknown quantization 'int4'; use none, int8, fp8, nf4"),
    ],
)
def test_a_quantization_that_cannot_be_had_says_why(
    klein: Path, options: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectral_diffusion.models.quantization.find_spec", lambda package: None)
    with pytest.raises(UserError, match=sentence):
        load_base(str(klein), "cpu", **options)


@pytest.mark.parametrize("options", [{"layer_offload": True}, {"quantization": "int8", "dtype": "bfloat16"}])
def test_small_bases_are_neither_quantized_nor_offloaded(
    options: dict[str, Any], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectral_diffusion.models.quantization.find_spec", lambda package: True)
    for name in ("pocket", str(tiny_base)):
        with pytest.raises(UserError, match="neither quantized nor offloaded: that is for FLUX"):
            load_base(name, "cpu", **options)


def test_bands_never_have_all_weights_in_memory(klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most = 0

    def read(layer: str) -> torch.Tensor:
        nonlocal most
        weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(len(layer)))
        alive.add(id(weight))
        weakref.finalize(weight, alive.discard, id(weight))
        most = max(most, len(alive))
        return weight

    weights = LayerWeights([f"layer{'x' * index}" for index in range(20)], read)
    spectrum = spectrum_of(weights, 4, tmp_path)
    assert len(spectrum.bands) == 20 and most <= 4
    again = spectrum_of(weights, 4, tmp_path)
    assert all(torch.equal(a.S, b.S) for a, b in zip(spectrum.bands.values(), again.bands.values(), strict=True))


def test_what_comes_too_late_for_a_loaded_pipeline_is_refused(klein: Path, photos: Path) -> None:
    pipeline = Flux2KleinPipeline.from_pretrained(str(klein))
    with pytest.raises(UserError, match="loaded already, so quantization comes too late"):
        sd.train(pipeline, photos, quantization="int8", dtype="bfloat16", steps=1)
    with pytest.raises(UserError, match=r"needs torchao|computes in half precision"):
        sd.train(str(klein), photos, quantization="int8", steps=1)


@pytest.mark.parametrize("name", ["gone/", "gone.ckpt", "gone.safetensors"])
def test_a_wrong_name_says_the_same_with_offloading(name: str, tmp_path: Path) -> None:
    messages = []
    for more in ({}, {"layer_offload": True}):
        with pytest.raises(UserError) as raised:
            load_base(str(tmp_path / name), "cpu", **more)  # type: ignore[arg-type]
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
