"""Methods on models: identity at init, the one delta, counts, PEFT's own operations."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import seldom
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from typer.testing import CliRunner

from spectral_diffusion.adapters.attach import (
    AdapterSpec,
    InjectedAdapter,
    disabled_adapters,
    inject_adapter,
    remove_adapters,
    set_adapters,
)
from spectral_diffusion.adapters.frozen import frozen_tensors, with_weight
from spectral_diffusion.adapters.low_rank import low_rank_linear
from spectral_diffusion.cli import app
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.linalg import matrix_shape, top_band
from spectral_diffusion.methods import all_methods, get_method
from spectral_diffusion.methods.registry import METHODS
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.slots.ledger import Slot

NAMES = sorted(all_methods())
BASIC = ("spectral-additive", "spectral-rotation", "lora", "dora", "oft", "vera")  # one of each kind of forward pass


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base), "cpu")


EVERYTHING = "attention+feed-forward+projection+conv"  # Linears, 1×1, 3×3 and strided convolutions


def allowed_rank(method: str, weights: dict[str, torch.Tensor]) -> int:
    """2, or the 1 of a method without a rank."""
    return 2 if 2 in get_method(method).ranks([matrix_shape(weight) for weight in weights.values()]) else 1


def put(
    base: Base, method: str, name: str = "one", start: int = 0, targets: str = "attention", steps: int = 0
) -> InjectedAdapter:
    weights, kind = base.weights(targets), get_method(method)
    rank = allowed_rank(method, weights)
    frozen = frozen_tensors(kind, weights, rank, Slot.interval(start, start + rank) if kind.slot else None)
    return inject_adapter(base.models, AdapterSpec(kind, rank, targets, seed=3, steps=steps), name, frozen)


def stir(injected: InjectedAdapter, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in injected.named_parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def outputs(base: Base) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    ids = torch.randint(0, 500, (2, 32), generator=generator)
    with torch.no_grad():
        text = base.pipeline.text_encoder(ids)[0]
        return [text, base.pipeline.unet(latents.to(text), 10, text).sample]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", seldom(["attention", EVERYTHING], {EVERYTHING}))
@pytest.mark.parametrize("method", NAMES)
def test_identity_at_init_to_the_last_bit_and_after_detach(
    tiny_base: Path, method: str, targets: str, dtype: str
) -> None:
    base = load_base(str(tiny_base), "cpu", dtype)
    before = outputs(base)
    injected = put(base, method, targets=targets)
    if get_method(method).peft:  # PEFT's DoRA divides by a norm and multiplies by it again
        near = 1e-5 if dtype == "float32" else 0.1
        assert all(torch.allclose(a, b, atol=near) for a, b in zip(outputs(base), before, strict=True))
    else:
        assert same(outputs(base), before)
    stir(injected)
    assert not same(outputs(base), before)
    with disabled_adapters(base.models):
        assert same(outputs(base), before)
    remove_adapters(base.models)
    assert same(outputs(base), before)


@pytest.mark.parametrize("targets", seldom(["attention", EVERYTHING], {EVERYTHING}))
@pytest.mark.parametrize("method", NAMES)
def test_the_forward_is_the_one_delta(base: Base, method: str, targets: str) -> None:
    injected = put(base, method, targets=targets)
    stir(injected)
    adapted = outputs(base)
    weights = {layer: weight.clone() for layer, weight in base.weights(targets).items()}
    kind, trained = get_method(method), injected.state_dict()
    slot = Slot.interval(0, injected.rank) if kind.slot else None
    frozen = frozen_tensors(kind, weights, injected.rank, slot)
    deltas = {}
    for layer, weight in weights.items():
        names = kind.shapes(*matrix_shape(weight), injected.rank)
        built_on = with_weight(kind, frozen[layer], weight)
        deltas[layer] = kind.delta({name: trained[f"{layer}.{name}"] for name in names}, built_on).delta()
    remove_adapters(base.models)
    for layer, weight in base.weights(targets).items():
        weight += deltas[layer].detach().view(weight.shape)
    for a, b in zip(adapted, outputs(base), strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)


def one_of_each_kind(layers: Iterable[str], weights: dict[str, torch.Tensor]) -> list[str]:
    """A layer per component and kernel: Linears of text encoder and U-Net, 1×1, 3×3 and strided convolutions."""
    kinds: dict[object, str] = {}
    for name in layers:
        kinds.setdefault((name.split(".")[0], tuple(weights[name].shape[2:]), "downsamplers" in name), name)
    return list(kinds.values())


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("dtype", seldom(["float32", "bfloat16"], {"float32"}))
def test_merging_gives_what_the_adapter_gives(tiny_base: Path, method: str, dtype: str) -> None:
    """delta = merged − base, two adapters stacked, strengths, and the parameters stay float32 whatever the base is."""
    base = load_base(str(tiny_base), "cpu", dtype)
    plain = {layer: weight.clone() for layer, weight in base.weights(EVERYTHING).items()}
    one = put(base, method, "one", targets=EVERYTHING)
    two = put(base, method, "two", 4 if get_method(method).slot else 0, targets=EVERYTHING)
    assert {p.dtype for _, p in one.named_parameters()} == {torch.float32}
    stir(one, 1.0)
    kind, trained = get_method(method), one.state_dict()
    frozen = frozen_tensors(kind, plain, one.rank, Slot.interval(0, one.rank) if kind.slot else None)
    names = one_of_each_kind(one.layers, plain)
    assert len(names) >= 4
    for name in names:
        layer = one.layers[name]
        held = {key: trained[f"{name}.{key}"] for key in kind.shapes(*matrix_shape(plain[name]), one.rank)}
        layer.merge(adapter_names=["one"])
        weight = base.weights(EVERYTHING)[name]  # PEFT puts another tensor there
        found = weight.float() - plain[name].float()
        wanted = kind.delta(held, with_weight(kind, frozen[name], plain[name])).delta().view(found.shape)
        rounding = float(weight.abs().max()) * torch.finfo(weight.dtype).eps
        assert torch.allclose(found, wanted, atol=2 * rounding, rtol=1e-2), name
        assert float(wanted.abs().max()) > 4 * rounding
        weight.copy_(plain[name])
        layer.merged_adapters.clear()
    stir(two, 0.1)
    set_adapters(base.models, ["one", "two"])
    remove_adapters(base.models)
    assert all(torch.equal(weight, plain[name]) for name, weight in base.weights(EVERYTHING).items())


@pytest.mark.parametrize("method", NAMES)
def test_only_the_adapter_gets_gradients(base: Base, method: str) -> None:
    injected = put(base, method)
    text = base.pipeline.text_encoder(torch.arange(32)[None])[0]
    base.pipeline.unet(torch.randn(1, 4, 8, 8), 10, text).sample.square().mean().backward()
    trainable = {id(p) for _, p in injected.named_parameters()}
    for model in base.models.values():
        for parameter in model.parameters():
            assert (parameter.grad is not None) == (id(parameter) in trainable)


@pytest.mark.parametrize("method", NAMES)
def test_no_library_grumbles_about_how_it_is_asked(base: Base, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put(base, method, steps=10)


def test_targets_name_every_kind_of_layer(base: Base) -> None:
    from spectral_diffusion.models.targets import find_targets

    everything = find_targets(base.models, EVERYTHING)
    kinds = {(m.kernel_size, m.stride) for m in everything.values() if isinstance(m, nn.Conv2d)}
    assert kinds == {((1, 1), (1, 1)), ((3, 3), (1, 1)), ((3, 3), (2, 2))}
    assert not any("conv_in" in name or "conv_out" in name for name in everything)
    assert set(find_targets(base.models)) < set(everything)
    only = find_targets(base.models, r"re:unet\.mid_block.*to_k")
    assert only and all("mid_block" in name and name.endswith("to_k") for name in only)
    for wrong, message in (("atention", "did you mean 'attention'"), ("re:(", "not a regular"), ("re:x", "match no")):
        with pytest.raises(UserError, match=message):
            find_targets(base.models, wrong)


def test_two_adapters_of_disjoint_slots_stack_into_the_sum(base: Base) -> None:
    plain = base.weights()
    one, two = put(base, "spectral-additive", "one", 0), put(base, "spectral-additive", "two", 2)
    stir(one)
    stir(two, 0.2)
    set_adapters(base.models, ["one", "two"])
    both = outputs(base)
    layers = {layer: (one.layers[layer], two.layers[layer]) for layer in one.layers}
    deltas = {
        layer: a.get_delta_weight("one").detach() + b.get_delta_weight("two").detach()
        for layer, (a, b) in layers.items()
    }
    remove_adapters(base.models)
    for layer, weight in plain.items():
        weight += deltas[layer]
    for a, b in zip(both, outputs(base), strict=True):
        assert torch.allclose(a, b, atol=5e-5)


def test_strength_scales_the_delta(base: Base) -> None:
    injected = put(base, "spectral-additive")
    stir(injected)
    layer = next(iter(injected.layers.values()))
    full = layer.get_delta_weight("one")
    injected.set_scale(0.25)
    assert torch.allclose(layer.get_delta_weight("one"), 0.25 * full, rtol=1e-6)
    injected.set_scale(0.0)
    with disabled_adapters(base.models):
        before = outputs(base)
    assert same(outputs(base), before)


def test_peft_and_diffusers_operations_work_on_our_tuner(base: Base) -> None:
    """State dict, disable, weights, merge and unmerge as diffusers and PEFT call them on any tuner."""
    unet = base.pipeline.unet
    before = outputs(base)
    text, latents = before[0], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = unet(latents, 10, text[:1]).sample
    injected = put(base, "spectral-additive")
    stir(injected)
    adapted = outputs(base)

    state = get_peft_model_state_dict(unet, adapter_name="one")
    expected = {f"{n[5:]}" for n, _ in injected.named_parameters() if n.startswith("unet.")}
    assert expected <= {key.replace("spectral_delta.", "") for key in state}

    unet.disable_lora()
    assert torch.equal(unet(latents, 10, text[:1]).sample, plain)
    unet.enable_lora()
    unet.set_adapters(["one"], [0.0])
    assert torch.equal(unet(latents, 10, text[:1]).sample, plain)
    unet.set_adapters(["one"], [1.0])
    assert same(outputs(base), adapted)

    unet.fuse_lora()
    merged = unet(latents, 10, text[:1]).sample
    unet.unfuse_lora()
    assert torch.allclose(unet(latents, 10, text[:1]).sample, merged, atol=5e-5)
    assert not torch.allclose(merged, plain, atol=1e-3)
    remove_adapters(base.models)
    for a, b in zip(outputs(base), before, strict=True):
        assert torch.allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", seldom(NAMES, BASIC))
def test_gradient_checkpointing_gives_the_same_gradients(base: Base, method: str, dtype: torch.dtype) -> None:
    for model in base.models.values():
        model.to(dtype)
    injected = put(base, method)
    stir(injected)
    ids = torch.arange(32)[None]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    networks = [base.pipeline.unet, base.pipeline.text_encoder]

    def gradients() -> dict[str, torch.Tensor]:
        for network in networks:
            network.zero_grad()
        text = base.pipeline.text_encoder(ids)[0]
        base.pipeline.unet(latents, 10, text).sample.float().square().mean().backward()
        return {name: p.grad.clone() for name, p in injected.named_parameters()}

    plain = gradients()
    base.pipeline.unet.enable_gradient_checkpointing()
    base.pipeline.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    for network in networks:
        network.train()
    again = gradients()
    assert {name.split(".")[0] for name in plain} == {"unet", "text_encoder"}
    for name, gradient in plain.items():
        assert gradient.any() and torch.allclose(gradient, again[name], rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_linear_backward(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, up, down = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((2, 5, 6), (7, 6), (7,), (7, 3), (3, 6))
    )
    inputs = [t.clone().requires_grad_() for t in (x, up, down)]
    y = low_rank_linear(inputs[0], weight, bias, inputs[1], inputs[2])
    y.square().sum().backward()
    plain = [t.clone().requires_grad_() for t in (x, up, down)]
    z = nn.functional.linear(plain[0], weight + plain[1] @ plain[2], bias)
    z.square().sum().backward()
    assert torch.allclose(y, z, rtol=1e-4, atol=1e-4)
    for a, b in zip(inputs, plain, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-3)
    partly = [t.clone().requires_grad_() for t in (x, up, down)]
    low_rank_linear(partly[0], weight, bias, partly[1], partly[2], 2).square().sum().backward()
    assert torch.equal(partly[0].grad, inputs[0].grad) and torch.equal(partly[2].grad, inputs[2].grad)
    assert torch.allclose(partly[1].grad[:, :1], inputs[1].grad[:, :1], rtol=1e-4, atol=1e-4)
    assert not partly[1].grad[:, 1:].any()


def test_frozen_columns_change_no_trained_gradient(base: Base) -> None:
    gradients = []
    for frozen in (True, False):
        method = replace(get_method("spectral-additive"), frozen_up=frozen)
        injected = inject_adapter(base.models, AdapterSpec(get_method("spectral-additive"), 2), "one", bands_for(base))
        for layer in injected.layers.values():
            layer.spectral_method["one"] = method
        stir(injected)
        text = base.pipeline.text_encoder(torch.arange(32)[None])[0]
        base.pipeline.unet(torch.ones(1, 4, 8, 8), 10, text).sample.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in injected.named_parameters()})
        remove_adapters(base.models)
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


def bands_for(base: Base) -> dict[str, dict[str, torch.Tensor]]:
    return frozen_tensors(get_method("spectral-additive"), base.weights(), 2, Slot.interval(0, 2))


def test_autocast_and_half_bases_keep_float32_parameters(base: Base) -> None:
    injected = put(base, "spectral-additive")
    with torch.autocast("cpu", torch.bfloat16):
        layer = next(iter(injected.layers.values()))
        assert layer(torch.randn(3, layer.in_features)).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for _, p in injected.named_parameters())


def test_adapters_on_a_half_precision_base_stay_float32(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu", "bfloat16")
    for method in NAMES:
        injected = put(base, method, method)
        assert {p.dtype for _, p in injected.named_parameters()} == {torch.float32}


def test_additive_on_the_top_slot_is_pissas_function_class(base: Base) -> None:
    """PEFT's PiSSA trains U S^½ and S^½ V of the same columns: an independent reading of 'top r columns'."""
    linear = nn.Linear(20, 16, bias=False)
    net = nn.Sequential(linear)
    weight = linear.weight.detach().clone()
    from peft import get_peft_model

    from spectral_diffusion.linalg import top_band

    tuned = get_peft_model(net, LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="pissa"))
    lora = tuned.base_model.model[0]
    theirs = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    U, S, V = top_band(weight, 4)
    assert torch.allclose(theirs.double(), (U * S) @ V.mT, atol=1e-5)


