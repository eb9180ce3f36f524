"""Photograph the app for README: docs/app-concepts.png and docs/app-generate.png.

python -m tools.app_pictures WORKSPACE

The workspace must hold ``adapters/rex.safetensors``, ``adapters/brew.safetensors`` and their ledger ``slots.json``, and
the fusion of both as ``fused/together``: copy what `make demo` leaves in ``demo``.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.browser.conftest import CHROMIUM, OFFLINE, QUIET, Server, Visitor

DOCS = Path(__file__).parent.parent / "docs"
BOXES = (("rex", 0.03, 0.47), ("brew", 0.53, 0.97))  # concept, left, right
PATIENCE = 600_000  # milliseconds for four pictures


def drag(page: Any, left: float, right: float) -> None:
    """Drag a box over the canvas, in fractions of its width."""
    stage = page.locator("#generate-canvas .stage").bounding_box()
    page.mouse.move(stage["x"] + left * stage["width"], stage["y"] + 0.06 * stage["height"])
    page.mouse.down()
    page.mouse.move(stage["x"] + right * stage["width"], stage["y"] + 0.94 * stage["height"], steps=6)
    page.mouse.up()


def choose(page: Any, field: str, option: str) -> None:
    """Choose an option of a drop-down list."""
    page.locator(f"{field} input").fill(option)
    page.get_by_role("option", name=option, exact=True).click()


def screenshot(page: Any, file: Path) -> None:
    """Write the whole page as a small PNG."""
    image = Image.open(BytesIO(page.screenshot(full_page=True))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


def photograph(visitor: Visitor, folder: Path) -> None:
    """Write both pictures."""
    page = visitor.page
    page.locator("#concepts-shelf button[data-name=rex]").click()
    page.locator("#concepts-about", has_text="Trained").wait_for()
    page.wait_for_timeout(1500)  # until the photos are there
    screenshot(page, folder / "app-concepts.png")
    visitor.tab("Generate")
    page.locator("#generate-more > button").click()
    choose(page, "#generate-base", "fused/together")
    page.locator("#generate-more > button").click()
    page.locator("#generate-prompt textarea").fill("<rex> on the left and <brew> on the right on the beach")
    page.get_by_label("Wide").check()
    page.locator("#generate-sources > button").click()
    choose(page, "#generate-sketch", "dog-teapot")
    page.locator("#generate-sources > button").click()
    page.locator("#generate-held > button").click()
    page.locator("#generate-held input[type=number]").first.fill("0.4")  # as in the demo: a concept keeps its colors
    page.locator("#generate-held > button").click()
    page.locator("#generate-canvas [data-mode=box]").first.click()
    for concept, left, right in BOXES:
        drag(page, left, right)
        row = page.locator("#generate-canvas .regions > li").last
        row.locator(".words").fill(f"a photo of <{concept}> on the beach")
        row.locator(".words").press("Tab")
    page.locator("#generate-count input[type=number]").fill("4")
    page.locator("#generate-go").click()
    page.locator("#generate-status", has_text="Drew 4 pictures").wait_for(timeout=PATIENCE)
    page.wait_for_timeout(1500)
    screenshot(page, folder / "app-generate.png")


def main(workspace: Path, folder: Path = DOCS) -> None:
    """Start the app on the workspace and photograph it."""
    server = Server(workspace)
    server.start()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *OFFLINE])
            photograph(Visitor(browser, server.url), folder)
            browser.close()
    finally:
        server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    main(parser.parse_args().workspace)
