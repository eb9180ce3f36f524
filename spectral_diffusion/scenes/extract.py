"""Control images from a photo, a drawing of any kind, or keypoints in a JSON file."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ..core.errors import UserError, reason
from ..core.files import parse_json, read_text
from .keypose import POINTS

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Person = np.ndarray[Any, np.dtype[np.floating[Any]]]  # (18, 2), NaN where unseen
Size = tuple[int, int]

# Indices of OpenPose's 18 points in other orders; a pair is the mean of two points.
Order = tuple[int | tuple[int, int], ...]
COCO: Order = (0, (5, 6), 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
BLAZEPOSE: Order = (0, (11, 12), 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7)
BODY_25: Order = (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18)
ORDERS: dict[int, Order] = {17: COCO, 18: tuple(range(18)), 25: BODY_25}

EDGE_SIDE = 512  # the longer side at which edges are detected, so that a large photo gives no finer drawing
PAPER_SIDE = 2048  # the same for drawings, where the strokes themselves must survive
MOST_PEOPLE = 8
LISTS = ("people", "instances", "instance_info")  # where files hold their people: OpenPose's, then MMPose's
SCORES = ("keypoint_scores", "scores")  # next to keypoints: MMPose's and transformers' confidences
SURE = 0.3  # from which score on these draw a point; below it is a guess


def sketch_of(image: Image.Image, thickness: float | None = None) -> Image.Image:
    """A drawing of a photo: its edges in lightness and color as soft white strokes on black, mode L, same size.

    Args:
        thickness: of the strokes in pixels; default a 160th of the longer side, at least 1.6.

    Raises:
        UserError: scikit-image is not installed.
    """
    color, feature, filters, restoration = (
        _library(f"skimage.{part}", "scikit-image", "spectral-diffusion[conditions]', or draw the sketch yourself")
        for part in ("color", "feature", "filters", "restoration")
    )
    scale = min(4.0, EDGE_SIDE / max(image.size))  # enlarged further, borders become slopes
    small = _opaque(image).resize(_scaled(image.size, scale), Image.Resampling.BICUBIC)
    # Total variation takes out cloth, grass and grain and leaves borders where they are.
    smooth = restoration.denoise_tv_chambolle(
        np.asarray(small, np.float32) / 255, weight=0.1, channel_axis=-1, max_num_iter=60
    )
    sigma = 1.4
    edges = np.zeros(smooth.shape[:2], bool)
    for channel, step in zip(np.moveaxis(color.rgb2lab(smooth), -1, 0), (5.0, 8.0, 8.0), strict=True):
        blurred = ndimage.gaussian_filter(channel, sigma)
        slope = np.hypot(ndimage.sobel(blurred, 0), ndimage.sobel(blurred, 1))
        least = step * 8 / (sigma * math.sqrt(2 * math.pi))  # the slope of a border `step` high
        steep = slope[slope > least]
        if steep.size < 8:
            continue
        high = max(least, 0.8 * float(filters.threshold_otsu(steep)))
        edges_of_channel = feature.canny(
            channel, sigma=sigma, low_threshold=max(least / 2, 0.35 * high), high_threshold=high
        )
        # A border in color is a pixel or two off the same border in lightness: one stroke, not two.
        edges |= edges_of_channel & ~ndimage.binary_dilation(edges, iterations=4) if edges.any() else edges_of_channel
    edges = _without_specks(edges, 28)
    if not edges.any():
        return Image.new("L", image.size)
    width = (thickness or max(1.6, max(image.size) / 160)) * scale
    strokes = np.clip(width / 2 + 0.5 - ndimage.distance_transform_edt(~edges), 0, 1)
    strokes = np.clip(ndimage.gaussian_filter(strokes, 0.25 * width) * 1.15, 0, 1)
    return _as_image(strokes).resize(image.size, Image.Resampling.BICUBIC)


def clean_strokes(image: Image.Image) -> Image.Image:
    """A drawing as soft white strokes on black, mode L, same size, whatever its paper and ink.

    A stroke is what differs from the paper in any color. The paper is the border's median, or transparency; its
    shading and grain go, and the strongest strokes become white.
    """
    scale = min(1.0, PAPER_SIDE / max(image.size))
    pixels = np.asarray(_eight_bit(image).resize(_scaled(image.size, scale), Image.Resampling.BOX), np.float32)
    colors, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.size and alpha.min() < 250:
        sheet = _sheet(colors, alpha[..., 0])
        strokes = alpha[..., 0] if sheet is None else _off_paper(sheet + (colors - sheet) * alpha / 255)
    else:
        strokes = _off_paper(colors)
    visible = strokes[strokes > 16]
    if visible.size:
        strokes = strokes / float(np.quantile(visible, 0.95))
    return _as_image(strokes).resize(image.size, Image.Resampling.BICUBIC)


def keypose_of(image: Image.Image) -> list[Person]:
    """The people of a photo, the most prominent first: arrays (18, 2) of pixels in OpenPose's order, NaN where unseen.

    Raises:
        UserError: mediapipe with its pose model is not installed.
    """
    remedy = "spectral-diffusion[keypose]' (Python 3.10 to 3.12), or give the keypoints as JSON"
    with _no_chatter():
        mediapipe = _library("mediapipe", "mediapipe", remedy)
        if not hasattr(mediapipe, "solutions"):  # 0.10.30 and later
            raise UserError(f"The installed mediapipe ships no pose model; uninstall it and pip install '{remedy}.")
        pose, options = mediapipe.solutions.pose.Pose, {"static_image_mode": True, "enable_segmentation": True}
        with (
            pose(min_detection_confidence=0.5, **options) as first,
            pose(min_detection_confidence=0.6, **options) as further,
        ):
            return _people(np.array(_opaque(image)), first.process, further.process)


def read_keypoints(path: Path) -> tuple[list[Person], Size | None]:
    """People of a keypoint file as (18, 2) in OpenPose's order, NaN where unseen, and the canvas if the file names it.

    It reads OpenPose's files (18 or 25 points, also inside a list of one frame), and a list of people, each a list of
    [x, y] or [x, y, confidence], flat or not, with 17 (COCO), 18 or 25 points; MMPose's scores beside its keypoints
    count as confidences. Fractions of the canvas become pixels where the canvas is named, and stay fractions (see
    ``are_fractions``) where it is not.

    Raises:
        UserError: not JSON, no people in it, or a wrong number of points.
    """
    path = Path(path)
    try:
        data = parse_json(read_text(path, "utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"No such file: {path}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file of keypoints ({reason(error)}).") from error
    if isinstance(data, list) and data and isinstance(data[0], dict) and "people" in data[0]:
        if len(data) > 1:
            raise UserError(f"{path} holds {len(data)} frames; keep one.")
        data = data[0]
    canvas = _canvas(data, path) if isinstance(data, dict) else None
    entries = next((data[key] for key in LISTS if key in data), None) if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise UserError(f'{path} holds no people; give {{"people": [{{"pose_keypoints_2d": [x, y, confidence, …]}}]}}.')
    if isinstance(data, list) and entries and all(_is_flat(entry) for entry in entries):
        entries = [entries]  # one person without the list around it
    people = [_person(entry, f"person {number} of {path}") for number, entry in enumerate(entries, 1)]
    visible = [person for person in people if np.isfinite(person).any()]
    if not visible:
        raise UserError(f"{path} holds no people: no point in it has a confidence above 0.")
    if canvas and are_fractions(visible):
        visible = [person * np.array(canvas, float) for person in visible]
    return visible, canvas


def are_fractions(people: Sequence[Person]) -> bool:
    """Whether most numbers are at most 1 in size, so that x and y are still to be multiplied by width and height.

    A hand or a foot may be outside the canvas, below 0 or above 1.
    """
    points = np.concatenate([np.asarray(person, float).ravel() for person in people]) if people else np.zeros(0)
    points = points[np.isfinite(points)]
    return bool(points.size and np.median(np.abs(points)) <= 1)


Finder = Callable[[np.ndarray], Any]
Box = tuple[int, int, int, int]  # left, top, right, bottom


def _people(image: np.ndarray, first: Finder, further: Finder) -> list[Person]:
    """Detect repeatedly: the model finds one person at a time, and misses small ones."""
    height, width = image.shape[:2]
    side = min(height, width)
    views: list[Box] = [(0, 0, width, height)]
    if max(height, width) > 1.25 * side:
        count = math.ceil((max(height, width) - side) / (side / 2)) + 1
        lefts, tops = np.linspace(0, width - side, count), np.linspace(0, height - side, count)
        views += [(int(x), int(y), int(x) + side, int(y) + side) for x, y in zip(lefts, tops, strict=True)]
    people: list[Person] = []
    rest = image.copy()
    for view in views:
        while len(people) < MOST_PEOPLE:
            sure = not people and view == views[0]
            if (detection := _find(first if sure else further, rest, view)) is None:
                break
            person, (left, top, right, bottom), body = detection
            cut = (
                *(0 < near <= edge for near, edge in ((left, view[0]), (top, view[1]))),
                *(far >= edge < end for far, edge, end in ((right, view[2], width), (bottom, view[3], height))),
            )
            if any(cut) or any(_same(person, known) for known in people):  # another view shows it whole
                break
            if not sure:  # what is painted over makes ghosts, which the picture itself does not confirm
                wide = max(right - left, bottom - top) // 4
                surroundings = (
                    max(0, left - wide),
                    max(0, top - wide),
                    min(width, right + wide),
                    min(height, bottom + wide),
                )
                confirmed = _find(first, image, surroundings)
                if confirmed is None or not _same(person, confirmed[0]):
                    break
            people.append(person)
            rest[ndimage.binary_dilation(body, iterations=max(1, side // 60))] = 128
    return people


def _find(finder: Finder, image: np.ndarray, view: Box) -> tuple[Person, Box, np.ndarray] | None:
    """The person that a part of the picture shows best: points, the box of its body, and its body as a mask."""
    left, top, right, bottom = view
    result = finder(np.ascontiguousarray(image[top:bottom, left:right]))
    if result.pose_landmarks is None:
        return None
    marks = np.array([(mark.x, mark.y, mark.visibility) for mark in result.pose_landmarks.landmark])
    visible = ((marks[:, :2] >= 0) & (marks[:, :2] <= 1)).all(1) & (marks[:, 2] >= 0.5)
    points = marks[:, :2] * (right - left, bottom - top) + (left, top)
    person = _ordered(np.where(visible[:, None], points, np.nan), BLAZEPOSE)
    body = np.zeros(image.shape[:2], bool)
    body[top:bottom, left:right] = result.segmentation_mask > 0.3
    if np.isfinite(person[:, 0]).sum() < 4 or not body.any():
        return None
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    return person, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1), body


def _library(module: str, name: str, remedy: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:  # a missing system library or a wrong protobuf shows in many ways
        raise UserError(f"This needs {name} ({reason(error)}); pip install '{remedy}.") from error


_stderr = threading.Lock()


@contextmanager
def _no_chatter() -> Iterator[None]:
    """Hold back what mediapipe's C++ writes to the process's standard error; it knows no other switch."""
    with _stderr:
        try:
            stderr = os.dup(2)
        except OSError:  # no standard error at all
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(nowhere)


def _scaled(size: Size, scale: float) -> Size:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _as_image(values: Floats) -> Image.Image:
    return Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8))


def _eight_bit(image: Image.Image) -> Image.Image:
    """RGB, or RGBA where the image has transparency."""
    if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
        return image.convert("F").point(lambda value: value / 256).convert("L").convert("RGB")
    clear = image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info
    return image.convert("RGBA" if clear else "RGB")


def _opaque(image: Image.Image) -> Image.Image:
    """RGB, what is transparent on white."""
    image = _eight_bit(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _sheet(colors: Floats, alpha: Floats) -> Floats | None:
    """The color of an opaque sheet with a drawing on it, or None where only the strokes are opaque."""
    visible = alpha > alpha.max() / 2
    if visible.mean() < 0.3:
        return None
    sheet = np.median(colors[visible], 0)
    share = float((np.abs(colors[visible] - sheet).max(-1) < 32).mean())
    return np.asarray(sheet) if 0.5 < share < 0.995 else None


def _off_paper(pixels: Floats) -> Floats:
    """How far each pixel is from the paper, 0…255, without the paper's shading and grain."""
    height, width = pixels.shape[:2]
    rim = max(1, min(height, width) // 50)
    border = np.concatenate(
        [part.reshape(-1, 3) for part in (pixels[:rim], pixels[-rim:], pixels[:, :rim], pixels[:, -rim:])]
    )
    step = max(1, max(height, width) // 256)  # a smooth surface needs few pixels
    some = pixels[::step, ::step]
    terms = _curves(height, width)[::step, ::step]
    paper: Floats = np.median(border, 0)
    curved, noise = None, 0.0
    for _ in range(4):  # a surface through what is near the paper, nearer each time
        away = np.abs(some - paper).max(-1)
        near = away < (max(6.0, 4 * noise) if noise else 48)
        if near.sum() < 32 or float(away[near].max()) == 0:  # a flat digital sheet
            break
        curved, *_ = np.linalg.lstsq(terms[near], some[near], rcond=None)
        paper = terms @ curved
        noise = float(1.48 * np.median(np.abs(some - paper).max(-1)[near]))
    if curved is not None:
        paper = _curves(height, width) @ curved
    # Ink takes away a share of the light, so that a stroke in the shade differs less from its paper.
    gain = 255 / np.maximum(paper, 255 - paper).max(-1)
    away = np.abs(pixels - paper).max(-1) * gain
    floor = np.maximum(8.0, 3 * noise * gain)
    strokes = away[away > 2 * floor]
    if strokes.size == 0 or float(away.max()) < 24:  # a blank sheet stays blank
        return np.zeros_like(away)
    toe = np.clip(2 * (away - floor), 0, away)  # nothing below the floor, nothing changed above twice the floor
    if noise > 1:  # grain that reaches above the floor is in specks and never dark
        dark = _without_specks(away > 0.4 * float(np.quantile(strokes, 0.95)), 3)
        toe *= ndimage.binary_propagation(dark, mask=away > floor)
    return np.asarray(toe)


def _curves(height: int, width: int) -> Floats:
    """1, x, y, xy, x², y² of every pixel, (height, width, 6)."""
    y, x = np.meshgrid(
        np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32), indexing="ij"
    )
    return np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], -1)


