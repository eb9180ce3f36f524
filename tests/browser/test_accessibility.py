"""Accessibility: axe-core finds nothing serious on any tab, and the first picture is made with the keyboard alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest

from spectral_diffusion.app.first_run import adopt
from spectral_diffusion.app.workspace import Workspace

from .conftest import PATIENCE

pytestmark = pytest.mark.browser
AXE = "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})"
SERIOUS = {"serious", "critical"}


def findings(page: Any) -> list[str]:
    """What axe-core finds that is serious: the rule and the first elements."""
    source = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    page.evaluate(source)
    found = page.evaluate(AXE)["violations"]
    return [
        f"{one['id']}: {node['html'][:300]} {node['failureSummary'][:300]}"
        for one in found
        if one["impact"] in SERIOUS
        for node in one["nodes"][:20]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious(server: Any, visit: Callable[..., Any], width: int, theme: str) -> None:
    pytest.importorskip("axe_playwright_python")
    adopt(Workspace(server.workspace))
    visitor = visit(f"{server.url}/?__theme={theme}", width=width)
    page = visitor.page
    found: dict[str, list[str]] = {}
    for tab in ("Concepts", "Train", "Fuse", "Generate"):
        visitor.tab(tab)
        if tab == "Concepts":
            page.locator("#concepts-shelf button[data-name=rex]").click()
            page.locator("#concepts-photos img").first.wait_for()
        if tab == "Train":
            page.locator("#train-adapters td").first.wait_for()
            page.locator("#train-estimate dd").first.wait_for(timeout=PATIENCE)
        if tab == "Fuse":
            for name in ("rex", "brew"):
                page.get_by_label(name, exact=True).check()
            page.locator("#fuse-table li").nth(1).wait_for()
        for folded in page.locator(f"#tab-{tab.lower()} button.label-wrap").all():
            if folded.is_visible() and "open" not in (folded.get_attribute("class") or ""):
                folded.click()
        page.wait_for_timeout(500)
        found[tab] = findings(page)
    lines = [f"{tab}: {line}" for tab, lines in found.items() for line in lines]
    print("\n".join(lines))  # pytest cuts long ones off
    assert lines == []


@pytest.mark.slow
def test_the_first_picture_by_keyboard(server: Any, visit: Callable[..., Any]) -> None:
    page = visit(server.url).page
    page.locator("#concepts-first").wait_for()

    def tab_to(selector: str, most: int = 60) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.closest(selector) !== null", selector):
                return
        raise AssertionError(f"The Tab key never comes to {selector}.")

    tab_to("#concepts-first")
    page.keyboard.press("Enter")
    page.locator("#generate-status", has_text="two adapters").wait_for(timeout=PATIENCE)

    # A box is moved with the arrow keys, and its picture is made again.
    page.locator("#generate-prompt textarea").focus()
    tab_to("#generate-canvas .boxes")
    before = page.locator("#generate-canvas .regions > li input[type=number]").first.input_value()
    page.keyboard.press("ArrowRight")
    after = page.locator("#generate-canvas .regions > li input[type=number]").first.input_value()
    assert before != after
    tab_to("#generate-start")
    page.keyboard.press("Enter")
    page.locator("#generate-status", has_text="Generated 1 picture").wait_for(timeout=PATIENCE)
