"""The verbs that draw control images from photos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import ELSEWHERE, UserError
from .support import echo

if TYPE_CHECKING:
    from PIL import Image

extract_app = typer.Typer(help="Control images (sketches, keyposes) from photos and keypoints.", no_args_is_help=True)
OutputOption = Annotated[Path | None, typer.Option("-o", "--output", help="Default: beside it, NAME_<kind>.png.")]


@extract_app.command("sketch")
def extract_sketch(
    photo: Annotated[Path, typer.Argument(help="A photo.")],
    output: OutputOption = None,
    thickness: Annotated[
        float | None, typer.Option(min=0.1, help="Of the strokes in the photo's pixels; more for small pictures.")
    ] = None,
) -> None:
    """Draw a photo's edges, white on black."""
    from ..data.folder import open_photo
    from ..scenes.extract import sketch_of

    _write(photo, output, "sketch", lambda: sketch_of(open_photo(photo), thickness))


@extract_app.command("keypose")
def extract_keypose(
    photo: Annotated[Path, typer.Argument(help="A photo of people, or their keypoints as JSON.")],
    output: OutputOption = None,
) -> None:
    """Draw the skeletons of a photo's people in OpenPose's colors."""
    from ..config.scene import ControlImage
    from ..data.folder import open_photo
    from ..scenes.control import read_control_image
    from ..scenes.extract import keypose_of
    from ..scenes.keypose import draw_keypose

    def draw_skeletons() -> Image.Image:
        if photo.suffix.lower() == ".json":
            return read_control_image(ControlImage(file=photo, kind="keypose")).image
        image = open_photo(photo)
        people = keypose_of(image)
        if not people:
            raise UserError(f"No person was found in {photo}; give keypoints as JSON instead.")
        return draw_keypose(people, *image.size)

    _write(photo, output, "keypose", draw_skeletons)


def _write(photo: Path, output: Path | None, kind: str, draw: Callable[[], Image.Image]) -> None:
    from PIL.PngImagePlugin import PngInfo

    from ..core.files import atomic
    from ..data.image_io import DRAWN, is_control_image

    output = output or photo.with_name(f"{photo.stem}_{kind}.png")
    if output.suffix.lower() != ".png":
        raise UserError(f"The output {output} must end in .png.")
    if output.exists() and not is_control_image(output):
        raise UserError(f"{output} was not drawn from a photo here, and would be lost.", ELSEWHERE)
    image, info = draw(), PngInfo()
    info.add_text(DRAWN, kind)
    with atomic(output) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    echo(f"Wrote {output}; look at it, then: generate … --{kind} {output}")