def test_the_method_of_the_contributing_guide_works(base: Base) -> None:
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = text.split("```python")[1].split("```")[0]
    known = dict(METHODS.entries)
    try:
        exec(code, {"__package__": "spectral_diffusion.methods", "__name__": "example"})
        assert set(METHODS.entries) - set(known) == {"band-scale"}
        before = outputs(base)
        injected = put(base, "band-scale")
        assert same(outputs(base), before)
        stir(injected)
        assert not same(outputs(base), before)
    finally:
        METHODS.entries.clear()
        METHODS.entries.update(known)


BRIEF = {
    ("lora", 1): 273_024,
    ("lora", 8): 2_184_192,
    ("spectral-additive", 8): 2_184_192,
    ("spectral-additive-s", 8): 2_185_600,
    ("spectral-rotation", 2): 1_408,
    ("spectral-rotation", 8): 22_528,
    ("spectral-rotation", 32): 360_448,
    ("vera", 1): 136_880,
    ("vera", 1024): 316_928,
    ("oft", 64): 29_670,
    ("oft", 16): 474_720,
    ("svdiff", 1): 130_560,
    ("lidb", 1): 26_400,
    ("lidb", 16): 422_400,
    ("orthogonal", 8): 1_093_632,
    ("dora", 8): 2_320_896,
    ("adalora", 8): 2_185_600,
    ("lora-xs", 8): 176 * 64,
    ("psoft", 8): 176 * (64 + 16),
    ("qr-lora", 8): 1_090_560,
    ("pissa", 8): 2_184_192,
    ("milora", 8): 2_184_192,
    ("svft", 1): 3 * 130_560,
}


