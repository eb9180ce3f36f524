"""The whole story in a browser: photos, training, fusion, a sketch with two boxes; and what may go wrong."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spectral_diffusion.core import assets as resources
from spectral_diffusion.scenes.png_metadata import read_settings

from .conftest import PATIENCE

pytestmark = pytest.mark.browser
STEPS = "3"  # of a training, which only has to go through here


def start_training(visitor: Any, concept: str) -> None:
    """On the train tab: choose a concept and start."""
    page = visitor.page
    field = page.locator("#train-concept input")
    if field.input_value().split(" ")[0] != concept:
        field.fill(concept)
        page.get_by_role("option", name=re.compile(f"^{concept} ")).click()
    page.locator("#train-about", has_text=f"<{concept}>").wait_for()
    if not page.locator("#train-steps input").is_visible():
        page.locator("#train-more > button").click()
    page.locator("#train-steps input").fill(STEPS)
    page.locator("#train-with-samples input").uncheck()
    page.locator("#train-start").click()
    page.locator("#train-said", has_text=concept).wait_for()


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag over the canvas, in fractions of it."""
    box = page.locator("#generate-canvas .stage").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=6)
    page.mouse.up()


@pytest.mark.slow
def test_from_photos_to_a_picture_of_two(server: Any, visit: Callable[..., Any], tmp_path: Path) -> None:
    visitor = visit(server.url)
    page = visitor.page

    # Add a thing of one's own. One of the files is no picture.
    photos = sorted((resources.concepts() / "rex").glob("*.png"))[:4]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    page.locator("#concepts-add > button").click()
    page.locator("#concepts-files input[type=file]").set_input_files([*photos, broken])
    page.locator("#concepts-found", has_text="broken.png").wait_for()
    page.locator("#concepts-name input, #concepts-name textarea").first.fill("tom")
    page.locator("#concepts-noun input, #concepts-noun textarea").first.fill("dog")
    page.locator("#concepts-save").click()
    page.locator("#concepts-shelf button[data-name=tom]").wait_for()
    page.locator("#concepts-about", has_text="tom").wait_for()

    # Train it; a second one waits. The page is reloaded, the server started anew: nothing is lost.
    page.locator("#concepts-train").click()
    page.locator("#train-start").wait_for()
    start_training(visitor, "tom")
    page.locator("#train-jobs", has_text="tom").wait_for()
    start_training(visitor, "brew")
    visitor.reload()
    visitor.tab("Train")
    page.locator("#train-jobs", has_text=re.compile("tom.*brew|brew.*tom", re.S)).wait_for()
    visitor.context.close()
    server.stop()
    server.start()
    visitor = visit(server.url)
    page = visitor.page
    visitor.tab("Train")
    page.locator("#train-adapters", has_text="tom").wait_for(timeout=PATIENCE)
    page.locator("#train-adapters", has_text="brew").wait_for(timeout=PATIENCE)

    # Put both together.
    visitor.tab("Fuse")
    for name in ("tom", "brew"):
        page.locator(f"#fuse-concepts label:has-text('{name}') input").check()
        page.locator(f"#fuse-strength-{name}").wait_for()
    page.locator("#fuse-table", has_text="its looks").first.wait_for()
    page.locator("#fuse-merge input").fill("spectral")
    page.get_by_role("option", name="spectral", exact=True).click()
    page.locator("#fuse-name input, #fuse-name textarea").first.fill("pair")
    page.locator("#fuse-distill").get_by_label("900 steps", exact=True).check()
    page.locator("#fuse-save").click()
    page.locator("#fuse-stop").wait_for()
    assert page.locator("#fuse-compare").is_disabled() and page.locator("#fuse-save").is_disabled()
    page.locator("#fuse-stop").click()
    page.get_by_text("nothing was saved").first.wait_for(timeout=PATIENCE)
    assert not (server.workspace / "fused" / "pair").exists()
    page.locator("#fuse-distill").get_by_label("none", exact=True).check()
    page.locator("#fuse-save").click()
    page.locator("#fuse-use").click(timeout=PATIENCE)

    # Draw: a stroke, two boxes with a prompt each.
    page.locator("#generate-tokens button", has_text="<tom>").wait_for()
    page.locator("#generate-prompt textarea").fill("a photo of ")
    page.locator("#generate-tokens button", has_text="<tom>").click()
    assert page.locator("#generate-prompt textarea").input_value().rstrip().endswith("<tom>")
    page.locator("#generate-prompt textarea").fill("<tom> and <brew> on the beach")
    page.get_by_label("Wide").check()
    drag(page, (0.1, 0.3), (0.4, 0.7))
    page.locator("#generate-canvas [data-mode=box]").first.click()
    for left, words in ((0.05, "a photo of <tom>"), (0.55, "a photo of <brew>")):
        drag(page, (left, 0.1), (left + 0.4, 0.9))
        page.locator("#generate-canvas .words").last.fill(words)
        page.locator("#generate-canvas .words").last.press("Tab")
    assert page.locator("#generate-canvas .regions > li").count() == 2
    page.locator("#generate-go").click()
    page.locator("#generate-gallery img").first.wait_for(timeout=PATIENCE)

    [picture] = (server.workspace / "pictures").glob("*.png")
    scene = read_settings(picture)
    with Image.open(picture) as image:
        assert image.size == (256, 128)
    assert scene["base"].endswith("fused/pair") and [one["prompt"] for one in scene["regions"]] == [
        "a photo of <tom>",
        "a photo of <brew>",
    ]
    assert [one["kind"] for one in scene["controls"]] == ["sketch"]
    assert scene["regions"][0]["box"] == pytest.approx([0.05, 0.1, 0.45, 0.9], abs=0.03)


