"""Bases in 8 and 4 bits, and off the GPU. `make test` gives these tests torchao and bitsandbytes, which load slowly."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_photos
from diffusers import DiffusionPipeline, Flux2KleinPipeline, PipelineQuantizationConfig
from families import make_tiny_klein, make_tiny_z_image
from processes import command_in_two

from spectral_diffusion.adapters.adapter import check_base
from spectral_diffusion.adapters.attach import AdapterSpec, inject_adapter, unloading
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.adapters.frozen import frozen_tensors
from spectral_diffusion.config.evaluate import EvaluateConfig
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.evaluation.run import evaluate_to_folder
from spectral_diffusion.merging.fuse import fuse_adapters
from spectral_diffusion.methods import all_methods, get_method
from spectral_diffusion.models.base import Base, base_of
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.offload import is_offloaded
from spectral_diffusion.models.quantization import is_quantized, quantization_of, quantizer
from spectral_diffusion.models.split_linear import QuantizedFused, join_layers
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.slots.ledger import Slot
from spectral_diffusion.training.run import train_to_file

torchao = pytest.importorskip("torchao", reason="pip install torchao")
FUSED = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
WITH_WEIGHT = {"dora", "oft"}


@pytest.fixture(scope="module", params=["klein", "z-image"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = {"klein": make_tiny_klein, "z-image": make_tiny_z_image}[request.param]
    return make(tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_klein(tmp_path_factory.mktemp("klein") / "klein")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "rex")


def settings(base: Path, output: Path, photos: Path, **more: Any) -> TrainConfig:
    given = {
        "rank": 2, "steps": 3, "device": "cpu", "noise_offset": 0.0, "learning_rate": 1e-2, "dtype": "bfloat16",
        "quantization": "int8", **more,
    }  # fmt: skip
    return TrainConfig(concept=photos, output=output, base=str(base), **given)


def predicted(base: Base) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    denoiser = base.denoiser
    side = 32 // denoiser.vae_scale
    noisy = torch.randn(2, denoiser.latent_channels, side, side, generator=generator)
    with torch.no_grad():
        return denoiser.predict(noisy, torch.tensor([100, 700]), denoiser.encode(["a dog", "a cup"]))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_base_knows_its_weights_from_before(folder: Path, kind: Any) -> None:
    whole = load_base(str(folder), "cpu", "bfloat16")
    base = load_base(str(folder), "cpu", "bfloat16", kind)
    assert base.quantization == kind and quantization_of(base.denoiser.network) == kind
    assert base.fingerprint == whole.fingerprint
    for targets in ("attention", "attention+feed-forward", "re:.*"):
        found, want = base.weights(targets), whole.weights(targets)
        assert list(found) == list(want) and base.sizes(targets) == whole.sizes(targets)
        for layer in want:
            assert torch.equal(found[layer], want[layer]), layer
    a, b = predicted(base), predicted(whole)
    assert not torch.equal(a, b) and torch.allclose(a, b, atol=0.1 * float(b.abs().max()))


def test_it_is_the_stock_quantized_pipeline_bit_for_bit(folder: Path) -> None:
    config = PipelineQuantizationConfig(quant_mapping={"transformer": quantizer("int8", torch.bfloat16)})
    stock = DiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.bfloat16, quantization_config=config)
    stock.set_progress_bar_config(disable=True)
    inputs: dict[str, Any] = {
        "prompt": "a dog", "width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 2.0,
        "output_type": "pt", "max_sequence_length": 64,
    }  # fmt: skip
    if folder.name == "klein":
        inputs["text_encoder_out_layers"] = (1, 2, 3)
    want = stock(**inputs, generator=torch.Generator().manual_seed(0)).images
    base = base_of(stock)
    assert base.quantization == "int8" and base.fingerprint == load_base(str(folder), "cpu", "bfloat16").fingerprint
    assert torch.equal(stock(**inputs, generator=torch.Generator().manual_seed(0)).images, want)
    base.family.release(stock)
    assert not any(isinstance(module, QuantizedFused) for module in stock.transformer.modules())


@pytest.mark.parametrize("method", sorted(set(all_methods()) - WITH_WEIGHT))
def test_every_method_trains_and_fits_the_whole_base(folder: Path, photos: Path, tmp_path: Path, method: str) -> None:
    rank = 1 if method == "svdiff" else 2
    config = settings(folder, tmp_path / "rex.safetensors", photos, method=method, rank=rank)
    train_to_file(config)
    adapter = load_adapter(config.output)
    whole = load_base(str(folder), "cpu", "bfloat16")
    assert check_base(adapter, whole) is None
    weights = whole.weights(adapter.targets)
    assert any(bool(adapter.factors(layer, weights[layer]).delta().any()) for layer in adapter.layers)
    if folder.name == "klein":
        assert adapter.fused[f"transformer.{FUSED}"]["q"] == 32
    if method == "spectral-additive":  # the bands are those of the weights from before
        bands = frozen_tensors(get_method(method), weights, rank, adapter.slot, cached=False)
        layer = adapter.layers[0]
        assert torch.equal(adapter.frozen[layer]["S"], bands[layer]["S"])


@pytest.mark.parametrize("method", sorted(WITH_WEIGHT))
def test_a_method_that_needs_the_weights_says_so(klein: Path, photos: Path, tmp_path: Path, method: str) -> None:
    config = settings(klein, tmp_path / "rex.safetensors", photos, method=method, rank=1)
    with pytest.raises(UserError, match=f"The method {method} computes with the weights"):
        train_to_file(config)
    assert not config.output.exists()


def changed_by(base: Base, method: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each adapted layer's output with an adapter less that without, and what its ΔW says."""
    kind, rank = get_method(method), 2
    slot = Slot.interval(0, rank) if kind.slot else None
    frozen = frozen_tensors(kind, base.weights(), rank, slot, cached=False)
    inputs: dict[str, torch.Tensor] = {}
    with unloading(base.models):
        before = predicted(base)
        injected = inject_adapter(base.models, AdapterSpec(kind, rank), "one", frozen)
        assert torch.equal(predicted(base), before)  # zero at the start, to the last bit
        with torch.no_grad():
            for _, parameter in injected.named_parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        for layer, module in injected.layers.items():
            x = inputs.setdefault(layer, torch.randn(3, module.in_features).bfloat16())  # type: ignore[arg-type]
            with torch.no_grad():
                with_it = module(x).float()
                injected.set_scale(0.0)
                without = module(x).float()
                injected.set_scale(1.0)
            factors = kind.delta(injected.parameters(layer), frozen[layer])
            yield layer, with_it - without, x.float() @ factors.delta().mT


