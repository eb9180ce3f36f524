"""The generate tab's controllers on a tiny random base: canvas, regions, cancel, preview, gallery, kept base."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import shutil
import socket
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_photos, make_tiny_base
from PIL import Image, ImageDraw, PngImagePlugin
from processes import client_of

from spectral_diffusion import pocket
from spectral_diffusion.app import base_cache as keeper_module
from spectral_diffusion.app import bases, canvas, poses, presets
from spectral_diffusion.app import gallery as pictures
from spectral_diffusion.app import generation as drawing
from spectral_diffusion.app.base_cache import BaseCache
from spectral_diffusion.app.canvas import Canvas, read_canvas
from spectral_diffusion.app.generation import GeneratedPictures, GenerateRequest
from spectral_diffusion.app.presets import suited_bases
from spectral_diffusion.app.streaming import CancelTokens, stream
from spectral_diffusion.app.workspace import Workspace
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.models.sd import SDDenoiser
from spectral_diffusion.scenes.png_metadata import read_places, read_settings
from spectral_diffusion.training.run import train_to_file

QUICK: dict[str, Any] = {"num_inference_steps": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with T2I-Adapters of its own, and a folder of two adapters trained on it."""
    from diffusers import T2IAdapter

    folder = tmp_path_factory.mktemp("trained")
    base = make_tiny_base(folder / "base")
    torch.manual_seed(0)
    for kind, channels in (("sketch", 1), ("keypose", 3)):
        T2IAdapter(
            in_channels=channels, channels=[16, 24], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
        ).save_pretrained(base / f"t2i_{kind}")
    for seed, name in enumerate(("tom", "jim")):
        photos = make_photos(folder / name, seed=seed)
        settings = {
            "rank": 2,
            "steps": 1,
            "batch_size": 1,
            "crops_per_image": 1,
            "device": "cpu",
            "mixed_precision": "no",
        }
        output = folder / "adapters" / f"{name}.safetensors"
        train_to_file(TrainConfig(concept=photos, output=output, base=str(base), class_noun="dog", **settings))
    return base, folder / "adapters"


@pytest.fixture
def workspace(tmp_path: Path, trained: tuple[Path, Path]) -> Workspace:
    workspace = Workspace(tmp_path / "workspace")
    shutil.copytree(trained[1], workspace.adapters)
    return workspace


@pytest.fixture(scope="module")
def keeper() -> BaseCache:
    return BaseCache()


def draw(workspace: Workspace, base: Path, keeper: BaseCache | None = None, **more: Any) -> GeneratedPictures:
    names = {"adapters", "strength", "canvas", "sketch_weight", "keypose_weight"}
    wish = GenerateRequest(base=str(base), **{key: more.pop(key) for key in names & set(more)})
    return drawing.generate(workspace, wish, keeper=keeper, **QUICK | {"prompt": "a <tom> and a dog"} | more)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def strokes(size: tuple[int, int] = (64, 32)) -> bytes:
    image = Image.new("RGBA", size)
    ImageDraw.Draw(image).line((4, 4, size[0] - 4, size[1] - 4), fill=(0, 0, 0, 255), width=4)
    return canvas.png_of(image)


def full_value() -> dict[str, Any]:
    return {
        "strokes": canvas.as_url(strokes()),
        "keypose": canvas.as_url(canvas.keypose_preset("waving", 2, 2.0)),
        "regions": [
            {"box": [0.03, 0.1, 0.47, 0.97], "prompt": "a <tom> on the grass", "concept": "tom"},
            {"box": [0.5, 0, 1, 1], "prompt": "a <jim> on the beach", "concept": "jim"},
        ],
    }


# --- the canvas ----------------------------------------------------------------------------------------------


def test_canvas_is_read_and_empty_ones_ignored() -> None:
    for nothing in (None, "", {}, {"strokes": "", "regions": []}):
        assert read_canvas(nothing) == Canvas()
    assert read_canvas({"strokes": canvas.as_url(canvas.png_of(Image.new("RGBA", (8, 8))))}) == Canvas()
    found = read_canvas(json.loads(json.dumps(full_value())))
    assert found.strokes == strokes() and found.keypose
    assert [place.concept for place in found.regions] == ["tom", "jim"]
    assert found.regions[0].box == (0.03, 0.1, 0.47, 0.97)


