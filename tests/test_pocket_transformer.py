"""The pocket transformer that ships: a stock FLUX.2 klein whose pictures can be named, and every step on it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from spectral_diffusion import pocket
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.app.estimates import base_shape
from spectral_diffusion.batch.estimate import UNKNOWN_MINUTES, needed
from spectral_diffusion.cli import app
from spectral_diffusion.config.presets import preset_settings
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.settings import build
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core import assets
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.metrics.classifiers import classify_images, load_classifier
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.sampling import sample

BASE = "pocket-transformer"
THINGS = ("elephant", "apple", "penguin", "tree", "mushroom", "rocket", "butterfly", "banana", "crab", "car")


def test_it_is_a_stock_pipeline_within_twenty_megabytes() -> None:
    folder = pocket.path(BASE)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 20e6
    stock = DiffusionPipeline.from_pretrained(str(folder), dtype=torch.float32)
    assert type(stock).__name__ == "Flux2KleinPipeline"
    for file in folder.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert str(Path.home()) not in text and '"_name_or_path": "/' not in text, file
    assert json.loads((folder / "pretraining.json").read_text())["artwork"]


def test_single_things_can_be_named() -> None:
    """By the classifier that no pretraining used, which is right on 99 % of true renders."""
    base, settings = load_base(BASE, "cpu"), preset_settings(BASE, "generate")
    scene = build(Scene, settings, {"prompt": "a photo"})
    pictures = sample(base, [f"a photo of a {thing} on a white background" for thing in THINGS], range(10), scene)
    verdicts = classify_images(load_classifier("referee"), pictures, [1] * len(pictures))
    named = [verdict[0].noun for verdict in verdicts]
    assert sum(name == thing for name, thing in zip(named, THINGS, strict=True)) >= 8, named


def test_it_has_a_folder_a_shape_and_no_sketches(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["pocket", "path", BASE])
    assert found.output.strip() == str(pocket.path(BASE))
    wrong = CliRunner().invoke(app, ["pocket", "path", "pocket-transfomer"])
    assert isinstance(wrong.exception, UserError) and "did you mean 'pocket-transformer'" in str(wrong.exception)
    assert base_shape(BASE, "attention").arch == "other" and base_shape("pocket", "attention").arch == "pocket"
    config = TrainConfig(concept=tmp_path, output=tmp_path / "a.safetensors", base=BASE, device="cpu")
    assert needed(config, load_base(BASE, "cpu")).minutes == UNKNOWN_MINUTES
    image = tmp_path / "sketch.png"
    Image.new("L", (128, 128), 255).save(image)
    words = ["generate", "--base", BASE, "--prompt", "a dog", "--sketch", str(image), "-o", str(tmp_path / "a.png")]
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, UserError) and "has seen no control images" in str(refused.exception)
    assert not (tmp_path / "a.png").exists()


def test_from_photos_to_regions_with_its_preset(tmp_path: Path) -> None:
    """Without `--config` the base's own preset is used; everything small is given."""
    few = ["steps=2", "batch_size=1", "prior.batch_size=1", "prior.num_images=1", "crops_per_image=1"]

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    files = {name: tmp_path / f"{name}.safetensors" for name in ("rex", "brew")}
    for slot, (name, file) in enumerate(files.items()):
        run("train", str(assets.concepts() / name), "-o", str(file), "--base", BASE, "--slot", str(slot), *few)
    rex, brew = (load_adapter(file) for file in files.values())
    assert rex.token == "<rex>" and brew.token == "<brew>"
    scene = tmp_path / "scene.yaml"
    scene.write_text(
        f"prompt: '{rex.token} on the left and {brew.token} on the right'\nnum_inference_steps: 1\nregions:\n"
        f"  - {{box: [0, 0, 0.5, 1], prompt: '{rex.token}', adapters: {{{files['rex']}: 1}}}}\n"
        f"  - {{box: [0.5, 0, 1, 1], prompt: '{brew.token}', adapters: {{{files['brew']}: 1}}}}\n"
    )
    run("generate", "--config", str(scene), "-o", str(tmp_path / "bound.png"))
    run("fuse", *map(str, files.values()), "-o", str(tmp_path / "fused"))
    run("generate", "--base", str(tmp_path / "fused"), "--prompt", rex.token, "-o", str(tmp_path / "fused.png"),
        "num_inference_steps=1")  # fmt: skip
    for name in ("bound", "fused"):
        assert Image.open(tmp_path / f"{name}.png").size[1] == 128
    run("export", str(files["rex"]), "-o", str(tmp_path / "rex-lora.safetensors"), "--format", "diffusers")
    stock = DiffusionPipeline.from_pretrained(str(pocket.path(BASE)), dtype=torch.float32)
    stock.load_lora_weights(str(tmp_path / "rex-lora.safetensors"))
    assert stock.get_active_adapters()