def _without_specks(mask: np.ndarray, least: int) -> np.ndarray:
    """A mask without its connected parts of fewer than ``least`` pixels."""
    parts, _ = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(sizes[parts] >= least)


def _same(first: Person, second: Person) -> bool:
    """Whether two detections are one person: their points are within a tenth of its extent of each other."""
    distances = np.linalg.norm(first - second, axis=1)
    distances = distances[np.isfinite(distances)]
    extent = np.nanmax(first, 0) - np.nanmin(first, 0)
    return bool(distances.size and np.median(distances) < 0.1 * float(extent.max()))


def _ordered(points: Floats, order: Order) -> Person:
    """OpenPose's 18 points from another order."""
    return np.stack([points[index] if isinstance(index, int) else points[list(index)].mean(0) for index in order])


def _canvas(data: dict[str, Any], path: Path) -> Size | None:
    width, height = data.get("canvas_width"), data.get("canvas_height")
    if width is None and height is None:
        return None
    for value in (width, height):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 1e6:
            raise UserError(f"canvas_width and canvas_height in {path} must both be numbers of pixels.")
    return int(width), int(height)  # type: ignore[arg-type]


def _is_flat(entry: Any) -> bool:
    """Whether it is a number or a point, and so no person."""
    if isinstance(entry, list):
        return 2 <= len(entry) <= 3 and not any(isinstance(value, list) for value in entry)
    return not isinstance(entry, dict)