@pytest.mark.parametrize("method", ["spectral-additive", "spectral-rotation", "lora"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_adapter_adds_its_change_to_the_quantized_layer(klein: Path, kind: Any, method: str) -> None:
    base = load_base(str(klein), "cpu", "bfloat16", kind)
    parts = 0
    for layer, found, want in changed_by(base, method):
        assert torch.allclose(found, want, atol=0.05 * float(want.abs().max()) + 0.02), layer
        parts += f"{FUSED}." in layer
    assert parts == 3
    fused: Any = base.denoiser.network.get_submodule(FUSED)
    assert isinstance(fused, QuantizedFused) and is_quantized(fused.get_submodule("quantized"))
    join_layers(base.denoiser.network)
    assert is_quantized(base.denoiser.network.get_submodule(FUSED))


def test_regions_and_several_adapters_act_on_it(klein: Path, photos: Path, tmp_path: Path) -> None:
    files = []
    for name in ("rex", "mug"):
        config = settings(klein, tmp_path / f"{name}.safetensors", photos, name=name, token=f"<{name}>")
        train_to_file(config)
        files.append(str(config.output))
    common: dict[str, Any] = {
        "base": str(klein), "device": "cpu", "dtype": "bfloat16", "quantization": "int8", "num_inference_steps": 2,
        "width": 32, "height": 32, "prompt": "<rex> beside <mug>",
    }  # fmt: skip
    pictures = []
    for index, more in enumerate(
        (
            {"adapters": dict.fromkeys(files, 1.0)},
            {"adapters": dict.fromkeys(files, 0.0)},
            {
                "regions": [
                    Region(box=(0, 0, 0.5, 1), prompt="<rex>", adapters={files[0]: 1.0}),
                    Region(box=(0.5, 0, 1, 1), prompt="<mug>", adapters={files[1]: 1.0}),
                ]
            },
        )
    ):
        output = tmp_path / f"{index}.png"
        generate_to_file(Scene(output=output, **common, **more))
        pictures.append(output.read_bytes())
    assert len(set(pictures)) == 3


def test_a_run_resumes_bit_for_bit(klein: Path, photos: Path, tmp_path: Path) -> None:
    from spectral_diffusion.core.errors import Cancelled
    from spectral_diffusion.core.hooks import Hooks

    whole = settings(klein, tmp_path / "a.safetensors", photos, gradient_checkpointing=True)
    train_to_file(whole)
    seen: list[int] = []
    hooks = Hooks(
        progress=lambda event: seen.append(event.done) if event.stage == "train" else None,
        should_stop=lambda: len(seen) == 2,
    )
    broken = settings(klein, tmp_path / "b.safetensors", photos, gradient_checkpointing=True, name="rex", token="<rex>")
    with pytest.raises(Cancelled):
        train_to_file(broken, hooks=hooks)
    train_to_file(broken, resume=True)
    a, b = load_adapter(whole.output), load_adapter(broken.output)
    assert all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters)


def test_nf4_weights_take_adapters(klein: Path) -> None:
    """diffusers loads NF4 on a GPU only, so the layers are replaced here, by its own function."""
    bnb = pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    pipeline = Flux2KleinPipeline.from_pretrained(str(klein), torch_dtype=torch.bfloat16)
    network = pipeline.transformer
    weights = {
        name: layer.weight.detach() for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)
    }
    replace_with_bnb_linear(network, [], quantization_config=quantizer("nf4", torch.bfloat16))
    for name, layer in network.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.weight = bnb.nn.Params4bit(weights[name], requires_grad=False, quant_type="nf4", module=layer)
            layer.to("cpu")
            layer.support_avx512bf16_for_cpu = False  # whose kernel needs at least 64 columns
    network.is_loaded_in_4bit = True
    base = base_of(pipeline)
    whole = load_base(str(klein), "cpu", "bfloat16")
    assert base.quantization == "nf4" and base.fingerprint == whole.fingerprint and base.sizes() == whole.sizes()
    for method in ("spectral-additive", "lora"):
        for layer, found, want in changed_by(base, method):
            assert torch.allclose(found, want, atol=0.05 * float(want.abs().max()) + 0.02), layer
    trained_through(base)