@pytest.mark.slow
def test_two_browsers_and_cancel(server: Any, visit: Callable[..., Any]) -> None:
    one, two = visit(server.url), visit(server.url)
    for visitor, steps in ((one, 100), (two, 4)):
        visitor.tab("Generate")
        page = visitor.page
        page.locator("#generate-prompt textarea").fill("a red dog on the beach")
        page.locator("#generate-more > button").click()
        field = page.get_by_label("number input for Steps")
        field.fill(str(steps))
        field.press("Tab")
    one.page.get_by_label("number input for Pictures").fill("16")
    one.page.get_by_label("number input for Pictures").press("Tab")
    one.page.locator("#generate-go").click()
    one.page.locator("#generate-picture img").wait_for(timeout=PATIENCE)  # the first preview
    two.page.locator("#generate-go").click()  # waits for its turn, and is cancelled at once
    two.page.locator("#generate-cancel").click()
    two.page.locator("#generate-status", has_text="Cancelled while it waited").wait_for()
    two.page.locator("#generate-start").click()  # asked for again
    one.page.locator("#generate-cancel").click()
    one.page.locator("#generate-status", has_text="Stopped").wait_for(timeout=PATIENCE)
    two.page.locator("#generate-status", has_text="Generated 1 picture").wait_for(
        timeout=PATIENCE
    )  # the other's stop was not its


@pytest.mark.slow
def test_what_breaks_is_said_and_the_app_goes_on(server: Any, visit: Callable[..., Any]) -> None:
    adapters = server.workspace / "adapters"
    adapters.mkdir(parents=True)
    (adapters / "bad.safetensors").write_bytes(b"garbage")
    visitor = visit(server.url)
    page = visitor.page
    visitor.tab("Train")
    page.locator("#train-problems", has_text="bad.safetensors").wait_for()
    visitor.tab("Fuse")
    page.locator("#fuse-problems", has_text="bad.safetensors").wait_for()
    page.locator("#fuse-save").click()
    page.get_by_text("No concepts are chosen").first.wait_for()
    visitor.tab("Generate")
    page.locator("#generate-go").click()
    page.get_by_text("The prompt is empty").first.wait_for()
    shutil.rmtree(server.workspace)  # under its feet
    visitor.tab("Concepts")
    page.locator("#concepts-shelf button[data-name=rex]").click()
    page.locator("#concepts-about", has_text="rex").wait_for()
