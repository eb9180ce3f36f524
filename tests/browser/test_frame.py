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
