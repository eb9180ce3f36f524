"""The page opens quickly, with four tabs, at a desk's and at a phone's width."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), pytest.param(390, "dark", marks=pytest.mark.slow)])
def test_page_fits_its_window(server: Any, visit: Any, width: int, theme: str) -> None:
    visitor = visit(f"{server.url}/?__theme={theme}", width=width)
    for tab in ("Concepts", "Train", "Fuse", "Generate"):
        visitor.tab(tab)
        visitor.page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


@pytest.mark.slow
def test_the_line_on_a_training_pushes_nothing(server: Any, visit: Any) -> None:
    visitor = visit(server.url)
    page = visitor.page
    visitor.tab("Train")
    page.locator("#train-estimate dd").first.wait_for(timeout=90_000)  # a concept is chosen
    page.locator("#train-start").click()
    page.locator("#train-strip p").wait_for(timeout=60_000)
    top = page.evaluate("document.getElementById('steps').getBoundingClientRect().top + scrollY")
    strip = page.locator("#train-strip").bounding_box()
    assert strip["y"] + strip["height"] <= 901  # at the foot of the window, over the page
    page.get_by_role("button", name="Pause").click()
    page.locator("#train-jobs", has_text="paused").wait_for(timeout=90_000)
    assert page.evaluate("document.getElementById('steps').getBoundingClientRect().top + scrollY") == top
