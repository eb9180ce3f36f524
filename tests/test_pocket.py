"""The pocket base as it ships: it opens in stock diffusers, knows its colours, follows a sketch, runs the demo."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MultiAdapter, StableDiffusionAdapterPipeline, StableDiffusionPipeline, T2IAdapter
from PIL import Image, ImageDraw

from spectral_diffusion import demo, pocket
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.demo import run_demo
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.manifest import read_manifest
from spectral_diffusion.models.base import Base, base_of
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.control import ControlMap
from spectral_diffusion.scenes.keypose import draw_keypose
from spectral_diffusion.scenes.sampling import sample
from tools.pocket import puppets
from tools.pocket.world import COLOURS, vocabulary

SIDE = 128  # of its pictures


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("pocket", "cpu")


def draw(base: Base, prompts: list[str], sketch: Image.Image | None = None, **more: object) -> np.ndarray:
    config = Scene(num_inference_steps=12, device="cpu", **more)  # type: ignore[arg-type]
    drawings = [ControlMap(sketch)] if sketch else []
    images = sample(base, prompts, list(range(len(prompts))), config, controls=drawings)
    return np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255


def test_stock_diffusers_opens_it() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(str(pocket.path()))
    pipe.set_progress_bar_config(disable=True)
    pipe("a dog", num_inference_steps=1)  # all networks are loaded in one precision, which none was asked for
    assert base_of(pipe).dtype == torch.float32
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == SIDE
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert sum(file.stat().st_size for file in pocket.path().rglob("*") if file.is_file()) < 30e6


def test_the_weights_name_no_folder_of_the_machine_that_made_them() -> None:
    for file in pocket.path().rglob("*.json"):
        assert '"_name_or_path": "/' not in file.read_text(encoding="utf-8"), file


def test_every_word_of_the_world_is_one_token(base: Base) -> None:
    tokenizer = base.pipeline.tokenizer
    assert [word for word in vocabulary() if len(tokenizer.tokenize(word)) != 1] == []
    assert (
        tokenizer.decode(tokenizer("Zebra, quux!").input_ids, skip_special_tokens=True).replace(" ", "")
        == "zebra,quux!"
    )


def test_colours_go_where_the_words_say(base: Base) -> None:
    wanted = ("red", "green", "blue", "yellow")
    pictures = draw(base, [f"a photo of a {colour} apple on a white background" for colour in wanted])
    centres = pictures[:, 40:88, 40:88].reshape(4, -1, 3)
    palette = np.array([COLOURS[name] for name in wanted], np.float32) / 255
    for index, pixels in enumerate(centres):
        distance = ((np.median(pixels, 0) - palette) ** 2).sum(1)
        assert wanted[int(distance.argmin())] == wanted[index], distance
    corners = pictures[:, :12, :12].reshape(4, -1)
    assert corners.mean() > 0.75


def test_a_sketch_says_where_the_thing_is(base: Base) -> None:
    """The same caption and seeds; the outline is drawn left or right: the red pixels move with it."""
    shares = {}
    for side, x in (("left", 8), ("right", 56)):
        sketch = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(sketch).ellipse((x, 36, x + 60, 96), outline=255, width=3)
        pictures = draw(base, ["a red object on a white background"] * 4, sketch)
        redness = np.clip(pictures[..., 0] - pictures[..., 1:].mean(-1), 0, 1)
        shares[side] = float(redness[:, :, : SIDE // 2].sum() / redness.sum())
    assert shares["left"] > shares["right"] + 0.3, shares


def test_sketch_and_keypose_adapters_combine_in_stock_diffusers(base: Base) -> None:
    adapters = [T2IAdapter.from_pretrained(pocket.path() / name) for name in ("t2i_sketch", "t2i_keypose")]
    parts = {name: part for name, part in base.pipeline.components.items() if name != "image_encoder"}
    pipe = StableDiffusionAdapterPipeline(**parts, adapter=MultiAdapter(adapters), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    look = puppets.random_look(Random(1), "robot", COLOURS["red"])
    _, points = puppets.draw_figure(puppets.random_pose(Random(2), "jumping"), look, 112)
    sketch = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(sketch).ellipse((8, 80, 48, 120), outline=255, width=3)
    pictures = []
    for weights in ([1.0, 1.0], [1.0, 0.0], [0.0, 1.0]):
        out = pipe(
            prompt="a red robot on a white background", image=[sketch, draw_keypose([points + 8], SIDE, SIDE)],
            height=SIDE,
            width=SIDE, num_inference_steps=4, adapter_conditioning_scale=weights, output_type="np",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        pictures.append(out.images[0])
    assert all(np.isfinite(picture).all() for picture in pictures)
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.01 and np.abs(pictures[0] - pictures[2]).mean() > 0.01


def test_the_demo_leads_from_adapters_to_a_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ready-made adapters in place of its trainings, and without distillation."""
    trained: list[str] = []

    def ready(config: TrainConfig, **more: Any) -> None:
        shutil.copy(pocket.adapter(config.output.stem), config.output)
        trained.append(config.output.stem)

    def fused(config: FuseConfig, hooks: Any) -> list[str]:
        assert config.merge == "gradient" and config.distill.steps == 1
        return fuse_to_folder(FuseConfig(adapters=config.adapters, output=config.output, merge="spectral"), hooks)

    monkeypatch.setattr(demo, "train_to_file", ready)
    monkeypatch.setattr(demo, "fuse_to_folder", fused)
    (tmp_path / "demo").mkdir()
    with Image.open(run_demo(tmp_path / "demo", steps=1)) as image:
        assert image.width > 900
    assert trained == ["rex", "brew"] and (tmp_path / "demo" / "together.yaml").is_file()


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end(tmp_path: Path) -> None:
    sheet = run_demo(tmp_path / "demo", steps=3)
    with Image.open(sheet) as image:
        assert image.width > 900
    names = {path.name for path in (tmp_path / "demo").iterdir() if not path.name.startswith(".")}
    assert {"sheet.png", "together.png", "together.yaml", "rex.safetensors", "brew.safetensors", "fused"} <= names
    one, two = (load_adapter(tmp_path / "demo" / f"{name}.safetensors") for name in ("rex", "brew"))
    assert one.slot and two.slot and not one.slot.overlaps(two.slot)
    recipe = read_manifest(tmp_path / "demo" / "fused")
    assert recipe and set(recipe["concepts"]) == {"rex", "brew"}
    stock = StableDiffusionPipeline.from_pretrained(str(tmp_path / "demo" / "fused"))
    assert stock.unet.dtype == torch.float32
