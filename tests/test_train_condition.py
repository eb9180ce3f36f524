"""Training a T2I-Adapter: it learns, resumes bit for bit, and stock diffusers opens what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import make_photos, make_tiny_base
from diffusers import T2IAdapter, UNet2DConditionModel
from PIL import Image, ImageOps
from test_bases import folder as other_base  # noqa: F401 - of Stable Diffusion 2 and XL
from typer.testing import CliRunner

from spectral_diffusion import pocket
from spectral_diffusion.cli.train_control import train_control as verb
from spectral_diffusion.config.control import ControlConfig
from spectral_diffusion.config.scene import ControlImage, Scene
from spectral_diffusion.config.settings import build, read_yaml
from spectral_diffusion.core.errors import Cancelled, NotFiniteError, UserError
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.data.control_pairs import encode_pairs, open_control_image, read_pairs
from spectral_diffusion.models.architectures import build_meta
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.control import ControlMap, read_control_image
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.training.control_adapter import control_state_path, fitting_shape, train_control


def make_pairs(folder: Path, count: int = 3, kind: str = "sketch") -> Path:
    """Noise, the drawing of each in a folder of its own: where it is bright."""
    make_photos(folder, count)
    (folder / kind).mkdir()
    for path in sorted(folder.glob("*.png")):
        gray = Image.open(path).convert("L").point(lambda value: 255 if value > 160 else 0)
        (gray if kind == "sketch" else gray.convert("RGB")).save(folder / kind / path.name)
    rows = [{"file_name": f"{index}.png", "text": f"a red cup number {index}"} for index in range(count - 1)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return make_pairs(tmp_path / "pairs")


def settings(pairs: Path, base: Path, output: Path, **more: object) -> ControlConfig:
    values = {"folder": pairs, "output": output, "base": str(base), "steps": 6, "batch_size": 2, "device": "cpu"}
    return ControlConfig(**{**values, "learning_rate": 1e-3, **more})  # type: ignore[arg-type]


def same(one: Path, two: Path) -> bool:
    first, second = (T2IAdapter.from_pretrained(path).state_dict() for path in (one, two))
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss(pairs: Path, tmp_path: Path) -> None:
    """At high noise v is the picture, which even a random U-Net can be told."""
    losses: list[float] = []

    def watch(event: Event) -> None:
        if event.stage == "train":
            losses.append(event.metrics["loss"])

    base = load_base(str(make_tiny_base(tmp_path / "base", prediction_type="v_prediction")), "cpu")
    before = {n: p.clone() for model in base.models.values() for n, p in model.state_dict().items()}
    views = {"crops_per_image": 2, "resize_ratio": 1.2, "flip": True}
    config = settings(pairs, tmp_path / "base", tmp_path / "out", steps=60, batch_size=4, timestep_power=0.05, **views)
    train_control(config.model_copy(update={"learning_rate": 1e-2}), base, hooks=Hooks(progress=watch))
    assert losses[-1] < 0.6 * losses[0]
    after = {n: p for model in base.models.values() for n, p in model.state_dict().items()}
    assert all(torch.equal(before[n], after[n]) for n in before)  # the base is frozen


@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_run_resumes_bit_for_bit(pairs: Path, tiny_base: Path, tmp_path: Path, stop: int) -> None:
    whole, halves, other = (tmp_path / name for name in ("whole", "halves", "other"))
    train_control(settings(pairs, tiny_base, whole))
    config = settings(pairs, tiny_base, halves, checkpointing_steps=2)
    asked = iter(range(100))
    with pytest.raises(Cancelled, match=f"step {stop} of 6"):
        train_control(config, hooks=Hooks(should_stop=lambda: next(asked) >= stop))
    assert control_state_path(halves).exists() and not halves.exists()
    with pytest.raises(UserError, match="batch_size=2, now it is 3"):
        train_control(config.model_copy(update={"batch_size": 3}), resume=True)
    train_control(config, resume=True)
    assert same(whole, halves) and not control_state_path(halves).exists()
    train_control(settings(pairs, tiny_base, other, seed=1))
    assert not same(whole, other)
    assert {path.name for path in tmp_path.iterdir()} == {"pairs", "whole", "halves", "other"}


def test_a_state_of_other_pictures_is_refused(pairs: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = settings(pairs, tiny_base, tmp_path / "out")
    asked = iter(range(100))
    with pytest.raises(Cancelled):
        train_control(config, hooks=Hooks(should_stop=lambda: next(asked) >= 2))
    (pairs / "2.txt").write_text("a caption that was not there")
    with pytest.raises(UserError, match="from other pictures"):
        train_control(config, resume=True)


def test_stock_diffusers_opens_the_folder_and_draws(pairs: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = settings(pairs, tiny_base, tmp_path / "out", steps=3)
    trained = train_control(config)
    loaded = T2IAdapter.from_pretrained(config.output)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in trained.state_dict().items())
    named = {"folder": Path(pairs.name), "output": Path(config.output.name), "base": tiny_base.name}  # no full paths
    named |= {"mixed_precision": "no"}
    assert build(ControlConfig, read_yaml(config.output / "settings.yaml")) == config.model_copy(update=named)
    base = load_base(str(tiny_base), "cpu")
    plain = Scene(num_inference_steps=2, device="cpu")
    sketch = ControlMap(Image.open(pairs / "sketch" / "0.png"), adapter=str(config.output))
    with_sketch = sample(base, ["a red cup"], [0], plain, controls=[sketch])[0]
    assert np.abs(np.asarray(with_sketch, float) - np.asarray(sample(base, ["a red cup"], [0], plain)[0])).max() > 1
    train_control(config.model_copy(update={"steps": 1}))  # an earlier one of ours is replaced
    assert read_yaml(config.output / "settings.yaml")["steps"] == 1


def test_other_kinds_of_bases(other_base: Path, tmp_path: Path) -> None:  # noqa: F811
    """v-prediction, text_time conditioning, and a first block that adds features behind its downsampler."""
    keyposes = make_pairs(tmp_path / "pairs", kind="keypose")
    config = settings(keyposes, other_base, tmp_path / "out", kind="keypose", steps=2, mixed_precision="bf16")
    adapter = train_control(config)
    assert adapter.config.adapter_type == "full_adapter_xl" and adapter.config.downscale_factor == 4
    keypose = ControlMap(Image.open(keyposes / "keypose" / "0.png"), "keypose", adapter=str(config.output))
    scene = Scene(num_inference_steps=2, device="cpu")
    assert sample(load_base(str(other_base), "cpu"), ["a red cup"], [0], scene, controls=[keypose])[0].size == (16, 16)
    with pytest.raises(UserError, match=r"resolution=18 .* multiple of 4. Use resolution=16, or resolution=20"):
        train_control(config.model_copy(update={"resolution": 18}))


def test_the_adapter_has_the_shape_that_the_unet_wants() -> None:
    with (pocket.t2i("sketch") / "config.json").open() as file:
        shipped = {key: value for key, value in json.load(file).items() if not key.startswith("_")}
    unet = UNet2DConditionModel.from_pretrained(pocket.path() / "unet")
    assert fitting_shape(unet, 8, "sketch") == shipped
    published = {"in_channels": 3, "num_res_blocks": 2, "channels": [320, 640, 1280, 1280]}
    for arch, kind, factor in (("sd15", "full_adapter", 8), ("sdxl", "full_adapter_xl", 16)):
        shape = fitting_shape(build_meta(arch)["unet"], 8, "keypose")
        assert shape == {**published, "adapter_type": kind, "downscale_factor": factor}


def test_where_conditions_and_captions_lie(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "a.b,c", 5)
    (folder / "image").mkdir()
    (folder / "conditions").mkdir()
    (folder / "3.png").rename(folder / "image" / "3.png")
    drawing = Image.new("L", (48, 40))
    drawing.save(folder / "0.sketch.png")
    drawing.save(folder / "1.keypose.png")
    drawing.save(folder / "image" / "3_sketch.jpg")
    drawing.save(folder / "conditions" / "4.png")
    (folder / "conditions" / "2.png").write_bytes(b"no image")
    (folder / "4.txt").write_text("a cup on a <TOK>")
    (folder / "concept.yaml").write_text("noun: table")
    told: list[str] = []
    config = settings(folder, tmp_path, tmp_path / "out", template="a photo of a {}")
    found = {
        pair.picture.stem: (pair.condition.name, pair.caption) for pair in read_pairs(config, Hooks(notify=told.append))
    }
    assert found == {
        "0": ("0.sketch.png", "a photo of a table"),
        "3": ("3_sketch.jpg", "a photo of a table"),
        "4": ("4.png", "a cup on a table"),
    }
    assert "2.png is not a readable image" in told[0] and "1 without a sketch" in told[0]
    assert "2 pictures, read as 'a photo of a {}'" in told[1]


def test_picture_and_condition_are_cut_alike(tiny_base: Path, tmp_path: Path) -> None:
    """Where both are the same drawing, all their views are the same too."""
    folder = make_photos(tmp_path / "pairs", 2)
    (folder / "keypose").mkdir()
    (folder / "0.txt").write_text("a cup on the left")
    for path in folder.glob("*.png"):
        (folder / "keypose" / path.name).write_bytes(path.read_bytes())
    config = settings(folder, tiny_base, tmp_path / "out", kind="keypose", crops_per_image=2, resize_ratio=1.5)
    config = config.model_copy(update={"flip": True})  # what no keypose should have, for its colours
    vae = load_base(str(tiny_base), "cpu").pipeline.vae
    seen: list[torch.Tensor] = []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    latents, conditions = encode_pairs(
        read_pairs(config, Hooks(notify=print)), vae, config, 16, Hooks(progress=lambda event: None)
    )
    assert latents.shape == (2, 4, 4, 8, 8) and conditions.shape == (2, 4, 3, 16, 16)
    assert torch.allclose(torch.stack(seen), conditions.float() / 127.5 - 1, atol=1e-5)
    unmirrored, _ = encode_pairs(
        read_pairs(config, Hooks(notify=print)),
        vae,
        config.model_copy(update={"flip": False, "crops_per_image": 4}),
        16,
        Hooks(progress=lambda event: None),
    )
    assert torch.equal(latents[0], unmirrored[0]) and not torch.equal(latents[1], unmirrored[1])


def test_sketches_are_white_on_black_and_keyposes_as_they_are(tmp_path: Path) -> None:
    for name, image in (("w", Image.new("L", (8, 8))), ("b", Image.new("L", (8, 8), 255))):
        image.putpixel((2, 3), 128)
        image.save(tmp_path / f"{name}.png")
        read = open_control_image(tmp_path / f"{name}.png", "sketch")
        bright = image if np.asarray(image).mean() <= 127 else ImageOps.invert(image)  # white strokes on black
        assert np.array_equal(np.asarray(read)[..., 0], np.asarray(bright))
        kept = open_control_image(tmp_path / f"{name}.png", "keypose")
        assert np.array_equal(np.asarray(kept)[..., 0], np.asarray(image))


def test_bad_input_is_one_sentence(pairs: Path, tiny_base: Path, tmp_path: Path) -> None:
    def refused(match: str, error: type[UserError] = UserError, **more: object) -> None:
        with pytest.raises(error, match=match) as caught:
            train_control(settings(**{"pairs": pairs, "base": tiny_base, "output": tmp_path / "out", **more}))  # type: ignore[arg-type]
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)

    refused("No such folder", pairs=tmp_path / "nowhere")
    refused("no picture with a keypose; put .*pairs/keypose", kind="keypose")
    refused("no picture with a sketch", pairs=make_photos(tmp_path / "bare"))
    refused("lower the learning rate .*nothing was saved", NotFiniteError, learning_rate=1e30, max_grad_norm=1e30)
    refused("exists and is not a folder of train-control", output=pairs)
    refused("exists and is not a folder of train-control", output=tiny_base / "unet")
    refused("Cannot write", output=pairs / "0.png" / "out")
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text("{}")
    (ours / "settings.yaml").write_text("kind: sketch\n")
    (ours / "notes.txt").write_text("mine")
    refused("ours holds notes.txt, which would be lost", output=ours)
    sketch = pairs / "sketch" / "1.png"
    ImageOps.expand(Image.open(sketch), (0, 0, 5, 0)).save(sketch)
    refused("1.png has 29×20 pixels, 1.png 24×20: .* same proportions")
    assert not (tmp_path / "out").exists()
    given = {"folder": "a", "output": "b"}
    with pytest.raises(UserError, match="'flip' cannot be True: mirroring a keypose"):
        build(ControlConfig, given, {"kind": "keypose", "flip": True})
    with pytest.raises(UserError, match="did you mean 'steps'"):
        build(ControlConfig, given, {"stpes": 3})


def test_the_verb(pairs: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def watched(condition: ControlImage) -> ControlMap:
        opened.append(f"{condition.kind} {condition.file.name}")
        return read_control_image(condition)

    monkeypatch.setattr("spectral_diffusion.scenes.control.read_control_image", watched)
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("train-control")(verb)
    words = ["train-control", str(pairs), "-o", str(tmp_path / "out"), "--base", str(tiny_base), "--steps", "2"]
    done = CliRunner().invoke(app, [*words, "--kind", "sketch", "--device", "cpu", "--resume", "batch_size=1"])
    assert done.exit_code == 0, done.exception
    assert "3 pictures with a sketch" in done.output and f"adapter: {tmp_path / 'out'}" in done.output
    assert opened == [f"sketch {index}.png" for index in range(3)]  # training sees what generating will
    again = CliRunner().invoke(app, [*words, "--config", str(tmp_path / "out" / "settings.yaml"), "--seed", "4"])
    assert again.exit_code == 0 and read_yaml(tmp_path / "out" / "settings.yaml")["seed"] == 4
    assert isinstance(CliRunner().invoke(app, [*words, "--kind", "depth"]).exception, UserError)
