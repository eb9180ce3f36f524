"""Publishing on the hub and training from it, against a hub of our own."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import make_photos
from fake_hub import Hub, running_hub
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import spectral_diffusion as sd
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.cli import app
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.data import hub_dataset
from spectral_diffusion.data.folder import describe, load_concept
from spectral_diffusion.hub import publication, publish
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.training.run import train_to_file

TERMS = {"license": "openrail++", "consent": True}


@pytest.fixture(scope="module")
def adapter_file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of one step."""
    folder = tmp_path_factory.mktemp("hub")
    config = TrainConfig(
        concept=make_photos(folder / "rex"), output=folder / "rex.safetensors", base=str(tiny_base), device="cpu",
        steps=1, rank=2, prior={"loss_weight": 0.0},
    )  # fmt: skip
    train_to_file(config)
    return config.output


@pytest.fixture(scope="module")
def fused(adapter_file: Path) -> Path:
    """Its fusion."""
    folder = adapter_file.parent / "fused"
    fuse_to_folder(FuseConfig(adapters=[adapter_file], output=folder))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the client takes for the real one, with somebody logged in."""
    with running_hub() as (hub, address):
        for name in ("ENDPOINT", "_HF_DEFAULT_ENDPOINT"):
            monkeypatch.setattr(huggingface_hub.constants, name, address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path / "cache"))
        hub_dataset._downloaded.cache_clear()
        yield hub


def test_an_adapter_goes_to_the_hub_and_comes_back(hub: Hub, adapter_file: Path) -> None:
    done = CliRunner().invoke(app, ["push", str(adapter_file), "me/rex", "--license", "openrail++", "--consent"])
    assert done.exit_code == 0 and "/me/rex" in done.output, done.output
    files = hub.repositories["models/me/rex"]
    assert set(files) == {"adapter.safetensors", "README.md"}
    assert files["adapter.safetensors"] == adapter_file.read_bytes()
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert front["license"] == "openrail++" and front["library_name"] == "spectral-diffusion"
    again = sd.Adapter.from_pretrained("me/rex")
    mine = load_adapter(adapter_file)
    assert again.name == mine.name and again.layers == mine.layers


def test_python_publishes_an_adapter(hub: Hub, adapter_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rex = sd.Adapter.from_pretrained(adapter_file)
    monkeypatch.delenv("HF_TOKEN")
    assert rex.push_to_hub("me/rex", license="openrail++", consent=True, token=hub.token).endswith("/me/rex")
    again = sd.Adapter.from_pretrained("me/rex")
    assert all(torch.equal(again.parameters[name], value) for name, value in rex.parameters.items())
    with pytest.raises(UserError, match="Cannot load 'me/nobody' from the hub: there is none by this name"):
        sd.Adapter.from_pretrained("me/nobody")
    hub.repositories["models/me/other"] = {"README.md": b"else"}
    with pytest.raises(UserError, match="it is there, but not the file"):
        sd.Adapter.from_pretrained("me/other")
    with pytest.raises(UserError, match="needs a license"):
        rex.push_to_hub("me/rex", consent=True)
    with pytest.raises(UserError) as refused:
        rex.push_to_hub("me/rex", license="openrail++", consent=True, token="hf_sec\nret")
    assert "sec" not in str(refused.value) and refused.value.__cause__ is None


def test_login_and_folders_are_written_nowhere(hub: Hub, adapter_file: Path, fused: Path, tmp_path: Path) -> None:
    said: list[str] = []
    address = publish(adapter_file, "me/rex", **TERMS, hooks=sd.Hooks(notify=said.append))
    assert hub.token in hub.logins
    sent = [content for files in hub.repositories.values() for content in files.values()]
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(
        hub.token.encode() in content for content in (*sent, *kept, address.encode(), *map(str.encode, said))
    )
    publish(fused, "me/both", **TERMS)
    sent = [content for files in hub.repositories.values() for content in files.values()]
    here = str(adapter_file.parent.parent).encode()  # where everything was made
    assert len(sent) > 8 and not any(here in content for content in sent)


def test_a_card_that_somebody_edited_stays(hub: Hub, adapter_file: Path) -> None:
    publish(adapter_file, "me/rex", **TERMS)
    hub.repositories["models/me/rex"]["README.md"] = b"mine"
    said: list[str] = []
    publish(adapter_file, "me/rex", **TERMS, hooks=sd.Hooks(notify=said.append))
    assert hub.repositories["models/me/rex"]["README.md"] == b"mine"
    assert "README.md" in said[0]


def test_a_fused_folder_and_an_export_go_to_the_hub(hub: Hub, fused: Path, adapter_file: Path, tmp_path: Path) -> None:
    publish(fused, "me/both", **TERMS, private=True)
    created = hub.created[-1]  # older clients say it one way, newer ones another
    assert created.get("private") is True or created.get("visibility") == "private"
    files = hub.repositories["models/me/both"]
    mine = {path.relative_to(fused).as_posix(): path for path in fused.rglob("*") if path.is_file()}
    mine = {name: path for name, path in mine.items() if not name.startswith(".")}
    assert set(files) == {*mine, "README.md"} and "manifest.json" in files
    assert all(files[name] == path.read_bytes() for name, path in mine.items())
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["library_name"] == "diffusers"
    exported, picture = tmp_path / "kohya.safetensors", tmp_path / "sample.png"
    Image.new("RGB", (8, 8)).save(picture)
    sd.Adapter.from_pretrained(adapter_file).export(exported, picture=picture)
    save_file({"secret": torch.zeros(1)}, tmp_path / "kohya.private.safetensors")  # somebody's own, not of the export
    publish(exported, "me/lora", **TERMS)
    files = hub.repositories["models/me/lora"]
    assert set(files) == {"kohya.safetensors", "kohya.rex.safetensors", "sample.png", "README.md"}
    assert files["kohya.safetensors"] == exported.read_bytes()
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "openrail++"
    assert "add your own" not in card and "publish it only" not in card and "openrail++; the base" in card


def test_private_is_private(hub: Hub, adapter_file: Path) -> None:
    publish(adapter_file, "me/open", **TERMS)
    before = dict(hub.repositories["models/me/open"])
    with pytest.raises(UserError, match="everybody sees it"):
        publish(adapter_file, "me/open", **TERMS, private=True)
    assert hub.repositories["models/me/open"] == before
    publish(adapter_file, "me/closed", **TERMS, private=True)
    publish(adapter_file, "me/closed", **TERMS, private=True)


def test_what_may_not_be_published_is_refused(
    hub: Hub, adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="needs a license"):
        publish(adapter_file, "me/rex")
    with pytest.raises(UserError, match="consent"):
        publish(adapter_file, "me/rex", license="openrail++")
    with pytest.raises(UserError, match="spells a license"):
        publish(adapter_file, "me/rex", license="Mine, all mine", consent=True)
    with pytest.raises(UserError, match="nothing to publish"):
        publish(tmp_path / "none.safetensors", "me/rex", **TERMS)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="neither an adapter nor a fused folder"):
        publish(tmp_path / "photos", "me/rex", **TERMS)
    with pytest.raises(UserError, match="no name of the hub"):
        publish(adapter_file, "me/re x", **TERMS)
    assert not hub.requests or not hub.repositories
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    with pytest.raises(UserError, match="hf auth login") as refused:
        publish(adapter_file, "me/rex", **TERMS)
    assert "hf_stranger" not in str(refused.value)
    done = CliRunner().invoke(app, ["push", str(adapter_file), "me/rex", "--license", "mit"])
    assert isinstance(done.exception, UserError)


def test_photos_come_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "local")
    content = {path.name: path.read_bytes() for path in photos.iterdir()}
    hub.repositories["datasets/me/mug"] = {**content, "model.bin": b"pickle", "script.py": b"print()"}
    local, distant = load_concept(photos, "mug"), load_concept(Path("hub:me/mug"))
    assert distant.name == "mug" and distant.noun == "mug" and len(distant.photos) == len(local.photos)
    assert [photo.path.read_bytes() for photo in distant.photos] == [p.path.read_bytes() for p in local.photos]
    assert not {"model.bin", "script.py"} & {path.name for path in distant.photos[0].path.parent.iterdir()}
    asked = len(hub.requests)
    assert describe(Path("hub:me/mug")).token == "<mug>" and len(hub.requests) == asked


def test_training_takes_a_dataset(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "local")
    hub.repositories["datasets/me/mug"] = {path.name: path.read_bytes() for path in photos.iterdir()}
    words = ["-o", str(tmp_path / "mug.safetensors"), "--base", str(tiny_base), "--device", "cpu", "--steps", "1"]
    done = CliRunner().invoke(app, ["train", "hub:me/mug", *words, "prior.loss_weight=0"])
    assert done.exit_code == 0, done.output
    adapter = load_adapter(tmp_path / "mug.safetensors")
    assert adapter.name == adapter.noun == "mug"
    several = CliRunner().invoke(
        app, ["train", "hub:me/mug", "hub:me/none", "-o", str(tmp_path / "out"), "--rank", "x"]
    )
    assert "neither a photo folder" not in str(several.exception)


def test_a_dataset_that_is_none_is_one_sentence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"me/none: there is none by this name"):
        load_concept(Path("hub:me/none"))
    for name in ("hub:only", "hub:../..", "hub:me/..", "hub:./x", "hub:me/x@", "hub:/me/x"):
        with pytest.raises(UserError, match="names no dataset"):
            load_concept(Path(name))
    hub.repositories["datasets/me/rows"] = {"data/train.parquet": b"rows"}
    with pytest.raises(UserError, match="no picture files"):
        load_concept(Path("hub:me/rows"))
    # Without the hub an earlier copy is used.
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    hub.repositories["datasets/me/red"] = {"1.png": picture.getvalue()}
    first = load_concept(Path("hub:me/red"))
    with monkeypatch.context() as away:
        away.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        hub_dataset._downloaded.cache_clear()
        assert load_concept(Path("hub:me/red")).photos == first.photos
    assert "copy that was downloaded last" in caplog.text
    # What the hub refuses is said, and half a download is no dataset.
    hub.commit = "f" * 40
    hub.repositories["datasets/me/red"]["2.png"] = picture.getvalue() + b"more"
    hub.fails_at = "2.png"
    hub_dataset._downloaded.cache_clear()
    with pytest.raises(UserError, match="Cannot download the dataset me/red"):
        load_concept(Path("hub:me/red"))
    hub.fails_at = ""
    assert len(load_concept(Path("hub:me/red")).photos) == 2


def test_the_files_of_a_publication_are_named(fused: Path) -> None:
    """Hidden files, such as locks, are none of them."""
    (fused / ".lock").touch()
    files = publication(fused).files
    (fused / ".lock").unlink()
    assert ".lock" not in files and all(not Path(name).is_absolute() for name in files)
