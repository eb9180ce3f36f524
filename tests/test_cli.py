"""The command line: bad input is one sentence and exit code 2; presets load; imports point one way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_photos, make_tiny_base
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

import spectral_diffusion
from spectral_diffusion import cli
from spectral_diffusion.cli.scenes import adapters_in
from spectral_diffusion.cli.support import ProgressLines, named_base, resolve
from spectral_diffusion.config.control import ControlConfig
from spectral_diffusion.config.evaluate import EvaluateConfig
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.settings import build, parse_overrides, read_yaml, to_yaml
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core import assets as resources
from spectral_diffusion.core.hooks import Event, Pace, brief_duration
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.scenes.png_metadata import read_settings
from spectral_diffusion.training.run import train_to_file

PACKAGE = Path(spectral_diffusion.__file__).parent


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*words: object) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["spectral-diffusion", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def refused(result: Result, *parts: str) -> None:
    """One sentence on stderr, exit code 2."""
    assert result.code == 2, (result.code, result.err)
    lines = [line for line in result.err.splitlines() if line.strip() and "━" not in line]
    assert len(lines) == 1 and lines[0].startswith("Error: ") and lines[0].endswith((".", ")", "…", "'")), result.err
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err, result.err


HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "gradio", "scipy", "numpy", "PIL", "jinja2"}
NAMES_HEAVY = """
import sys
from typer.testing import CliRunner
from spectral_diffusion.cli import app
result = CliRunner().invoke(app, sys.argv[1:])
assert result.exit_code == 0 and "--help" in result.output, result.output
print(*sys.modules)
"""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "--help"]])
def test_help_is_quick(words: list[str]) -> None:
    """Nothing that takes long to import is imported for it."""
    command = [sys.executable, "-c", NAMES_HEAVY, *words]
    modules = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert "spectral_diffusion.cli.verbs" in modules and not HEAVY & set(modules)


def test_a_verb_is_imported_alone(tmp_path: Path) -> None:
    """Showing slots builds no other verb's settings."""
    command = [sys.executable, "-c", NAMES_HEAVY.replace(' and "--help" in result.output', ""), "slots", "list"]
    modules = subprocess.run([*command, str(tmp_path)], capture_output=True, check=True, text=True).stdout.split()
    assert "spectral_diffusion.cli.slots" in modules and "spectral_diffusion.slots.ledger" in modules
    assert not {"spectral_diffusion.cli.training", "spectral_diffusion.config.train"} & set(modules)


def test_train_folder_problems(run, tiny_base: Path, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "a.safetensors", "--base", tiny_base, "--device", "cpu")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(run("train", empty, *output), str(empty), "no readable photo")
    (empty / "notes.txt").write_text("hello")
    (empty / "more.txt").write_text("hello")
    refused(run("train", empty, *output), "no readable photo")
    refused(run("train", tmp_path / "nowhere", *output), "No such folder", "nowhere")
    refused(run("train", make_photos(tmp_path / "p"), *output[2:]), "'output' is missing")
    refused(run("train", tmp_path / "p", "-o", tmp_path / "a.png", *output[2:]), "must end in .safetensors")


