"""Evaluating: what is measured, what is drawn for it, the report, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_photos, make_tiny_base
from PIL import Image
from typer.testing import CliRunner

from spectral_diffusion.cli import app
from spectral_diffusion.config.evaluate import EvaluateConfig
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core import assets as resources
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.data.folder import load_concept, open_photo
from spectral_diffusion.evaluation.measure import PHOTOS, confusion_of, measurement_rows, score, with_photos
from spectral_diffusion.evaluation.references import Subject, references_of
from spectral_diffusion.evaluation.region_crops import spoken, square_box, views_in
from spectral_diffusion.evaluation.run import evaluate_to_folder
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.metrics.encoders import Clip, load_encoder
from spectral_diffusion.metrics.text import text_match
from spectral_diffusion.metrics.views import View
from spectral_diffusion.scenes.png_metadata import read_settings, save_png
from spectral_diffusion.training.run import train_to_file

SMALL = [
    "--encoder", "pocket", "num_images=2", "num_inference_steps=2",
    "prompts=['a photo of {} on the grass', 'a photo of {} at night']",
    "prior_prompts=[a photo of a dog, a photo of a cat]",
]  # fmt: skip


def evaluate(*words: Any) -> str:
    """Run the verb; what it refuses is raised."""
    result = CliRunner().invoke(app, ["evaluate", *map(str, words)], catch_exceptions=True)
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def found_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


@pytest.fixture(scope="module")
def pair(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny adapters, the photos they were trained on, and both fused."""
    folder = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("rex", "brew")):
        photos = make_photos(folder / "photos" / name, seed=seed)
        adapter = folder / f"{name}.safetensors"
        settings = {"rank": 2, "steps": 3, "crops_per_image": 1, "class_noun": "dog <i>& co</i>", "learning_rate": 0.05}
        train_to_file(TrainConfig(concept=photos, output=adapter, base=str(tiny_base), **settings))
    files = [folder / "rex.safetensors", folder / "brew.safetensors"]
    fuse_to_folder(FuseConfig(adapters=files, output=folder / "fused"))
    return folder


def test_real_photos_are_told_apart() -> None:
    """With the photos of four shipped concepts, two pairs of them alike, the matrix is diagonal."""
    concepts = {name: load_concept(resources.concepts() / name) for name in ("rex", "fido", "brew", "posy")}
    scored = score(with_photos({}, concepts), concepts, [load_encoder("pocket")])
    [matrix] = confusion_of(PHOTOS, scored[PHOTOS], list(concepts))
    assert matrix["shares"] == [[float(row == column) for column in range(4)] for row in range(4)]
    *_, everything = measurement_rows(PHOTOS, scored[PHOTOS])
    figures = everything["encoders"]["pocket"]
    assert figures["identity"]["low"] > 0.85 and figures["nearest other"]["high"] < 0.4
    right = {"mean": 1.0, "low": 1.0, "high": 1.0, "n": everything["pictures"], "range": True}  # of four concepts
    assert figures["right concept"] == right


def test_a_photo_is_not_compared_with_itself(tmp_path: Path) -> None:
    """Of two photos each one's identity is the cosine with the other one, never 1."""
    concepts = {"rex": load_concept(make_photos(tmp_path / "rex", count=2))}
    encoder = load_encoder("pocket")
    one, other = encoder.embed([open_photo(photo.path) for photo in concepts["rex"].photos])
    found = score(with_photos({}, concepts), concepts, [encoder])[PHOTOS]
    assert [scored.identity("pocket") for scored in found] == pytest.approx([float(one @ other)] * 2, abs=1e-5)


def test_pictures_made_here_are_measured_by_their_regions(tmp_path: Path) -> None:
    """Two photos side by side under a scene that says so, and under one that has them the wrong way round."""
    photos = {name: open_photo(resources.concepts() / name / "1.png").resize((64, 64)) for name in ("rex", "fido")}
    picture = Image.new("RGB", (128, 64))
    picture.paste(photos["rex"], (0, 0))
    picture.paste(photos["fido"], (64, 0))
    for seed, (left, right) in enumerate([("<rex>", "<fido>"), ("<fido>", "<rex>")]):
        places = [((0, 0, 0.5, 1), left), ((64, 0, 128, 64), right)]
        regions = [Region(box=box, prompt=f"a photo of {token}") for box, token in places]
        scene = Scene(prompt="two dogs", regions=regions, width=128, height=64, seeds=[seed], only_seed=seed)
        save_png(picture, tmp_path / "in" / f"{seed}.png", scene, {})
    sheet = Scene(prompt="<rex>", seeds=[0, 1])
    save_png(picture, tmp_path / "in" / "sheet.png", sheet, {})
    evaluate("--pictures", tmp_path / "in", "--references", resources.concepts(), "-o", tmp_path / "out")
    found = found_in(tmp_path / "out")
    [row] = [row for row in found["measures"] if (row["way"], row["concept"]) == ("pictures", "all")]
    assert row["pictures"] == 4 and row["encoders"]["pocket"]["right concept"]["mean"] == 0.5
    [matrix] = [matrix for matrix in found["confusion"] if matrix["way"] == "pictures"]
    assert matrix["shares"] == [[0.5, 0.5], [0.5, 0.5]] and set(matrix["columns"]) == {"rex", "fido"}
    [bound] = found["binding"]
    assert (bound["pictures"], bound["subjects"]) == (2, 4) and bound["right"] == bound["swap"] == 0.5
    assert bound["collapse rate"] == bound["pictures with a collapse"] == 0.5 and bound["drift"] == 0
    assert "Subject Collapse Rate" in (tmp_path / "out" / "evaluation.md").read_text()
    assert 'class="wrong"' in (tmp_path / "out" / "evaluation.html").read_text()