def bomb() -> str:
    """A PNG that claims 60000 × 60000 pixels."""
    data = bytearray(canvas.png_of(Image.new("L", (8, 8))))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    return canvas.as_url(bytes(data))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("text", "cannot be read"),
        ([1], "cannot be read"),
        ({"strokes": 5}, "no PNG"),
        ({"strokes": "data:image/svg+xml,<svg/>"}, "no PNG"),
        ({"strokes": "file:///etc/passwd"}, "no PNG"),
        ({"strokes": canvas.PNG + "!!!"}, "no readable PNG"),
        ({"strokes": canvas.PNG + base64.b64encode(b"GIF89a" + bytes(40)).decode()}, "no readable PNG"),
        ({"strokes": canvas.as_url(strokes())[:-40]}, "no readable PNG"),
        ({"strokes": canvas.PNG + "A" * 9_000_000}, "over 8 MB"),
        ({"strokes": canvas.as_url(strokes((3000, 10)))}, "too large"),
        ({"keypose": bomb()}, "PNG|too large"),
        ({"regions": "{"}, "no JSON"),
        ({"regions": "[" * 100_000}, "no JSON"),
        ({"regions": {"box": 1}}, "no list"),
        ({"regions": [{"box": [0, 0, 1, 1], "prompt": "x"}] * 17}, "at most 16"),
        ({"regions": [{"box": [0, 0, 1], "prompt": "x"}]}, "four numbers"),
        ({"regions": [{"box": [0, 0, 1, float("nan")], "prompt": "x"}]}, "four numbers"),
        ({"regions": '[{"box": [0, 0, 1, NaN], "prompt": "x"}]'}, "four numbers"),
        ({"regions": [{"box": [0, 0, 1, 1e400], "prompt": "x"}]}, "four numbers"),
        ({"regions": [{"box": [0, 0, True, 1], "prompt": "x"}]}, "four numbers"),
        ({"regions": [{"box": [0, 0, 1.5, 1], "prompt": "x"}]}, "four numbers"),
        ({"regions": [{"box": [0.5, 0, 0.5, 1], "prompt": "x"}]}, "no area"),
        ({"regions": [{"box": [0, 0, 1, 1], "prompt": " "}]}, "no prompt"),
        ({"regions": [{"box": [0, 0, 1, 1], "prompt": "x" * 2001}]}, "at most 2000"),
        ({"regions": [{"box": [0, 0, 1, 1], "prompt": "x", "mask": "/etc/passwd"}]}, "unknown part 'mask'"),
    ],
)
def test_hostile_canvas_is_one_sentence(value: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as told:
        read_canvas(value)
    assert len(str(told.value)) < 300 and "\n" not in str(told.value)


def test_drawings_and_photos_become_ink(tmp_path: Path) -> None:
    paper = Image.new("RGB", (700, 350), (250, 248, 240))
    ImageDraw.Draw(paper).ellipse((100, 60, 500, 300), outline=(30, 30, 90), width=9)
    paper.save(tmp_path / "drawing.jpg")
    for make in (canvas.ink_of_drawing, canvas.ink_of_photo):
        with Image.open(io.BytesIO(make(tmp_path / "drawing.jpg"))) as ink:
            assert ink.size == (512, 256) and ink.mode == "RGBA"
            alpha = np.asarray(ink.getchannel("A"))
        assert alpha[128, 220] < 30 and alpha.max() > 200
    Image.new("RGB", (64, 64), "white").save(tmp_path / "blank.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    for make in (canvas.ink_of_drawing, canvas.ink_of_photo):
        with pytest.raises(UserError, match="was found"):
            make(tmp_path / "blank.png")
        with pytest.raises(UserError, match="not a readable image"):
            make(tmp_path / "bad.png")


def test_ready_made_sketches_and_poses() -> None:
    assert {"dog", "dog-teapot"} <= set(canvas.sketch_files())
    data = canvas.ready_sketch("dog-teapot")
    assert read_canvas({"strokes": canvas.as_url(data)}).strokes == data
    with Image.open(io.BytesIO(canvas.ready_sketch("dog", 2.0))) as wide:  # undistorted, in the middle
        left, _, right, _ = wide.getbbox() or (0, 0, 0, 0)
        assert wide.size == (512, 256) and left > 128 and right < 384
    with pytest.raises(UserError, match="No sketch"):
        canvas.ready_sketch("../x")
    for pose in poses.POSES:
        for count in (1, 2, 3):
            for width, height in ((512, 256), (256, 512), (64, 64)):
                found = poses.people(pose, count, width, height)
                assert len(found) == count and all(person.shape == (18, 2) for person in found)
                assert all((person >= 0).all() and (person <= (width, height)).all() for person in found)
    assert not np.allclose(poses.people("sitting", 1, 64, 64)[0], poses.people("standing", 1, 64, 64)[0])
    with pytest.raises(UserError, match="No pose"):
        canvas.keypose_preset("flying", 1, 1.0)
    with pytest.raises(UserError, match="number of people"):
        canvas.keypose_preset("standing", 10**9, 1.0)


# --- drawing -------------------------------------------------------------------------------------------------


def test_everything_at_once_and_the_round_trip(
    workspace: Workspace, trained: tuple[Path, Path], keeper: BaseCache
) -> None:
    base = trained[0]
    drawn = draw(
        workspace, base, keeper, canvas=read_canvas(full_value()), adapters=["tom"], strength="tom=0.7, jim=1.3",
        seed=7, num_images=2, width=32, height=16, sketch_weight=0.6, global_prompt_weight=0.1, negative_prompt="snow",
        prompt="a <tom> and a <nobody> on the grass",
    )  # fmt: skip
    assert [path.stem[-2:] for path in drawn.pictures] == ["-7", "-8"]
    assert "<nobody>" in drawn.message and "tom acts in its own box only" in drawn.message
    assert {path.name for path in workspace.pictures.iterdir()} == {p.name for p in drawn.pictures} | {"sketches"}
    settings = read_settings(drawn.pictures[0])
    assert settings["seed"] == 7 and settings["adapters"] == {}
    assert [list(region["adapters"].values()) for region in settings["regions"]] == [[0.7], [1.3]]

    for path in drawn.pictures:
        again = pictures.refill(workspace, path.stem)
        assert again.notes == [] and again.canvas == full_value()
        assert (again.base, again.strength, again.sketch_weight) == (str(base), "tom=0.7, jim=1.3", 0.6)
        wish = GenerateRequest(
            again.base, again.adapters, again.strength, read_canvas(again.canvas), again.sketch_weight,
            again.keypose_weight, again.sketch_adapter, again.keypose_adapter,
        )  # fmt: skip
        for loaded in (keeper, None):  # also on a base that is loaded anew
            redrawn = drawing.generate(workspace, wish, keeper=loaded, device="cpu", seed=again.seed, **again.fields)
            assert pixels(redrawn.pictures[0]) == pixels(path)
    plain = draw(workspace, base, keeper, seed=7, width=32, height=16)
    assert pixels(plain.pictures[0]) != pixels(drawn.pictures[0])


def test_kept_base_is_given_back_as_it_was(workspace: Workspace, trained: tuple[Path, Path]) -> None:
    base, keeper = trained[0], BaseCache()

    def state() -> dict[str, torch.Tensor]:
        with keeper.acquire(str(base), "cpu") as held:
            parts: dict[str, Any] = {**held.models, "vae": held.pipeline.vae}
            assert len(held.pipeline.tokenizer) == held.pipeline.tokenizer.vocab_size
            return {
                f"{n}.{key}": value.clone() for n, part in parts.items() for key, value in part.state_dict().items()
            }

    before = state()
    first = draw(workspace, base, keeper, adapters=["tom"], canvas=read_canvas(full_value()), width=32, height=16)
    after = state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="is there already"):  # two of one token: fails half-way
        shutil.copy(workspace.adapters / "tom.safetensors", workspace.adapters / "twin.safetensors")
        draw(workspace, base, keeper, adapters=["tom", "twin"])
    with keeper.acquire(str(base), "cpu") as held:
        mine = held
    second = draw(workspace, base, keeper, adapters=["tom"], canvas=read_canvas(full_value()), width=32, height=16)
    assert pixels(first.pictures[0]) == pixels(second.pictures[0])
    with keeper.acquire(str(base), "cpu") as held:
        assert held is mine  # never loaded again
    (base / "note.txt").write_text("changed")
    with keeper.acquire(str(base), "cpu") as held:
        assert held is not mine  # but for a base whose files have changed
    (base / "note.txt").unlink()


def test_a_large_base_leaves_its_gpu_between_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str] = []
    pipeline = SimpleNamespace(to=lambda device: moves.append(device.type))
    denoiser = SimpleNamespace(network=torch.nn.Linear(10, 10))
    for device, small, wanted in (("cuda", 1, ["cuda", "cpu"]), ("cuda", 1000, []), ("cpu", 1, [])):
        moves.clear()
        monkeypatch.setattr(keeper_module, "SMALL", small)
        base: Any = SimpleNamespace(
            device=torch.device(device), denoiser=denoiser, pipeline=pipeline, family=SDDenoiser
        )
        keeper_module.move(base, base.device)
        keeper_module.move(base, torch.device("cpu"))
        assert moves == wanted


