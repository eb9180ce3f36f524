"""One contract for every method: train, stop, resume, save, load, inspect, fuse and draw through the same calls."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import seldom
from peft import OFTConfig, VeraConfig, get_peft_model
from torch import nn

from spectral_diffusion.adapters.adapter import Adapter, check_base
from spectral_diffusion.adapters.apply import install_tokens, put_adapters
from spectral_diffusion.adapters.attach import AdapterSpec, inject_adapter
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.fuse import CalibrationConfig, FuseConfig
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.files import read_tensors
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.inspection import inspect_path
from spectral_diffusion.linalg import cayley_change, top_band
from spectral_diffusion.merging.calibration import calibrate
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.methods import all_methods, get_method
from spectral_diffusion.methods.registry import METHODS
from spectral_diffusion.methods.spectral_rotation import prepare
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.targets import find_targets
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.slots.ledger import LEDGER, ROWS, Ledger
from spectral_diffusion.training.output import is_done
from spectral_diffusion.training.run import state_path, train_to_file

NAMES = sorted(all_methods())


def settings(photos: Path, base: Path, output: Path, **more: object) -> TrainConfig:
    values = {"concept": photos, "output": output, "base": str(base), "rank": 2, "steps": 8, "device": "cpu"}
    rates = {"learning_rate": 3e-2, "text_encoder_learning_rate": 3e-2}
    return TrainConfig(**{**values, **rates, **more})  # type: ignore[arg-type]


def same(left: Adapter, right: Adapter) -> bool:
    return set(left.parameters) == set(right.parameters) and all(
        torch.equal(value, right.parameters[name]) for name, value in left.parameters.items()
    )


@pytest.mark.parametrize(
    "method",
    seldom(
        NAMES,
        set(NAMES)
        - {
            "pissa",
            "milora",
            "lora-xs",
            "psoft",
            "svft",
            "lidb",
            "spectral-additive-s",
            "vera",
            "svdiff",
            "orthogonal",
            "qr-lora",
            "spectral-rotation-s",
        },
    ),
)
def test_every_method_from_photos_to_a_picture(photos: Path, tiny_base: Path, tmp_path: Path, method: str) -> None:
    whole = train_to_file(settings(photos, tiny_base, tmp_path / "whole" / "rex.safetensors", method=method))
    config = settings(photos, tiny_base, tmp_path / "broken" / "rex.safetensors", method=method)
    asked = itertools.count()
    with pytest.raises(Cancelled):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(asked) >= 5))
    assert state_path(config.output).exists()
    assert same(train_to_file(config, resume=True), whole)

    loaded = load_adapter(config.output)
    base = load_base(str(tiny_base), "cpu")
    assert same(loaded, whole) and check_base(loaded, base) is None
    weights = base.weights()
    change = sum(float(loaded.factors(layer, weights[layer]).delta().norm()) for layer in loaded.layers)
    assert change > 0
    told = inspect_path(config.output)
    assert told["method"] == method and told["trained"] == loaded.count()

    fuse_to_folder(FuseConfig(adapters=[config.output], output=tmp_path / "fused", device="cpu"))
    fused, unfused = load_base(str(tmp_path / "fused"), "cpu"), load_base(str(tiny_base), "cpu")
    for layer, weight in fused.weights().items():
        assert torch.allclose(weight - weights[layer], loaded.factors(layer, weights[layer]).delta(), atol=1e-5)
    put_adapters(unfused, [(loaded, 1.0)])
    draw = Scene(num_inference_steps=2, guidance_scale=3.0, device="cpu")
    pictures = [
        np.asarray(sample(one, [f"a photo of {loaded.token}"], [1], draw)[0], float) for one in (fused, unfused)
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


@pytest.mark.parametrize("method", seldom(NAMES, ("spectral-rotation", "adalora")))
def test_every_method_goes_on_bit_for_bit_in_bfloat16(
    photos: Path, tiny_base: Path, tmp_path: Path, method: str
) -> None:
    half = {"method": method, "dtype": "bfloat16", "mixed_precision": "bf16", "steps": 4}
    whole = train_to_file(settings(photos, tiny_base, tmp_path / "whole" / "rex.safetensors", **half))
    config = settings(photos, tiny_base, tmp_path / "broken" / "rex.safetensors", **half)
    asked = itertools.count()
    with pytest.raises(Cancelled):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(asked) >= 2))
    assert same(train_to_file(config, resume=True), whole) and same(load_adapter(config.output), whole)


def test_adalora_really_takes_values_away(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = settings(photos, tiny_base, tmp_path / "rex.safetensors", method="adalora", rank=4, steps=30)
    adapter = train_to_file(config)
    values = torch.cat([value.flatten() for name, value in adapter.parameters.items() if name.endswith(".E")])
    assert int((values == 0).sum()) == len(values) // 2  # target_r is half of the rank


def test_a_skipped_step_leaves_no_trace_in_adaloras_scores(tiny_base: Path) -> None:
    """A float16 step that overflows is skipped, and its gradients are not finite."""
    base = load_base(str(tiny_base), "cpu")
    on = inject_adapter(base.models, AdapterSpec(get_method("adalora"), 4, steps=10), "concept")
    for step in (1, 2):
        for _, parameter in on.named_parameters():
            parameter.requires_grad_(True)
            parameter.grad = torch.full_like(parameter, float("nan") if step == 1 else 1.0)
        on.on_step(step)
    state, _ = on.extra_state()
    assert state and all(bool(torch.isfinite(value).all()) for value in state.values())


def test_rows_of_the_orthogonal_basis_are_distinct_and_have_their_own_ledger(
    photos: Path, tiny_base: Path, tmp_path: Path
) -> None:
    first = train_to_file(settings(photos, tiny_base, tmp_path / "rex.safetensors", method="orthogonal"))
    second = train_to_file(
        settings(photos, tiny_base, tmp_path / "mug.safetensors", method="orthogonal", name="mug", token="<mug>")
    )
    assert str(first.slot) == "0:2" and str(second.slot) == "2:4"
    assert Ledger(tmp_path / ROWS).read() and not (tmp_path / LEDGER).exists()
    for layer in first.layers:
        one, two = first.factors(layer), second.factors(layer)
        assert float((one.down @ two.down.mT).abs().max()) < 1e-6
    fuse_to_folder(
        FuseConfig(
            adapters=[tmp_path / "rex.safetensors", tmp_path / "mug.safetensors"], output=tmp_path / "f", device="cpu"
        )
    )


def test_svdiff_stores_shifts_and_values_only(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    adapter = train_to_file(settings(photos, tiny_base, tmp_path / "rex.safetensors", method="svdiff"))
    tensors, _ = read_tensors(tmp_path / "rex.safetensors")
    assert {name.rpartition(".")[2] for name in tensors if name.startswith(("delta", "frozen"))} == {"delta", "S"}
    assert adapter.norm() is None
    foreign = load_base(str(tiny_base), "cpu").weights()
    layer = adapter.layers[0]
    with pytest.raises(UserError, match="does not fit this base"):
        adapter.factors(layer, foreign[layer] * 1.1)
    with pytest.raises(UserError, match="only be computed with its base"):
        adapter.factors(layer)


def test_continue_goes_on_from_turned_columns(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lemma 4.1: no new decomposition; the first concept's change is the second's start, bit for bit."""
    first = train_to_file(
        settings(photos, tiny_base, tmp_path / "rex.safetensors", method="spectral-rotation-s", rank=3)
    )
    from spectral_diffusion import svd_cache as spectrum

    monkeypatch.setattr(spectrum, "compute", lambda *arguments, **options: pytest.fail("a new decomposition"))
    more = {"name": "mug", "token": "<mug>", "init_from_adapter": tmp_path / "rex.safetensors"}
    nothing = train_to_file(
        settings(photos, tiny_base, tmp_path / "still.safetensors", **more, learning_rate=0.0,
                 text_encoder_learning_rate=0.0)
    )  # fmt: skip
    second = train_to_file(settings(photos, tiny_base, tmp_path / "mug.safetensors", **more))
    loaded = load_adapter(tmp_path / "mug.safetensors")
    assert same(second, loaded) and loaded.slot == first.slot and set(loaded.tokens) == {"<rex>", "<mug>"}
    for layer in first.layers:
        assert torch.allclose(nothing.factors(layer).delta(), first.factors(layer).delta(), atol=1e-6)
        assert not torch.allclose(second.factors(layer).delta(), first.factors(layer).delta(), atol=1e-5)
    base = load_base(str(tiny_base), "cpu")
    install_tokens(base, loaded)
    watched: list[Event] = []
    layers = dict(list(find_targets(base.models).items())[:2])
    quick = CalibrationConfig(num_images=3, num_inference_steps=1)
    calibrate(base, loaded.tokens, layers, quick, 0, Hooks(progress=watched.append))
    assert watched[-1].total == 6  # both words are watched, so that a fusion by gradient keeps both
    base = load_base(str(tiny_base), "cpu")
    put_adapters(base, [(loaded, 1.0)])
    assert {"<rex>", "<mug>"} <= set(base.pipeline.tokenizer.get_added_vocab())
    with pytest.raises(UserError, match="has the token <rex> already"):
        train_to_file(
            settings(photos, tiny_base, tmp_path / "x.safetensors", init_from_adapter=more["init_from_adapter"])
        )
    assert second.rank == 3 and second.method.name == "spectral-rotation-s"


