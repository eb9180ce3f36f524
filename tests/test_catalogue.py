"""The page's translations: every text of the page is in the catalogue, and nothing else is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from spectral_diffusion.app.catalogue import LANGUAGES, PLACE, catalogue, head
from spectral_diffusion.core import assets

APP = Path(__file__).parent.parent / "spectral_diffusion" / "app"
NUMBER = re.compile(r"\{(\d)\}")
# Names of methods and presets, sizes and tokens are the same in every language, as are examples of prompts.
VERBATIM = re.compile(
    r"[<>\w.=+ -]*[\d<=_-][<>\w.=+ -]*|[a-z]+|DPM-Solver\+\+|DDIM|Euler|\d+(st|nd|rd|th)|a photo of .*|"
)
HIDDEN = {"Run"}  # buttons that only programs press


def test_every_sentence_has_its_translations() -> None:
    for source, texts in catalogue().items():
        assert set(texts) == set(LANGUAGES), source
        for text in texts.values():
            assert sorted(NUMBER.findall(text)) == sorted(NUMBER.findall(source)), source
            assert text == text.strip() and text and source == source.strip()
            for mark in ("**", "`"):
                assert text.count(mark) == source.count(mark), source


def static_texts(workspace: Path) -> Iterator[str]:
    """The texts of both pages as they are built, by paragraph."""
    gr = pytest.importorskip("gradio")
    from spectral_diffusion.app.hosted import build_hosted
    from spectral_diffusion.app.server import build_app

    shown = (gr.Markdown, gr.Button, gr.DownloadButton, gr.UploadButton)
    for page in (build_app(workspace), build_hosted()):
        for part in page.blocks.values():
            choices = [
                one[0] if isinstance(one, (tuple, list)) else one for one in getattr(part, "choices", None) or []
            ]
            texts = [getattr(part, name, None) for name in ("label", "info", "placeholder")] + choices
            texts += [part.value] if isinstance(part, shown) else []
            for text in texts:
                if isinstance(text, str):
                    yield from (line.lstrip("#- ") for line in text.splitlines())


def test_every_text_of_the_page_is_translated(tmp_path: Path) -> None:
    presets = {
        path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for path in assets.configs().glob("*.yaml")
    }
    known = set(catalogue()) | presets | HIDDEN | {"Spectral Diffusion"}
    missing = {text for text in static_texts(tmp_path) if text not in known and not VERBATIM.fullmatch(text)}
    assert missing == set()


def test_the_canvas_and_the_templates_are_translated() -> None:
    """Texts between tags, and attributes that are read out."""
    source = (APP / "canvas.html").read_text(encoding="utf-8")
    texts = [
        *re.findall(r">([^<>\n]*[a-z][^<>\n]*)<", source),
        *re.findall(r'(?:title|aria-label|alt)="([^"]+)"', source),
    ]
    for template in (APP / "templates").glob("*.jinja"):
        plain = re.sub(r"\{[#%{].*?[#%}]\}", "\0", template.read_text(encoding="utf-8"), flags=re.DOTALL)
        texts += re.findall(r">([^<>\0]*[a-z]{3}[^<>\0]*)</", plain)
    known = {re.sub(r"[*`]", "", source) for source in catalogue()}
    missing = {
        text for text in (" ".join(text.split()) for text in texts)
        if text and text not in known and not any(text in source for source in known)
    }  # fmt: skip
    assert missing == set()


def test_no_sentence_is_left_over() -> None:
    """Every word of the catalogue is said somewhere in the app, its settings or its presets."""
    files = [path for path in APP.rglob("*") if path.suffix in {".py", ".js", ".html", ".jinja"}]
    files += [*(APP.parent / "config").glob("*.py"), *assets.configs().glob("*.yaml")]
    said = " ".join(path.read_text(encoding="utf-8") for path in files if path.name != "catalogue.json")
    words = set(re.findall(r"[A-Za-z]{4,}", said)) | {"Photos", "deletions"}
    stale = {source for source in catalogue() if not set(re.findall(r"[A-Za-z]{4,}", source)) <= words}
    assert stale == set()


def test_the_page_carries_the_catalogue() -> None:
    script = head()
    assert script.startswith("<script>") and script.count("</script>") == 1 and PLACE not in script
    texts, _ = json.JSONDecoder().raw_decode(script, script.index(PLACE[:-3]) + len(PLACE[:-3]))
    assert texts["de"]["Save"] == "Speichern" and texts["zh"]["Save"] == "保存"
