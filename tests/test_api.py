"""The public Python API on a stock pipeline: objects come out, files only where asked, the pipeline stays as it was."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_photos
from diffusers import StableDiffusionPipeline
from PIL import Image

import spectral_diffusion as sd
from spectral_diffusion.core import assets
from spectral_diffusion.linalg import Factors

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK: dict[str, Any] = {"steps": 2, "rank": 2, "batch_size": 1, "crops_per_image": 1, "learning_rate": 1e-2}


@pytest.fixture
def pipe(tiny_base: Path) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_base))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def two(pipe: Any, tmp_path: Path) -> list[sd.Adapter]:
    ledger = tmp_path / "slots.json"
    folders = [make_photos(tmp_path / name, seed=seed) for seed, name in enumerate(("rex", "mug"))]
    return [sd.train(pipe, folder, class_noun="dog", ledger=ledger, **QUICK) for folder in folders]


def drawn(pipeline: Any, prompt: str = "a red dog") -> bytes:
    generator = torch.Generator().manual_seed(0)
    images = pipeline(prompt, num_inference_steps=2, generator=generator, width=16, height=16).images
    pixels: bytes = images[0].tobytes()
    return pixels


def test_every_public_name_is_there_and_documented() -> None:
    for name in sd.__all__:
        thing = getattr(sd, name)
        assert inspect.getdoc(thing), name
    assert set(sd.__all__) <= set(dir(sd))
    with pytest.raises(AttributeError, match="nonsense"):
        sd.nonsense  # noqa: B018


def test_training_writes_only_what_is_asked_for(pipe: Any, photos: Path, tmp_path: Path) -> None:
    before, plain, seen = sorted(tmp_path.rglob("*")), drawn(pipe), []
    adapter = sd.train(pipe, photos, class_noun="dog", callbacks=[seen.append], **QUICK)
    assert [(event.stage, event.done) for event in seen] == [("train", 1), ("train", 2)]
    assert sorted(tmp_path.rglob("*")) == before
    assert [event.done for event in seen if event.stage == "train"] == [1, 2]
    assert adapter.token == "<rex>" and str(adapter.slot) == "0:2" and drawn(pipe) == plain
    again = sd.train(pipe, photos, class_noun="dog", output=tmp_path / "out" / "rex.safetensors", **QUICK)
    assert (tmp_path / "out" / "rex.safetensors").exists()
    assert all(torch.equal(adapter.parameters[name], again.parameters[name]) for name in adapter.parameters)
    with pytest.raises(sd.UserError, match="did you mean 'rank'"):
        sd.train(pipe, photos, rnak=2)


def test_a_ledger_keeps_slots_apart(two: list[sd.Adapter], tmp_path: Path) -> None:
    assert [str(adapter.slot) for adapter in two] == ["0:2", "2:4"] and (tmp_path / "slots.json").exists()
    assert not list(tmp_path.glob("*.safetensors"))


def test_adapters_act_while_they_are_loaded(pipe: Any, two: list[sd.Adapter]) -> None:
    rex, mug = two
    plain, size = drawn(pipe), len(pipe.tokenizer)
    sd.load_adapters(pipe, {rex: 0.8, mug: 1.0})
    assert drawn(pipe) != plain and len(pipe.tokenizer) == size + 4
    assert drawn(pipe, f"{rex.token} and {mug.token}") != drawn(pipe, "rex and mug")
    with pytest.raises(sd.UserError, match="unload_adapters"):
        sd.load_adapters(pipe, [rex])
    sd.unload_adapters(pipe)
    assert drawn(pipe) == plain and len(pipe.tokenizer) == size
    sd.unload_adapters(pipe)  # nothing to do


def test_an_unloaded_pipeline_is_saved_as_it_was(pipe: Any, two: list[sd.Adapter], tmp_path: Path) -> None:
    plain, size = drawn(pipe), pipe.text_encoder.config.vocab_size
    sd.load_adapters(pipe, two)
    sd.unload_adapters(pipe)
    assert pipe.text_encoder.config.vocab_size == size
    pipe.save_pretrained(tmp_path / "copy")
    assert drawn(StableDiffusionPipeline.from_pretrained(str(tmp_path / "copy"))) == plain


def test_layer_wise_tokens_are_unloaded_whole(pipe: Any, photos: Path) -> None:
    adapter = sd.train(pipe, photos, class_noun="dog", per_layer_tokens=True, **QUICK)
    plain, kinds = drawn(pipe), [type(p) for p in pipe.unet.attn_processors.values()]
    sd.load_adapters(pipe, [adapter])
    sd.unload_adapters(pipe)
    assert [type(p) for p in pipe.unet.attn_processors.values()] == kinds and drawn(pipe) == plain
    assert not pipe.text_encoder._forward_pre_hooks and not pipe.text_encoder._forward_hooks


def test_nothing_is_trained_or_fused_on_top_of_loaded_adapters(
    pipe: Any, two: list[sd.Adapter], photos: Path, tmp_path: Path
) -> None:
    plain = drawn(pipe)
    sd.load_adapters(pipe, two)
    for attempt in (lambda: sd.train(pipe, photos, class_noun="dog", **QUICK), lambda: sd.fuse(pipe, two)):
        with pytest.raises(sd.UserError, match="unload_adapters"):
            attempt()
    sd.unload_adapters(pipe)
    assert drawn(pipe) == plain
    lora = two[0].export(tmp_path / "lora.safetensors", format="diffusers")[0]
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    with_lora = drawn(pipe)
    assert with_lora != plain
    for attempt in (lambda: sd.train(pipe, photos, class_noun="dog", **QUICK), lambda: sd.load_adapters(pipe, two)):
        with pytest.raises(sd.UserError, match="unload_lora_weights"):
            attempt()
    sd.unload_adapters(pipe)  # none of ours is loaded, so the other program's stays
    assert drawn(pipe) == with_lora


def test_a_region_takes_no_adapter_of_another_base(pipe: Any, two: list[sd.Adapter]) -> None:
    size = {"num_inference_steps": 1, "width": 32, "height": 16}
    scene = sd.Scene("a beach", [sd.Region((0, 0, 0.5, 1), two[0])])
    sd.load_adapters(pipe, [two[1]])
    assert len(sd.generate(pipe, scene, **size)) == 1  # the fingerprint is that of the base below the adapters
    sd.unload_adapters(pipe)
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(sd.UserError, match="does not fit the base"):
        sd.generate(pipe, scene, **size)


def test_a_training_that_is_stopped_without_an_output_says_that_nothing_is_kept(pipe: Any, photos: Path) -> None:
    with pytest.raises(sd.Cancelled, match="nothing is kept"):
        sd.train(pipe, photos, class_noun="dog", hooks=sd.Hooks(should_stop=lambda: True), **QUICK)


def test_a_fusion_is_a_new_pipeline(pipe: Any, two: list[sd.Adapter], tmp_path: Path) -> None:
    plain = drawn(pipe)
    settings: dict[str, Any] = {"num_images": 1, "num_inference_steps": 1}
    fused = sd.fuse(pipe, two, method="gradient", calibration=settings)
    assert drawn(pipe) == plain != drawn(fused)
    fused.save_pretrained(tmp_path / "fused")
    stock = StableDiffusionPipeline.from_pretrained(str(tmp_path / "fused"))
    assert drawn(stock) == drawn(fused) and "<rex>" in stock.tokenizer.get_added_vocab()
    assert drawn(sd.fuse(pipe, two)) == drawn(sd.fuse(pipe, two, method="spectral"))  # this base has no preset
    with pytest.raises(sd.UserError, match=r"options\.density"):
        sd.fuse(pipe, two, method="ties", options={"density": 2})


def test_a_scene_with_adapters_in_their_regions(pipe: Any, two: list[sd.Adapter]) -> None:
    plain = drawn(pipe)
    regions = [sd.Region((0, 0, 0.5, 1), two[0]), sd.Region((0.5, 0, 1, 1), two[1], prompt="a cup", scale=0.5)]
    images = sd.generate(pipe, sd.Scene("a beach", regions), seeds=[0, 3], num_inference_steps=2, width=32, height=16)
    assert [image.size for image in images] == [(32, 16)] * 2 and drawn(pipe) == plain
    without = sd.generate(pipe, "a beach", seeds=[0], num_inference_steps=2, width=32, height=16)
    assert images[0].tobytes() != without[0].tobytes()


def test_an_adapter_goes_to_files_and_back(two: list[sd.Adapter], tmp_path: Path) -> None:
    rex = two[0]
    layer = rex.layers[0]
    assert torch.equal(rex.delta(layer), Factors(*rex.factors(layer)).delta())
    with pytest.raises(sd.UserError, match="does not adapt"):
        rex.delta("unet.nowhere")
    rex.save_pretrained(tmp_path / "folder")
    loaded = sd.Adapter.from_pretrained(tmp_path / "folder")
    assert torch.equal(loaded.delta(layer), rex.delta(layer)) and loaded.token == rex.token
    assert str(tmp_path) not in (tmp_path / "folder" / "README.md").read_text()
    files = rex.export(tmp_path / "kohya.safetensors", format="kohya")
    assert tmp_path / "kohya.safetensors" in files and all(file.exists() for file in files)


def test_a_folder_with_a_page_of_its_own_keeps_it(two: list[sd.Adapter], tmp_path: Path) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "README.md").write_text("# My notes\n")
    with pytest.raises(sd.UserError, match=r"README\.md was not written by this program"):
        two[0].save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    (folder / "README.md").unlink()
    (folder / "adapter.safetensors").write_bytes(b"another program's")
    with pytest.raises(sd.UserError, match=r"adapter\.safetensors is no adapter of this program"):
        two[0].save_pretrained(folder)
    (folder / "adapter.safetensors").unlink()
    for _ in range(2):
        two[0].save_pretrained(folder)


def test_identity_is_of_the_photos_own_thing() -> None:
    folders = {name: assets.concepts() / name for name in ("rex", "brew")}
    photos = [Image.open(path).convert("RGB") for path in sorted(folders["rex"].glob("*.png"))[:3]]
    found = sd.identity(photos, folders)
    assert found["rex"] > 0.5 > found["brew"]


@pytest.mark.slow
def test_the_example_runs(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "identity").symlink_to(sd.pocket.path() / "identity")  # the encoder that `identity` measures with
    monkeypatch.setattr(sd.pocket, "path", lambda: base)
    spec = importlib.util.spec_from_file_location("train_and_fuse", EXAMPLES / "train_and_fuse.py")
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert set(example.main(assets.concepts(), tmp_path, steps=1)) == {"rex", "brew"}
    assert (tmp_path / "together-1.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_steps", "compare_methods"])
def test_notebooks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "STEPS = " in code[0]
    code[0] += "\nSTEPS = 1\n"
    space: dict[str, Any] = {"display": lambda *things: None}
    for text in code:
        exec(compile(text, name, "exec"), space)
    assert space["scores"]


@pytest.mark.slow
def test_the_notebook_for_colab_runs_on_the_pocket_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own, with the parameters of a base that is here."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(EXAMPLES / "klein_colab.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    for cell in cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = (
                "CONFIG, STEPS, MORE = 'pocket-quick', 1, 'prior.loss_weight=0'\nTHINGS = {'rex': 'dog', 'brew': 'pot'}"
            )
    notebook.cells = cells
    for name in ("rex", "brew"):
        shutil.copytree(assets.concepts() / name, tmp_path / "photos" / name)
    run = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "both.png").is_file()
    assert all((tmp_path / f"{name}-comfyui.safetensors").is_file() for name in ("rex", "brew"))
    shown = "".join(part.get("text", "") for cell in run.cells for part in cell.get("outputs", ()))
    assert "Error" not in shown and "<rex>" in shown, shown


def test_training_stops_when_asked_and_resumes_to_the_same_adapter(pipe: Any, photos: Path, tmp_path: Path) -> None:
    whole = sd.train(pipe, photos, output=tmp_path / "whole" / "rex.safetensors", **QUICK)
    output, notes, asked = tmp_path / "stopped" / "rex.safetensors", [], iter(range(100))
    hooks = sd.Hooks(notify=notes.append, should_stop=lambda: next(asked) >= 1)
    with pytest.raises(sd.Cancelled):
        sd.train(pipe, photos, output=output, hooks=hooks, **QUICK)
    assert not output.exists()
    events: list[sd.Event] = []
    resumed = sd.train(pipe, photos, output=output, resume=True, callbacks=[events.append], **QUICK)
    assert all(torch.equal(resumed.parameters[name], value) for name, value in whole.parameters.items())
    assert events[-1].done == QUICK["steps"]


def test_a_preset_and_a_file_of_settings_are_taken_by_name(pipe: Any, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("rank: 3\nbatch_size: 1\n")
    settings = {name: value for name, value in QUICK.items() if name != "rank"}
    adapter = sd.train(pipe, photos, config=tmp_path / "mine.yaml", **settings)
    assert adapter.rank == 3 and adapter.config["batch_size"] == 1
    with pytest.raises(sd.UserError, match="did you mean 'pocket-quick'"):
        sd.train(pipe, photos, config="pocket-quic", **QUICK)