def test_a_truncated_photo_is_skipped_and_named(run, tiny_base: Path, tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 2)
    Image.effect_noise((64, 64), 90).save(folder / "broken.jpg")
    data = (folder / "broken.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(data[: len(data) // 2])
    (folder / "readme.docx").write_bytes(b"PK")
    result = run(
        "train",
        folder,
        "-o",
        tmp_path / "a.safetensors",
        "--base",
        tiny_base,
        "--device",
        "cpu",
        "--rank",
        2,
        "--steps",
        1,
    )
    assert result.code == 0, result.err
    assert "broken.jpg is not a readable image" in result.out and "1 file of other kinds" in result.out
    assert "2 photos" in result.out


def test_train_setting_problems(run, photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    words = ("train", photos, "-o", tmp_path / "a.safetensors", "--base", tiny_base, "--device", "cpu")
    refused(run(*words, "--method", "spectral-aditive"), "Unknown method", "did you mean 'spectral-additive'")
    refused(run(*words, "--rank", 0), "'rank'", "greater than or equal to 1")
    refused(run(*words, "learning_rat=1"), "Unknown setting 'learning_rat'", "did you mean 'learning_rate'")
    refused(run(*words, "nonsense"), "key=value")
    refused(run(*words, "--slot", "9999"), "past the 16 columns")
    refused(run(*words, "--slot", "maybe"), "not understood")
    refused(run(*words, "--device", "abacus"), "Device 'abacus'")
    refused(run(*words, "--dtype", "float8"), "Unknown dtype")
    refused(run(*words, "target_modules=attentoin"), "did you mean 'attention'")
    refused(run(*words, "token=rex"), "must look like <rex>")
    (tmp_path / "c.yaml").write_text("steps: 3\nrnak: 4\n")
    refused(run(*words, "--config", tmp_path / "c.yaml"), "Unknown setting 'rnak' in", "c.yaml", "did you mean 'rank'")
    (tmp_path / "c.yaml").write_text("steps: [1\n")
    refused(run(*words, "--config", tmp_path / "c.yaml"), "not valid YAML")
    refused(run(*words, "--config", tmp_path / "no.yaml"), "No such file")
    refused(run(*words, "--config", "pockte"), "did you mean 'pocket'")
    assert not (tmp_path / "a.safetensors").exists()


def test_slots_taken_and_released(run, photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    common = ("--base", tiny_base, "--device", "cpu", "--rank", 8, "--steps", 1)
    assert run("train", photos, "-o", tmp_path / "rex.safetensors", *common, "--slot", 0).code == 0
    other = make_photos(tmp_path / "mug", seed=1)
    refused(run("train", other, "-o", tmp_path / "mug.safetensors", *common, "--slot", "0"), "overlaps", "'rex'")
    assert run("train", other, "-o", tmp_path / "mug.safetensors", *common).code == 0
    third = make_photos(tmp_path / "cup", seed=2)
    refused(
        run("train", third, "-o", tmp_path / "cup.safetensors", *common), "past the 16 columns", "2 slots of rank 8"
    )
    listed = run("slots", "list", tmp_path)
    assert "0:8  rex" in listed.out and "8:16  mug" in listed.out
    refused(run("slots", "release", "rxe", tmp_path), "No concept 'rxe'")
    assert run("slots", "release", "rex", tmp_path).code == 0
    assert run("train", third, "-o", tmp_path / "cup.safetensors", *common).code == 0


def test_base_problems(run, photos: Path, tmp_path: Path) -> None:
    words = ("train", photos, "-o", tmp_path / "a.safetensors", "--device", "cpu", "--config", "sd15-12gb", "--base")
    refused(run(*words, "no/such-model"), "no/such-model", "HF_HUB_OFFLINE")
    refused(run(*words, tmp_path), "not a diffusers folder")
    refused(run(*words, "pokcet"), "No base 'pokcet'")
    (tmp_path / "x.safetensors").write_bytes(b"\x00" * 64)
    refused(run(*words, tmp_path / "x.safetensors"), "is not a readable safetensors file")
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04")
    refused(run(*words, tmp_path / "x.ckpt"), "pickle")


def test_adapter_problems(run, photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(bytes(range(256)) * 8)
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(2)}, plain)
    for verb in (("inspect",), ("fuse", "-o", tmp_path / "f")):
        refused(run(*verb, noise), "not a readable safetensors file")
        refused(run(*verb, plain), "not an adapter")
        refused(run(*verb, tmp_path / "no.safetensors"), "No such file")
    rex = tmp_path / "rex.safetensors"
    train_to_file(TrainConfig(concept=photos, output=rex, base=str(tiny_base), rank=2, steps=1, device="cpu"))
    other = make_tiny_base(tmp_path / "other", seed=5)
    refused(run("fuse", rex, "-o", tmp_path / "f", "--base", other, "--device", "cpu"), "does not fit", str(tiny_base))
    refused(
        run("generate", "--base", other, "--adapter", rex, "--prompt", "x", "-o", tmp_path / "o.png"), "does not fit"
    )
    refused(run("fuse", rex, "-o", tmp_path / "f", "options.form=smu"), "'options.form'")
    refused(run("fuse", rex, "-o", tmp_path / "f", "--merge", "spectrl"), "did you mean 'spectral'")
    refused(run("fuse", rex, "-o", tmp_path / "f", "--strength", "rex=much"), "'much' is not a number")
    refused(run("fuse", rex, "-o", tmp_path / "f", "--strength", "rx=1"), "did you mean 'rex'")
    assert not (tmp_path / "f").exists()


def test_generate_problems(run, tiny_base: Path, tmp_path: Path) -> None:
    words = ("generate", "--base", tiny_base, "--device", "cpu", "-o", tmp_path / "o.png")
    refused(run(*words), "prompt")
    refused(run(*words, "--prompt", "x", "--width", 30), "'width'", "divisible by 8")
    refused(run(*words, "--prompt", "x", "--sketch", tmp_path / "no.png"), "No such file")
    refused(run(*words[:-1], tmp_path / "o.txt", "--prompt", "x"), "must end in .png")
    refused(run("inspect", tmp_path), "manifest.json")
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    refused(run("inspect", tmp_path / "bare.png"), "no settings")
    refused(run("methods", "--arch", "sd51"), "did you mean 'sd15'")
    refused(run("methods", "--rank", 0), "at least 1")


def test_unwritable_output(run, photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    common = ("--base", tiny_base, "--device", "cpu")
    below = tmp_path / "file" / "below"
    refused(run("train", photos, "-o", below / "a.safetensors", "--rank", 2, "--steps", 1, *common), "Cannot write")
    refused(run("generate", "--prompt", "x", "-o", below / "o.png", *common), "Cannot write")
    rex = tmp_path / "rex.safetensors"
    train_to_file(TrainConfig(concept=photos, output=rex, base=str(tiny_base), rank=2, steps=1, device="cpu"))
    refused(run("fuse", rex, "-o", below, "--device", "cpu"), "Cannot write")


def test_odd_words_get_a_sentence(run, tiny_base: Path, tmp_path: Path) -> None:
    refused(run("evaluate", "x.safetensors", f"prompts=[{'a' * 300}]"), "x.safetensors")
    (tmp_path / "scene.yaml").write_text("prompt: x\nname: 2024-13-01\n")
    refused(run("generate", tmp_path / "scene.yaml"), "not valid YAML")
    (tmp_path / "scene.yaml").write_text("prompt: x\nregions: 5\n")
    refused(run("generate", tmp_path / "scene.yaml"), "'regions'")
    assert parse_overrides(["prompt=2024-13-45", "a=0x_", "b=!!bool foo"]) == {
        "prompt": "2024-13-45", "a": "0x_", "b": "!!bool foo",
    }  # fmt: skip
    folder = shutil.copytree(tiny_base, tmp_path / "inpainting")
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = UNet2DConditionModel.from_config({**config, "in_channels": 9})
    unet.save_pretrained(folder / "unet")
    refused(
        run("generate", "--prompt", "x", "--base", folder, "-o", tmp_path / "o.png"),
        "is an inpainting model (9 input channels)",
    )


def test_what_a_person_made_is_not_written_over(run, photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    common = ("--base", tiny_base, "--device", "cpu")
    train = ("train", photos, "-o", tmp_path / "rex.safetensors", "--rank", 2, "--steps", 1, *common)
    draw = ("generate", "--prompt", "x", "-o", tmp_path / "out.png", "num_inference_steps=1", *common)
    own = {
        tmp_path / "rex.yaml": b"steps: 1  # as I like it\n",
        tmp_path / "out.yaml": b"prompt: my scene\n",
    }
    save_file({"a": torch.zeros(1)}, tmp_path / "rex.safetensors")
    for path, data in own.items():
        path.write_bytes(data)
    refused(run(*train), "rex.safetensors is no adapter of this program")
    (tmp_path / "rex.safetensors").unlink()
    refused(run(*train, "--config", tmp_path / "rex.yaml"), "rex.yaml would be replaced by the settings")
    refused(run(*draw), "out.yaml would be replaced by the settings")
    for name in ("rex.yaml", "out.yaml"):
        assert (tmp_path / name).read_bytes() == own[tmp_path / name]
        (tmp_path / name).unlink()
    for name, more in {"out.png": (), "out-1.png": ("--count", 2)}.items():
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        refused(run(*draw, *more), f"{name} was not generated by this program")
        refused(
            run("extract", "sketch", tmp_path / name, "-o", tmp_path / name),
            f"{name} was not drawn from a photo here",
        )
        (tmp_path / name).unlink()
    photo = next(photos.glob("*.png"))
    sketch = ("extract", "sketch", photo, "-o", tmp_path / "sketch.png")
    for words in (train, draw, sketch) * 2:  # what they wrote themselves they may replace
        assert run(*words).code == 0
    for name, words in {"rex.yaml": (*train, "--config", tmp_path / "rex.yaml"), "out.yaml": draw}.items():
        (tmp_path / name).write_bytes(own[tmp_path / name])  # a person's again, beside what is there by now
        refused(run(*words), f"{name} would be replaced by the settings")
        assert (tmp_path / name).read_bytes() == own[tmp_path / name]


def test_a_picture_takes_the_base_of_its_adapters(run, photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    rex, out = tmp_path / "rex.safetensors", tmp_path / "out.png"
    train_to_file(TrainConfig(concept=photos, output=rex, base=str(tiny_base), rank=2, steps=1, device="cpu"))
    (tmp_path / "scene.yaml").write_text(
        f"prompt: x\nregions: [{{box: [0, 0, 1, 1], prompt: x, adapters: {{{rex}: 1.0}}}}]\n"
    )
    for words in (("--adapter", f"{rex}=0.5", "--prompt", "x"), (tmp_path / "scene.yaml",)):
        assert run("generate", *words, "-o", out, "--device", "cpu", "num_inference_steps=1").code == 0
        assert read_settings(out)["base"] == str(tiny_base)
    (tmp_path / "c.yaml").write_text(f"prompt: x\nadapters: {{{rex}: 1.0}}\n")
    for words in (("--config", tmp_path / "c.yaml"), ("--prompt", "x", f"adapters={{{rex}: 1.0}}")):
        assert run("generate", *words, "-o", out, "--device", "cpu", "num_inference_steps=1").code == 0
        assert read_settings(out)["base"] == str(tiny_base)
    assert adapters_in({"regions": 5}) == []
    assert adapters_in({"regions": [3, {"adapters": [1]}], "adapters": "a"}) == []


def test_resolved_settings_lie_beside_the_output_and_read_back(
    run, photos: Path, tiny_base: Path, tmp_path: Path
) -> None:
    words = ("--base", tiny_base, "--device", "cpu", "--rank", 2, "--steps", 2, "noise_offset=0.5")
    assert run("train", photos, "-o", tmp_path / "a" / "rex.safetensors", *words).code == 0
    written = read_yaml(tmp_path / "a" / "rex.yaml")
    assert written["noise_offset"] == 0.5 and written["rank"] == 2
    again = run("train", photos, "--config", tmp_path / "a" / "rex.yaml", "-o", tmp_path / "b" / "rex.safetensors")
    assert again.code == 0, again.err


def test_a_preset_without_a_part_for_training_is_refused_there(run, photos: Path, tmp_path: Path) -> None:
    found = run("train", photos, "-o", tmp_path / "a.safetensors", "--config", "pocket-distilled")
    assert found.code == 2
    assert "pocket-distilled is a preset for fuse" in found.err


def test_whose_preset_is_meant_where_no_base_is_named(
    run, photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, foreign = tmp_path / "rex.safetensors", tmp_path / "foreign.safetensors"
    assert run("train", photos, "-o", ours, "--base", tiny_base, "--device", "cpu", "--rank", 2, "--steps", 1).code == 0
    assert run("export", ours, "-o", foreign, "--device", "cpu").code == 0
    assert named_base([str(foreign), str(ours)]) == named_base([], [f"adapters=[{ours}]"]) == str(tiny_base)
    assert named_base([str(foreign)]) == named_base([]) == ""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest.json").write_text('{"base": "pocket"}')
    assert resources.preset_of("") is None and resources.preset_of(".") == resources.preset_of("pocket") == "pocket"
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    assert resources.preset_of(".") is None


def test_on_the_pocket_base_teaching_takes_the_guidance_of_its_pictures() -> None:
    settings = resolve(FuseConfig, "fuse", None, {"adapters": ["a"], "output": "b"}, ["distill.steps=300"])
    assert settings.distill.guidance_scale == 2.0 and settings.distill.steps == 300


@pytest.mark.parametrize(
    "path",
    [*sorted(resources.configs().glob("*.yaml")), resources.configs() / "paper" / "diffusion-fusion.yaml"],
    ids=lambda path: path.stem,
)
def test_every_preset_loads(path: Path) -> None:
    parts = read_yaml(path)
    assert set(parts) <= {"train", "fuse", "generate", "evaluate", "train-control"}
    build(ControlConfig, parts.get("train-control", {}), {"folder": "x", "output": "y"})
    build(TrainConfig, parts.get("train", {}), {"concept": "x", "output": "y"})
    build(FuseConfig, parts.get("fuse", {}), {"adapters": ["x"], "output": "y"})
    build(EvaluateConfig, parts.get("evaluate", {}))
    config = build(Scene, parts.get("generate", {}))
    assert "num_inference_steps" in to_yaml(config)


def test_the_ready_made_concepts_load() -> None:
    folders = sorted(path.parent for path in resources.concepts().glob("*/concept.yaml"))
    assert len(folders) >= 4
    for folder in folders:
        concept = load_concept(folder)
        assert len(concept.photos) >= 5 and not concept.skipped
        assert all(photo.caption and concept.token in concept.prompt(photo.caption) for photo in concept.photos)


def test_without_a_terminal_progress_is_a_line_now_and_then() -> None:
    lines: list[str] = []
    now = iter([0.0] + [float(second) for second in range(1, 62)])
    show = ProgressLines(lines.append, clock=lambda: next(now))
    for step in range(1, 62):
        show(Event("train", step, 100, {"loss": 0.5}))
    assert len(lines) == 4 and lines[0] == "train 15/100, 1.00 s/step, 85 s left, loss 0.5000"
    assert lines[3].startswith("train 60/100") and "40 s left" in lines[3]


def test_the_pace_is_that_of_the_steps_however_often_one_looks() -> None:
    pace = Pace()
    for tick in range(400):  # a step lasts two seconds, and somebody looks every tenth of one
        pace.add(tick // 20, tick / 10)
    assert pace.seconds_per_step == pytest.approx(2.0)


def test_one_slow_step_moves_the_time_left_little() -> None:
    pace = Pace()
    for step, now in enumerate([0.0, 0.3, 0.6, 0.9, 30.9, 31.2, 31.5]):
        pace.add(step, now)
    assert pace.seconds_per_step == pytest.approx(0.3)
    assert [brief_duration(seconds) for seconds in (40, 200, 9000)] == ["40 s", "4 min", "2.5 h"]