def test_composed_columns_stay_orthonormal_under_bfloat16_autocast() -> None:
    """A thousand steps, four trainings one on top of the other."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    x, wanted = torch.randn(32, 64, generator=generator), torch.randn(32, 48, generator=generator)
    band = top_band(weight, 8)
    frozen = {name: value.float() for name, value in band._asdict().items()}
    method = get_method("spectral-rotation")
    for _ in range(4):
        parameters = {name: torch.zeros(8, 8, requires_grad=True) for name in ("A_U", "A_V")}
        optimizer = torch.optim.Adam(list(parameters.values()), lr=1e-2)
        for _ in range(250):
            with torch.autocast("cpu", torch.bfloat16):
                up, down = method.delta(parameters, frozen)
                loss = (x @ (weight + up @ down).mT - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            turned = prepare(parameters, frozen)
            D_U, D_V = turned["D_U"], turned["D_V"]
        frozen |= {"D_U": D_U, "D_V": D_V}
    one = torch.eye(8)
    assert float(D_U.norm() + D_V.norm()) > 1  # it really turned
    for basis, D in ((frozen["U"], D_U), (frozen["V"], D_V)):
        turned = basis @ (one + D)
        assert float((turned.mT @ turned - one).abs().max()) <= 1e-6


@pytest.mark.parametrize(("method", "budget"), [("lora", 6000), ("spectral-rotation", "0.5k"), ("oft", 3000)])
def test_a_budget_chooses_the_largest_rank_within_it(
    photos: Path, tiny_base: Path, tmp_path: Path, method: str, budget: object
) -> None:
    notes: list[str] = []
    config = settings(photos, tiny_base, tmp_path / "rex.safetensors", method=method, param_budget=budget, steps=1)
    adapter = train_to_file(config, hooks=Hooks(notify=notes.append))
    assert config.param_budget and adapter.count() <= config.param_budget and any("its steps" in note for note in notes)
    counts = [
        sum(get_method(method).count(*size, rank) for size in adapter.sizes.values())
        for rank in get_method(method).ranks(list(adapter.sizes.values()))
    ]
    assert adapter.count() == max(count for count in counts if count <= config.param_budget)


def test_impossible_budgets_and_ranks_say_what_would_do(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    for more, message in (
        ({"param_budget": 10}, r"cannot train as few as 10 numbers here: its steps are \d"),
        ({"method": "oft", "rank": 5}, "cannot have rank 5 on these layers; near it are"),
        ({"rank": 999}, "cannot have rank 999"),
        ({"method": "lora", "init_from_adapter": Path("missing.safetensors")}, "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            train_to_file(settings(photos, tiny_base, tmp_path / "rex.safetensors", **more))


def test_spectral_a_reaches_every_weight_that_dora_reaches_for_a_vector() -> None:
    """Appendix D: from DoRA's magnitude m and direction to a' and b' of Spectral Adapter A, explicitly."""
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(1, 12, generator=generator, dtype=torch.float64)
    parameters = {
        "A": torch.randn(2, 12, generator=generator, dtype=torch.float64),
        "B": torch.randn(1, 2, generator=generator, dtype=torch.float64),
        "m": torch.tensor([2.5], dtype=torch.float64),
    }
    theirs = w + get_method("dora").delta(parameters, {"W": w}).delta()
    band = top_band(w, 1)
    direction = (w + parameters["B"] @ parameters["A"]).mT
    direction = direction / direction.norm()
    a = band.U * (parameters["m"] / band.S - 1)  # the magnitude goes into U,
    b = direction * band.U - band.V  # the direction into V
    ours = w + get_method("spectral-additive").delta({"A_U": a, "A_V": b}, band._asdict()).delta()
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_oft_is_pefts_exact_oft() -> None:
    """PEFT's OFT with a shared block and no Neumann series is an independent reading of the same rotation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 7))
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    config = OFTConfig(oft_block_size=4, r=0, block_share=True, use_cayley_neumann=False, target_modules=["0"])
    tuned = get_peft_model(net, config)
    block = next(p for n, p in tuned.named_parameters() if "oft_R" in n)
    with torch.no_grad():
        block.copy_(0.3 * torch.randn(block.shape))
    x = torch.randn(5, 12)
    theirs = tuned(x)
    rows, columns = torch.triu_indices(4, 4, 1)
    skew = torch.zeros(4, 4)
    skew[rows, columns] = block.detach().flatten()
    skew = skew - skew.mT
    method = get_method("oft")
    found = [x @ (weight + method.delta({"A": sign * skew}, {"W": weight}).delta()).mT + bias for sign in (1.0, -1.0)]
    assert min(float((one - theirs).abs().max()) for one in found) < 1e-5  # which way they turn is a matter of taste
    assert max(float((one - theirs).abs().max()) for one in found) > 1e-2
    assert cayley_change(skew).norm() > 0.1


def test_vera_is_pefts_vera() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 7))
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    tuned = get_peft_model(net, VeraConfig(r=3, target_modules=["0"]))
    layer = tuned.base_model.model[0]
    method = get_method("vera")
    assert method.init_frozen is not None
    frozen = method.init_frozen(7, 12, 3, None)
    parameters = {"d": torch.randn(3), "b": torch.randn(7)}
    with torch.no_grad():
        layer.vera_A["default"].copy_(frozen["A"])
        layer.vera_B["default"].copy_(frozen["B"])
        layer.vera_lambda_d["default"].copy_(parameters["d"])
        layer.vera_lambda_b["default"].copy_(parameters["b"])
    x = torch.randn(5, 12)
    assert torch.allclose(tuned(x), x @ (weight + method.delta(parameters, frozen).delta()).mT + bias, atol=1e-6)
    for rank in (1, 64):  # and its matrices are as large as PEFT's, which makes all ranks alike
        theirs = get_peft_model(nn.Sequential(nn.Linear(768, 320)), VeraConfig(r=rank, target_modules=["0"]))
        held = theirs.base_model.model[0]
        ours = method.init_frozen(320, 768, rank, None)
        for mine, other in ((ours["A"], held.vera_A["default"]), (ours["B"], held.vera_B["default"])):
            assert mine.shape == other.shape
            assert float(mine.std()) == pytest.approx(float(other.std()), rel=0.15)


def test_an_adapter_of_another_revision_of_its_method_is_refused(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rex.safetensors"
    train_to_file(settings(photos, tiny_base, file, method="vera", rank=4, steps=1))
    assert load_adapter(file).method.revision == 2
    longer = settings(photos, tiny_base, tmp_path / "long.safetensors", method="vera", rank=4, steps=4)
    asked = itertools.count()
    with pytest.raises(Cancelled):
        train_to_file(longer, hooks=Hooks(should_stop=lambda: next(asked) >= 2))
    assert is_done(settings(photos, tiny_base, file, method="vera", rank=4, steps=1))
    monkeypatch.setitem(METHODS.entries, "vera", replace(get_method("vera"), revision=3))
    with pytest.raises(UserError, match="was trained by another version of vera"):
        load_adapter(file)
    with pytest.raises(UserError, match="by another version of its method"):
        train_to_file(longer, resume=True)
    assert not is_done(settings(photos, tiny_base, file, method="vera", rank=4, steps=1))


def test_adalora_takes_away_what_an_average_would_bring_back(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = settings(photos, tiny_base, tmp_path / "rex.safetensors", method="adalora", rank=4, steps=30)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"ema": 0.99})})
    adapter = train_to_file(config)
    values = torch.cat([value.flatten() for name, value in adapter.parameters.items() if name.endswith(".E")])
    assert int((values == 0).sum()) == len(values) // 2


@pytest.mark.parametrize("method", ["spectral-additive", "lora", "adalora"])
@pytest.mark.parametrize("name", ["train", "dog-v1.5"])
def test_any_folder_may_be_a_concepts(photos: Path, tiny_base: Path, tmp_path: Path, method: str, name: str) -> None:
    folder = shutil.copytree(photos, tmp_path / name)
    config = settings(folder, tiny_base, tmp_path / f"{name}.safetensors", method=method, rank=2, steps=1)
    assert train_to_file(config).name == name
