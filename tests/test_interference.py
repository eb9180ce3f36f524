"""Training that knows other concepts: the overlap penalty and randomized output erasure."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectral_diffusion import cli
from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import AdapterSpec, InjectedAdapter, inject_adapter, unloading
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.adapters.frozen import frozen_tensors
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.linalg import Factors, flatten, matrix_shape
from spectral_diffusion.methods import all_methods, get_method
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.prompt_encoder import PromptEncoder
from spectral_diffusion.slots.ledger import Slot
from spectral_diffusion.training.batch import Batch
from spectral_diffusion.training.output_erasure import erase, erased_targets, other_prompts
from spectral_diffusion.training.overlap import (
    EarlierSpaces,
    earlier_adapters,
    earlier_spaces,
    joint_space,
    overlap_penalty,
)
from spectral_diffusion.training.prior_preservation import OTHER_TOKENS
from spectral_diffusion.training.run import train_to_file


def settings(photos: Path, tiny_base: Path, output: Path, **more: object) -> TrainConfig:
    values = {"concept": photos, "output": output, "base": str(tiny_base), "rank": 2, "steps": 6, "device": "cpu"}
    return TrainConfig(**{**values, **more})  # type: ignore[arg-type]


def trained(photos: Path, tiny_base: Path, output: Path, **more: object) -> Adapter:
    own = {"name": output.stem, "method": "lora", "learning_rate": 0.05}
    return train_to_file(settings(photos, tiny_base, output, **{**own, **more}))


class Planted(InjectedAdapter):
    """An adapter of given changes."""

    def __init__(self, changes: Mapping[str, Factors]) -> None:
        super().__init__("planted", get_method("lora"), 2, {})
        self.changes = changes

    def factors(self, layer: str) -> Factors:
        return self.changes[layer]


def test_the_penalty_is_the_share_in_the_earlier_directions() -> None:
    torch.manual_seed(0)
    Q, P, earlier = torch.eye(6)[:, :2], torch.eye(5)[:, :2], torch.randn(2, 2)
    space = EarlierSpaces(Q, P, float(earlier.square().sum()))
    inside, outside = Factors(Q @ earlier, P.mT), Factors(torch.eye(6)[:, 3:5], torch.eye(5)[3:])
    crossing = Factors(Q @ earlier, torch.eye(5)[3:])  # it writes where they write, and reads elsewhere
    for change, expected in ((inside, 1.0), (outside, 0.0), (crossing, 0.5)):
        assert float(overlap_penalty(Planted({"a": change}), {"a": space})) == pytest.approx(expected, abs=1e-6)
        dense = change.delta()
        direct = ((Q.mT @ dense).square().sum() + (dense @ P).square().sum()) / (2 * space.energy)
        assert float(direct) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_method_is_measured_and_starts_at_nothing(tiny_base: Path, name: str) -> None:
    base, method = load_base(str(tiny_base), "cpu"), get_method(name)
    weights = {layer: weight for layer, weight in base.weights().items() if layer.endswith("to_q")}
    allowed = method.ranks([matrix_shape(weight) for weight in weights.values()])
    rank = allowed[min(1, len(allowed) - 1)]
    slot = Slot.interval(0, rank) if method.slot else None
    spaces = {
        layer: EarlierSpaces(
            torch.linalg.qr(torch.randn(matrix_shape(weight)[0], 2)).Q,
            torch.linalg.qr(torch.randn(matrix_shape(weight)[1], 2)).Q,
            1.0,
        )
        for layer, weight in weights.items()
    }
    with unloading(base.models):
        frozen = frozen_tensors(method, weights, rank, slot, cached=False)
        adapter = inject_adapter(base.models, AdapterSpec(method, rank, only=set(weights), steps=10), frozen=frozen)
        assert float(overlap_penalty(adapter, spaces)) == pytest.approx(0, abs=1e-10)
        generator = torch.Generator().manual_seed(0)
        for _, parameter in adapter.named_parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        penalty = overlap_penalty(adapter, spaces)
        penalty.backward()
        layer = next(iter(weights))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters(layer).values())
        dense = [adapter.factors(layer).delta() for layer in weights]
        direct = [
            ((s.outputs.mT @ d).square().sum() + (d @ s.inputs).square().sum()) / 2
            for s, d in zip(spaces.values(), dense, strict=True)
        ]
        assert torch.allclose(penalty, torch.stack(direct).mean(), rtol=1e-3)


def test_layers_that_an_earlier_adapter_does_not_change_have_no_space(
    photos: Path, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = trained(photos, tiny_base, tmp_path / "first.safetensors")
    dead = adapter.layers[0]
    parameters = {n: torch.zeros_like(v) if n.startswith(f"{dead}.") else v for n, v in adapter.parameters.items()}
    weights = load_base(str(tiny_base), "cpu").weights()
    spaces = earlier_spaces([replace(adapter, parameters=parameters)], weights)
    assert spaces.keys() == set(adapter.layers) - {dead}
    assert earlier_spaces([adapter, replace(adapter, parameters=parameters)], weights).keys() == set(adapter.layers)


def overlap_of(adapter: Adapter, earlier: Adapter, base: Base) -> float:
    """The share of |ΔW|² that is in the earlier adapter's directions, over all layers."""
    spaces = earlier_spaces([earlier], base.weights())
    changes = {layer: adapter.factors(layer) for layer in spaces}
    total = sum(float(change.delta().square().sum()) for change in changes.values())
    inside: list[float] = []
    for layer, space in spaces.items():
        dense = changes[layer].delta()
        inside.append(float((space.outputs.mT @ dense).square().sum() + (dense @ space.inputs).square().sum()) / 2)
    return sum(inside) / total