def test_counts_agree_with_the_table_at_stable_diffusion_size() -> None:
    result = CliRunner().invoke(app, ["methods", "--arch", "sd15", "--json"])
    assert result.exit_code == 0
    rows = json.loads(result.output)
    counts = {(row["method"], row["rank"]): row["trainable"] for row in rows}
    assert {key: counts[key] for key in BRIEF} == BRIEF
    assert {row["layers"] for row in rows} == {176}
    assert {row["method"] for row in rows} == set(NAMES)
    assert {row["method"]: row["lr_scale"] for row in rows} == {n: m.lr_scale for n, m in all_methods().items()}
    shown = CliRunner().invoke(app, ["methods", "--arch", "pocket"]).output
    assert "learning rate ×10;" in shown and "learning rate ×1;" in shown


def test_normalised_columns_train_the_same_function(base: Base) -> None:
    """A = Â s_max / S: the adapter with scales is the plain one at the scaled parameters, and files hold A."""
    bands = frozen_tensors(get_method("spectral-additive"), base.weights(), 2, Slot.interval(4, 6))
    scales = {layer: torch.tensor([2.0, 5.0]) for layer in bands}
    method = get_method("spectral-additive")
    scaled = inject_adapter(base.models, AdapterSpec(method, 2), "one", bands, scales)
    stir(scaled)
    with_scales, files = outputs(base), scaled.state_dict()
    raw = dict(scaled.named_parameters())
    assert all(torch.equal(files[name], raw[name].detach() * torch.tensor([2.0, 5.0])) for name in files)
    remove_adapters(base.models)
    plain = inject_adapter(base.models, AdapterSpec(method, 2), "one", bands)
    plain.load_state_dict(files)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(outputs(base), with_scales, strict=True))


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}


