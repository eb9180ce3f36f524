"""The app: controllers on a scratch workspace, and the served page as a client meets it."""

from __future__ import annotations

import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from spectral_diffusion.errors import UserError
from spectral_diffusion.generation.pictures import read_settings
from spectral_diffusion.progress import Event
from spectral_diffusion.ui import controllers
from spectral_diffusion.ui.controllers import Teller, Workspace

QUICK: dict[str, Any] = {"rank": 2, "steps": 2, "batch": 1, "crops": 1, "device": "cpu", "autocast": False}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On networks this small, threads cost more than they give."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


# --- names and concepts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "a\\b", ".hidden", "", "  ", "a\0b", "x" * 41, "é<b>", None])
def test_unsafe_names_are_refused(workspace: Workspace, photos: Path, tmp_path: Path, name: str) -> None:
    before = files_in(tmp_path)
    with pytest.raises(UserError, match="name"):
        controllers.add_concept(workspace, name, "dog", photos.iterdir())
    with pytest.raises(UserError, match="name"):
        controllers.fuse(workspace, ["rex"], name)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "fused/../../x", "rex/.."])
def test_names_are_looked_up_never_joined(workspace: Workspace, name: str) -> None:
    with pytest.raises(UserError, match="No concept"):
        controllers.train(workspace, name)
    with pytest.raises(UserError, match="No adapter"):
        controllers.fuse(workspace, [name], "pair")
    with pytest.raises(UserError, match="No adapter"):
        controllers.generate(workspace, "pocket", [name], "1", prompt="a dog")
    with pytest.raises(UserError, match="No fused folder"):
        controllers.base_path(workspace, f"fused/{name}")
    assert not workspace.root.exists()


def test_upload_is_copied(workspace: Workspace, photos: Path) -> None:
    name, problems = controllers.add_concept(workspace, "tom", "cat", sorted(photos.iterdir()))
    assert (name, problems) == ("tom", [])
    assert {path.name for path in files_in(workspace.root)} == {"001.png", "002.png", "003.png", "concept.yaml"}
    shutil.rmtree(photos)
    concept, thumbnails = controllers.view_concept(workspace, "tom")
    assert (concept.name, concept.noun, concept.token, len(thumbnails)) == ("tom", "cat", "<tom>", 3)
    with pytest.raises(UserError, match="already"):
        controllers.add_concept(workspace, "tom", "cat", [])


def test_broken_image_is_told_by_name(workspace: Workspace, photos: Path) -> None:
    bad, text = photos / "bad.png", photos / "notes.txt"
    bad.write_bytes(b"not an image")
    text.write_text("hello")
    _, problems = controllers.add_concept(workspace, "tom", "cat", [bad, text, photos / "0.png"])
    assert len(problems) == 2 and "bad.png" in problems[0] and "notes.txt" in problems[1]
    with pytest.raises(UserError, match=r"bad\.png"):
        controllers.add_concept(workspace, "tim", "cat", [bad])
    assert next(iter(controllers.concept_folders(workspace))) == "tom"
    assert not (workspace.concepts / "tim").exists()


def test_ready_made_concepts_are_offered_and_their_names_kept(workspace: Workspace, photos: Path) -> None:
    assert {"rex", "brew"} <= set(controllers.concept_folders(workspace))
    with pytest.raises(UserError, match="already"):
        controllers.add_concept(workspace, "rex", "dog", photos.iterdir())


# --- empty and damaged workspaces ----------------------------------------------------------------------------


def test_empty_workspace(workspace: Workspace) -> None:
    assert controllers.readable_adapters(workspace) == ({}, [])
    assert controllers.base_choices(workspace) == ["pocket"]
    assert controllers.tokens(workspace, "pocket", []) == {}
    for sentence, call in {
        "step 1": lambda: controllers.train(workspace, None),
        "step 2": lambda: controllers.fuse(workspace, [], "pair"),
        "prompt is empty": lambda: controllers.generate(workspace, "pocket", [], "1", prompt=" "),
    }.items():
        with pytest.raises(UserError, match=sentence):
            call()
    assert not workspace.root.exists()


def test_broken_adapter_is_one_line(workspace: Workspace) -> None:
    workspace.adapters.mkdir(parents=True)
    (workspace.adapters / "bad.safetensors").write_bytes(b"garbage")
    (workspace.adapters / "rex.state.safetensors").write_bytes(b"garbage")
    adapters, problems = controllers.readable_adapters(workspace)
    assert adapters == {} and len(problems) == 1
    assert "bad.safetensors" in problems[0] and "\n" not in problems[0]


# --- small parts ---------------------------------------------------------------------------------------------