def test_a_penalized_adapter_keeps_out_of_the_one_beside_it(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    first = trained(photos, tiny_base, tmp_path / "first.safetensors")
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    plain = trained(photos, tiny_base, elsewhere / "second.safetensors", seed=1, steps=12)
    penalty = {"overlap_weight": 100.0}
    apart = trained(photos, tiny_base, tmp_path / "second.safetensors", seed=1, steps=12, interference=penalty)
    given = penalty | {"earlier_adapters": [tmp_path / "first.safetensors"]}
    same = trained(
        photos, tiny_base, elsewhere / "again.safetensors", name="second", seed=1, steps=12, interference=given
    )
    assert overlap_of(apart, first, base) < 0.5 * overlap_of(plain, first, base)
    assert all(torch.equal(same.parameters[name], value) for name, value in apart.parameters.items())
    assert str(tmp_path) not in (elsewhere / "again.safetensors").read_bytes().decode("latin-1")


def test_a_resumed_training_keeps_off_those_that_it_began_with(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    trained(photos, tiny_base, tmp_path / "first.safetensors")
    interference = {"overlap_weight": 10.0, "erasure_prob": 0.5}
    whole = trained(photos, tiny_base, tmp_path / "whole.safetensors", interference=interference)
    (tmp_path / "whole.safetensors").unlink()
    own = {"name": "whole", "method": "lora", "learning_rate": 0.05, "interference": interference}
    config, stops = settings(photos, tiny_base, tmp_path / "parts.safetensors", **own), iter([False, False, True])
    with pytest.raises(Cancelled):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(stops)))
    trained(photos, tiny_base, tmp_path / "later.safetensors")
    (tmp_path / "first.safetensors").rename(tmp_path / "first.away")
    with pytest.raises(UserError, match="Put the others back"):
        train_to_file(config, resume=True)
    (tmp_path / "first.away").rename(tmp_path / "first.safetensors")
    parts = train_to_file(config, resume=True)
    assert all(torch.equal(parts.parameters[name], value) for name, value in whole.parameters.items())


def test_what_adapters_share_counts_once_and_the_rest_leaves_room() -> None:
    torch.manual_seed(0)
    one, other = Factors(torch.randn(20, 2), torch.randn(2, 16)), Factors(torch.randn(20, 2), torch.randn(2, 16))
    assert joint_space([one, one]).shape == (16, 2) and joint_space([one, other]).shape == (16, 4)
    basis = joint_space([one, Factors(other.up, one.down + 1e-9 * other.down)])
    assert basis.shape == (16, 2) and torch.allclose(basis.mT @ basis, torch.eye(2, dtype=basis.dtype))


def test_neighbors_that_are_no_other_concept_are_left_out(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    penalty = {"interference": {"overlap_weight": 10.0}}
    trained(photos, tiny_base, tmp_path / "rex.safetensors", method="spectral-rotation", learning_rate=0.01)
    older = trained(photos, tiny_base, tmp_path / "older.safetensors", name="mug", steps=1)
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "older.safetensors").read_bytes()[:-64] + bytes(64))
    said: list[str] = []
    config = settings(
        photos, tiny_base, tmp_path / "new.safetensors", name="mug", method="spectral-rotation",
        init_from_adapter=tmp_path / "rex.safetensors", token="<mug2>", steps=1, **penalty,
    )  # fmt: skip
    train_to_file(config, hooks=Hooks(notify=said.append))
    assert any("broken.safetensors cannot be read" in text for text in said)
    base, concept = load_base(str(tiny_base), "cpu"), load_concept(photos, name="mug")
    config = settings(photos, tiny_base, tmp_path / "next.safetensors", **penalty)
    kept = earlier_adapters(config, base, concept, None, False)
    assert older.token == "<mug>" and [adapter.token for adapter in kept] == ["<mug2>", "<rex>"]
    start = load_adapter(tmp_path / "rex.safetensors")
    kept = earlier_adapters(config, base, concept, start, False)
    assert kept == [] or all("<rex>" not in adapter.tokens for adapter in kept)


