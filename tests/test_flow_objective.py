"""When a flow is trained: the density of its timesteps, their shift and their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_photos
from diffusers import FlowMatchEulerDiscreteScheduler
from families import make_tiny_klein

from spectral_diffusion.config.train import ObjectiveConfig, TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.models.denoiser import Denoiser
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.training.run import train_to_file


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_klein(tmp_path_factory.mktemp("klein") / "klein")


@pytest.fixture
def denoiser(klein: Path) -> Denoiser:
    return load_base(str(klein), "cpu").denoiser


def sampled(denoiser: Denoiser, power: float = 1.0, count: int = 4000, **objective: object) -> torch.Tensor:
    """Timesteps of one generator, in 0…1."""
    generator, settings = torch.Generator().manual_seed(0), ObjectiveConfig(**objective)  # type: ignore[arg-type]
    times = [denoiser.sample_timestep(generator, power, settings) for _ in range(count)]
    return torch.stack(times).float() / denoiser.num_timesteps


def test_uniform_timesteps_are_those_of_before(denoiser: Denoiser) -> None:
    generator = torch.Generator().manual_seed(0)
    want = torch.stack([(torch.rand((), generator=generator) ** 0.5 * 1000).long() for _ in range(50)])
    assert torch.equal(sampled(denoiser, 0.5, 50) * 1000, want.float())


def test_a_density_has_its_moments(denoiser: Denoiser) -> None:
    normal = torch.logit(sampled(denoiser, timestep_density="logit_normal", logit_mean=0.5, logit_std=0.8))
    assert normal.mean() == pytest.approx(0.5, abs=0.05) and normal.std() == pytest.approx(0.8, abs=0.05)
    mode = sampled(denoiser, timestep_density="mode")
    assert ((mode > 0.3) & (mode < 0.7)).float().mean() > 0.5  # 0.4 where the density is uniform
    assert float(mode.min()) >= 0 and float(mode.max()) < 1


def test_a_shift_is_that_of_the_sampler(denoiser: Denoiser) -> None:
    """The default is the scheduler's own: sorted timesteps are spread as its sigmas are."""
    config = {**denoiser.pipeline.scheduler.config, "shift": 3.0}
    denoiser.pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    shifted = sampled(denoiser).sort().values
    own = denoiser.pipeline.scheduler.sigmas.sort().values
    quantiles = torch.linspace(0.05, 0.95, 19)
    assert torch.allclose(shifted.quantile(quantiles), own.quantile(quantiles), atol=0.02)
    assert torch.equal(sampled(denoiser, timestep_shift=3), sampled(denoiser))
    none = sampled(denoiser, timestep_shift=1).sort().values
    assert float(none.median()) == pytest.approx(0.5, abs=0.02)
    config["use_dynamic_shifting"] = True  # by the size of a picture, which has no say in training
    denoiser.pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    assert torch.equal(sampled(denoiser).sort().values, none)


def test_weights_are_those_of_the_paper(denoiser: Denoiser) -> None:
    times = torch.tensor([99, 499, 999])
    assert denoiser.timestep_weights(times, ObjectiveConfig()) is None
    root = denoiser.timestep_weights(times, ObjectiveConfig(loss_weighting="sigma_sqrt"))
    assert root is not None and torch.allclose(root, torch.tensor([100.0, 4.0, 1.0]))
    map_ = denoiser.timestep_weights(times, ObjectiveConfig(loss_weighting="cosmap"))
    assert map_ is not None and torch.allclose(map_ * torch.pi, torch.tensor([2 / 0.82, 4.0, 2.0]))


def test_weights_and_shift_change_what_is_learned(klein: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "rex", seed=0)
    made = []
    for name, more in (("a", {}), ("b", {"loss_weighting": "cosmap"}), ("c", {"timestep_shift": 3.0})):
        config = TrainConfig(
            concept=photos, output=tmp_path / f"{name}.safetensors", base=str(klein), rank=2, steps=2, device="cpu",
            class_noun="dog", objective=ObjectiveConfig(**more), name=name, token=f"<{name}>",
        )  # fmt: skip
        made.append(next(iter(train_to_file(config).parameters.values())))
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("more", [{"timestep_shift": 2.0}, {"loss_weighting": "cosmap"}])
def test_what_needs_a_flow_is_refused_elsewhere(tiny_base: Path, photos: Path, tmp_path: Path, more: dict) -> None:
    config = TrainConfig(
        concept=photos, output=tmp_path / "a.safetensors", base=str(tiny_base), rank=1, steps=1, device="cpu",
        class_noun="dog", objective=ObjectiveConfig(**more),
    )  # fmt: skip
    with pytest.raises(UserError, match="match a flow") as caught:
        train_to_file(config)
    assert caught.value.fixes[0].option == f"objective.{next(iter(more))}"
