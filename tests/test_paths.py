"""Files that people share hold no folder of a person or a machine, and what they name is found again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import make_photos
from PIL import Image

from spectral_diffusion.adapters.formats.native import content_hash, load_adapter, save_adapter
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.settings import build
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core import paths
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.core.paths import located, located_base, portable, portable_base, without_folders
from spectral_diffusion.merging.export import ExportOptions, export
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.manifest import read_manifest
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.scenes.png_metadata import read_embedded, read_settings, read_sources
from spectral_diffusion.training.run import train_to_file


def test_a_full_path_becomes_relative_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ann"))
    work = Path("/home/ann/work")
    assert portable("rex.safetensors", work) == "rex.safetensors" and portable("user/model", work) == "user/model"
    assert portable("/home/ann/work/adapters/rex.safetensors", work / "pictures") == "../adapters/rex.safetensors"
    assert portable("/home/ann/rex.safetensors", work) == "../rex.safetensors"
    assert portable("/home/ann/rex.safetensors", Path("/home/bob")) == "rex.safetensors"  # its way names a person
    assert portable("/data/rex.safetensors", work) == "rex.safetensors"
    assert portable("/home/ann/rex.safetensors", work / "a/b/c/d/e/f") == "rex.safetensors"  # far
    assert portable("C:\\Users\\ann\\rex.safetensors", work) == "rex.safetensors"
    held = {"/home/ann/a": [1, "/home/ann/b.png"], "prompt": "a / b", "none": None}
    assert without_folders({"/a/clip": "/b/clip"}, {"/a/clip": "/a/clip"}) == {"/a/clip": "clip"}
    assert without_folders(held) == {"a": [1, "b.png"], "prompt": "a / b", "none": None}


def test_what_is_named_is_looked_for_beside_the_file_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "rex").write_text("")
    assert located("../adapters/rex", tmp_path / "pictures") == str(tmp_path / "adapters" / "rex")
    assert located("adapters/rex", tmp_path / "pictures") == "adapters/rex"  # from here
    assert located("A" * 300, tmp_path) == "A" * 300 and located("", tmp_path) == ""


def test_a_base_that_lies_far_away_is_remembered_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder = tmp_path / "base", tmp_path / "a/b/c/d/e/f/g"
    base.mkdir()
    folder.mkdir(parents=True)
    assert portable_base(str(base), "print", folder) == "base"
    assert located_base("base", "print", folder) == str(base)
    assert located_base("base", "other", folder) == "base" and located_base("another", "print", folder) == "another"
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path / "cache"))
    assert located_base("base", "print", folder) == "base"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / paths.BASES).write_text("[" * 100_000)  # damaged
    assert located_base("base", "print", folder) == "base"
    assert portable_base("pocket", "print", folder) == "pocket"


def held_in(folder: Path, text: str) -> list[str]:
    """The files in which a text stands."""
    return [file.name for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


def test_nothing_that_is_shared_names_a_folder_and_all_of_it_works_elsewhere(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "ann" / "work"
    base = shutil.copytree(tiny_base, work / "base")
    photos, adapter = make_photos(work / "photos" / "rex"), work / "adapters" / "rex.safetensors"
    settings = {
        "concept": photos, "output": adapter, "base": str(base), "rank": 2, "steps": 1, "device": "cpu",
        "validation": {"model_card": True},
    }  # fmt: skip
    train_to_file(build(TrainConfig, settings))
    fuse_to_folder(FuseConfig(adapters=[adapter], output=work / "fused", device="cpu"))
    export(adapter, work / "out" / "rex.safetensors", "kohya", ExportOptions(device="cpu"))
    export(work / "fused", work / "whole", "folder", ExportOptions(device="cpu"))
    scene = Scene(
        prompt="a <rex>",
        output=work / "out" / "p.png",
        base=str(base),
        adapters={str(adapter): 1.0},
        num_inference_steps=1,
        device="cpu",
    )
    generate_to_file(scene)
    shutil.rmtree(work / "photos")
    assert held_in(work, str(tmp_path)) == ["rex.yaml"]  # the settings beside the adapter are not shared
    assert held_in(work, "ann/work") == ["rex.yaml"]

    assert read_embedded(scene.output)["settings"]["adapters"] == {"../adapters/rex.safetensors": 1.0}
    before, picture = content_hash(load_adapter(adapter)), scene.output.read_bytes()
    assert generate_to_file(scene, resume=True) and scene.output.read_bytes() == picture
    (work / "out" / "base").touch()  # which is not what the picture calls its base
    moved = tmp_path / "bob" / "things"
    moved.parent.mkdir()
    shutil.move(work, moved)
    monkeypatch.chdir(tmp_path)
    found = load_adapter(moved / "adapters" / "rex.safetensors")
    assert found.base == str(moved / "base") and content_hash(found) == before
    assert (read_manifest(moved / "fused") or {})["base"] == str(moved / "base")
    again = read_settings(moved / "out" / "p.png")
    assert again["base"] == str(moved / "base") and set(again["adapters"]) < set(read_sources(moved / "out" / "p.png"))
    notes: list[str] = []
    generate_to_file(
        Scene(**{**again, "output": tmp_path / "q.png", "device": "cpu"}),
        expected=read_sources(moved / "out" / "p.png"),
        hooks=Hooks(notify=notes.append),
    )
    assert not notes and "base" in read_sources(moved / "out" / "p.png")
    with Image.open(tmp_path / "q.png") as one, Image.open(moved / "out" / "p.png") as other:
        assert one.tobytes() == other.tobytes()
    save_adapter(found, tmp_path / "bob" / "copy.safetensors")
    assert held_in(tmp_path / "bob", "bob/things") == []
