"""The page in German and Chinese: what a reader sees has no English left that the catalogue knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from spectral_diffusion.app.catalogue import catalogue
from spectral_diffusion.app.first_run import adopt
from spectral_diffusion.app.workspace import Workspace

from .conftest import PATIENCE

pytestmark = pytest.mark.browser
SEEN = """() => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), texts = [];
    while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement;
        if (parent.checkVisibility() && !parent.closest('script, style, textarea, [data-verbatim]'))
            texts.push(walker.currentNode.data.trim());
    }
    return texts;
}"""


def left_in_english(page: Any, language: str) -> set[str]:
    """The visible texts that have a translation."""
    known = {source for source, texts in catalogue().items() if texts[language] != source}
    return known & set(page.evaluate(SEEN))


def test_the_page_speaks_the_readers_language(server: Any, visit: Callable[..., Any]) -> None:
    adopt(Workspace(server.workspace))
    visitor = visit(server.url, locale="de-DE")
    page = visitor.page
    page.locator("#tab-concepts-button", has_text="1 · Konzepte").wait_for()
    assert page.evaluate("document.documentElement.lang") == "de"
    page.locator("#concepts-shelf button[data-name=rex]").click()
    page.locator("#concepts-about", has_text="8 Fotos von: dog; in Prompts heißt es").wait_for()
    assert left_in_english(page, "de") == set()
    visitor.tab("Fuse")
    for name in ("rex", "brew"):
        page.get_by_label(name, exact=True).check()
    page.locator("#fuse-table li", has_text="Die anderen wirken").first.wait_for()
    page.locator("#fuse-table p", has_text="Vorher und nachher zeigen").wait_for()
    assert left_in_english(page, "de") == set()
    visitor.tab("Generate")
    page.locator("#generate-start").click()
    page.locator("#generate-status", has_text="Das ging nicht. Der Prompt ist leer").wait_for(timeout=PATIENCE)
    assert left_in_english(page, "de") == set()

    # Another language is chosen, and stays chosen.
    visitor.reload(lambda: page.locator("#language").select_option("zh"))
    page.locator("#tab-train-button", has_text="2 · 训练").wait_for()
    visitor.reload()
    visitor.tab("Train")
    page.locator("#train-start", has_text="开始训练").wait_for()
    page.locator("#train-estimate dd").first.wait_for(timeout=PATIENCE)
    assert left_in_english(page, "zh") == set()
    visitor.reload(lambda: page.locator("#language").select_option("en"))
    page.locator("#tab-train-button", has_text="2 · Train").wait_for()
