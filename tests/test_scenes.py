"""Scenes: files, pictures that make themselves again, conditions with weights, Mix-of-Show's region files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_photos
from diffusers import StableDiffusionAdapterPipeline, T2IAdapter
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spectral_diffusion.cli import app
from spectral_diffusion.cli.scenes import base_in
from spectral_diffusion.config.scene import ControlImage, Region, Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import Cancelled, NotFiniteError, UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.metrics.encoders import load_encoder
from spectral_diffusion.models.loading import load_base, native_size
from spectral_diffusion.models.vae import in_portions
from spectral_diffusion.scenes import generate as pipeline
from spectral_diffusion.scenes.control import (
    ControlMap,
    adapter_of,
    load_t2i_adapter,
    own_adapter,
    read_control_image,
    weight_map,
)
from spectral_diffusion.scenes.generate import generate_to_file, truncated_text
from spectral_diffusion.scenes.mix_of_show import mapped, read_layouts, scene_of
from spectral_diffusion.scenes.png_metadata import read_settings, sources_of
from spectral_diffusion.scenes.region_mask import region_mask
from spectral_diffusion.scenes.sampling import SceneInputs, sample, sample_in_turn
from spectral_diffusion.scenes.scene import read_scene
from spectral_diffusion.training.run import train_to_file

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
SCHEMA = Path(__file__).parent.parent / "docs" / "scene.schema.json"


@pytest.fixture(scope="module")
def base_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a random T2I-Adapter of each kind inside, as the pocket base has."""
    folder = tmp_path_factory.mktemp("scenes") / "base"
    shutil.copytree(tiny_base, folder)
    torch.manual_seed(0)
    for kind, channels in (("sketch", 1), ("keypose", 3)):
        network = T2IAdapter(in_channels=channels, channels=[16, 24], num_res_blocks=1, downscale_factor=2)
        network.save_pretrained(folder / f"t2i_{kind}")
    return folder


