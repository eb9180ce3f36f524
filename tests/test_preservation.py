"""Preservation: what else the base draws stays put while one concept is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_photos
from diffusers import DDPMScheduler

from spectral_diffusion.base import Base, load_base
from spectral_diffusion.config import PreservationConfig, TrainConfig
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.formats.native import load_adapter
from spectral_diffusion.generation.pipeline import put_on
from spectral_diffusion.progress import silent
from spectral_diffusion.training.conditioning import Conditioner
from spectral_diffusion.training.draws import Samples
from spectral_diffusion.training.loop import Stopped
from spectral_diffusion.training.preservation import (
    OTHERS,
    Anchors,
    Ordinary,
    cut_mix,
    draw_anchors,
    draw_ordinary,
    ordinary_prompts,
)
from spectral_diffusion.training.run import train_to_file

KEEP = PreservationConfig(weight=1.0, batch=2, pictures=4, others=0.5)


def settings(photos: Path, base: Path, output: Path, **more: object) -> TrainConfig:
    values = {"concept": photos, "output": output, "base": str(base), "rank": 2, "steps": 6, "device": "cpu"}
    return TrainConfig(**{**values, **more})  # type: ignore[arg-type]


@torch.no_grad()
def drift(base: Base, condition: Conditioner, anchors: Anchors) -> float:
    """How far the networks, as they are, predict from what the untouched base predicted."""
    predicted = base.pipeline.unet(anchors.noisy, anchors.timesteps, **condition(anchors.prompts)).sample
    return float((predicted - anchors.targets).square().mean())


def test_preservation_holds_the_base_while_a_concept_is_learnt(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    drifts = {}
    for weight in (0.0, 3.0):
        keep = KEEP.model_copy(update={"weight": weight})
        output = tmp_path / f"{weight}" / "rex.safetensors"
        config = settings(photos, tiny_base, output, steps=60, learning_rate=3e-2, preservation=keep)
        adapter = train_to_file(config)
        assert adapter.norm() > 0
        base = load_base(str(tiny_base), "cpu")
        schedule = DDPMScheduler.from_config(base.pipeline.scheduler.config)
        others = config.model_copy(update={"seed": 5})  # pictures and words that training did not see
        ordinary = draw_ordinary(base, others, "dog", base.size, silent)
        with Conditioner(base, load_concept(photos, name="some"), 5, base.size, OTHERS) as condition:
            anchors = draw_anchors(ordinary, base, schedule, others, condition)
            assert drift(base, condition, anchors) < 1e-9
        put_on(base, [(load_adapter(output), 1.0)])
        with Conditioner(base, load_concept(photos, name="some"), 5, base.size, OTHERS) as condition:
            drifts[weight] = drift(base, condition, anchors)
    assert drifts[3.0] < 0.5 * drifts[0.0]


@pytest.mark.parametrize("stop", [2, 4])
def test_a_stopped_run_with_preservation_resumes_bit_for_bit(
    photos: Path, tiny_base: Path, tmp_path: Path, stop: int
) -> None:
    keep = KEEP.model_copy(update={"cut_mix": 0.5})
    whole = train_to_file(settings(photos, tiny_base, tmp_path / "a" / "rex.safetensors", preservation=keep))
    config = settings(photos, tiny_base, tmp_path / "b" / "rex.safetensors", preservation=keep)
    asked = iter(range(100))
    with pytest.raises(Stopped):
        train_to_file(config, should_stop=lambda: next(asked) >= stop)
    again = train_to_file(config, resume=True)
    assert all(torch.equal(whole.parameters[n], again.parameters[n]) for n in whole.parameters)
    assert torch.equal(whole.vectors["text_encoder"], again.vectors["text_encoder"])
    plain = train_to_file(settings(photos, tiny_base, tmp_path / "c" / "rex.safetensors"))
    assert any(not torch.equal(whole.parameters[n], plain.parameters[n]) for n in whole.parameters)


def test_two_concepts_at_one_seed_begin_with_different_words(tiny_base: Path, tmp_path: Path) -> None:
    first = {}
    for name in ("rex", "brew"):
        folder = make_photos(tmp_path / name)
        adapter = train_to_file(settings(folder, tiny_base, tmp_path / f"{name}.safetensors", steps=1))
        first[name] = adapter.vectors["text_encoder"][0]
    assert torch.nn.functional.cosine_similarity(first["rex"], first["brew"], dim=0).abs() < 0.7


def test_ordinary_prompts_hold_the_concepts_own_class_and_others() -> None:
    things, prompts = ordinary_prompts(PreservationConfig(pictures=30), "octopus", seed=0)
    assert sum("octopus" in thing for thing in things) == 10
    assert all(thing in prompt for thing, prompt in zip(things, prompts, strict=True))
    assert len(set(prompts)) > 20


def test_cut_mix_puts_photo_and_ordinary_picture_side_by_side() -> None:
    photos = Samples(torch.ones(4, 2, 3, 3), torch.zeros(4, 2, 3, 3), torch.tensor([1, 2, 3, 4]), ["x"] * 4)
    ordinary = Ordinary(torch.zeros(5, 2, 3, 3), [f"a thing{i}" for i in range(5)], ["p"] * 5)
    config = TrainConfig(concept=Path("c"), output=Path("o"))
    sides = set()
    for step in range(6):
        mixed = cut_mix(photos, ordinary, "<rex>", step, config)
        assert mixed.latents.shape == (2, 2, 3, 6) and torch.equal(mixed.timesteps, torch.tensor([1, 2]))
        for latents, prompt in zip(mixed.latents, mixed.prompts, strict=True):
            left = bool(latents[..., :3].all())
            assert bool(latents[..., 3:].all()) != left
            assert (prompt.index("<rex>") < prompt.index("a thing")) == left
            sides.add(left)
    assert sides == {True, False}
