"""Styles are concepts without a place: how they are drawn, trained, asked for and fused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import yaml
from conftest import make_photos
from PIL import Image

from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.fuse import CalibrationConfig, DistillConfig, FuseConfig
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.train import PriorPreservationConfig, TrainConfig
from spectral_diffusion.core import assets
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.data.image_io import open_photo
from spectral_diffusion.data.joint import joined
from spectral_diffusion.merging.calibration import calibration_prompts
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.teacher_targets import prepare_targets
from spectral_diffusion.metrics.encoders import load_encoder
from spectral_diffusion.metrics.identity import auc
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.auto_regions import concepts_named, styles_of
from spectral_diffusion.training.batch import caption_templates
from spectral_diffusion.training.prior_images import prior_prompts
from spectral_diffusion.training.run import train_to_file
from tools.pocket.styles import READY_MADE, STYLES, Style, alike, near_miss, random_style, styled, tiled


def style_folder(folder: Path, captions: bool = True) -> Path:
    """Photos of a style, as a person keeps them."""
    make_photos(folder)
    (folder / "concept.yaml").write_text(yaml.safe_dump({"name": "ink", "noun": "style", "token": "<ink>"}))
    if captions:
        for index, photo in enumerate(sorted(folder.glob("*.png"))):
            photo.with_suffix(".txt").write_text(f"a red dog number {index}, in <TOK> style")
    return folder


def settings(concept: Path, base: Path, output: Path, **more: object) -> TrainConfig:
    values = {"concept": concept, "output": output, "base": str(base), "rank": 2, "steps": 4, "device": "cpu"}
    return TrainConfig(**{**values, **more})  # type: ignore[arg-type]


def test_the_ready_made_styles_are_concepts_of_the_class_style() -> None:
    for name in READY_MADE:
        concept = load_concept(assets.concepts() / name)
        assert concept.is_style and concept.nouns == [] and concept.styles == [concept.token] == [f"<{name}>"]
        assert len(concept.photos) == 16 and all("in <TOK> style" in str(photo.caption) for photo in concept.photos)
        assert concept.subject == f"a dog in <{name}> style"
    rex = load_concept(assets.concepts() / "rex")
    assert not rex.is_style and rex.styles == [] and rex.subject == "<rex>"
    both = joined([rex, load_concept(assets.concepts() / "bands")])
    assert not both.is_style and both.nouns == ["dog"] and both.styles == ["<bands>"]


def test_a_styles_prior_images_show_no_style() -> None:
    subjects, prompts = prior_prompts(PriorPreservationConfig(num_images=30), [], seed=0)
    assert len(subjects) == 30 and not any("style" in text for text in (*subjects, *prompts))


def test_a_style_is_never_cut_in_half(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import spectral_diffusion.training.loop as loop

    seen: list[str] = []
    plain = loop.cut_mix

    def watched(samples: object, *args: object) -> object:
        mixed = plain(samples, *args)  # type: ignore[arg-type]
        seen.extend(mixed.prompts)
        return mixed

    monkeypatch.setattr(loop, "cut_mix", watched)
    prior = PriorPreservationConfig(loss_weight=1.0, batch_size=1, num_images=2, cut_mix_prob=1.0)
    style = style_folder(tmp_path / "ink")
    train_to_file(settings(style, tiny_base, tmp_path / "ink" / "ink.safetensors", prior=prior))
    assert not seen
    thing = make_photos(tmp_path / "mug")
    train_to_file(settings(thing, tiny_base, tmp_path / "mug" / "mug.safetensors", prior=prior, joint_concepts=[style]))
    assert seen and all("<mug>" in prompt and "<ink>" not in prompt for prompt in seen)


def test_captions_of_a_style_without_any(tmp_path: Path) -> None:
    bare = load_concept(style_folder(tmp_path / "ink", captions=False))
    config = TrainConfig(concept=tmp_path / "ink", output=Path("o"))
    assert all(text.endswith("in {} style") for text in caption_templates(config, bare))
    own = config.model_copy(update={"templates": ["{} all over"]})
    assert caption_templates(own, bare) == ["{} all over"]
    assert caption_templates(config, replace(bare, noun="dog")) == config.templates


def test_calibration_and_teaching_ask_for_a_style_in_things(tiny_base: Path, tmp_path: Path) -> None:
    prompts = calibration_prompts(CalibrationConfig(num_images=8), "<ink>", 0, is_style=True)
    assert len(set(prompts)) > 4 and all("in <ink> style" in prompt for prompt in prompts)
    assert all("<mug>" in p and "style" not in p for p in calibration_prompts(CalibrationConfig(), "<mug>", 0))
    path = tmp_path / "ink.safetensors"
    train_to_file(settings(style_folder(tmp_path / "ink"), tiny_base, path))
    adapter = load_adapter(path)
    assert adapter.styles == ["<ink>"]
    base = load_base(str(tiny_base), "cpu")
    quick = DistillConfig(steps=1, num_images=6, num_prior_images=1, noises_per_image=1)
    targets = prepare_targets(base, [adapter], {}, quick, 0)
    assert all("in <ink> style" in prompt for prompt in targets.concepts[0].prompts)


def test_a_style_fuses_with_a_thing_by_the_merge_for_styles(tiny_base: Path, tmp_path: Path) -> None:
    files = [tmp_path / "ink.safetensors", tmp_path / "mug.safetensors"]
    train_to_file(settings(style_folder(tmp_path / "ink"), tiny_base, files[0], method="lora"))
    train_to_file(settings(make_photos(tmp_path / "mug"), tiny_base, files[1], method="lora"))
    fuse_to_folder(FuseConfig(adapters=files, output=tmp_path / "fused", base=str(tiny_base), merge="np-lora"))
    # In the fused model the thing may get a place, the style never does.
    train_to_file(
        settings(make_photos(tmp_path / "cup", seed=4), tiny_base, tmp_path / "cup.safetensors", method="lora")
    )
    files.append(tmp_path / "cup.safetensors")
    fuse_to_folder(FuseConfig(adapters=files, output=tmp_path / "three", base=str(tiny_base), merge="np-lora"))
    fused = load_base(str(tmp_path / "three"), "cpu")
    prompt = "<mug> beside <cup>, in <ink> style"
    found = concepts_named(fused, Scene(prompt=prompt, auto_regions=True), {})
    assert found == {"<cup>": "<cup>", "<mug>": "<mug>"}
    assert styles_of(fused) == ["<ink>"] and styles_of(load_base(str(tiny_base), "cpu")) == []


def scene(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_no_style_changes_nothing_and_every_other_one_something() -> None:
    assert np.array_equal(styled(scene(), Style()), scene())
    for seed in range(40):
        style = random_style(Random(seed))
        made = styled(scene(), style)
        assert made.shape == (64, 64, 3) and made.dtype == np.uint8
        assert np.array_equal(made, styled(scene(), style)) and not np.array_equal(made, scene())


def test_tiles_have_their_mean_colour() -> None:
    pixels = scene().astype(np.float32)
    tiles = tiled(pixels, 8)
    assert np.allclose(tiles[8, 16], pixels[8:16, 16:24].mean((0, 1)))
    assert np.ptp(tiles[8:16, 16:24], axis=(0, 1)).max() == 0
    assert tiled(pixels, 12).shape == pixels.shape


def test_training_never_comes_near_a_ready_made_style() -> None:
    random = Random(1)
    for _ in range(200):
        style = random_style(random)
        miss = near_miss(style, random)
        assert style != miss
        assert not any(alike(one, ready) for one in (style, miss) for ready in STYLES.values())
    assert all(alike(style, style) for style in STYLES.values())


@pytest.mark.parametrize("name", STYLES)
def test_the_shipped_encoder_sees_a_style_in_anything(name: str) -> None:
    """Photos of a ready-made style are nearer to each other than to those of the others and to pictures in none."""
    encoder = load_encoder("pocket-style")
    vectors = {
        folder: encoder.embed([open_photo(photo.path) for photo in load_concept(assets.concepts() / folder).photos])
        for folder in (*STYLES, "rex", "moss")
    }
    own = vectors.pop(name)
    same = (own @ own.mT)[~torch.eye(len(own), dtype=torch.bool)]
    for other in vectors.values():
        assert auc(same, (own @ other.mT).flatten()) > 0.75  # posters against plain pictures are the hardest


def test_the_shipped_encoder_of_things_in_any_style_tells_look_alikes_apart() -> None:
    """Rex in a ready-made style is nearer to rex's photos than to fido's."""
    encoder = load_encoder("pocket-any-style")
    photos = {
        name: [open_photo(photo.path) for photo in load_concept(assets.concepts() / name).photos]
        for name in ("rex", "fido")
    }
    centers = {name: encoder.embed(images).mean(0) for name, images in photos.items()}
    for style in STYLES.values():
        made = [Image.fromarray(styled(np.asarray(image.convert("RGB")), style)) for image in photos["rex"]]
        vectors = encoder.embed(made)
        assert float((vectors @ centers["rex"] > vectors @ centers["fido"]).double().mean()) >= 0.75
