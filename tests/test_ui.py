"""The app: its small parts, and the served page as a client meets it."""

from __future__ import annotations

import urllib.error
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import client_of, free_port

from spectral_diffusion.app import generation as drawing
from spectral_diffusion.app.device import giving_back
from spectral_diffusion.app.workspace import ProgressLine, sentence_of
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Event

# --- small parts ---------------------------------------------------------------------------------------------


def test_teller_says_what_is_left() -> None:
    lines: list[str] = []
    clock = iter([0.0, 10.0])
    tell = ProgressLine(lambda done, total, words: lines.append(words), lambda: next(clock))
    tell(Event("train", 1, 100))
    tell(Event("train", 11, 100, {"loss": 0.25}))
    assert lines == ["Training", "Training, loss 0.2500, 89 s left"]


def test_unexpected_errors_become_one_sentence() -> None:
    assert sentence_of(UserError("Do this.")) == "Do this."
    sentence = sentence_of(ValueError("first\nsecond"))
    assert "ValueError: first" in sentence and "\n" not in sentence


# --- the page ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    pytest.importorskip("gradio")
    from spectral_diffusion.app.server import build_app, launch

    port = free_port()
    blocks = build_app(tmp_path_factory.mktemp("ui") / "workspace")
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
    from spectral_diffusion.app.server import build_app, launch

    with pytest.raises(UserError, match="port"):
        launch(build_app(tmp_path), int(served[1].rpartition(":")[2]), prevent_thread_lock=True, quiet=True)


def test_endpoints_answer_in_sentences_and_stay_alive(served: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:

    client = client_of(served[1])
    with pytest.raises(Exception, match="No adapter 'nonsense'"):
        client.predict("a photo of a dog", adapters=["nonsense"], api_name="/generate")
    with pytest.raises(Exception, match=r"No concept 'rx'.*did you mean 'rex'"):
        client.predict("rx", api_name="/train")
    with pytest.raises(Exception, match="cannot be the name"):
        client.predict(["rex"], "../x", api_name="/fuse")
    monkeypatch.setattr(drawing, "generate", lambda *args, **more: 1 / 0)
    with pytest.raises(Exception, match=r"unexpected went wrong .ZeroDivisionError"):
        client.predict("a photo of a dog", api_name="/generate")
    assert status_of(served[1]) == 200


@pytest.mark.slow
def test_the_example_client_goes_from_photos_to_a_picture(
    served: tuple[Any, str], photos: Path, tiny_base: Path
) -> None:
    import runpy

    from gradio_client import handle_file

    client = client_of(served[1])
    pictures = [handle_file(path) for path in sorted(photos.iterdir())]
    for name in ("tom", "jim"):
        client.predict(name, "dog", pictures, api_name="/add_concept")
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "client.py"))
    files = example["run"](served[1], ["tom", "jim"], str(tiny_base), steps=1, draw=2)
    assert [Path(file).suffix for file in files] == [".png"]
    workspace = served[0].pictures.parent
    assert {path.name for path in (workspace / "adapters").glob("*.safetensors")} == {
        "tom.safetensors",
        "jim.safetensors",
    }
    assert (workspace / "fused" / "together" / "model_index.json").is_file()


def test_a_foreign_pages_name_for_this_machine_is_refused(served: tuple[Any, str]) -> None:
    port = served[1].rpartition(":")[2]
    for host, wanted in {"evil.example": 400, "localhost": 200, "127.0.0.1": 200}.items():
        asked = urllib.request.Request(f"{served[1]}/config", headers={"Host": f"{host}:{port}"})
        try:
            with urllib.request.urlopen(asked) as answer:
                assert answer.status == wanted
        except urllib.error.HTTPError as error:
            assert error.code == wanted


def test_a_full_gpu_is_told_in_a_sentence_and_emptied_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.nn.Module]] = []
    gone: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gone.append(held[0]() is None))

    def work(fails: bool) -> None:
        network = torch.nn.Linear(2, 2)
        held[:] = [weakref.ref(network)]
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with giving_back():
        work(fails=False)
    with pytest.raises(torch.OutOfMemoryError) as caught, giving_back():
        work(fails=True)
    assert gone == [True, True] and sentence_of(caught.value).startswith("The GPU has not enough memory")


@pytest.mark.parametrize("open_to_others", [{"host": "0.0.0.0"}, {"share": True}])
def test_only_a_password_opens_it_to_others(tmp_path: Path, open_to_others: dict[str, Any]) -> None:
    pytest.importorskip("gradio")
    from spectral_diffusion.app.server import launch

    with pytest.raises(UserError, match="password"):
        launch(None, 0, **open_to_others)  # type: ignore[arg-type]


def test_a_password_keeps_strangers_out(tmp_path: Path) -> None:
    pytest.importorskip("gradio")

    from spectral_diffusion.app.server import build_app, launch

    blocks = build_app(tmp_path / "workspace")
    port = free_port()
    launch(blocks, port, password="open sesame", prevent_thread_lock=True, quiet=True)
    url = f"http://127.0.0.1:{port}"
    try:
        assert status_of(f"{url}/config") == 401
        for given in ("", "Open sesame", "öffne"):
            with pytest.raises(Exception, match=r"401|credentials|[Ll]ogin|auth"):
                client_of(url, auth=("anyone", given))
        client = client_of(url, auth=("anyone", "open sesame"))
        assert client.predict(api_name="/jobs") == []
    finally:
        blocks.close()