def test_strengths() -> None:
    parse = controllers.parse_strengths
    assert parse("", ["a", "b"]) == {"a": 1.0, "b": 1.0}
    assert parse("0.5", ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert parse("a = 0.5; b=-1", ["a", "b"]) == {"a": 0.5, "b": -1.0}
    for text, sentence in {"rx=1": "did you mean 'rex'", "rex=x": "not a number", "nan": "not a number"}.items():
        with pytest.raises(UserError, match=sentence):
            parse(text, ["rex"])


def test_sketch_is_white_on_black_and_empty_canvas_ignored() -> None:
    canvas = Image.new("L", (32, 32), 255)
    assert controllers.drawn(None) is None and controllers.drawn(canvas) is None
    ImageDraw.Draw(canvas).line((4, 4, 28, 28), fill=0, width=2)
    stroke = controllers.drawn(canvas)
    assert stroke is not None and stroke.getpixel((0, 0)) == 0 and stroke.getpixel((16, 16)) == 255


def test_teller_says_what_is_left() -> None:
    lines: list[str] = []
    clock = iter([0.0, 10.0])
    tell = Teller(lambda done, total, words: lines.append(words), lambda: next(clock))
    tell(Event("train", 1, 100))
    tell(Event("train", 11, 100, {"loss": 0.25}))
    assert lines == ["Training", "Training, loss 0.2500, 89 s left"]


def test_unexpected_errors_become_one_sentence() -> None:
    assert controllers.sentence_of(UserError("Do this.")) == "Do this."
    sentence = controllers.sentence_of(ValueError("first\nsecond"))
    assert "ValueError: first" in sentence and "\n" not in sentence


# --- the whole path on random weights ------------------------------------------------------------------------


def test_train_stop_resume_fuse_generate(workspace: Workspace, tiny_base: Path, photos: Path) -> None:
    for name in ("tom", "jim"):
        controllers.add_concept(workspace, name, "dog", sorted(photos.iterdir()))
    settings = QUICK | {"base": str(tiny_base)}
    with pytest.raises(UserError, match="no stopped training"):
        controllers.train(workspace, "tom", resume=True, **settings)
    told = controllers.train(workspace, "tom", should_stop=lambda: True, **settings)
    assert told.startswith("Stopped at step 0 of 2") and "--" not in told
    assert controllers.readable_adapters(workspace) == ({}, [])
    assert "tom.safetensors" in controllers.train(workspace, "tom", resume=True, **settings)
    controllers.train(workspace, "jim", **settings)
    adapters, problems = controllers.readable_adapters(workspace)
    assert problems == []
    rows = controllers.adapter_rows(adapters)
    assert [row[:2] for row in rows] == [["jim", "<jim>"], ["tom", "<tom>"]]
    assert sorted(row[4] for row in rows) == ["0:2", "2:4"]

    controllers.fuse(workspace, ["tom", "jim"], "pair", "mean", "tom=0.5")
    assert controllers.base_choices(workspace) == ["pocket", "fused/pair"]
    assert set(controllers.tokens(workspace, "fused/pair", [])) == {"<tom>", "<jim>"}
    with pytest.raises(UserError, match="fused already"):
        controllers.generate(workspace, "fused/pair", ["tom"], "1", prompt="<tom>")

    draw: dict[str, Any] = {"prompt": "a <tom> and a <nobody>", "steps": 2, "device": "cpu"}
    paths, words = controllers.generate(workspace, "fused/pair", [], "", count=2, **draw)
    assert len(paths) == 3 and "<nobody>" in words and all(workspace.pictures in path.parents for path in paths)
    paths, _ = controllers.generate(workspace, str(tiny_base), ["tom"], "0.5", seed=7, **draw)
    assert read_settings(paths[0])["seed"] == 7
    assert list(read_settings(paths[0])["adapters"].values()) == [0.5]


# --- the page ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    pytest.importorskip("gradio")
    from spectral_diffusion.ui.app import build, launch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks = build(tmp_path_factory.mktemp("ui") / "workspace")
    launch(blocks, port, prevent_thread_lock=True, quiet=True)
    yield blocks, f"http://127.0.0.1:{port}"
    blocks.close()


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_page_is_served_on_this_machine_only(served: tuple[Any, str], tmp_path: Path) -> None:
    blocks, url = served
    assert status_of(url) == 200
    assert blocks.share_url is None
    assert {socket.getsockname()[0] for socket in blocks.server.servers[0].sockets} == {"127.0.0.1"}
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    for path in ("/etc/passwd", str(secret), str(Path(__file__))):
        assert status_of(f"{url}/gradio_api/file={path}") in (403, 404)


def test_taken_port_is_a_sentence(served: tuple[Any, str], tmp_path: Path) -> None:
    from spectral_diffusion.ui.app import build, launch

    with pytest.raises(UserError, match="port"):
        launch(build(tmp_path), int(served[1].rpartition(":")[2]), prevent_thread_lock=True, quiet=True)


def test_endpoints_answer_in_sentences_and_stay_alive(served: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio_client import Client

    client = Client(served[1], verbose=False, analytics_enabled=False)
    with pytest.raises(Exception, match="No adapter 'nonsense'"):
        client.predict("a photo of a dog", adapters=["nonsense"], api_name="/generate")
    with pytest.raises(Exception, match=r"No concept 'rx'.*did you mean 'rex'"):
        client.predict("rx", api_name="/train")
    with pytest.raises(Exception, match="cannot be the name"):
        client.predict(["rex"], "../x", api_name="/fuse")
    monkeypatch.setattr(controllers, "fuse", lambda *args: 1 / 0)
    with pytest.raises(Exception, match=r"unexpected went wrong .ZeroDivisionError"):
        client.predict(["rex"], "pair", api_name="/fuse")
    assert status_of(served[1]) == 200


def test_lists_say_what_to_do_next(workspace: Workspace) -> None:
    pytest.importorskip("gradio")
    from spectral_diffusion.ui.app import Handlers

    handlers = Handlers(workspace)
    _, table, problems, _, hint, *_ = handlers.lists()
    assert not table.visible and "step 1" in problems.value and "step 2" in hint.value
    assert "step 1" in handlers.view(None)[2]
    line, thumbnails, _ = handlers.view("rex")
    assert "`<rex>`" in line and len(thumbnails) == 8
    assert "No tokens" in handlers.tokens("pocket", [])
    assert "No fused folder" in handlers.tokens("fused/x", [])
