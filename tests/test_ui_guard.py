"""The app before others: pages of other sites, clients that go away, files of any kind, other users of a machine."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from processes import client_of, free_port

from spectral_diffusion.app import generation as drawing
from spectral_diffusion.app import temporary
from spectral_diffusion.app.generation import GeneratedPictures
from spectral_diffusion.app.guard import Guard, is_cross_site, session_of
from spectral_diffusion.app.workspace import pick, safe_name
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Hooks

# --- the layer alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({"host": "127.0.0.1:7860"}, False),  # a program
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}, False),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7861"}, True),
        ({"host": "127.0.0.1:7860", "origin": "https://evil.example"}, True),
        ({"host": "127.0.0.1:7860", "origin": "null"}, True),
        ({"host": "127.0.0.1:7860", "x-forwarded-host": "a.example", "origin": "https://a.example"}, False),
        ({"host": "a.example:443", "origin": "https://a.example"}, False),
        ({"host": "127.0.0.1:7860", "origin": "https://mine.gradio.live"}, False),  # its own link
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, True),
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, False),  # a link
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, False),
    ],
)
def test_a_foreign_page_is_told_by_its_origin(headers: dict[str, str], foreign: bool) -> None:
    assert is_cross_site(headers, ["mine.gradio.live"]) is foreign


def test_a_stream_names_its_session() -> None:
    assert session_of("/gradio_api/queue/data", "session_hash=abc") == "abc"
    assert session_of("/gradio_api/call/generate/abc", "") == "abc"
    assert session_of("/config", "session_hash=abc") == ""


def answered(
    path: str, headers: dict[str, str], bodies: list[bytes], kind: str = "application/json", gone: bool = False
) -> tuple[Message, list[str]]:
    """The headers of an answer that the layer lets through, its status among them, and who has left."""
    left: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        cookie = (b"set-cookie", b"a=b; HttpOnly; SameSite=none; Secure")
        shown = (b"content-disposition", b'inline; filename="a"')
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode()), cookie, shown]}
        )
        for body in bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if gone:
            await receive()
            return
        await send({"type": "http.response.body", "body": b""})
        await receive()

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(app, list, left.append)
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    where, _, query = path.partition("?")
    scope = {"type": "http", "path": where, "query_string": query.encode(), "headers": pairs}
    asyncio.run(guard(scope, receive, send))
    found = Message()
    found["status"] = str(sent[0]["status"])
    for name, value in sent[0]["headers"]:
        found[name.decode()] = value.decode()
    return found, left


def test_answers_say_what_a_browser_may_do_with_them() -> None:
    found, _ = answered("/login", {"host": "a"}, [])
    assert found["x-frame-options"] == "SAMEORIGIN" and "frame-ancestors 'self'" in str(
        found["content-security-policy"]
    )
    assert found["x-content-type-options"] == "nosniff"
    assert found["set-cookie"] == "a=b; HttpOnly; SameSite=lax; Secure"
    assert answered("/login", {"host": "a", "origin": "http://b"}, [])[0]["status"] == "403"
    for kind in ("text/html", "image/svg+xml", "application/xhtml+xml", "text/plain"):
        found, _ = answered("/gradio_api/file=/ws/pictures/a", {"host": "a"}, [], kind)
        assert found["content-disposition"] == 'attachment; filename="a"'
        assert found["content-type"] == "application/octet-stream"
    assert answered("/gradio_api/file=/a.png", {"host": "a"}, [], "image/png")[0]["content-disposition"].startswith(
        "in"
    )
    assert answered("/", {"host": "a"}, [], "text/html")[0]["content-type"] == "text/html"


def test_a_client_that_goes_before_its_streams_end_has_left() -> None:
    stream = "/gradio_api/queue/data?session_hash=abc"
    assert answered(stream, {"host": "a"}, [b"data: 1"], gone=True)[1] == ["abc"]
    assert answered(stream, {"host": "a"}, [b'data: {"msg":"close_stream"}'], gone=True)[1] == []
    assert answered(stream, {"host": "a"}, [b"data: 1"])[1] == []
    assert answered("/config", {"host": "a"}, [], gone=True)[1] == []


# --- the folder of a run --------------------------------------------------------------------------------------


def test_the_folder_of_a_run_is_its_owners_and_those_of_killed_runs_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(temporary.VARIABLE, raising=False)
    old, running = (tmp_path / temporary.UPLOADS / name for name in ("old", "running"))
    for folder in (old, running):
        (folder / "photo").mkdir(parents=True)
    old.with_suffix(".lock").touch()
    with FileLock(running.with_suffix(".lock")):
        temporary.choose_folder(tmp_path)
        folder = Path(os.environ[temporary.VARIABLE])
        assert not folder.exists()
        temporary.prepare_folder()
        temporary.prepare_folder()  # a second app of this process
        assert running.is_dir() and not old.exists()
    for mine in (folder, folder.parent):
        assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    temporary._remove(folder, temporary._lock(folder))
    assert not folder.exists() and not folder.with_suffix(".lock").exists()
    monkeypatch.setenv(temporary.VARIABLE, str(tmp_path / "mine"))
    temporary.choose_folder(tmp_path)
    temporary.prepare_folder()
    assert not (tmp_path / "mine").exists()  # a person's own choice is left alone


# --- the served app -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    pytest.importorskip("gradio")
    from spectral_diffusion.app.server import build_app, launch

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(temporary.VARIABLE, raising=False)
        blocks = build_app(tmp_path_factory.mktemp("guarded") / "workspace")
        port = free_port()
        launch(blocks, port, prevent_thread_lock=True, quiet=True)
        yield blocks, f"http://127.0.0.1:{port}"
        blocks.close()


def ask(url: str, headers: dict[str, str] | None = None, data: bytes | None = None) -> tuple[int, Message, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_uploads_are_refused_from_other_sites_and_private_from_our_own(served: tuple[Any, str]) -> None:
    blocks, url = served
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nphoto\r\n--x--\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert ask(f"{url}/gradio_api/upload", {**form, "Origin": "https://evil.example"}, body)[0] == 403
    status, _, answer = ask(f"{url}/gradio_api/upload", {**form, "Origin": url}, body)
    [file] = json.loads(answer)
    uploads = blocks.pictures.parent / temporary.UPLOADS
    assert status == 200 and Path(file).is_relative_to(uploads)
    assert stat.S_IMODE(uploads.stat().st_mode) == 0o700
    assert ask(url)[1]["x-frame-options"] == "SAMEORIGIN"


def test_only_pictures_are_shown_from_the_folder_of_pictures(served: tuple[Any, str]) -> None:
    blocks, url = served
    blocks.pictures.mkdir(exist_ok=True)
    for name, shown in {"a.html": False, "a.svg": False, "a.png": True}.items():
        (blocks.pictures / name).write_bytes(b"<script>alert(1)</script>")
        status, headers, _ = ask(f"{url}/gradio_api/file={blocks.pictures / name}")
        assert status == 200 and headers["content-disposition"].startswith("inline" if shown else "attachment")
        assert headers["content-type"] == ("image/png" if shown else "application/octet-stream")


def test_arguments_of_other_types_are_named(served: tuple[Any, str]) -> None:

    client = client_of(served[1])
    for name, argument, wrong in (
        ("/train", "concept", [["x"]]), ("/stop", "job", [["x"]]), ("/fuse", "name", [["rex"], 5]),
        ("/fuse", "adapters", [5, "x"]), ("/train", "steps", ["rex", "pocket", None, None, None, "many"]),
    ):  # fmt: skip
        with pytest.raises(Exception, match=rf"'{argument}' cannot be .*: input should be a valid"):
            client.predict(*wrong, api_name=name)
    for wrong in (["x"], 5, None):
        with pytest.raises(UserError, match="No adapter"):
            pick(wrong, {"rex": 1}, "adapter", "train it")  # type: ignore[arg-type]
        with pytest.raises(UserError, match="The name is missing"):
            safe_name(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("simple", [False, True])
def test_nobody_draws_for_a_program_that_has_gone(
    served: tuple[Any, str], monkeypatch: pytest.MonkeyPatch, simple: bool
) -> None:
    begun, stopped, end = threading.Event(), threading.Event(), threading.Event()

    def endless(workspace: Any, request: Any, hooks: Hooks, *_: object, **__: object) -> GeneratedPictures:
        begun.set()
        while not end.is_set():
            if hooks.should_stop():
                stopped.set()
                break
            time.sleep(0.01)
        return GeneratedPictures([], "Stopped.")

    monkeypatch.setattr(drawing, "generate", endless)
    url, kind = served[1], {"Content-Type": "application/json"}
    found = json.loads(ask(f"{url}/config")[2])["dependencies"]
    number = next(one["id"] for one in found if one["api_name"] == "generate")
    data = ["a dog", "pocket", [], "1", "", 0, 1, 64, 64, 1, 2, None, 1, "", None, 0, 0, "dpm"]
    asked: dict[str, Any] = {"data": data, **({} if simple else {"fn_index": number, "session_hash": "gone"})}
    where = "call/generate" if simple else "queue/join"
    event = json.loads(ask(f"{url}/gradio_api/{where}", kind, json.dumps(asked).encode())[2])["event_id"]
    stream = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    stream.request("GET", f"/gradio_api/{where}/{event}" if simple else "/gradio_api/queue/data?session_hash=gone")
    assert stream.getresponse().status == 200 and begun.wait(60)
    assert not stopped.is_set()
    stream.close()
    try:
        assert stopped.wait(60)
    finally:
        end.set()