def test_adapters_from_files_to_a_report_and_again(pair: Path, tmp_path: Path) -> None:
    """Alone and in the sum, and a scene by region; a second run draws nothing, a changed setting draws anew."""
    (tmp_path / "two.yaml").write_text(
        "prompt: <rex> and <brew>\nwidth: 32\nheight: 16\nregions:\n"
        "- {box: [0, 0, 0.5, 1], prompt: a photo of <rex>}\n- {box: [0.5, 0, 1, 1], prompt: a photo of <brew>}\n"
    )
    words = [pair / "rex.safetensors", pair / "brew.safetensors", "--scene", tmp_path / "two.yaml", *SMALL]
    output = evaluate(*words, "-o", tmp_path / "out")
    assert "Wrote" in output and "right" in output and "drift" in output
    found = found_in(tmp_path / "out")
    counts = {(row["way"], row["concept"]): row["pictures"] for row in found["measures"]}
    assert counts["untouched base", "rex"] == counts["alone", "brew"] == counts["sum", "rex"] == 4
    assert counts["scene two", "rex"] == counts["scene two", "brew"] == 2 and counts["photos", "all"] == 6
    assert found["drift"]["pocket"]["n"] == 4 and set(found["seconds"]) == {"untouched base", "alone", "sum"}
    assert found["config"]["num_images"] == 2 and found["base"]["fingerprint"] and found["provenance"]["threads"] == "1"
    assert {row["concept"] for row in found["kept"]} == {"rex", "brew", "all"}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pictures").rglob("*-*-*.png")}
    assert len(files) == 3 * 8 + 2 * 4
    evaluate(*words, "-o", tmp_path / "out")
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert found_in(tmp_path / "out")["measures"] == found["measures"]
    evaluate(words[0], *SMALL, "-o", tmp_path / "out", "guidance_scale=1.5", "noun_baseline=false")
    anew = {path for path, before in files.items() if path.stat().st_mtime_ns > before}
    kept = {path for path in files if "-rex-" not in f"-{path.name}" and "generic" not in path.name}
    assert anew and not anew & kept and {path for path in files if path.match("alone/rex-*")} <= anew


def test_pictures_hold_the_scene_that_makes_them_again(pair: Path, tmp_path: Path) -> None:
    evaluate(pair / "rex.safetensors", *SMALL, "-o", tmp_path / "out")
    picture = tmp_path / "out" / "pictures" / "alone" / "rex-1-1001.png"
    assert read_settings(picture)["adapters"] == {str(pair / "rex.safetensors"): 1.0}
    again = CliRunner().invoke(app, ["generate", str(picture), "-o", str(tmp_path / "again.png")])
    assert again.exit_code == 0, again.output
    assert open_photo(picture).tobytes() == open_photo(tmp_path / "again.png").tobytes()


def test_a_fusion_and_what_its_report_holds(pair: Path, tmp_path: Path) -> None:
    """The fused folder against the untouched base; the page holds its pictures and escapes every word."""
    evaluate(pair / "fused", "--references", pair / "photos", *SMALL, "noun_baseline=false", "-o", tmp_path / "out")
    found = found_in(tmp_path / "out")
    assert {row["way"] for row in found["measures"]} == {"photos", "alone", "fused"}
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "<script" not in page and "http:" not in page and "https:" not in page and "<i>" not in page
    assert "dog &lt;i&gt;&amp; co" in page and page.count("data:image/png;base64,") == 6 + 8 + 8
    assert "| fused | rex |" in (tmp_path / "out" / "evaluation.md").read_text()
    assert open_photo(tmp_path / "out" / "evaluation.png").width > 400
    again = evaluate("--config", tmp_path / "out" / "evaluation.yaml")
    assert "Wrote" in again


def test_adapters_at_strength_nothing_do_not_drift(pair: Path, tmp_path: Path) -> None:
    """Both adapters at 0 are the untouched base; at 1 they are not."""
    few = ["num_images=1", "noun_baseline=false", "prompts=['{}']"]
    words = [pair / "rex.safetensors", pair / "brew.safetensors", *SMALL, *few]
    evaluate(*words, "--strength", "rex=0", "--strength", "brew=0", "-o", tmp_path / "none")
    evaluate(*words, "-o", tmp_path / "full")
    none, full = (found_in(tmp_path / name)["drift"]["pocket"]["mean"] for name in ("none", "full"))
    assert abs(none) < 1e-5 < full


