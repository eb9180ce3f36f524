"""Objectives, optimizers, precision: each does what it says and resumes bit for bit."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import seldom
from diffusers import DDPMScheduler
from peft.optimizers import create_loraplus_optimizer
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import AdapterSpec, InjectedAdapter, inject_adapter, unloading
from spectral_diffusion.adapters.frozen import frozen_tensors
from spectral_diffusion.config.train import ObjectiveConfig, OptimizerConfig, TrainConfig
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.linalg import matrix_shape
from spectral_diffusion.methods import all_methods, get_method
from spectral_diffusion.models.attention_maps import AttentionMaps, attention_loss, capture_attention_maps, shape_of
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.denoiser import min_snr_weights
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.prompt_encoder import PromptEncoder
from spectral_diffusion.slots.ledger import Slot
from spectral_diffusion.training.checkpoint import load_state, save_state
from spectral_diffusion.training.losses import diffusion_loss
from spectral_diffusion.training.optimizers import EMA, ProdigyGroups, build_optimizer, lr_schedule
from spectral_diffusion.training.run import train_to_file


def settings(photos: Path, tiny_base: Path, output: Path, **more: object) -> TrainConfig:
    values = {"concept": photos, "output": output, "base": str(tiny_base), "rank": 2, "steps": 6, "device": "cpu"}
    return TrainConfig(**{**values, **more})  # type: ignore[arg-type]


def tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {**adapter.parameters, **{f"token.{name}": rows for name, rows in adapter.vectors.items()}}


def same(one: Adapter, two: Adapter) -> bool:
    return all(torch.equal(value, tensors(two)[name]) for name, value in tensors(one).items())


def apart(one: Adapter, two: Adapter) -> float:
    """How far two adapters are apart, relative to what the first has learnt; parameters start at zero."""
    difference = sum(float((value - two.parameters[n]).square().sum()) for n, value in one.parameters.items())
    return (difference / sum(float(value.square().sum()) for value in one.parameters.values())) ** 0.5


# --- optimizers ----------------------------------------------------------------------------------------------

KINDS = {
    "schedule": {
        "lr_scheduler": "cosine",
        "optimizer": {"lr_warmup_steps": 2, "gradient_accumulation_steps": 2, "ema_decay": 0.9},
        "batch_size": 1,
    },
    "prodigy": {"optimizer": {"name": "prodigy", "ema_decay": 0.5}, "weight_decay": 0.01},
    "adamw8bit": {"optimizer": {"name": "adamw8bit"}, "rank": 16, "steps": 4},
    "float16": {"mixed_precision": "fp16"},
    "objective": {"objective": {"loss_type": "huber", "snr_gamma": 5.0}, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_step_resumes_bit_for_bit(photos: Path, tiny_base: Path, tmp_path: Path, kind: str) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    base = load_base(str(tiny_base), "cpu")
    whole = train_to_file(settings(photos, tiny_base, tmp_path / "a" / "rex.safetensors", **KINDS[kind]), base=base)
    config = settings(photos, tiny_base, tmp_path / "b" / "rex.safetensors", **KINDS[kind])
    asked = iter(range(100))
    with pytest.raises(Cancelled):
        train_to_file(config, base=base, hooks=Hooks(should_stop=lambda: next(asked) >= 3))
    assert same(whole, train_to_file(config, resume=True, base=base))
    plain = settings(photos, tiny_base, tmp_path / "c" / "rex.safetensors", rank=config.rank, steps=config.steps)
    assert not same(whole, train_to_file(plain, base=base))


def test_tensors_that_parameters_share_are_kept_for_each(tmp_path: Path) -> None:
    """As the eight-bit optimizer's maps are, which any two large parameters have in common."""
    shared = torch.arange(8.0)
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for weight in weights:
        optimizer.state[weight] = {"qmap1": shared}
    save_state(tmp_path / "a.state.safetensors", {"weight": weights[0]}, optimizer, {"step": 1})
    fresh = torch.optim.SGD(weights, lr=0.1)
    load_state(tmp_path / "a.state.safetensors", fresh)
    assert all(torch.equal(fresh.state[weight]["qmap1"], shared) for weight in weights)


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_weight_decay_leaves_what_is_neutral_elsewhere(photos: Path, tiny_base: Path, name: str) -> None:
    base, method = load_base(str(tiny_base), "cpu"), get_method(name)
    weights = {layer: weight for layer, weight in base.weights().items() if layer.endswith("to_q")}
    rank = method.ranks([matrix_shape(weight) for weight in weights.values()])[-1]
    slot = Slot.interval(0, rank) if method.slot else None
    config = TrainConfig(concept=photos, output=photos, weight_decay=0.5, learning_rate=0.1)
    with PromptEncoder(base, load_concept(photos), 0, 16) as condition, unloading(base.models):
        frozen = frozen_tensors(method, weights, rank, slot, cached=False)
        on = inject_adapter(base.models, AdapterSpec(method, rank, only=set(weights), steps=10), frozen=frozen)
        optimizer, _ = build_optimizer(on, condition, config, {})
        parameters = {**condition.named_parameters(), **dict(on.named_parameters())}
        for parameter in parameters.values():
            parameter.requires_grad_(True).grad = torch.zeros_like(parameter)
        before = {n: p.detach().clone() for n, p in parameters.items()}
        optimizer.step()
        for parameter_name, parameter in parameters.items():
            fixed = parameter_name.startswith("token.") or parameter_name.rpartition(".")[2] in method.neutral
            factor = 1.0 if fixed else 1 - 0.1 * 0.5
            assert torch.allclose(parameter, before[parameter_name] * factor, atol=1e-7), parameter_name
        zero = {n: p for n, p in on.parameters(on.layers and next(iter(on.layers))).items() if n in method.neutral}
        assert all(bool((before[f"{next(iter(on.layers))}.{n}"] != 0).any()) for n in zero)