def test_side_by_side_there_are_none_to_keep_off(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(photos), str(photos), "-o", str(tmp_path), "--jobs", "2", "interference.overlap_weight=1"]
    monkeypatch.setattr(sys, "argv", ["spectral-diffusion", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "--jobs 1 is needed" in capsys.readouterr().err


def test_settings_that_would_do_nothing_are_refused(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    earlier = {"earlier_adapters": [tmp_path / "b.safetensors"]}
    with pytest.raises(UserError, match="does nothing without the penalty"):
        train_to_file(settings(photos, tiny_base, output, interference=earlier))
    with pytest.raises(UserError, match="no columns to scale the rate by"):
        train_to_file(settings(photos, tiny_base, output, method="lora", slot_lr_power=1.0))


def test_without_others_the_penalty_says_that_it_does_nothing(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = settings(photos, tiny_base, tmp_path / "a.safetensors", steps=1, interference={"overlap_weight": 1.0})
    train_to_file(config, hooks=Hooks(notify=said.append))
    assert any("overlap_weight does nothing" in text for text in said)


def some_batch(count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(count, 4, 8, 8, generator=generator) for _ in range(2))
    half = torch.full((count, 1, 8, 8), 0.5)
    return Batch(latents, noise, torch.full((count,), 500), ["a photo of <rex>"] * count, weights=half)


def test_erased_samples_have_other_prompts_and_the_bases_predictions(photos: Path, tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    config = TrainConfig(concept=photos, output=photos, interference={"erasure_prob": 0.5})  # type: ignore[arg-type]
    before = some_batch(32)
    others = other_prompts(config)
    batch = erase(before, others, 3, config)
    assert len(set(others)) > 50
    assert batch.erased is not None and 4 < sum(batch.erased) < 28
    assert [("<rex>" not in prompt) for prompt in batch.prompts] == batch.erased
    assert any(token in prompt for prompt in batch.prompts for token in OTHER_TOKENS)
    assert batch.weights is not None and before.weights is not None
    assert [bool(row.eq(1).all()) for row in batch.weights] == batch.erased and bool(before.weights.eq(0.5).all())
    noisy = base.denoiser.add_noise(batch.latents, batch.noise, batch.timesteps)
    with PromptEncoder(base, Named(), 0, 16, OTHER_TOKENS) as encode, unloading(base.models), torch.no_grad():
        alone = base.denoiser.predict(noisy, batch.timesteps, encode(batch.prompts, noisy.shape[-2:]))
        lora = inject_adapter(base.models, AdapterSpec(get_method("lora"), 2))
        for _, parameter in lora.named_parameters():
            parameter.data += 0.3
        adapted = base.denoiser.predict(noisy, batch.timesteps, encode(batch.prompts, noisy.shape[-2:]))
        target = erased_targets(batch.noise, noisy, batch, base, encode)
        for row, erased in enumerate(batch.erased):
            assert torch.allclose(target[row], alone[row] if erased else batch.noise[row], atol=1e-5)
        assert not torch.allclose(adapted, alone, atol=1e-3)


class Named:
    """A concept's words."""

    token, noun = "<rex>", "dog"


def effect(adapter: Adapter, base: Base) -> Tensor:
    """What an adapter adds to the key of the first cross-attention layer."""
    layer = next(name for name in adapter.layers if "attn2.to_k" in name)
    return adapter.factors(layer, flatten(base.weights()[layer])).delta()


def test_erasure_changes_the_training_and_needs_no_pictures(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    plain = trained(photos, tiny_base, tmp_path / "plain.safetensors")
    erased = trained(photos, tiny_base, tmp_path / "erased.safetensors", interference={"erasure_prob": 1.0})
    # With every output erased nothing is left to learn: B starts at zero, and so do its gradients.
    assert float(effect(erased, base).norm()) < 1e-3 * float(effect(plain, base).norm())