@pytest.fixture(scope="module")
def two(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("two")
    for index, name in enumerate(("rex", "fido")):
        train_to_file(
            TrainConfig(
                concept=make_photos(folder / name, seed=index), output=folder / f"{name}.safetensors",
                base=str(base_folder), rank=2, steps=3, device="cpu", learning_rate=0.1, text_encoder_learning_rate=0.1,
            )
        )  # fmt: skip
    return [folder / "rex.safetensors", folder / "fido.safetensors"]


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["generate", *map(str, words)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_a_scene_file_and_the_picture_that_makes_itself_again(
    base_folder: Path, two: list[Path], tmp_path: Path
) -> None:
    sketch = Image.new("L", (32, 16))
    sketch.paste(255, (4, 4, 12, 12))
    sketch.save(tmp_path / "where.png")
    Image.new("L", (32, 16), 255).crop((0, 0, 16, 16)).save(tmp_path / "left.png")
    (tmp_path / "scene.yaml").write_text(
        f"""
        base: {base_folder}
        prompt: <rex> and <fido> on the beach
        width: 32
        height: 16
        num_inference_steps: 2
        num_images: 3
        batch_size: 2
        device: cpu
        regions:
          - {{box: [0, 0, 16, 16], prompt: <rex>, adapters: {{{two[0]}: 0.9}}, conditioning_scale: 0.5}}
          - {{box: [0.5, 0, 1, 1], prompt: <fido>, adapters: {{{two[1]}: 1.0}}, negative_prompt: red}}
        controls:
          - {{file: where.png, conditioning_scale: 0.8}}
        """
    )
    output = tmp_path / "out.png"
    told = run(tmp_path / "scene.yaml", "-o", output, "guidance_scale=3.0")
    assert "is stretched" not in told and "no token" not in told
    pictures = [tmp_path / f"out-{seed}.png" for seed in range(3)]
    assert all(picture.is_file() for picture in pictures) and len({pixels(p) for p in pictures}) == 3
    assert read_settings(pictures[1])["guidance_scale"] == 3.0
    for picture in pictures[1:]:
        run(picture, "-o", tmp_path / "again.png", "device=cpu")
        assert pixels(tmp_path / "again.png") == pixels(picture)
    for words in (["--seed", 9], ["seed=9"], ["seeds=[9]"]):
        run(pictures[0], "-o", tmp_path / "other.png", *words, "device=cpu")
        assert read_settings(tmp_path / "other.png")["only_seed"] == 9
    before = (tmp_path / "scene.yaml").read_text()
    run(tmp_path / "scene.yaml", "-o", tmp_path / "scene.png", "num_images=1")
    assert (tmp_path / "scene.yaml").read_text() == before  # a person's own file stays


def test_long_batches_go_on_where_they_stopped(tiny_base: Path, tmp_path: Path) -> None:
    scene = Scene(
        prompt="a dog",
        base=str(tiny_base),
        output=tmp_path / "a.png",
        num_inference_steps=2,
        num_images=4,
        batch_size=2,
        device="cpu",
    )
    steps: list[int] = []
    with pytest.raises(Cancelled):
        generate_to_file(
            scene, Hooks(progress=lambda event: steps.append(event.done), should_stop=lambda: len(steps) >= 3)
        )
    kept = [tmp_path / f"a-{seed}.png" for seed in range(2)]
    assert all(path.is_file() for path in kept) and not (tmp_path / "a-2.png").exists()
    before = [path.stat().st_mtime_ns for path in kept]
    paths = generate_to_file(scene, resume=True)
    assert len(paths) == 5 and [path.stat().st_mtime_ns for path in kept] == before
    generate_to_file(scene.model_copy(update={"prompt": "a cat"}), resume=True)  # another scene: all anew
    assert [path.stat().st_mtime_ns for path in kept] != before


def test_a_changed_file_is_noticed(base_folder: Path, tmp_path: Path) -> None:
    sketch = tmp_path / "sketch.png"
    Image.new("L", (32, 32), 255).save(sketch)
    scene = Scene(
        prompt="a dog",
        base=str(base_folder),
        output=tmp_path / "a.png",
        num_inference_steps=2,
        controls=[ControlImage(file=sketch)],
        device="cpu",
    )
    generate_to_file(scene)
    before = scene.output.stat().st_mtime_ns
    generate_to_file(scene, resume=True)
    assert scene.output.stat().st_mtime_ns == before
    assert "has changed" not in run(scene.output, "-o", tmp_path / "again.png", "device=cpu")
    Image.new("L", (32, 32), 0).save(sketch)
    told = run(scene.output, "-o", tmp_path / "again.png", "device=cpu")
    assert f"{sketch} has changed since that picture was made" in told
    generate_to_file(scene, resume=True)
    assert scene.output.stat().st_mtime_ns != before


def test_previews_show_the_picture_as_it_comes(tiny_base: Path) -> None:
    seen: list[tuple[int, int, tuple[int, int]]] = []
    scene = Scene(num_inference_steps=3, device="cpu")
    sample(
        load_base(str(tiny_base), "cpu"), ["a dog"] * 2, [1, 2], scene,
        preview=lambda step, images: seen.append((step, len(images), images[0].size)),
    )  # fmt: skip
    assert seen == [(step, 2, (16, 16)) for step in (1, 2, 3)]


def test_without_regions_it_is_the_stock_pipeline_to_the_last_bit(base_folder: Path) -> None:
    base, scene = load_base(str(base_folder), "cpu"), Scene(num_inference_steps=3, device="cpu", width=32, height=16)
    drawing = ControlMap(Image.effect_noise((32, 16), 90), weight=0.7)
    ours = sample(base, ["a red dog"], [5], scene, controls=[drawing])[0]
    parts = {name: part for name, part in base.pipeline.components.items() if name != "image_encoder"}
    stock = StableDiffusionAdapterPipeline(
        **{**parts, "scheduler": base.denoiser.scheduler("dpm")}, requires_safety_checker=False,
        adapter=T2IAdapter.from_pretrained(base_folder / "t2i_sketch"),
    )  # fmt: skip
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        prompt="a red dog", negative_prompt="", image=drawing.at(32, 16), num_inference_steps=3, guidance_scale=4.0,
        width=32, height=16, generator=torch.Generator().manual_seed(5), adapter_conditioning_scale=0.7,
    ).images[0]  # fmt: skip
    assert ours.tobytes() == theirs.tobytes()


def test_regions_weigh_the_conditions_cell_by_cell(base_folder: Path) -> None:
    weights = weight_map([0.0, 2.0], [LEFT, (0.25, 0.0, 0.75, 1.0)], 2, 4)
    assert weights.tolist() == [[0.0, 1.0, 2.0, 1.0]] * 2
    base = load_base(str(base_folder), "cpu")
    base.pipeline.set_progress_bar_config(disable=True)
    drawings = [
        ControlMap(Image.effect_noise((32, 16), 90)),
        ControlMap(Image.new("RGB", (32, 16), "red"), "keypose", 0.5),
    ]

    def drawn(*weights: object) -> np.ndarray:
        places = zip((LEFT, RIGHT), weights, strict=True)
        regions = [Region(box=box, prompt="a dog", conditioning_scale=weight) for box, weight in places]  # type: ignore[arg-type]
        scene = Scene(num_inference_steps=2, device="cpu", width=32, height=16, regions=regions)
        return np.asarray(sample(base, ["a dog"], [1], scene, controls=drawings)[0], float)

    same = drawn(1.0, 1.0)
    assert np.abs(drawn(0.0, 0.0) - same).max() > 0
    halves = drawn(1.0, {"sketch": 0.0})
    assert np.abs(halves - same)[:, 16:].sum() > np.abs(halves - same)[:, :16].sum()


def test_strengths_of_single_components(base_folder: Path, two: list[Path], tmp_path: Path) -> None:
    out, common = (
        tmp_path / "a.png",
        ["--prompt", "<rex>", "--base", base_folder, "num_inference_steps=2", "device=cpu"],
    )
    pictures = {}
    for text in ("1", "unet:1,text_encoder:1", "unet:1, text_encoder:0", "text_encoder:0"):
        run(*common, "-o", out, "--adapter", f"{two[0]}={text}")
        pictures[text] = pixels(out)
    assert pictures["1"] == pictures["unet:1,text_encoder:1"] != pictures["text_encoder:0"]
    assert pictures["text_encoder:0"] == pictures["unet:1, text_encoder:0"]
    with pytest.raises(UserError, match="adapters"):
        run(*common, "-o", out, "--adapter", f"{two[0]}=vae:1")


def test_samplers_by_name(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    found = {name: sample(base, ["a dog"], [1], Scene(num_inference_steps=4, device="cpu", sampler=name))[0].tobytes()
             for name in ("dpm", "ddim", "euler")}  # type: ignore[arg-type]  # fmt: skip
    assert len(set(found.values())) == 3


def test_large_pictures_are_decoded_one_by_one(tiny_base: Path) -> None:
    vae = load_base(str(tiny_base), "cpu").pipeline.vae
    seen = []
    for side in (64, 1024):
        with in_portions(vae, side, side):
            seen.append(vae.use_slicing)
    assert seen == [False, True] and not vae.use_slicing


def test_a_picture_of_nan_is_never_written(tiny_base: Path, tmp_path: Path) -> None:
    scene = Scene(prompt="a dog", num_inference_steps=2, device="cpu", output=tmp_path / "a.png", base=str(tiny_base))
    for part, place in {"unet": "conv_in", "vae": "decoder.conv_in"}.items():
        base = load_base(str(tiny_base), "cpu")
        with torch.no_grad():
            getattr(base.pipeline, part).get_parameter(f"{place}.weight").fill_(torch.nan)
        with pytest.raises(NotFiniteError, match="is NaN or infinite: lower the strengths"):
            generate_to_file(scene, base=base)
    assert not scene.output.exists()


@pytest.mark.parametrize("sketch", [False, True])
def test_an_autoencoder_that_overflows_in_float16_decodes_in_float32(base_folder: Path, sketch: bool) -> None:
    base = load_base(str(base_folder), "cpu", "float16")
    base.pipeline.vae.register_to_config(force_upcast=True)
    with torch.no_grad():  # what is inside grows a lot, and what comes out does not
        base.pipeline.vae.decoder.conv_in.weight *= 1e5
        base.pipeline.vae.decoder.conv_in.bias *= 1e5
    seen: list[torch.dtype] = []
    hook = base.pipeline.vae.decoder.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    Image.new("L", (16, 16)).save(base_folder / "black.png")
    drawings = [read_control_image(ControlImage(file=base_folder / "black.png"))] if sketch else []
    scene = Scene(num_inference_steps=2, device="cpu", dtype="float16")
    turn = sample_in_turn(base, ["a dog"], [1], scene, inputs=SceneInputs(controls=drawings))
    assert len(next(turn)) == 1 and seen == [torch.float16, torch.float32]
    hook.remove()
    assert base.pipeline.vae.dtype == torch.float16


def test_sketch_adapters_of_another_kind_are_refused(base_folder: Path, tmp_path: Path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    base = load_base(str(base_folder), "cpu")
    more = {"in_channels": 1, "num_res_blocks": 1, "downscale_factor": 2}
    T2IAdapter(**more, channels=[16, 24, 24, 24, 24]).save_pretrained(tmp_path / "long")  # the rest is left out
    drawing = read_control_image(ControlImage(file=tmp_path / "a.png", adapter=str(tmp_path / "long")))
    assert adapter_of(base, [drawing], (16, 16))[1] == 1.0
    for name, more in {"xl": {"adapter_type": "full_adapter_xl"}, "coarse": {"downscale_factor": 4}}.items():
        kind = {"in_channels": 1, "channels": [16, 24], "num_res_blocks": 1, "downscale_factor": 2} | more
        T2IAdapter(**kind).save_pretrained(tmp_path / name)
        drawing = read_control_image(ControlImage(file=tmp_path / "a.png", adapter=str(tmp_path / name)))
        with pytest.raises(UserError, match="is for another U-Net"):
            adapter_of(base, [drawing], (16, 16))
    base.pipeline.unet.register_to_config(cross_attention_dim=1024)
    base.name = "somewhere"
    with pytest.raises(UserError, match=r"no sketch adapter for Stable Diffusion 2\.x"):
        load_t2i_adapter(base, None)


def test_masks_of_more_bits_are_read_as_they_look(tmp_path: Path) -> None:
    grey = np.full((8, 8), 600, np.uint16)  # nearly black
    grey[:, 4:] = 65535
    for name, image in {
        "a.png": Image.fromarray(grey), "b.tif": Image.fromarray(grey.astype(">u2")),
        "c.tif": Image.fromarray((grey / 65535).astype(np.float32)),
    }.items():  # fmt: skip
        image.save(tmp_path / name)
        mask = region_mask(Region(prompt="x", mask=tmp_path / name), 8, 8)
        assert isinstance(mask, torch.Tensor)
        assert float(mask[:, :4].max()) < 0.02 and float(mask[:, 4:].min()) > 0.99, name


def test_ctrl_c_ends_a_picture_with_130(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> list[Path]:
        raise Cancelled("Stopped.")

    monkeypatch.setattr(pipeline, "generate_to_file", stopped)
    words = ["generate", "--prompt", "x", "--base", str(base_folder), "-o", str(tmp_path / "a.png")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 130 and "--resume goes on" in result.output


def test_a_pickle_on_the_hub_gets_a_sentence(base_folder: Path, tmp_path: Path) -> None:
    """As the T2I-Adapters of Stable Diffusion 1.x are."""
    folder = shutil.copytree(base_folder / "t2i_sketch", tmp_path / "pickled")
    for file in folder.glob("*.safetensors"):
        torch.save({}, folder / "diffusion_pytorch_model.bin")
        file.unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors weights, and pickles are not opened"):
        load_t2i_adapter(load_base(str(base_folder), "cpu"), str(folder))
    (folder / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="but a Git LFS pointer"):
        load_t2i_adapter(load_base(str(base_folder), "cpu"), str(folder))
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "clip"}')
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no \.safetensors weights, and pickles are not opened"):
        load_encoder(str(folder))


def test_a_picture_knows_the_adapter_that_read_its_drawing(base_folder: Path, tmp_path: Path) -> None:
    base, folder = load_base(str(base_folder), "cpu"), shutil.copytree(base_folder / "t2i_sketch", tmp_path / "t2i")
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    scene = Scene(prompt="a dog", controls=[ControlImage(file=tmp_path / "a.png", adapter=str(folder))])
    before = sources_of(scene, base)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file)
    after = sources_of(scene, base)
    assert {name for name in before if before[name] != after[name]} == {"adapter of condition 1"}


def test_a_region_file_takes_the_size_of_the_base_that_a_preset_names(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text(f"generate:\n  base: {base_folder}\n")
    assert base_in(str(tmp_path / "preset.yaml")) == str(base_folder)
    assert base_in("sdxl-12gb") and base_in("pocket-distilled") is None
    assert (
        native_size(str(base_folder)) == load_base(str(base_folder), "cpu").size == 16 and native_size("pocket") == 128
    )
    with pytest.raises(UserError):
        native_size(str(tmp_path / "nowhere"))


def test_official_adapters_are_found_by_kind_and_base(base_folder: Path, tiny_base: Path) -> None:
    assert own_adapter(load_base(str(base_folder), "cpu"), "keypose") == str(base_folder / "t2i_keypose")
    assert own_adapter(load_base(str(tiny_base), "cpu"), "keypose") == "TencentARC/t2iadapter_openpose_sd14v1"
    assert own_adapter(load_base("pocket", "cpu"), "keypose").endswith("t2i_keypose")


def test_keypoints_are_drawn_as_openpose_draws_them(tmp_path: Path) -> None:
    points = [[0.5, 0.1 + 0.04 * index] for index in range(18)]
    (tmp_path / "pose.json").write_text(json.dumps([points]))
    drawing = read_control_image(ControlImage(file=tmp_path / "pose.json", kind="keypose"))
    assert drawing.image.mode == "RGB" and len(drawing.image.getcolors(100_000) or []) > 10


def test_what_cannot_be_drawn_is_said_in_a_sentence(base_folder: Path, two: list[Path], tmp_path: Path) -> None:
    scene = Scene(
        prompt="a dog", base=str(base_folder), output=tmp_path / "a.png", num_inference_steps=1, device="cpu", width=32
    )
    for region, message in (
        (
            Region(box=(0, 0, 40, 16), prompt="a cup"),
            r"box \[0, 0, 40, 16\] of 'a cup' reaches outside the picture of 32×16",
        ),
        (Region(box=(0, 0, 0.01, 1), prompt="a cup"), "too small"),
        (Region(mask=tmp_path / "no.png", prompt="a cup"), "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            generate_to_file(scene.model_copy(update={"regions": [region]}))
    Image.new("L", (8, 8)).save(tmp_path / "empty.png")
    painted = Image.new("RGBA", (32, 16))
    painted.paste((255, 255, 255, 255), (0, 0, 16, 16))
    painted.save(tmp_path / "painted.png")
    found = region_mask(Region(mask=tmp_path / "painted.png", prompt="x"), 32, 16)
    assert isinstance(found, torch.Tensor) and float(found.mean()) == 0.5
    with pytest.raises(UserError, match="is empty: paint white"):
        region_mask(Region(mask=tmp_path / "empty.png", prompt="x"), 32, 16)
    for wrong in ({"box": (0.5, 0, 0.5, 1)}, {"box": (-0.1, 0, 1, 1)}, {}, {"box": LEFT, "mask": tmp_path / "m.png"}):
        with pytest.raises(ValueError, match=r"a box is left|needs a box or a mask"):
            Region(prompt="x", **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="only_seed=7 is none of the seeds"):
        generate_to_file(scene.model_copy(update={"only_seed": 7}))
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(two[0].read_bytes())
    files = zip((LEFT, RIGHT), (two[0], copy), strict=True)
    twice = [Region(box=box, prompt="<rex>", adapters={str(file): 1.0}) for box, file in files]
    with pytest.raises(UserError, match="share the token <rex>"):
        generate_to_file(scene.model_copy(update={"regions": twice}))


def test_remarks_name_what_is_cut_off_and_stretched(base_folder: Path, tmp_path: Path) -> None:
    Image.new("L", (10, 10)).save(tmp_path / "square.png")
    notes: list[str] = []
    generate_to_file(Scene(
            prompt="a dog " * 20 + "and the very last banana", base=str(base_folder), output=tmp_path / "a.png",
            width=32, num_inference_steps=1, device="cpu", controls=[ControlImage(file=tmp_path / "square.png")],
            regions=[Region(box=LEFT, prompt="<rexx>")],
        ), hooks=Hooks(notify=notes.append))  # fmt: skip
    assert any("cut off:" in note and "last banana" in note for note in notes)
    assert any("square.png of 10×10 is stretched" in note for note in notes)
    assert any("<rexx> is no token" in note for note in notes)
    assert truncated_text(load_base(str(base_folder), "cpu"), "a dog") == ""


def test_the_exported_schema_is_the_models() -> None:
    assert json.loads(run("--schema")) == json.loads(SCHEMA.read_text()) == Scene.model_json_schema()


REGIONS = """char1='<rexA1> <rexA2> sit on a <chair1>'
box1='[31, 2, 512, 376]'

region3='a <vase1> <vase2>'
region3='[110, 438, 342, 568]'



char1_prompt='[a <rexA1> <rexA2>, near a lake]'char1_neg_prompt="[${context}]"box1='[61, 18, 512, 166]'weight1="[1,0.5]"
char2_prompt='[a <vase1>, near a lake]'
char2_neg_prompt="[ugly]"
box2='[20, 167, 512, 1024]'
"""


def test_region_files_are_read_exactly(tmp_path: Path) -> None:
    path = tmp_path / "both.txt"
    path.write_text(REGIONS)
    first, second = read_layouts(path)
    assert [(spot.prompt, spot.box) for spot in first] == [
        ("<rexA1> <rexA2> sit on a <chair1>", (2, 31, 376, 512)),
        ("a <vase1> <vase2>", (438, 110, 568, 342)),
    ]
    assert [(spot.prompt, spot.negative, spot.weights) for spot in second] == [
        ("a <rexA1> <rexA2>, near a lake", "", (1.0, 0.5)), ("a <vase1>, near a lake", "ugly", ()),
    ]  # fmt: skip
    scene = scene_of(path, 64, {"<rexA>": "a person", "<token>": "a cup"}, layout=2)
    assert (
        scene["regions"][0]["prompt"] == "a person, near a lake" and scene["regions"][0]["conditioning_scale"] == 0.75
    )
    assert (scene["width"], scene["height"]) == (128, 64) and scene["regions"][1]["box"][2] == 1.0
    path.write_text('prompt_rewrite="[a dog]-*-[ugly]-*-[4, 6, 33, 512]|[a cup]-*-[]-*-[22, 100, 512, 200]"')
    assert [spot.box for spot in read_layouts(path)[0]] == [(6, 4, 512, 33), (100, 22, 200, 512)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "is no region file"),
        ("a='x'", "has no box"),
        ("box='[1, 2, 3, 4]'", "belongs to no prompt"),
        ("a='x'\nbox='[5, 2, 3, 4]'", "is no box"),
        ("p='[a]-*-[b]'", "is not \\[prompt\\]"),
    ],
)
def test_broken_region_files_get_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_layouts(tmp_path / "r.txt")


def test_mappings_stand_for_a_tokens_whole_group() -> None:
    assert mapped("a <dogA1> <dogA2> and <cat1>", {"<dogA>": "a dog", "cat": "a cat"}) == "a dog and a cat"
    assert mapped("<dogA1> <dogA2>", {"<dogA1>": "a dog"}) == "a dog"
    assert mapped("<dogA1>", {}) == "<dogA1>"


def test_a_region_file_becomes_a_picture(base_folder: Path, two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "both.txt").write_text(REGIONS)
    Image.effect_noise((1024, 512), 90).save(tmp_path / "both_sketch.png")
    out = tmp_path / "out.png"
    run(
        tmp_path / "both.txt",
        "--map",
        "<token>=a person",
        "--base",
        base_folder,
        "-o",
        out,
        "num_inference_steps=1",
        "device=cpu",
    )
    settings = read_settings(out)
    assert settings["controls"][0]["kind"] == "sketch" and settings["width"] == 32
    assert run(
        tmp_path / "both.txt",
        "--map",
        "<token>=x",
        "--adapter",
        two[0],
        "-o",
        out,
        "num_inference_steps=1",
        "device=cpu",
    )
    assert (read_settings(out)["base"], read_settings(out)["width"]) == (str(base_folder), 32)
    run(
        tmp_path / "both.txt",
        "--map",
        "<token>=a person",
        "--base",
        base_folder,
        "-o",
        out,
        "num_inference_steps=1",
        "device=cpu",
    )
    assert [region["prompt"] for region in settings["regions"]] == ["a person sit on a person", "a person"]
    with pytest.raises(UserError, match="The mapping names '<hat>'"):
        run(tmp_path / "both.txt", "--map", "<hat>=a hat", "--base", base_folder, "-o", out)
    (tmp_path / "s.yaml").write_text("prompt: a dog\nbase: pocket\n")
    assert read_scene(tmp_path / "s.yaml") == {"prompt": "a dog", "base": "pocket"}
    with pytest.raises(UserError, match="--map is for"):
        run(tmp_path / "s.yaml", "--map", "a=b", "-o", out)