def with_lora(base: Base, photos: Path, **options: float) -> tuple[InjectedAdapter, torch.optim.Optimizer]:
    """A LoRA whose B is not zero, gradients of ones, and the optimizer of these options."""
    config = TrainConfig(concept=photos, output=photos, optimizer=OptimizerConfig(**options), learning_rate=0.01)  # type: ignore[arg-type]
    with PromptEncoder(base, load_concept(photos), 0, 16) as condition:
        lora = inject_adapter(base.models, AdapterSpec(get_method("lora"), 2))
        generator = torch.Generator().manual_seed(1)
        for row in condition.named_parameters().values():
            row.requires_grad_(True)
        for _, parameter in lora.named_parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return lora, build_optimizer(lora, condition, config, {})[0]  # type: ignore[return-value]


def test_lora_plus_has_the_rates_of_pefts_own(photos: Path, tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    with unloading(base.models):
        lora, optimizer = with_lora(base, photos, loraplus_lr_ratio=16)
        network = base.models["unet"]
        peft = create_loraplus_optimizer(network, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)  # type: ignore[arg-type]
        rates = [{id(p): g["lr"] for g in some.param_groups for p in g["params"]} for some in (optimizer, peft)]
        of_network = [p for name, p in lora.named_parameters() if name.startswith("unet.")]
        assert of_network and all(rates[0][id(p)] == pytest.approx(rates[1][id(p)]) for p in of_network)


def test_the_preconditioner_turns_gradients_as_the_paper_says(photos: Path, tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    with unloading(base.models):
        lora, optimizer = with_lora(base, photos, riemannian_reg=0.1)
        own = lora.parameters(next(iter(lora.layers)))
        A, B, grad_A, grad_B = own["A"].detach(), own["B"].detach(), own["A"].grad, own["B"].grad
        assert grad_A is not None and grad_B is not None
        damping = 0.1 * torch.eye(2)
        expected = torch.linalg.solve(B.T @ B + damping, grad_A), torch.linalg.solve(A @ A.T + damping, grad_B.T).T
        optimizer.step()
        assert torch.allclose(own["A"].grad, expected[0], atol=1e-5)  # type: ignore[arg-type]
        assert torch.allclose(own["B"].grad, expected[1], atol=1e-5)  # type: ignore[arg-type]
        assert all(len(optimizer.state[p]) for _, p in lora.named_parameters())


@pytest.mark.parametrize("option", ["loraplus_lr_ratio", "riemannian_reg"])
def test_loras_optimizers_resume_and_refuse_other_methods(
    photos: Path, tiny_base: Path, tmp_path: Path, option: str
) -> None:
    def run(name: str, **more: object) -> Adapter:
        optimizer = {option: 4.0, "name": "adamw"}
        config = settings(photos, tiny_base, tmp_path / f"{name}.safetensors", method="lora", optimizer=optimizer)
        return train_to_file(config.model_copy(update=more))

    whole, plain = run("whole"), run("plain", optimizer=OptimizerConfig())
    stops = iter([False, False, True])
    config = settings(
        photos, tiny_base, tmp_path / "parts.safetensors", method="lora", optimizer={option: 4.0, "name": "adamw"}
    )
    with pytest.raises(Cancelled):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(stops)))
    parts = train_to_file(config, resume=True)
    assert all(torch.equal(parts.parameters[name], value) for name, value in whole.parameters.items())
    assert any(not torch.equal(plain.parameters[name], value) for name, value in whole.parameters.items())
    with pytest.raises(UserError, match=option):
        run("other", method="spectral-additive")
    with pytest.raises(UserError, match="Prodigy"):
        run("prodigy", optimizer=OptimizerConfig(**{option: 4.0, "name": "prodigy"}))  # type: ignore[arg-type]