def band_of(weight: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    return dict(zip("USV", top_band(weight, rank), strict=True))


def test_a_prepared_layer_knows_that_its_scaled_columns_were_trained(base: Base) -> None:
    method = get_method("spectral-rotation")
    bands = frozen_tensors(method, base.weights(), 2, Slot.interval(4, 6))
    scales = {layer: torch.tensor([2.0, 5.0]) for layer in bands}
    adapter = inject_adapter(base.models, AdapterSpec(method, 2), "one", bands, scales)
    outputs(base)
    layer = next(iter(adapter.layers.values()))
    with torch.no_grad():
        assert "one" in layer.prepared and not layer.factors("one", cached=True).delta().any()
        stir(adapter)
        assert torch.equal(layer.factors("one", cached=True).delta(), layer.factors("one").delta())
        assert layer.factors("one", cached=True).delta().any()


def test_psoft_is_pefts_psoft() -> None:
    """With exact Cayley maps, the same columns, and both scales."""
    from peft import PsoftConfig, get_peft_model

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(14, 11, bias=False)).double()
    weight = net[0].weight.detach().clone()
    config = PsoftConfig(
        r=4, psoft_alpha=4, target_modules=["0"], psoft_svd="full", psoft_orth=True, psoft_mag_a=True,
        psoft_mag_b=True, use_cayley_neumann=False, ab_svd_init="psoft_init",
    )  # fmt: skip
    tuned = get_peft_model(net.float(), config)
    layer = tuned.base_model.model[0]
    theirs, A, B = layer.psoft_R["default"], layer._psoft_A_cache["default"], layer._psoft_B_cache["default"]
    S = B.norm(dim=0)
    frozen = {"U": (B / S).double(), "S": S.double(), "V": A.mT.double()}  # PEFT's signs of the columns
    own = random_tensors(get_method("psoft").shapes(11, 14, 4))
    skew = (own["A"] - own["A"].mT) / 2
    with torch.no_grad():
        theirs.weight.copy_(skew[theirs.rows, theirs.cols])
        theirs.vector_b.copy_(1 + own["b"])
        theirs.vector_a.copy_(1 + own["a"])
    x = torch.randn(5, 14)
    assert torch.allclose(frozen["S"], band_of(weight, 4)["S"], atol=1e-5)
    change = get_method("psoft").delta(own, frozen).delta()
    with torch.no_grad():
        assert torch.allclose(tuned(x), x @ (weight + change).float().mT, atol=1e-5)
    assert change.norm() > 0.1


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_pissa_is_a_lora_that_begins_as_the_band(method: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(11, 14, dtype=torch.float64)
    frozen, own = band_of(weight, 4), random_tensors(get_method(method).shapes(11, 14, 4))
    root = frozen["S"].sqrt()
    B, A = frozen["U"] * root, root[:, None] * frozen["V"].mT
    residual = weight - B @ A
    trained = residual + (B + own["dB"]) @ (A + own["dA"])
    assert torch.allclose(weight + get_method(method).delta(own, frozen).delta(), trained, atol=1e-12)


def test_methods_between_frozen_columns_by_their_formulas() -> None:
    torch.manual_seed(0)
    weight = torch.randn(11, 14, dtype=torch.float64)
    frozen = band_of(weight, 4)
    U, S, V = frozen["U"], frozen["S"], frozen["V"]
    R = random_tensors(get_method("lora-xs").shapes(11, 14, 4))
    assert torch.allclose(get_method("lora-xs").delta(R, frozen).delta(), U @ S.diag() @ R["R"] @ V.mT, atol=1e-12)
    dR = random_tensors(get_method("qr-lora").shapes(11, 14, 4))
    change = get_method("qr-lora").delta(dR, frozen).delta()
    assert torch.allclose(U.mT @ change, dR["dR"]) and torch.allclose(U @ U.mT @ change, change)  # it stays in the slot
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    M = random_tensors(get_method("svft").shapes(11, 14, 2))
    core = U.mT @ get_method("svft").delta(M, {"U": U, "V": Vh.mT}).delta() @ Vh.mT
    assert torch.allclose(core, core.triu(-2).tril(2), atol=1e-12)
    for row, offset in zip(M["M"], range(-2, 3), strict=True):
        assert torch.allclose(core.diagonal(offset), row[: 11 - abs(offset)], atol=1e-12)


def test_milora_takes_the_bottom_unless_told_where(base: Base, tmp_path: Path) -> None:
    from conftest import make_photos

    from spectral_diffusion.adapters.tuner import SpectralConfig
    from spectral_diffusion.config.train import TrainConfig
    from spectral_diffusion.data.folder import load_concept
    from spectral_diffusion.training.slot_choice import reserve

    def slot(name: str, **more: object) -> tuple[int, ...]:
        photos = make_photos(tmp_path / "photos" / name)
        config = TrainConfig(concept=photos, output=tmp_path / f"{name}.safetensors", rank=2, **more)  # type: ignore[arg-type]
        return reserve(config, base, load_concept(photos, None, None, None).name).columns

    assert slot("a", method="milora") == (-2, -1) and slot("b", method="milora") == (-4, -3)
    assert slot("c", method="pissa") == (0, 1) and slot("d", method="milora", slot="4:6") == (4, 5)

    from peft import get_peft_model

    net = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))
    given = {"r": 2, "method": "milora", "target_modules": ["0", "1"]}
    tuned = get_peft_model(net, SpectralConfig(**given))
    tuned.add_adapter("second", SpectralConfig(**given))
    assert [config.slot for config in tuned.peft_config.values()] == ["-2:0", "-4:-2"] or [
        config.slot for config in tuned.peft_config.values()
    ] == ["-2,-1", "-4,-3"]