def test_a_base_is_loaded_as_this_computer_needs_it(
    workspace: Workspace, trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    klein, z_image = "black-forest-labs/FLUX.2-klein-base-4B", "Tongyi-MAI/Z-Image"
    assert drawing.as_loaded(workspace, klein) == {"dtype": "float32"}  # no GPU here
    monkeypatch.setattr("spectral_diffusion.doctor.this_computer", lambda: ("a card", ["klein-12gb", "z-image-12gb"]))
    assert bases.base_choices(workspace, list(suited_bases())) == [*pocket.BASES, klein, z_image]
    assert drawing.as_loaded(workspace, klein) == {"dtype": "bfloat16"}
    assert drawing.as_loaded(workspace, z_image) == {"dtype": "bfloat16", "quantization": "int8"}
    assert drawing.sampling_of(workspace, klein, (20, 2.0, 1.0)) == (50, 4.0, 0.0)
    assert drawing.sampling_of(workspace, "pocket-transformer", (20, 2.0, 1.0)) == (20, 4.0, 0.0)
    assert drawing.sampling_of(workspace, klein, (33, 2.5, 1.0)) == (33, 2.5, 0.0)  # a person's own stay
    asked = GenerateRequest(base=z_image, adapters=[])
    assert drawing.requested_scene(workspace, asked, Path("x.png"), prompt="a").quantization == "int8"
    own = drawing.requested_scene(workspace, asked, Path("x.png"), prompt="a", quantization="none")
    assert own.quantization == "none" and own.dtype == "bfloat16"
    fused = workspace.fused / "pair"
    fused.mkdir(parents=True)
    monkeypatch.setattr("spectral_diffusion.merging.manifest.read_manifest", lambda folder: {"base": z_image})
    monkeypatch.setattr(presets, "base_path", lambda workspace, base: str(fused))
    assert presets.preset_of_base(workspace, "fused/pair") == "z-image-12gb"


def test_large_bases_are_drawn_in_half_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawing.default_dtype(1024, "cpu") == "float32"
    monkeypatch.setattr("spectral_diffusion.core.machine.parse_device", lambda name: torch.device("cuda"))
    assert [drawing.default_dtype(side, "auto") for side in (64, 512)] == ["float32", "float16"]


def test_names_are_looked_up_never_joined(workspace: Workspace) -> None:
    for name in ("../x", "/etc/passwd", "fused/../../x"):
        with pytest.raises(UserError, match="No adapter"):
            drawing.generate(workspace, GenerateRequest(adapters=[name]), prompt="a dog")
        with pytest.raises(UserError, match="No adapter"):
            region = {"box": [0, 0, 1, 1], "prompt": "x", "concept": name}
            drawing.generate(workspace, GenerateRequest(canvas=read_canvas({"regions": [region]})), prompt="a dog")
        with pytest.raises(UserError, match="No fused folder"):
            drawing.generate(workspace, GenerateRequest(base=f"fused/{name}"), prompt="a dog")
        with pytest.raises(UserError, match="no picture"):
            pictures.delete(workspace, name)
    with pytest.raises(UserError, match="prompt is empty"):
        drawing.generate(workspace, GenerateRequest(), prompt=" ")
    assert not workspace.pictures.exists()


def test_preview_and_cancel(workspace: Workspace, trained: tuple[Path, Path], keeper: BaseCache) -> None:
    seen: list[tuple[int, int]] = []
    told: list[tuple[int, int]] = []
    done = draw(
        workspace, trained[0], keeper, num_inference_steps=12, num_images=2,
        preview=lambda images: seen.append(images[0].size),
        hooks=Hooks(lambda event: told.append((event.done, event.total))),
    )  # fmt: skip
    assert seen == [(16, 16)] * 12 and len(done.pictures) == 2
    assert told == [(step, 24) for step in range(1, 25)]

    calls = iter(range(100))
    stopped = draw(
        workspace, trained[0], keeper, num_images=3, canvas=read_canvas(full_value() | {"keypose": ""}),
        hooks=Hooks(should_stop=lambda: next(calls) > 3),
    )  # fmt: skip
    assert stopped.message.endswith("Stopped; 1 picture of 16×16 pixels finished before that.")
    assert len(stopped.pictures) == 1
    assert stopped.pictures[0].exists()
    sketches = set((workspace.pictures / "sketches").iterdir())
    nothing = draw(workspace, trained[0], keeper, canvas=Canvas(strokes()), hooks=Hooks(should_stop=lambda: True))
    assert nothing.pictures == [] and nothing.message.endswith("Stopped.")
    assert set((workspace.pictures / "sketches").iterdir()) == sketches  # its drawing went with it


def test_news_come_in_turn_and_leaving_stops_the_work() -> None:
    stop, step = threading.Event(), threading.Event()

    def work(tell: Any) -> str:
        tell(1)
        step.wait(10)
        return "done"

    turn = stream(work, stop)
    assert next(turn) == 1
    step.set()
    assert list(turn) == ["done"]
    with pytest.raises(ZeroDivisionError):
        list(stream(lambda tell: 1 / 0, threading.Event()))

    stop, ended = threading.Event(), []

    def endless(tell: Any) -> None:
        tell(1)
        stop.wait(10)
        ended.append(stop.is_set())

    turn = stream(endless, stop)
    assert next(turn) == 1
    turn.close()  # type: ignore[attr-defined]
    assert ended == [True]


def test_one_browser_stops_only_its_own_run() -> None:
    runs = CancelTokens()
    waiting, two = runs.begin("one"), runs.begin("two")
    assert not runs.stop("one") and not runs.stop("three")  # neither is at work
    assert runs.take(waiting) is None and not runs.busy("one")  # it was stopped while it waited
    at_work = runs.take(two)
    later = runs.begin("one")  # has nothing to do with the one before
    assert at_work is not None and not at_work.is_set() and runs.busy("one")
    one = runs.take(later)
    assert one is not None and runs.stop("one") and one.is_set() and not at_work.is_set()
    runs.end(later)
    assert not runs.busy("one") and not runs.stop("one") and runs.busy("two")


def test_full_disk_is_a_sentence(
    workspace: Workspace, trained: tuple[Path, Path], keeper: BaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    drawn = Canvas(strokes())
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match=r"No space left.*free some space"):
            draw(workspace, trained[0], keeper, canvas=drawn)
    assert [path for path in workspace.pictures.rglob("*") if path.is_file()] == []
    assert draw(workspace, trained[0], keeper).pictures


def test_fused_base_and_tokens(workspace: Workspace, trained: tuple[Path, Path], keeper: BaseCache) -> None:
    pytest.importorskip("gradio")
    from spectral_diffusion.app.tabs.generate_handlers import GenerateHandlers
    from spectral_diffusion.config.fuse import FuseConfig
    from spectral_diffusion.merging.fuse import fuse_to_folder

    assert drawing.tokens(workspace, "pocket", ["tom"]) == {"<tom>": "dog"}
    files = [workspace.adapters / f"{name}.safetensors" for name in ("tom", "jim")]
    fuse_to_folder(FuseConfig(adapters=files, output=workspace.fused / "pair"))
    fuse_to_folder(FuseConfig(adapters=files[:1], output=workspace.fused / "one"))
    assert set(drawing.tokens(workspace, "fused/pair", [])) == {"<tom>", "<jim>"}
    with pytest.raises(UserError, match="is not among them"):
        drawing.generate(workspace, GenerateRequest("fused/one", ["jim"]), prompt="<jim>")
    one, photos = workspace.fused / "one", make_photos(workspace.concepts / "ann")
    on_it = {
        "concept": photos,
        "output": workspace.adapters / "ann.safetensors",
        "base": str(one),
        "rank": 2,
        "steps": 1,
    }
    train_to_file(TrainConfig(**on_it, slot="8:10", device="cpu", mixed_precision="no"))  # on top of what is fused
    assert drawing.chosen_base(workspace, "ann") == "fused/one" and drawing.chosen_base(workspace, "tom") == str(
        trained[0]
    )
    *_, tokens = GenerateHandlers(workspace).follow("fused/one", ["ann"])
    assert [row[0] for row in tokens] == ["<tom>", "<ann>"]
    assert drawing.generate(
        workspace, GenerateRequest("fused/one", ["ann"]), keeper=keeper, prompt="<ann>", **QUICK
    ).pictures
    box = {"box": [0, 0, 1, 1], "prompt": "a <jim>", "concept": "jim"}  # chosen before they were fused
    canvas = Canvas(strokes(), None, read_canvas({"regions": [box]}).regions)
    wish = GenerateRequest("fused/pair", ["tom"], canvas=canvas)
    drawn = drawing.generate(workspace, wish, keeper=keeper, prompt="a <tom>", **QUICK)
    assert pictures.refill(workspace, drawn.pictures[0].stem).base == "fused/pair"
    assert drawing.side_of(workspace, "fused/pair") == 16
    assert drawing.side_of(workspace, "pocket") == 128 and drawing.side_of(workspace, "some/hub-id") == 512


def test_region_without_its_token_is_noted(workspace: Workspace, trained: tuple[Path, Path], keeper: BaseCache) -> None:
    region = {"box": [0, 0, 1, 1], "prompt": "a dog", "concept": "tom"}
    drawn = draw(workspace, trained[0], keeper, canvas=read_canvas({"regions": [region]}))
    assert "a box has the concept tom, but its prompt does not name <tom>" in drawn.message
    with pytest.raises(UserError, match="strength names 'rex'"):
        draw(workspace, trained[0], keeper, adapters=["tom"], strength="rex=1")


# --- the gallery ---------------------------------------------------------------------------------------------


def test_gallery_pages_download_and_delete(workspace: Workspace, trained: tuple[Path, Path], keeper: BaseCache) -> None:
    assert pictures.page_of(workspace, 1) == ([], 1, [])
    with pytest.raises(UserError, match="No picture is chosen"):
        pictures.picture_details(workspace, None)
    drawn = draw(
        workspace,
        trained[0],
        keeper,
        num_images=2,
        adapters=["tom"],
        canvas=read_canvas(full_value()),
        width=32,
        height=16,
    )
    (workspace.pictures / "odd.png").write_bytes(b"garbage")
    Image.new("RGB", (8, 8)).save(workspace.pictures / "foreign.png")
    (workspace.pictures / "link.png").symlink_to("/etc/passwd")
    shown, pages, problems = pictures.page_of(workspace, 99)
    assert {path.stem for path in shown} == {path.stem for path in drawn.pictures} | {"foreign"} and pages == 1
    assert len(problems) == 1 and "odd.png" in problems[0]
    with pytest.raises(UserError, match="holds no settings"):
        pictures.picture_details(workspace, "foreign")

    name = drawn.pictures[0].stem
    rows = dict(pictures.picture_details(workspace, name))
    assert rows["Prompt"] == "a <tom> and a dog" and rows["Box 2"].endswith("(with jim)") and rows["Seed"] == "0"
    path, packed = pictures.download_picture(workspace, name)
    with zipfile.ZipFile(packed) as archive:
        assert set(archive.namelist()) == {"scene.yaml", path.name, "drawing-1.png", "drawing-2.png"}
        text = archive.read("scene.yaml").decode()
    assert "tom.safetensors, jim.safetensors" in text and str(workspace.root) not in text

    pictures.delete(workspace, name)
    assert not path.exists() and not packed.exists() and list(workspace.trash.rglob(path.name))
    assert len(list((workspace.pictures / "sketches").iterdir())) == 2  # the other picture needs them
    pictures.delete(workspace, drawn.pictures[1].stem)
    assert list((workspace.pictures / "sketches").iterdir()) == []
    with pytest.raises(UserError, match="any more"):
        pictures.delete(workspace, name)


def test_downloaded_scene_draws_the_same_picture(
    workspace: Workspace, trained: tuple[Path, Path], keeper: BaseCache, tmp_path: Path
) -> None:
    from spectral_diffusion.config.scene import Scene
    from spectral_diffusion.config.settings import build
    from spectral_diffusion.scenes.generate import generate_to_file
    from spectral_diffusion.scenes.scene import read_scene

    [path] = draw(workspace, trained[0], keeper, canvas=read_canvas(full_value()), width=32, height=16).pictures
    elsewhere = tmp_path / "elsewhere"
    with zipfile.ZipFile(pictures.download_picture(workspace, path.stem)[1]) as archive:
        archive.extractall(elsewhere)
    assert {file.name for file in elsewhere.iterdir()} == {"scene.yaml", path.name, "drawing-1.png", "drawing-2.png"}
    assert (elsewhere / path.name).read_bytes() == path.read_bytes()
    for file in workspace.adapters.glob("*.safetensors"):
        shutil.copy(file, elsewhere)
    shutil.copytree(trained[0], elsewhere / trained[0].name)
    layer = {"output": elsewhere / "again.png", "device": "cpu"}
    [again] = generate_to_file(build(Scene, read_scene(elsewhere / "scene.yaml"), layer))
    assert pixels(again) == pixels(path)


def hostile_picture(path: Path, settings: dict[str, Any]) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("spectral_diffusion", json.dumps({"settings": settings}))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def test_pictures_of_others_read_nothing_outside(workspace: Workspace, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(strokes())
    settings = {
        "prompt": "x",
        "adapters": {str(tmp_path / "x.safetensors"): 1.0},
        "controls": [{"file": str(secret)}, {"file": "/etc/passwd", "kind": "keypose"}],
    }
    hostile_picture(workspace.pictures / "evil.png", settings)
    found = pictures.refill(workspace, "evil")
    assert found.canvas == {"strokes": "", "keypose": "", "regions": []} and found.adapters == []
    assert len(found.notes) == 3
    with zipfile.ZipFile(pictures.download_picture(workspace, "evil")[1]) as archive:
        assert set(archive.namelist()) == {"scene.yaml", "evil.png"}
    hostile_picture(workspace.pictures / "odd.png", {"prompt": ["x"], "surprise": 1})
    with pytest.raises(UserError, match=r"odd\.png"):
        pictures.picture_details(workspace, "odd")


def test_what_is_gone_is_told_on_refill(workspace: Workspace, trained: tuple[Path, Path], keeper: BaseCache) -> None:
    value = full_value() | {"keypose": ""}
    [path] = draw(workspace, trained[0], keeper, adapters=["tom"], canvas=read_canvas(value)).pictures
    (workspace.adapters / "jim.safetensors").unlink()
    shutil.rmtree(workspace.pictures / "sketches")
    found = pictures.refill(workspace, path.stem)
    assert any("jim" in note for note in found.notes) and any("drawing" in note for note in found.notes)
    assert [region["concept"] for region in found.canvas["regions"]] == ["tom", ""]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On networks this small, threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the tab and its endpoint --------------------------------------------------------------------------------


@pytest.fixture
def handlers(workspace: Workspace) -> Any:
    pytest.importorskip("gradio")
    from spectral_diffusion.app.tabs.generate_handlers import GenerateHandlers

    return GenerateHandlers(workspace)


class Asker:
    """As much of a request as the handlers look at."""

    def __init__(self, session_hash: str) -> None:
        self.session_hash = session_hash


def values_of(base: Path, **more: Any) -> list[Any]:
    from spectral_diffusion.app.tabs.generate_layout import Fields

    usual = {"prompt": "a <tom>", "base": str(base), "adapters": ["tom"], "strength": "1",
             "num_inference_steps": 3, "guidance_scale": 2.0, "sampler": "dpm", "canvas": full_value(),
             "sketch_weight": 1.0, "keypose_weight": 1.0, "region_start": 0.0, "region_end": 1.0, "num_images": 1,
             "seed": 3}  # fmt: skip
    return [(usual | more).get(name) for name in Fields.__dataclass_fields__]


def test_tab_draws_shows_and_refills(
    handlers: Any, workspace: Workspace, trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectral_diffusion.app.tabs.generate_layout import Fields

    news = list(handlers.generate_from_fields(handlers.begin(Asker("one"))[-1], *values_of(trained[0])))
    assert any(isinstance(picture, Image.Image) for picture, *_ in news)
    assert any("Generating" in line and "step 3 of 3" in line for _, line, _ in news)
    picture, line, name = news[-1]
    assert "Generated 1 picture of 16×16 pixels." in line and Path(picture).stem == name
    *filled, line = handlers.refilled(name)
    by_name = dict(zip(Fields.__dataclass_fields__, filled, strict=True))
    assert by_name["canvas"].value == full_value() and by_name["seed"] == 3 and "fields above" in line
    assert by_name["quantization"] == ""  # as the base is loaded anyway
    unlike = {"quantization": "int8"}
    monkeypatch.setattr("spectral_diffusion.app.generation.as_loaded", lambda *given: unlike)
    assert dict(zip(Fields.__dataclass_fields__, handlers.refilled(name), strict=False))["quantization"] == "none"
    monkeypatch.undo()
    again = list(handlers.again(handlers.begin(Asker("one"))[-1], name))[-1]
    assert pixels(Path(again[0])) == pixels(Path(picture)) and again[0] != picture


def test_found_places_become_boxes_over_the_picture(
    handlers: Any, workspace: Workspace, trained: tuple[Path, Path], keeper: BaseCache
) -> None:
    from spectral_diffusion.app.tabs.generate_layout import Fields

    both = {"adapters": ["tom", "jim"], "prompt": "a <tom> and a <jim> on the grass", "strength": "tom=0.7, jim=1.3"}
    [path] = draw(workspace, trained[0], keeper, **both).pictures
    places = read_places(path)
    assert set(places) == {"<tom>", "<jim>"} and all(0 <= a < c <= 1 for a, _, c, _ in places.values())
    *filled, line = handlers.places(path.stem)
    by_name = dict(zip(Fields.__dataclass_fields__, filled, strict=True))
    assert by_name["canvas"].value["regions"] == [
        {"box": list(places["<tom>"]), "prompt": "a <tom> and a on the grass", "concept": "tom"},
        {"box": list(places["<jim>"]), "prompt": "a and a <jim> on the grass", "concept": "jim"},
    ]
    assert by_name["adapters"] == [] and by_name["strength"] == "tom=0.7, jim=1.3" and "drag them" in line
    assert by_name["canvas"].props["backdrop"].startswith(canvas.PNG)
    boxed = draw(
        workspace, trained[0], keeper, canvas=read_canvas(by_name["canvas"].value), adapters=[],
        strength=by_name["strength"], prompt=by_name["prompt"],
    )  # fmt: skip
    settings = read_settings(boxed.pictures[0])
    assert [list(region["adapters"].values()) for region in settings["regions"]] == [[0.7], [1.3]]
    assert read_places(boxed.pictures[0]) == {}
    with pytest.raises(UserError, match="No places were found"):
        pictures.boxes_of_places(workspace, boxed.pictures[0].stem)


def test_tab_says_errors_in_place(handlers: Any, trained: tuple[Path, Path]) -> None:
    def draw_for(who: str, **values: Any) -> list[Any]:
        return list(handlers.generate_from_fields(handlers.begin(Asker(who))[-1], *values_of(trained[0], **values)))

    [(_, line, _)] = draw_for("one", prompt="")
    assert line.startswith("**That did not work.** The prompt is empty")
    [(_, line, _)] = draw_for("one", canvas={"strokes": "x"})
    assert "no PNG" in line
    ticket = handlers.begin(Asker("one"))[-1]
    start, cancel, line = handlers.cancel(Asker("one"))  # while it waits for its turn
    assert start.visible and not cancel.visible and "while it waited" in line
    later = handlers.begin(Asker("one"))[-1]
    assert handlers.ended("", Asker("one"))[1].visible  # the later one waits, and can be cancelled
    [silent] = handlers.generate_from_fields(ticket, *values_of(trained[0]))
    assert all("value" not in update for update in silent)
    assert "Generated" in list(handlers.generate_from_fields(later, *values_of(trained[0])))[-1][1]
    assert not handlers.ended("", Asker("one"))[1].visible


def test_tab_offers_what_the_base_allows(handlers: Any, workspace: Workspace) -> None:
    _, note, adapters, strength, _, tokens = handlers.lists("pocket", ["tom", "gone"])
    assert adapters.value == ["tom"] and strength.visible and not note.visible
    assert "value" not in handlers.lists("pocket", ["tom"])[2]._constructor_args[0]  # what is right is left as it is
    assert tokens == [["<jim>", "dog", "jim"], ["<tom>", "dog", "tom"]]
    assert handlers.follow("fused/none", [])[0].visible  # no such fusion: said when it is drawn
    shutil.copy(pocket.adapter("rex"), workspace.adapters / "rex.safetensors")
    assert [row[2] for row in handlers.follow("pocket", [])[-1]] == ["jim", "rex", "tom"]  # tom's base is a path
    assert [row[2] for row in handlers.follow("pocket-transformer", ["rex"])[-1]] == ["jim", "tom"]
    assert handlers.follow("pocket-transformer", ["rex"])[0].value == []
    shutil.rmtree(workspace.adapters)
    _, note, adapters, *_ = handlers.lists("pocket", [])
    assert note.visible and "step 2" in note.value and not adapters.visible
    assert handlers.shape("Wide", "pocket") == (256, 128) and handlers.shape("Square", "pocket") == (128, 128)
    assert handlers.reshaped("pocket", 128, 256)[1] == "Tall" and handlers.reshaped("pocket", 128, 144)[1] is None


def test_what_is_handed_over_comes_with_its_base(
    handlers: Any, workspace: Workspace, trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectral_diffusion.app.page import hand
    from spectral_diffusion.app.tabs.train import TrainHandlers as Train

    pocket, large = (20, 2.0, 1.0), (50, 7.5, 0.0)  # steps, guidance and isolation of regions
    base = str(trained[0])
    assert hand("rex") != hand("rex")  # each time it is a change
    assert handlers.handed_adapters(hand(["tom"]), "Wide", *pocket) == (base, ["tom"], 32, 16, *large)
    assert handlers.handed_adapters(hand(["tom"]), "Wide", 30, 2.0, 1.0)[4:] == (30, 7.5, 0.0)  # a person's own steps
    assert handlers.handed_base(hand("pocket"), "Square", *large) == ("pocket", [], 128, 128, *pocket)
    assert handlers.suited("fused/none", "Square", *pocket) == (512, 512, *pocket)
    assert handlers.shape("Square", "x" * 300) == (512, 512)

    # The prompt names what was handed over, and boxes of others go.
    kept, others = ({"box": [0, 0, 1, 1], "prompt": "", "concept": name} for name in ("tom", "jim"))
    boxes = {"strokes": "data:x", "keypose": "", "regions": [others, kept]}
    prompt, canvas = handlers.prompt_of_handed("a <tom> and a <jim>", boxes, hand(["tom"]))
    assert prompt == "a photo of <tom> on the beach" and canvas == {**boxes, "regions": [kept]}
    prompt, canvas = handlers.prompt_of_handed("my <Tom>, drawn", {"regions": []}, hand(["tom"]))
    assert prompt == "my <Tom>, drawn" and "value" not in canvas

    train = Train.__new__(Train)
    train.workspace, train.queue = workspace, SimpleNamespace(jobs=list)
    for folder in ("tom", "jim"):
        make_photos(workspace.concepts / folder)
    first = hand("tom")
    assert train.opened("jim", None, 0, "lora")[0].value == "jim"
    chosen, _, taken = train.opened("jim", first, 0, "lora")
    assert (chosen.value, taken) == ("tom", first[1])
    assert train.opened("jim", first, taken, "lora")[0].value == "jim"  # chosen since
    assert train.opened("jim", hand("tom"), taken, "lora")[0].value == "tom"  # handed over again


def test_each_chosen_thing_gets_a_box(handlers: Any) -> None:
    boxes = {"regions": [], "strokes": "data:x"}
    prompt, canvas, left, width, height, shape = handlers.arranged(
        ["tom", "jim"], "<tom> and <jim> at night", boxes, "pocket"
    )
    assert prompt == "<tom> and <jim> at night" and (left, width, height, shape) == ([], 256, 128, "Wide")
    assert canvas["strokes"] == "data:x" and canvas["regions"] == [
        {"box": [0.0, 0.0, 0.5, 1.0], "prompt": "a photo of <tom> at night", "concept": "tom"},
        {"box": [0.5, 0.0, 1.0, 1.0], "prompt": "a photo of <jim> at night", "concept": "jim"},
    ]
    prompt, canvas, *_ = handlers.arranged(["tom", "jim"], "my <tom>", None, "pocket")
    assert prompt == "a photo of <tom> and <jim> on the grass"
    assert canvas["regions"][1]["prompt"] == "a photo of <jim> on the grass"
    prompt, canvas, *_ = handlers.arranged(["tom", "jim"], "a watercolor of <jim> beside <tom>", None, "pocket")
    assert prompt == "a watercolor of <jim> beside <tom>" and [one["concept"] for one in canvas["regions"]] == [
        "jim",
        "tom",
    ]
    with pytest.raises(Exception, match="Choose two to 6 concepts"):
        handlers.arranged(["tom"], "", boxes, "pocket")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, trained: tuple[Path, Path]) -> Iterator[tuple[Workspace, str]]:
    pytest.importorskip("gradio")
    from spectral_diffusion.app.server import build_app, launch

    workspace = Workspace(tmp_path_factory.mktemp("served") / "workspace")
    shutil.copytree(trained[1], workspace.adapters)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks = build_app(workspace.root)
    launch(blocks, port, prevent_thread_lock=True, quiet=True)
    yield workspace, f"http://127.0.0.1:{port}"
    blocks.close()


def test_endpoint_draws_with_sketch_and_regions(
    served: tuple[Workspace, str], trained: tuple[Path, Path], tmp_path: Path
) -> None:
    from gradio_client import handle_file

    client = client_of(served[1])
    (tmp_path / "sketch.png").write_bytes(strokes())

    def copies() -> set[Path]:  # all apps of a process share the folder
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        return {path for path in folder.rglob("*.png") if "sketch" not in path.name}

    before = copies()
    files, words = client.predict(
        prompt="a <tom> and a <jim>", base=str(trained[0]), strength="0.8", seed=7, num_images=2, width=32, height=16,
        num_inference_steps=2, sketch=handle_file(tmp_path / "sketch.png"), regions=full_value()["regions"],
        api_name="/generate",
    )  # fmt: skip
    assert len(files) == 2 and "Generated 2 pictures of " in words
    assert copies() == before and Path(files[0]).exists()  # pictures are served from where they are
    settings = read_settings(Path(files[0]))
    assert settings["seed"] == 7 and len(settings["regions"]) == 2 and settings["controls"][0]["kind"] == "sketch"
    for more, sentence in (
        ({"adapters": ["nonsense"]}, "No adapter 'nonsense'"),
        ({"regions": [{"box": [0, 0, 2, 1], "prompt": "x"}]}, "four numbers from 0 to 1"),
        ({"base": "fused/../../x"}, "No fused folder"),
    ):
        with pytest.raises(Exception, match=sentence):
            client.predict("a dog", **more, api_name="/generate")


def test_twenty_at_once_are_all_answered(served: tuple[Workspace, str], trained: tuple[Path, Path]) -> None:

    clients = [client_of(served[1]) for _ in range(4)]
    jobs = [
        clients[number % 4].submit(
            "a dog", base=str(trained[0]), seed=number, num_inference_steps=2, api_name="/generate"
        )
        for number in range(20)
    ]
    seeds = [read_settings(Path(job.result(timeout=120)[0][0]))["seed"] for job in jobs]
    assert seeds == list(range(20))
