"""Preservation: what else the base generates stays while one concept is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_photos
from PIL import Image

from spectral_diffusion.adapters.apply import put_adapters
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.train import DataConfig, PriorPreservationConfig, TrainConfig
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.prompt_encoder import PromptEncoder
from spectral_diffusion.training import prior_images as prior_images_module
from spectral_diffusion.training.batch import Batch
from spectral_diffusion.training.prior_images import PriorImages, make_prior_images, prior_prompts
from spectral_diffusion.training.prior_preservation import (
    OTHER_TOKENS,
    PriorTargets,
    cut_mix,
    predict_both,
    predict_prior_targets,
)
from spectral_diffusion.training.run import train_to_file

KEEP = PriorPreservationConfig(loss_weight=1.0, batch_size=2, num_images=4, other_token_prob=0.5)


def settings(photos: Path, base: Path, output: Path, **more: object) -> TrainConfig:
    values = {"concept": photos, "output": output, "base": str(base), "rank": 2, "steps": 6, "device": "cpu"}
    return TrainConfig(**{**values, **more})  # type: ignore[arg-type]


@torch.no_grad()
def drift(base: Base, encode: PromptEncoder, targets: PriorTargets) -> float:
    """How far the networks, as they are, predict from what the untouched base predicted."""
    predicted = base.denoiser.predict(targets.noisy, targets.timesteps, encode(targets.prompts))
    return float((predicted - targets.targets).square().mean())


def test_prior_preservation_keeps_the_base_while_a_concept_is_trained(
    photos: Path, tiny_base: Path, tmp_path: Path
) -> None:
    drifts = {}
    for weight in (0.0, 3.0):
        keep = KEEP.model_copy(update={"loss_weight": weight})
        output = tmp_path / f"{weight}" / "rex.safetensors"
        config = settings(photos, tiny_base, output, steps=60, learning_rate=3e-2, prior=keep)
        adapter = train_to_file(config)
        assert adapter.norm() > 0
        base = load_base(str(tiny_base), "cpu")
        others = config.model_copy(update={"seed": 5})  # pictures and words that training did not see
        prior_images = make_prior_images(base, others, ["dog"], base.size)
        with PromptEncoder(base, load_concept(photos, name="some"), 5, base.size, OTHER_TOKENS) as encode:
            targets = predict_prior_targets(prior_images, base.denoiser, others, encode)
            assert drift(base, encode, targets) < 1e-9
        put_adapters(base, [(load_adapter(output), 1.0)])
        with PromptEncoder(base, load_concept(photos, name="some"), 5, base.size, OTHER_TOKENS) as encode:
            drifts[weight] = drift(base, encode, targets)
    assert drifts[3.0] < 0.5 * drifts[0.0]


@pytest.mark.parametrize("stop", [2, 4])
def test_a_stopped_run_with_preservation_resumes_bit_for_bit(
    photos: Path, tiny_base: Path, tmp_path: Path, stop: int
) -> None:
    keep = KEEP.model_copy(update={"cut_mix_prob": 0.5})
    whole = train_to_file(settings(photos, tiny_base, tmp_path / "a" / "rex.safetensors", prior=keep))
    config = settings(photos, tiny_base, tmp_path / "b" / "rex.safetensors", prior=keep)
    done: list[int] = []
    with pytest.raises(Cancelled):
        train_to_file(
            config,
            hooks=Hooks(
                progress=lambda event: done.append(event.done) if event.stage == "train" else None,
                should_stop=lambda: len(done) >= stop,
            ),
        )
    again = train_to_file(config, resume=True)
    assert all(torch.equal(whole.parameters[n], again.parameters[n]) for n in whole.parameters)
    assert torch.equal(whole.vectors["text_encoder"], again.vectors["text_encoder"])
    plain = train_to_file(settings(photos, tiny_base, tmp_path / "c" / "rex.safetensors"))
    assert any(not torch.equal(whole.parameters[n], plain.parameters[n]) for n in whole.parameters)


def test_prior_images_are_cached_and_those_of_other_classes_shared(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path / "cache"))
    config = settings(photos, tiny_base, tmp_path / "a.safetensors", prior=KEEP)
    base, calls = load_base(str(tiny_base), "cpu"), []
    sample = prior_images_module.sample_prior_latents
    monkeypatch.setattr(
        prior_images_module,
        "sample_prior_latents",
        lambda base, asked, *more: calls.append(asked) or sample(base, asked, *more),
    )
    seen: list[Event] = []
    first = make_prior_images(base, config, ["dog"], 16, Hooks(seen.append))
    assert [len(asked) for asked in calls] == [2, 2]
    assert seen[-1] == Event("prior images", 4, 4) and {event.total for event in seen} == {4}
    again = make_prior_images(base, config, ["dog"], 16)
    assert len(calls) == 2 and torch.equal(first.latents, again.latents)
    other = make_prior_images(base, config, ["cat"], 16)
    assert [len(asked) for asked in calls] == [2, 2, 2], "only those of the concept's own class are generated anew"
    assert torch.equal(first.latents[1:3], other.latents[1:3]) and not torch.equal(first.latents[0], other.latents[0])
    for file in (tmp_path / "cache" / "prior-images").iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(make_prior_images(base, config, ["dog"], 16).latents, first.latents) and len(calls) == 5


def test_the_generation_of_prior_images_stops_when_asked(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path / "cache"))
    config = settings(photos, tiny_base, tmp_path / "rex.safetensors", prior=KEEP)
    asked = iter(range(100))
    with pytest.raises(Cancelled, match="before the first step"):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(asked) >= 3))
    assert next(asked) == 4, "asked at every step of a picture"
    assert train_to_file(config, resume=True).norm() > 0


def test_two_concepts_at_one_seed_begin_with_different_words(tiny_base: Path, tmp_path: Path) -> None:
    first = {}
    for name in ("rex", "brew"):
        folder = make_photos(tmp_path / name)
        adapter = train_to_file(settings(folder, tiny_base, tmp_path / f"{name}.safetensors", steps=1))
        first[name] = adapter.vectors["text_encoder"][0]
    assert torch.nn.functional.cosine_similarity(first["rex"], first["brew"], dim=0).abs() < 0.7


def test_prior_prompts_have_the_concepts_own_class_and_others() -> None:
    things, prompts = prior_prompts(PriorPreservationConfig(num_images=30), ["octopus"], seed=0)
    assert sum("octopus" in thing for thing in things) == 10
    assert all(thing in prompt for thing, prompt in zip(things, prompts, strict=True))
    assert len(set(prompts)) > 20


def test_cut_mix_puts_photo_and_prior_image_side_by_side() -> None:
    photos = Batch(
        torch.ones(4, 2, 3, 3), torch.zeros(4, 2, 3, 3), torch.tensor([1, 2, 3, 4]), ["x"] * 4, tokens=["<rex>"] * 4
    )
    prior_images = PriorImages(torch.zeros(5, 2, 3, 3), [f"a thing{i}" for i in range(5)], ["p"] * 5)
    config = TrainConfig(concept=Path("c"), output=Path("o"))
    sides = set()
    for step in range(6):
        mixed = cut_mix(photos, prior_images, step, config)
        assert mixed.latents.shape == (2, 2, 3, 6) and torch.equal(mixed.timesteps, torch.tensor([1, 2]))
        for latents, prompt in zip(mixed.latents, mixed.prompts, strict=True):
            left = bool(latents[..., :3].all())
            assert bool(latents[..., 3:].all()) != left
            assert (prompt.index("<rex>") < prompt.index("a thing")) == left
            sides.add(left)
    assert sides == {True, False}


def test_class_images_need_no_masks(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    dogs = make_photos(tmp_path / "dogs", 2, seed=7)
    config = settings(photos, tiny_base, tmp_path / "a.safetensors", prior=KEEP, data={"class_images_dir": dogs},
                      objective={"attention_loss_weight": 0.1})  # fmt: skip
    assert len(make_prior_images(load_base(str(tiny_base), "cpu"), config, ["dog"], 16).prompts) == 2


def test_class_images_take_the_place_of_generated_ones(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    dogs = make_photos(tmp_path / "dogs", 6, seed=7)
    (dogs / "2.txt").write_text("<TOK> on the grass")
    (dogs / "3.txt").write_text("a sleeping dog")
    config = settings(photos, tiny_base, tmp_path / "a.safetensors", prior=KEEP, data={"class_images_dir": dogs})
    base = load_base(str(tiny_base), "cpu")
    prior_images, again = (make_prior_images(base, config, ["dog"], 16) for _ in range(2))
    assert prior_images.latents.shape == (4, 4, 8, 8) and torch.equal(prior_images.latents, again.latents)
    assert set(prior_images.subjects) == {"a dog"} and len(prior_images.prompts) == 4
    assert set(prior_images.prompts) <= {"a photo of a dog", "a dog on the grass", "a sleeping dog"}
    every = config.model_copy(update={"prior": KEEP.model_copy(update={"num_images": 50})})
    assert sorted(make_prior_images(base, every, ["dog"], 16).prompts)[:2] == [
        "a dog on the grass",
        "a photo of a dog",
    ]
    with torch.no_grad():
        pixels = torch.full((1, 3, 16, 16), -1.0)  # what they hold is what the files show
        black = base.pipeline.vae.encode(pixels).latent_dist.mean * base.pipeline.vae.config.scaling_factor
    Image.new("RGB", (40, 20)).save(tmp_path / "black.png")
    (tmp_path / "one").mkdir()
    (tmp_path / "black.png").rename(tmp_path / "one" / "0.png")
    one = config.model_copy(update={"data": DataConfig(class_images_dir=tmp_path / "one")})
    assert torch.allclose(make_prior_images(base, one, ["dog"], 16).latents, black, atol=1e-5)
    drawn = make_prior_images(base, config.model_copy(update={"data": DataConfig()}), ["dog"], 16)
    assert not torch.equal(drawn.latents, prior_images.latents)
    (tmp_path / "empty").mkdir()
    empty = config.model_copy(update={"data": DataConfig(class_images_dir=tmp_path / "empty")})
    with pytest.raises(UserError, match="empty holds no readable photo"):
        make_prior_images(base, empty, ["dog"], 16)
    assert train_to_file(config).norm() > 0


def test_targets_of_another_shape_are_predicted_apart(photos: Path, tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    wide = Batch(torch.randn(2, 4, 4, 12), torch.randn(2, 4, 4, 12), torch.tensor([3, 500]), ["a dog", "<some>"])
    square = Batch(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), ["a dog", "<some>"])
    targets = PriorTargets(torch.randn(1, 4, 8, 8), torch.tensor([9]), ["a cat"], torch.randn(1, 4, 8, 8))
    denoiser = base.denoiser
    with PromptEncoder(base, load_concept(photos, name="some"), 5, base.size) as encode, torch.no_grad():
        for samples in (wide, square):
            photo, held = predict_both(denoiser, encode, samples.latents, samples, targets)
            alone, none = predict_both(denoiser, encode, samples.latents, samples, None)
            assert held is not None and none is None and photo.shape == samples.latents.shape
            assert torch.allclose(photo, alone, atol=1e-5)
            want = denoiser.predict(targets.noisy, targets.timesteps, encode(targets.prompts))
            assert torch.allclose(held, want, atol=1e-5)


def test_cut_mix_weighs_the_photos_side_by_its_mask_and_fits_other_shapes() -> None:
    tall, prior_images = torch.ones(2, 4, 10, 6), PriorImages(torch.zeros(1, 4, 8, 8), ["a cup"], ["a cup"])
    tall[:, :, 8:] = 7  # the foot of the photo, which is cut off
    config = TrainConfig(concept=Path("c"), output=Path("o"))
    weights = torch.full((2, 1, 10, 6), 0.25)
    samples = Batch(tall, torch.zeros_like(tall), torch.tensor([1, 2]), ["x"] * 2, weights, tokens=["<rex>"] * 2)
    for step in range(6):
        mixed = cut_mix(samples, prior_images, step, config)
        assert mixed.latents.shape == mixed.noise.shape == (1, 4, 8, 14)
        assert mixed.weights is not None and mixed.weights.shape == (1, 1, 8, 14)
        assert torch.equal(mixed.weights == 0.25, mixed.latents[:, :1] == 1)
        assert torch.equal(mixed.weights == 1, mixed.latents[:, :1] == 0)
    samples.weights = None
    assert cut_mix(samples, prior_images, 0, config).weights is None


def test_prior_prompts_say_a_or_an() -> None:
    prior = PriorPreservationConfig(num_images=24, adjectives=["", "orange", "red"], nouns=["octopus", "dog"])
    subjects, prompts = prior_prompts(prior, ["apple"], seed=0)
    assert {"an octopus", "a dog", "an orange dog", "a red octopus"} <= {*subjects}
    assert all(subject.startswith("an ") == (subject.split()[1][0] in "ao") for subject in subjects)
    assert all(subject in prompt for subject, prompt in zip(subjects, prompts, strict=True))