def test_rates_warm_up_and_decay() -> None:
    def rates(name: str = "linear", warmup: int = 0) -> list[float]:
        return [lr_schedule(name, 10, warmup)(step) for step in range(10)]

    assert rates() == pytest.approx([1 - step / 10 for step in range(10)])
    assert rates("constant") == [1.0] * 10
    cosine = rates("cosine")
    assert cosine[0] == 1.0 and cosine[5] == pytest.approx(0.5) and all(a > b for a, b in pairwise(cosine))
    for name in ("linear", "constant", "cosine"):
        warmed = rates(name, 4)
        assert warmed[:5] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
        assert all(0 <= rate <= 1 for rate in rates(name, 1000))


@torch.no_grad()
def test_an_average_follows_its_parameters_and_comes_back_from_a_state() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.ones(1))}
    ema, again = EMA(parameters, 0.5), EMA(parameters, 0.5)
    for step in range(1, 9):
        parameters["a"] += 1
        ema.update(step)
    assert torch.equal(parameters["a"], torch.full((2,), 8.0)) and 6 < float(ema.averages["a"][0]) < 8
    again.load({name: value.clone() for name, value in ema.averages.items()})
    for one in (ema, again):
        one.update(9)
    assert all(torch.equal(ema.averages[name], again.averages[name]) for name in parameters)
    with ema.applied():
        assert torch.equal(parameters["a"], ema.averages["a"])
    assert torch.equal(parameters["a"], torch.full((2,), 8.0)) and not EMA(parameters, 0.0).averages