def test_a_stopped_evaluation_keeps_what_it_drew(pair: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 4

    files, out = [pair / "rex.safetensors"], tmp_path / "out"
    config = EvaluateConfig(
        adapters=files, output=out, encoders=["pocket"], num_images=2, num_inference_steps=2, batch_size=2
    )
    with pytest.raises(Cancelled):
        evaluate_to_folder(config, hooks=Hooks(should_stop=stop))
    assert len(list(out.rglob("*.png"))) == 2 and not (out / "evaluation.json").exists()


def test_references_are_found_or_told(tmp_path: Path) -> None:
    rex, brew = Subject("rex", "dog", "<rex>", tmp_path / "gone"), Subject("brew", "cup", "<brew>")
    make_photos(tmp_path / "all" / "rex")
    make_photos(tmp_path / "all" / "posy")
    assert list(references_of([rex], tmp_path / "all")) == ["rex"]
    assert list(references_of([rex], tmp_path / "all", others=True)) == ["rex", "posy"]
    assert references_of([brew], tmp_path / "all" / "rex")["brew"].token == "<brew>"
    for subjects, folder, words in (
        ([rex], None, "gone any more"),
        ([brew], None, "not known"),
        ([brew], tmp_path / "all", "none of 'brew'"),
        ([rex, brew], tmp_path / "all" / "rex", "one for each of rex, brew"),
        ([rex], tmp_path / "nowhere", "No such folder of references"),
    ):
        with pytest.raises(UserError, match=words):
            references_of(subjects, folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no references"):
        references_of([rex], tmp_path / "empty")


def test_bad_input_is_one_sentence(pair: Path, tmp_path: Path) -> None:
    other = make_tiny_base(tmp_path / "other", seed=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    rex = pair / "rex.safetensors"
    for words, sentence in (
        ([], "Nothing to evaluate"),
        ([rex, "--base", other, "--encoder", "pocket"], "does not fit the base"),
        ([rex, "--encoder", "nobody/nothing"], "not on this machine"),
        ([rex, "--encoder", other], "no folder of a CLIP or DINOv2"),
        ([rex], "No encoder that knows photographs"),
        ([rex, pair / "fused"], "one fused folder"),
        ([pair / "fused", *SMALL], "references="),
        ([rex, "-o", tmp_path / "file"], "is a file"),
        ([rex, "--strength", "fido=1"], "fido"),
        ([rex, "promts=[x]"], "did you mean 'prompts'"),
        (["--pictures", tmp_path / "empty"], "no picture made by this program"),
        (["--pictures", tmp_path / "gone"], "No such folder of pictures"),
        ([rex, "--scene", tmp_path / "gone.yaml"], "No such file"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate(*words, *([] if "-o" in words else ["-o", tmp_path / "out"]))
    assert not list((tmp_path / "out").rglob("*.png"))


def test_where_a_concept_is_in_a_picture() -> None:
    assert square_box((0, 0, 64, 64)) == (0, 0, 64, 64) and square_box((10, 0, 30, 64)) == (10, 22, 30, 42)
    tokens = {"<rex>": ("rex", "octopus"), "<brew>": ("brew", "cup")}
    assert spoken("<rex> <rex>_1 and <brew>", tokens) == "an octopus and a cup"
    whole = Scene(prompt="a photo of <rex>")
    assert views_in(Path("x.png"), whole, tokens, (64, 64)) == [View("rex", Path("x.png"), "a photo of an octopus")]
    assert views_in(Path("x.png"), Scene(prompt="<rex> and <brew>"), tokens, (64, 64)) == []


def test_clip_and_dino_from_folders(tmp_path: Path) -> None:
    """Tiny random models: pictures and texts become unit vectors, and CLIP-T is their cosine."""
    from transformers import (
        AutoImageProcessor,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        Dinov2Config,
        Dinov2Model,
    )  # fmt: skip

    from tools.pocket.models import build_tokenizer

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = build_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **small, **ends)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, **small)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    shape = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    for name, model in (
        ("clip", CLIPModel(config)),
        ("dino", Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **small))),
    ):
        model.save_pretrained(tmp_path / name)
        CLIPImageProcessor(**shape).save_pretrained(tmp_path / name)
        assert AutoImageProcessor.from_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "clip")
    [photo, *_] = make_photos(tmp_path / "rex").iterdir()
    images = [open_photo(photo), Image.new("L", (50, 20))]
    clip, dino = load_encoder(str(tmp_path / "clip")), load_encoder(str(tmp_path / "dino"))
    for encoder, width in ((clip, 12), (dino, 16)):
        vectors = encoder.embed(images)
        assert vectors.shape == (2, width) and torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-5)
    assert isinstance(clip, Clip) and clip.kind == "image and text" and dino.kind == "image"
    found = text_match([View("rex", photo, "a red dog"), View("rex", photo)], [dino, clip])
    wanted = float(clip.embed(images[:1])[0] @ clip.embed_text(["a red dog"])[0])
    assert found == {"CLIP-T": [pytest.approx(wanted, abs=1e-5), None]}
