"""The first picture without any training, two pictures under one slider, and found places as boxes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from spectral_diffusion.scenes.png_metadata import read_settings

from .conftest import PATIENCE
from .test_story import drag

pytestmark = pytest.mark.browser
BOXES = "#generate-canvas .regions > li"


def pictures(server: Any) -> list[Any]:
    return sorted((server.workspace / "pictures").glob("*.png"))


def test_one_button_makes_the_first_picture(server: Any, visit: Callable[..., Any]) -> None:
    visitor = visit(server.url)
    page = visitor.page
    begun = time.monotonic()
    page.locator("#concepts-first").click()
    page.locator("#generate-status", has_text="two adapters").wait_for(timeout=PATIENCE)
    print(f"first picture after {time.monotonic() - begun:.1f} s")
    [picture] = pictures(server)
    with Image.open(picture) as image:
        assert image.size == (256, 128)
    scene = read_settings(picture)
    assert [next(iter(region["adapters"])).endswith(f"{name}.safetensors") for region, name in zip(
        scene["regions"], ("rex", "brew"), strict=True
    )] == [True, True]  # fmt: skip
    assert page.locator(BOXES).count() == 2
    page.locator("#generate-gallery img").first.wait_for(timeout=PATIENCE)

    # A token that is typed chooses nothing whose concept acts in a box.
    prompt = page.locator("#generate-prompt textarea")
    whole = prompt.input_value()
    prompt.fill("")
    prompt.fill(whole)

    # A box is dragged, and the picture is drawn again with it where it is now.
    drag(page, (0.03, 0.04), (0.13, 0.04))  # by its label, while the pen is chosen
    page.locator("#generate-start").click()
    page.locator("#generate-status", has_text="Generated 1 picture").wait_for(timeout=PATIENCE)
    moved = read_settings(pictures(server)[-1])
    assert moved["regions"][0]["box"] != scene["regions"][0]["box"]
    assert moved["regions"][1] == scene["regions"][1]
    assert moved["adapters"] == scene["adapters"]

    # Another concept in a box: its token takes the other's place, in the box's prompt and in the picture's.
    page.locator("#generate-canvas li select").first.select_option("brew")
    assert page.locator("#generate-canvas .words").first.input_value() == "a photo of <brew> on the grass"
    assert prompt.input_value() == "<brew> on the left and <brew> on the right on the grass"
    page.locator("#generate-canvas li select").nth(1).select_option("rex")
    assert prompt.input_value() == "<brew> on the left and <rex> on the right on the grass"

    # The guide is for the first time only.
    visitor.tab("Concepts")
    page.locator("#concepts-shelf button[data-name=rex]").wait_for()
    page.locator("#concepts-guide").wait_for(state="hidden")


@pytest.mark.slow
def test_two_strengths_are_compared_under_one_slider(server: Any, visit: Callable[..., Any]) -> None:
    visitor = visit(server.url)
    page = visitor.page
    page.locator("#concepts-first").click()
    page.locator("#generate-status", has_text="two adapters").wait_for(timeout=PATIENCE)
    page.locator("#generate-pairs > button").click()
    page.locator("#pairs-start").click()
    page.locator("#generate-status", has_text="Say what is different").wait_for()
    page.locator("#pairs-strength input, #pairs-strength textarea").first.fill("0.2")
    page.locator("#pairs-start").click()
    page.locator("#generate-status", has_text="strength 0.2 on the right").wait_for(timeout=PATIENCE)
    page.locator("#pairs-slider img").first.wait_for()
    with page.expect_download() as download:
        page.locator("#pairs-sheet").click()
    with Image.open(download.value.path()) as sheet:
        assert sheet.width > 512


@pytest.mark.slow
def test_found_places_become_boxes_that_can_be_dragged(server: Any, visit: Callable[..., Any]) -> None:
    visitor = visit(server.url)
    page = visitor.page
    page.locator("#concepts-first").click()
    page.locator("#generate-status", has_text="two adapters").wait_for(timeout=PATIENCE)
    while page.locator(BOXES).count():  # no boxes: the places are to be found
        page.locator(f"{BOXES} button").last.click()
    prompt = page.locator("#generate-prompt textarea")
    whole = prompt.input_value()
    prompt.fill("")
    prompt.fill(whole)  # typed tokens choose their concepts
    for name in ("rex", "brew"):
        page.locator("#generate-adapters", has_text=name).wait_for()
    page.locator("#generate-side").click()
    page.locator("#generate-canvas .words").nth(1).wait_for()
    assert page.locator("#generate-canvas .words").nth(1).input_value() == "a photo of <brew> on the grass"
    while page.locator(BOXES).count():
        page.locator(f"{BOXES} button").last.click()
    prompt.fill("")
    prompt.fill(whole)
    for name in ("rex", "brew"):
        page.locator("#generate-adapters", has_text=name).wait_for()
    page.locator("#generate-start").click()
    page.locator("#generate-status", has_text="Generated 1 picture").wait_for(timeout=PATIENCE)
    page.locator("#generate-places").click()
    page.locator("#generate-status", has_text="drag them").wait_for()
    assert page.locator(BOXES).count() == 2
    before = page.locator("#generate-canvas .stage").bounding_box()
    assert before is not None
    page.locator("#generate-start").click()
    page.locator("#generate-status", has_text="Generated 1 picture").wait_for(timeout=PATIENCE)
    scene = read_settings(pictures(server)[-1])
    assert len(scene["regions"]) == 2 and all(region["adapters"] for region in scene["regions"])