def test_two_accumulated_batches_are_one_of_twice_the_size(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    more = {"prior": {"loss_weight": 0.5, "batch_size": 2, "num_images": 3, "cut_mix_prob": 0.4}, "learning_rate": 1e-2}
    halves = {**more, "prior": {**more["prior"], "batch_size": 1}}  # type: ignore[dict-item]
    base = load_base(str(tiny_base), "cpu")
    one = train_to_file(settings(photos, tiny_base, tmp_path / "a.safetensors", batch_size=4, **more), base=base)
    two = settings(
        photos,
        tiny_base,
        tmp_path / "b.safetensors",
        batch_size=2,
        optimizer={"gradient_accumulation_steps": 2},
        **halves,
    )
    assert apart(one, train_to_file(two, base=base)) < 1e-3


def test_the_average_is_written_and_not_the_last_numbers(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    base, seen = load_base(str(tiny_base), "cpu"), []
    first = {"steps": 1, "lr_scheduler": "constant"}
    for steps in (1, 2):
        more = {**first, "steps": steps}
        seen.append(train_to_file(settings(photos, tiny_base, tmp_path / f"{steps}.safetensors", **more), base=base))
    averaged = train_to_file(
        settings(
            photos,
            tiny_base,
            tmp_path / "e.safetensors",
            steps=2,
            lr_scheduler="constant",
            optimizer={"ema_decay": 0.999},
        ),
        base=base,
    )
    # It begins as the first step, then forgets by (1 + n) / (10 + n) after n more.
    for name, value in averaged.parameters.items():
        wanted = 2 / 11 * seen[0].parameters[name] + 9 / 11 * seen[1].parameters[name]
        assert torch.allclose(value, wanted, atol=1e-7)


def test_prodigy_finds_its_rates_and_learns(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    def last_loss(factor: float) -> float:
        losses: list[float] = []
        prodigy = {"name": "prodigy", "d_coef": factor}
        config = settings(
            photos, tiny_base, tmp_path / f"{factor}.safetensors", steps=30, batch_size=2, optimizer=prodigy
        )
        train_to_file(config, hooks=Hooks(progress=lambda event: losses.append(event.metrics.get("loss", 0.0))))
        return losses[-1]

    assert last_loss(10) < 0.99 * last_loss(1e-6)  # the same photos and noise, without learning
    config = settings(photos, tiny_base, tmp_path / "a.safetensors", optimizer={"name": "prodigy", "d_coef": 10})
    frozen = config.model_copy(update={"text_encoder_learning_rate": 0.0, "steps": 2})
    parameters = train_to_file(frozen).parameters
    assert not any(value.any() for name, value in parameters.items() if name.startswith("text_encoder."))
    with pytest.raises(UserError, match="slot_lr_power=0"):
        train_to_file(config.model_copy(update={"slot_lr_power": 0.5, "steps": 1}))


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("adamw8bit", "bitsandbytes.optim")])
def test_a_missing_optimiser_is_told(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'spectral-diffusion\[optim\]'"):
        train_to_file(settings(photos, tiny_base, tmp_path / "a.safetensors", optimizer={"name": name}))


def test_checkpointing_changes_only_roundings(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    plain = train_to_file(settings(photos, tiny_base, tmp_path / "a.safetensors"), base=base)
    again = train_to_file(
        settings(photos, tiny_base, tmp_path / "b.safetensors", gradient_checkpointing=True), base=base
    )
    assert apart(plain, again) < 1e-3
    assert not base.pipeline.unet.is_gradient_checkpointing


# --- the objective -------------------------------------------------------------------------------------------


def test_the_smooth_huber_is_square_near_zero_and_linear_far_off() -> None:
    def loss(error: float) -> float:
        objective = ObjectiveConfig(loss_type="huber", huber_delta=0.1)
        return float(diffusion_loss(torch.full((1, 1, 1, 1), error), torch.zeros(1, 1, 1, 1), None, None, objective))

    assert loss(1e-3) == pytest.approx(1e-6, rel=1e-2)
    assert loss(100.0) == pytest.approx(2 * 0.1 * (100 - 0.1), rel=1e-3)


def test_weights_of_places_and_times_multiply() -> None:
    predicted, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    weights, times = torch.rand(2, 1, 4, 4), torch.tensor([0.5, 2.0])
    found = diffusion_loss(predicted, target, weights, times, ObjectiveConfig())
    wanted = ((predicted - target) ** 2 * weights * times[:, None, None, None]).mean()
    assert torch.allclose(found, wanted)
    assert torch.equal(diffusion_loss(predicted, target, None, None, ObjectiveConfig()), F.mse_loss(predicted, target))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_picture(kind: str) -> None:
    """Whatever is predicted, the weight on the error of x0 is min(snr, γ)."""
    schedule = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=kind == "v_prediction")
    times = torch.tensor([0, 200, 500, 800, 999])
    alphas = schedule.alphas_cumprod[times].double()
    snr = alphas / (1 - alphas)
    weights = min_snr_weights(schedule, times, 5.0)
    assert weights is not None and torch.isfinite(weights).all() and min_snr_weights(schedule, times, 0.0) is None
    # An error e of x0 is one of e √snr in ε, and of e √(snr + 1) in v.
    of_picture = weights.double() * (snr if kind == "epsilon" else snr + 1)
    assert torch.allclose(of_picture, snr.clamp_max(5.0), rtol=1e-4)


# --- attention -----------------------------------------------------------------------------------------------


def test_attention_is_held_to_the_mask_and_never_nan() -> None:
    own = torch.zeros(3, 5, dtype=torch.bool)
    own[:, 2] = True
    own[2] = False  # a prompt without the token
    masks = torch.zeros(3, 1, 4, 8)
    masks[0, :, :, :4] = 1  # the second mask is empty
    inside, outside = AttentionMaps(), AttentionMaps()
    flat = masks[0].flatten()
    for maps, shown in ((inside, flat), (outside, 1 - flat)):
        seen = torch.zeros(3, 32, 5)
        seen[:, :, 2] = 0.3 * shown
        maps.found[0] = seen.requires_grad_()
    assert float(attention_loss(inside, own, masks)) == pytest.approx(0, abs=1e-6)
    assert float(attention_loss(outside, own, masks)) == pytest.approx(1 / 3, abs=1e-6)
    nothing = AttentionMaps()
    nothing.found[0] = torch.zeros(3, 32, 5, requires_grad=True)  # its maximum is 0
    for maps in (nothing, AttentionMaps()):
        loss = attention_loss(maps, own, masks)
        assert torch.isfinite(loss)
    attention_loss(nothing, own, masks).backward()
    assert torch.isfinite(nothing.found[0].grad).all()  # type: ignore[arg-type]


def test_maps_know_their_shape() -> None:
    assert shape_of(24, 6, 16) == (3, 8) and shape_of(2, 5, 5) == (1, 1) and shape_of(9, 5, 6) == (3, 3)


def test_watching_the_attention_changes_no_prediction(photos: Path, tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    unet, latents = base.pipeline.unet, torch.randn(2, 4, 8, 8)
    words = torch.randn(2, 6, 24)
    plain = unet(latents, 5, words).sample
    before = dict(unet.attn_processors)
    with capture_attention_maps(unet, True) as maps:
        assert maps and torch.equal(unet(latents, 5, words).sample, plain)
        assert maps.found and all(seen.shape[2] == 6 for seen in maps.found.values())
        assert all(torch.allclose(seen.sum(2), torch.ones(()), atol=1e-5) for seen in maps.found.values())
    assert all(unet.attn_processors[name] is one for name, one in before.items())


@pytest.mark.parametrize("checkpointed", seldom([False, True], {False}))
def test_masks_steer_where_the_token_is_attended_to(
    photos: Path, tiny_base: Path, tmp_path: Path, checkpointed: bool
) -> None:
    with pytest.raises(UserError, match=r"objective\.attention_loss_weight needs masks"):
        train_to_file(settings(photos, tiny_base, tmp_path / "x.safetensors", objective={"attention_loss_weight": 1.0}))
    (photos / "masks").mkdir()
    for photo in sorted(photos.glob("*.png")):
        half = Image.new("L", (24, 20), 0)
        half.paste(255, (0, 0, 12, 20))
        half.convert("RGB").save(photo)  # white where the thing is
        half.save(photos / "masks" / photo.name)
    losses: dict[float, float] = {}

    def watch(event: Event) -> None:
        if event.stage == "train":
            losses.setdefault(event.done, event.metrics["loss"])

    base = load_base(str(tiny_base), "cpu")
    more = {
        "learning_rate": 3e-3,
        "steps": 60,
        "batch_size": 4,
        "timestep_power": 4,
        "lr_scheduler": "constant",
        "rank": 8,
    }
    config = settings(
        photos, tiny_base, tmp_path / "a.safetensors", objective={"attention_loss_weight": 50.0},
        gradient_checkpointing=checkpointed, **more,
    )  # fmt: skip
    train_to_file(config, base=base, hooks=Hooks(progress=watch))
    assert losses[60] < 0.9 * losses[1]


def test_prodigy_reads_the_device_a_few_times_a_step_and_finds_the_step_size_of_its_own_class() -> None:
    """One flat tensor a group: as many reads for a hundred parameters as for one, and the same step size."""
    prodigyopt = pytest.importorskip("prodigyopt")
    torch.manual_seed(0)
    many = [nn.Parameter(torch.randn(3, 4)) for _ in range(100)]
    plain = [nn.Parameter(parameter.detach().clone()) for parameter in many]
    ours = ProdigyGroups([{"params": many, "weight_decay": 0.0}], 1.0)
    theirs = prodigyopt.Prodigy(plain, lr=1.0, safeguard_warmup=True)
    reads: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    for _ in range(10):
        for group in (many, plain):
            for parameter in group:
                parameter.grad = parameter.detach() * 2
        with Reads():
            ours.step()
        theirs.step()
    assert len(reads) <= 4 * 10
    assert ours.parts[0].param_groups[0]["d"] == pytest.approx(theirs.param_groups[0]["d"], rel=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(many, plain, strict=True))