def _person(entry: Any, where: str) -> Person:
    """One person of a keypoint file."""
    if isinstance(entry, dict):
        entry = _scored(entry, where)
    if entry is None or (isinstance(entry, list) and all(row is None for row in entry)):
        return np.full((POINTS, 2), np.nan)  # OpenPose writes such where it saw hands or a face only
    if not isinstance(entry, list):
        raise UserError(f"Cannot read {where}; give it as a list of [x, y, confidence].")
    if not any(isinstance(row, list) for row in entry):
        width = next((each for each in (3, 2) if len(entry) / each in ORDERS), None)
        if width is None:
            raise UserError(f"{_start(where)} has {len(entry)} numbers; give 3 for each of 17, 18 or 25 points.")
        entry = [entry[at : at + width] for at in range(0, len(entry), width)]
    if len(entry) not in ORDERS:
        raise UserError(f"{_start(where)} has {len(entry)} points; give 17 (COCO), 18 or 25 (OpenPose).")
    return _ordered(np.array([_point(row, where) for row in entry]), ORDERS[len(entry)])


def _scored(entry: dict[str, Any], where: str) -> Any:
    """The points of a person's entry; where scores come with them, guessed ones are None.

    Raises:
        UserError: there are not as many scores as points.
    """
    key = next((key for key in ("pose_keypoints_2d", "pose_keypoints", "keypoints") if key in entry), None)
    points = entry[key] if key else None
    scores = next((entry[name] for name in SCORES if isinstance(entry.get(name), list)), None)
    if scores is not None and isinstance(points, list):
        if points and not any(isinstance(row, list) for row in points):
            points = [points[at : at + 2] for at in range(0, len(points), 2)]
        if len(scores) != len(points) or not all(isinstance(score, int | float) for score in scores):
            raise UserError(f"{_start(where)} has {len(points)} points and {len(scores)} scores; give one for each.")
        return [row if score >= SURE else None for row, score in zip(points, scores, strict=True)]
    if key == "keypoints" and isinstance(points, list):  # COCO's results hold scores where its annotations hold 0, 1, 2
        rows = points if any(isinstance(row, list) for row in points) else _in_threes(points)
        return [None if _is_guess(row) else row for row in rows]
    return points


def _in_threes(numbers: list[Any]) -> list[Any]:
    """A flat list of x, y, confidence as rows; any other one as it is."""
    if len(numbers) % 3 or len(numbers) // 3 not in ORDERS:
        return numbers
    return [numbers[at : at + 3] for at in range(0, len(numbers), 3)]


def _is_guess(row: Any) -> bool:
    """Whether a point's score says that it was only guessed."""
    return isinstance(row, list) and len(row) == 3 and isinstance(row[2], int | float) and row[2] < SURE


def _start(where: str) -> str:
    return where[0].upper() + where[1:]


def _point(row: Any, where: str) -> tuple[float, float]:
    """x and y, NaN where the point was not seen."""
    if row is None:
        return math.nan, math.nan
    try:
        if not 2 <= len(row) <= 3 or any(isinstance(value, bool | str) for value in row):
            raise ValueError
        x, y, *confidence = (math.nan if value is None else float(value) for value in row)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"A point of {where} is {str(row)[:40]}; give [x, y] or [x, y, confidence].") from error
    # Without a confidence, the corner itself is how files say unseen.
    visible = confidence[0] > 0 if confidence else (x, y) != (0, 0)
    return (x, y) if visible and math.isfinite(x + y) else (math.nan, math.nan)
