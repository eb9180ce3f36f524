"""The hosted demo: pictures of two ready-made concepts, and nothing else that a visitor could ask of the machine."""

from __future__ import annotations

import pickle
import runpy
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from processes import client_of

from spectral_diffusion.core.errors import UserError

pytest.importorskip("gradio")
from spectral_diffusion.app import hosted

ROOT = Path(__file__).parent.parent
BOX = {"box": [0.0, 0.0, 0.5, 1.0], "prompt": "a photo of <rex>", "concept": "rex"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "STEPS", 2)


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPACE_ID", "somebody/spectral-diffusion")
        demo = runpy.run_path(str(ROOT / "app.py"), run_name="space")["demo"]
    _, url, _ = hosted.launch_hosted(demo, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield url
    demo.close()


def test_a_request_is_answered_with_a_picture(page: str) -> None:

    client = client_of(page)
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/generate"]
    picture, line = client.predict("<rex> beside <brew>", 3, "Wide", api_name="/generate")
    with Image.open(picture) as image:
        assert image.size == (256, 128) and "spectral_diffusion" not in image.info
    assert "Generated 1 picture of 256×128 pixels." in line
    with pytest.raises(Exception, match="The prompt has 301 characters; this demo takes 300"):
        client.predict("x" * 301, 0, "Wide", api_name="/generate")


def test_files_are_refused(page: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nx\r\n--x--\r\n'
    for path in ("gradio_api/upload", "upload", "gradio_api/upload/"):
        asked = urllib.request.Request(f"{page.rstrip('/')}/{path}", body, method="POST")
        asked.add_header("Content-Type", "multipart/form-data; boundary=x")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked, timeout=20)
        assert refused.value.code == 403
    for file in (ROOT / "README.md", ROOT / "app.py"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{page.rstrip('/')}/gradio_api/file={file}", timeout=20)


def test_nothing_of_a_visitor_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    news = list(hosted.generate_picture("on the beach", {"regions": [BOX]}, "Wide", 1))
    picture, line = news[-1]
    assert picture is not None and picture.info == {} and "Generated 1 picture" in line
    assert any("step 2 of 2" in text for _, text in news)
    assert list(tmp_path.iterdir()) == []
    first = hosted.generate_picture("on the beach", {"regions": [BOX]}, "Wide", 1)
    next(first)
    first.close()  # the visitor has gone
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"canvas": {"regions": [BOX] * 5}}, "There are 5 boxes; this demo takes 4"),
        ({"canvas": {"regions": [BOX | {"concept": "../../etc"}]}}, "no concept '../../etc'; there are rex and brew"),
        ({"canvas": {"strokes": "x"}}, "no PNG"),
        ({"shape": "/etc"}, "no shape '/etc'"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_what_a_demo_does_not_take_is_a_sentence(fields: dict[str, Any], sentence: str) -> None:
    usual = {"prompt": "a <rex>", "canvas": {}, "shape": "Square", "seed": 0}
    with pytest.raises(UserError, match=sentence):
        list(hosted.generate_picture(**usual | fields))


def test_the_work_can_be_done_in_another_process() -> None:
    """ZeroGPU pickles the function and its arguments."""
    assert pickle.loads(pickle.dumps(hosted.generate_picture)) is hosted.generate_picture
    request, scene = hosted.checked_request("<rex> and <brew>", {"regions": [BOX]}, "Tall", 5)
    assert request.base == "pocket" and request.adapters == ["brew"]  # rex acts in its box
    assert (scene["width"], scene["height"], scene["seed"]) == (128, 256, 5)


def test_the_space_is_a_folder_that_can_be_pushed() -> None:
    folder = ROOT / "examples" / "space"
    _, header, _ = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
    settings = yaml.safe_load(header)
    assert settings["sdk"] == "gradio" and (folder / settings["app_file"]).is_file()
    assert (folder / "requirements.txt").read_text() == "spectral-diffusion[ui]\n"
    demo = runpy.run_path(str(folder / "app.py"), run_name="space")["demo"]
    assert demo._queue.max_size == hosted.WAITING_ROOM and demo._queue.default_concurrency_limit == 1