def trained_through(base: Base) -> None:
    """A forward pass of the whole network gives every parameter a gradient, and one without gradients spoils none."""
    kind = get_method("spectral-additive")
    frozen = frozen_tensors(kind, base.weights(), 2, Slot.interval(0, 2), cached=False)
    with unloading(base.models):
        injected = inject_adapter(base.models, AdapterSpec(kind, 2), "one", frozen)
        parameters = dict(injected.named_parameters())
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        with torch.inference_mode():
            loss_of(base)
        loss = loss_of(base)
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters.values())


def loss_of(base: Base) -> torch.Tensor:
    denoiser, side = base.denoiser, 32 // base.denoiser.vae_scale
    noisy = torch.randn(2, denoiser.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
    return denoiser.predict(noisy, torch.tensor([100, 700]), denoiser.encode(["a dog", "a cup"])).square().mean()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_gradients_reach_every_adapter(folder: Path, kind: Any) -> None:
    trained_through(load_base(str(folder), "cpu", "bfloat16", kind))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_network_can_be_offloaded_too(folder: Path, kind: Any) -> None:
    whole, away = (load_base(str(folder), "cpu", "bfloat16", kind, layer_offload=on) for on in (False, True))
    assert torch.equal(predicted(whole), predicted(away))
    trained_through(away)


@pytest.mark.parametrize("how", [{"quantization": "int8"}, {"layer_offload": True}])
def test_an_evaluation_loads_the_base_so_too(
    klein: Path, photos: Path, tmp_path: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for its scenes, which take the evaluation's settings."""
    file = tmp_path / "adapters" / "rex.safetensors"
    train_to_file(settings(klein, file, photos, **{"quantization": "none", **how}))
    loaded: list[Base] = []

    def counted(*args: Any, **more: Any) -> Base:
        loaded.append(load_base(*args, **more))
        return loaded[-1]

    for module in ("evaluation.generate", "scenes.generate"):
        monkeypatch.setattr(f"spectral_diffusion.{module}.load_base", counted)
    scene = tmp_path / "scene.yaml"
    scene.write_text("prompt: a rex rex on a beach\nwidth: 32\nheight: 32\n")
    evaluate_to_folder(
        EvaluateConfig(
            adapters=[file], scenes=[scene], references=photos.parent, output=tmp_path / "report", device="cpu",
            num_images=1, num_inference_steps=1, encoders=["pocket"], dtype="bfloat16", noun_baseline=False,
            prior_prompts=["a {} on grass"], prompts=["a {}"], **how,
        )
    )  # fmt: skip
    assert len(loaded) == 2
    for base in loaded:
        assert base.quantization == how.get("quantization", "none")
        assert is_offloaded(base.denoiser.network) == how.get("layer_offload", False)


def test_fusing_into_quantized_weights_is_refused(klein: Path, photos: Path, tmp_path: Path) -> None:
    config = settings(klein, tmp_path / "rex.safetensors", photos)
    train_to_file(config)
    base = load_base(str(klein), "cpu", "bfloat16", "int8")
    with pytest.raises(UserError, match="is quantized, and adapters are fused into whole weights"):
        fuse_adapters(base, [load_adapter(config.output)], FuseConfig(adapters=[config.output], output=tmp_path / "f"))


def test_other_libraries_hooks_stay(klein: Path) -> None:
    pipeline = Flux2KleinPipeline.from_pretrained(str(klein))
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    layer.forward = partial(type(layer).forward, layer)  # as accelerate's are
    base = base_of(pipeline)
    base.family.release(pipeline)
    assert "forward" in vars(layer)


def test_two_processes_with_a_quantized_base_are_one(klein: Path, photos: Path, tmp_path: Path) -> None:
    outputs = {count: tmp_path / str(count) / "rex.safetensors" for count in (1, 2)}

    def config(count: int) -> TrainConfig:
        prior = {"loss_weight": 0.5, "num_images": 2, "batch_size": 2 // count}
        return settings(klein, outputs[count], photos, batch_size=4 // count, prior=prior)

    train_to_file(config(1))
    given = tmp_path / "settings.yaml"
    given.write_text(yaml.safe_dump(config(2).model_dump(mode="json", exclude_unset=True)))
    command_in_two(["train", str(photos), "-o", str(outputs[2]), "--config", str(given)])
    one, two = (load_adapter(outputs[count]) for count in (1, 2))
    # The base computes in bfloat16, and Adam takes a whole step where rounding turns a tiny gradient's sign.
    off = sum(float((value - two.parameters[name]).square().sum()) for name, value in one.parameters.items())
    whole = sum(float(value.square().sum()) for value in one.parameters.values())
    assert whole > 0.01 and off < 0.05**2 * whole, (off / whole) ** 0.5
