"""Words that would silently not be used are named, masks out of shape too; pictures find their files again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_photos
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from spectral_diffusion.adapters.apply import put_adapters
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.cli import app
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.tokens import collapse, expand
from spectral_diffusion.scenes.generate import remarks
from spectral_diffusion.scenes.png_metadata import SETTINGS_KEY, find_again, read_settings
from spectral_diffusion.scenes.prompts import foreign_syntax
from spectral_diffusion.scenes.region_mask import region_mask
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.scenes.scene import read_scene
from spectral_diffusion.training.run import train_to_file

LEFT = (0.0, 0.0, 0.5, 1.0)
LONG = "ugly blurry " * 30


@pytest.fixture(scope="module")
def rex(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rex")
    train_to_file(
        TrainConfig(
            concept=make_photos(folder / "rex"), output=folder / "rex.safetensors", base=str(tiny_base), rank=2,
            steps=2, device="cpu", learning_rate=0.1, text_encoder_learning_rate=0.1,
        )
    )  # fmt: skip
    return folder / "rex.safetensors"


def told(base: Path, **more: object) -> list[str]:
    return list(remarks(load_base(str(base), "cpu"), Scene(**{"prompt": "a dog", **more}), []))  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["prompt", "negative", "region", "region's negative"])
def test_unknown_and_cut_words_are_told_of_every_prompt(tiny_base: Path, where: str) -> None:
    text = f"{LONG}<nobody>"
    region = (
        {"box": LEFT, "prompt": "a cup", "negative_prompt": text}
        if "negative" in where
        else {"box": LEFT, "prompt": text}
    )
    scene = {"prompt": {"prompt": text}, "negative": {"negative_prompt": text}}.get(where, {"regions": [region]})
    notes = told(tiny_base, **scene)
    assert len(notes) == 2 and "<nobody> is no token" in notes[0] and "is longer than this base reads" in notes[1]


def test_syntax_of_other_programs_is_called_plain_text(tiny_base: Path) -> None:
    text = "a (red:1.4) dog <lora:rex:0.8> BREAK grass, ((big)), [day:night:0.5]"
    first, second, *_ = told(tiny_base, negative_prompt=text)
    assert (
        "<lora:rex:0.8> is read as plain text; such a file is named among the adapters (rex.safetensors=0.8)." in first
    )
    assert "(red:1.4) and BREAK and ((big)) and [day:night:0.5] are read as plain text" in second
    assert told(tiny_base, prompt="a dog (brown, 2 years), [x] at 10:30: BREAKING news") == []
    assert list(foreign_syntax(["<lora:x>", "<lora:x>"])) == [
        "<lora:x> is read as plain text; such a file is named among the adapters (x.safetensors)."
    ]


def test_a_token_is_itself_in_upper_case(tiny_base: Path, rex: Path) -> None:
    assert expand("a <REX> <Rex>_1 dog", {"<rex>": 2}) == "a <rex> <rex>_1 dog"
    assert collapse("a <REX> dog", {"<rex>": 2}) == "a <rex> dog" and collapse("<REX2>", {"<rex>": 2}) == "<REX2>"
    base = load_base(str(tiny_base), "cpu")
    put_adapters(base, [(load_adapter(rex), 1.0)])
    scene = Scene(num_inference_steps=2, device="cpu", guidance_scale=3.0)
    small, large, region = (
        sample(base, [prompt], [1], scene.model_copy(update={"regions": regions}))[0].tobytes()
        for prompt, regions in (
            ("<rex> on grass", []), ("<REX> on grass", []), ("x", [Region(box=(0, 0, 1, 1), prompt="<Rex> on grass")]),
        )
    )  # fmt: skip
    assert small == large == region
    assert not list(remarks(base, Scene(prompt="<REX>"), [])) and list(remarks(base, Scene(prompt="<REXX>"), []))


def test_a_stretched_mask_is_told_as_a_drawing_is(tiny_base: Path, tmp_path: Path) -> None:
    Image.new("L", (225, 125), 255).save(tmp_path / "wide.png")
    Image.new("L", (225, 225), 255).save(tmp_path / "square.png")
    regions = [{"mask": tmp_path / f"{name}.png", "prompt": "a dog"} for name in ("wide", "square", "wide")]
    [note] = told(tiny_base, regions=regions)
    assert note == "Note: the mask wide.png of 225×125 is stretched to the picture's 16×16."


@pytest.mark.parametrize("box", [(0.67, 0, 1.01, 1), (0.5, 0, 1.5, 1), (0, 0, 1, 2)])
def test_fractions_above_one_reach_outside_the_picture(box: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="reaches outside the picture of 64×32; fractions go up to 1"):
        region_mask(Region(box=box, prompt="a dog"), 64, 32)
    assert region_mask(Region(box=(0, 0, 32, 16), prompt="a dog"), 64, 32) == (0, 0, 0.5, 0.5)
    with pytest.raises(UserError, match="give pixels inside it"):
        region_mask(Region(box=(0, 0, 3, 40), prompt="a dog"), 64, 32)


@pytest.fixture
def project(tiny_base: Path, rex: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an adapter and, in folders of their own, pictures drawn with it from here."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rex.safetensors").write_bytes(rex.read_bytes())
    monkeypatch.chdir(tmp_path)
    common = ["--prompt", "<rex>", "--base", str(tiny_base), "--device", "cpu", "num_inference_steps=2"]
    run(*common, "--adapter", "in/rex.safetensors=0.5", "-o", "out/p.png")
    region = "{box: [0, 0, 0.5, 1], prompt: <rex>, adapters: {in/rex.safetensors: 0.7}}"
    run(*common, f"regions=[{region}]", "-o", "out/r.png")
    return tmp_path


def run(*words: object) -> None:
    result = CliRunner().invoke(app, ["generate", *map(str, words)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def again(source: Path | str, *words: object) -> bytes:
    run(source, *words, "-o", "again.png", "--device", "cpu")
    return pixels(Path("again.png"))


def test_a_picture_finds_its_adapter_from_any_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, elsewhere = pixels(project / "out" / "p.png"), project / "elsewhere"
    (elsewhere / "in").mkdir(parents=True)
    (elsewhere / "in" / "rex.safetensors").write_bytes(b"another one")
    monkeypatch.chdir(elsewhere)
    assert again("../out/p.png") == wanted
    shutil.rmtree(elsewhere / "in")
    assert again("../out/p.yaml") == wanted
    shutil.move(project / "in" / "rex.safetensors", project / "out")  # beside the picture
    assert again("../out/p.png") == wanted


def test_an_adapter_named_anew_stands_for_the_pictures_own(project: Path) -> None:
    wanted, bound = pixels(Path("out/p.png")), pixels(Path("out/r.png"))
    Path("in/rex.safetensors").rename("moved.safetensors")
    with pytest.raises(
        UserError,
        match=r"p\.png was generated with in/rex\.safetensors, which no longer exists. Use adapters=…",
    ):
        again("out/p.png")
    assert again("out/p.png", "--adapter", "moved.safetensors") == wanted
    assert read_settings(Path("again.png"))["adapters"] == {"moved.safetensors": 0.5}
    assert again("out/r.png", "--adapter", "moved.safetensors") == bound
    assert again("out/p.png", "--adapter", "moved.safetensors=0.9") != wanted
    assert read_settings(Path("again.png"))["adapters"] == {"moved.safetensors": 0.9}
    assert again("out/p.png", "adapters={moved.safetensors: 0.5}") == wanted


def test_a_changed_adapter_of_the_same_name_stands_for_it_too(project: Path) -> None:
    other = project / "new" / "rex.safetensors"
    other.parent.mkdir()
    Path("in/rex.safetensors").rename(other)
    held = find_again(Path("out/p.png"), [str(other)])
    assert held.settings["adapters"] == {str(other): 0.5} and held.placed == {str(other)} and str(other) in held.sources
    other.write_bytes(other.read_bytes() + b"\0")
    assert find_again(Path("out/p.png"), [str(other)]).settings["adapters"] == {str(other): 0.5}


def test_a_scene_file_is_read_whatever_it_holds(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "prompt: x\nbase: pocket\nregions: 5\ncontrols: [3, {file: a.png}]\nadapters: [a]\n"
    )
    (tmp_path / "pocket").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    assert read_scene(tmp_path / "s.yaml") == {
        "prompt": "x", "base": "pocket", "regions": 5, "controls": [3, {"file": str(tmp_path / "a.png")}],
        "adapters": ["a"],
    }  # fmt: skip


def test_a_picture_with_odd_settings_is_a_sentence(tmp_path: Path) -> None:
    for settings in ({"regions": 5}, {"regions": [3, {"adapters": 1}]}, {"adapters": [1], "controls": {"a": 1}}):
        info = PngImagePlugin.PngInfo()
        info.add_itxt(SETTINGS_KEY, json.dumps({"settings": {"prompt": "x", **settings}}))
        Image.new("RGB", (8, 8)).save(tmp_path / "odd.png", pnginfo=info)
        assert find_again(tmp_path / "odd.png").settings == {"prompt": "x", "auto_regions": False, **settings}
        with pytest.raises(UserError, match=r"'(regions|adapters)"):
            run(tmp_path / "odd.png", "-o", tmp_path / "out.png")
