"""Sketches and keyposes from photos, drawings and keypoint files."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from spectral_diffusion.config.scene import ControlImage
from spectral_diffusion.core.assets import concepts
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.scenes.control import read_control_image
from spectral_diffusion.scenes.extract import (
    BLAZEPOSE,
    are_fractions,
    clean_strokes,
    keypose_of,
    read_keypoints,
    sketch_of,
)

SIZE = (200, 150)


def drawing() -> Image.Image:
    """Anti-aliased white strokes on black: a ring, a line, a filled square."""
    image = Image.new("L", (SIZE[0] * 4, SIZE[1] * 4))
    pen = ImageDraw.Draw(image)
    pen.ellipse((100, 100, 420, 420), outline=255, width=14)
    pen.line((480, 80, 700, 520), fill=255, width=14)
    pen.rectangle((560, 80, 640, 160), fill=255)
    return image.resize(SIZE, Image.Resampling.BOX)


def inked(paper: Any, ink: tuple[int, int, int]) -> Image.Image:
    """The drawing in ink on paper, RGB."""
    cover = np.asarray(drawing(), float)[..., None] / 255
    pixels = np.broadcast_to(np.asarray(paper, float), (SIZE[1], SIZE[0], 3)) * (1 - cover) + np.array(ink) * cover
    return Image.fromarray(pixels.round().astype(np.uint8))


def apart(one: Image.Image, two: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(two, int)).max())


def photographed(image: Image.Image, noise: float) -> Image.Image:
    """With grain, through JPEG."""
    pixels = np.asarray(image, float) + np.random.default_rng(0).normal(0, noise, (image.height, image.width, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=75)
    return Image.open(buffer)


def shaded() -> np.ndarray:
    y, x = np.mgrid[0 : 1 : SIZE[1] * 1j, 0 : 1 : SIZE[0] * 1j]
    return (150 + 80 * x - 30 * y * y)[..., None] * np.array([1, 0.98, 0.92])


@pytest.mark.parametrize("paper,ink", [((255,) * 3, (0, 0, 0)), ((0,) * 3, (255,) * 3), ((255,) * 3, (255, 220, 0))])
def test_strokes_of_a_digital_drawing_keep_their_soft_rims(paper: Any, ink: Any) -> None:
    clean = clean_strokes(inked(paper, ink))
    assert clean.mode == "L" and clean.size == SIZE
    assert apart(clean, drawing()) <= 9
    assert apart(clean_strokes(clean), clean) <= 9


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16", "LA"])
def test_strokes_in_any_mode(mode: str) -> None:
    dark = Image.eval(drawing(), lambda value: 255 - value)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(dark, np.uint16) * 257)
        assert image.mode.startswith("I;16")
    else:
        image = dark.convert(mode)
    clean = np.asarray(clean_strokes(image))
    assert clean[30, 150] > 200 and clean[5, 5] == 0


@pytest.mark.parametrize("ink", [(0, 0, 0), (255, 255, 255), (200, 30, 30)])
def test_strokes_on_nothing(ink: tuple[int, int, int]) -> None:
    image = Image.new("RGBA", SIZE, (*ink, 0))
    image.putalpha(drawing())
    assert apart(clean_strokes(image), drawing()) <= 9
    half = Image.new("RGBA", SIZE, (*ink, 0))
    half.putalpha(Image.eval(drawing(), lambda value: value // 2))
    assert apart(clean_strokes(half), drawing()) <= 9  # a brush of half strength


def test_sheet_with_transparent_margin_is_paper() -> None:
    page = Image.new("RGBA", (SIZE[0] + 40, SIZE[1] + 40))
    page.paste(inked((255, 255, 255), (0, 0, 0)), (20, 20))
    clean = clean_strokes(page)
    assert apart(clean.crop((20, 20, SIZE[0] + 20, SIZE[1] + 20)), drawing()) <= 9
    assert np.asarray(clean)[:20].max() == 0


@pytest.mark.parametrize(
    "paper,ink", [(shaded(), (70, 70, 75)), ((190, 150, 110), (20, 20, 20)), ((40, 70, 50), (230, 230, 225))]
)
def test_shading_and_grain_of_paper_go(paper: Any, ink: tuple[int, int, int]) -> None:
    clean = np.asarray(clean_strokes(photographed(inked(paper, ink), 5)), int)
    truth = np.asarray(drawing(), int)
    far = np.asarray(drawing().filter(ImageFilter.MaxFilter(9))) == 0
    assert clean[far].max() < 40 and clean[far].mean() < 0.1  # JPEG spreads colour a little
    assert np.median(clean[truth == 255]) > 215


def test_border_decides_and_a_dark_drawing_is_no_paper() -> None:
    image = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(image).rectangle((6, 6, 57, 57), fill=0)  # mean 87, yet drawn on white
    clean = clean_strokes(image)
    assert clean.getpixel((30, 30)) == 255 and clean.getpixel((2, 2)) == 0


@pytest.mark.parametrize("size", [(1, 1), (3, 200)])
def test_nothing_drawn_gives_black(size: tuple[int, int]) -> None:
    for image in (Image.new("RGB", size, "white"), Image.new("L", size), Image.new("RGBA", size)):
        assert clean_strokes(image).getextrema() == (0, 0)
    assert clean_strokes(photographed(Image.fromarray(shaded().astype(np.uint8)), 4)).getextrema() == (0, 0)


def test_large_drawing_keeps_its_size() -> None:
    large = drawing().resize((2400, 1800))
    clean = clean_strokes(large)
    assert clean.size == large.size
    assert np.abs(np.asarray(clean, int) - np.asarray(large, int)).mean() < 3


def test_shipped_sketch_passes_unchanged() -> None:
    with Image.open(concepts() / "sketches" / "dog-teapot.png") as sketch:
        assert apart(clean_strokes(sketch), sketch) <= 9


@pytest.mark.parametrize("name", ["rex", "bolt", "posy"])
def test_sketch_of_a_photo(name: str) -> None:
    pytest.importorskip("skimage")
    with Image.open(concepts() / name / "1.png") as photo:
        sketch = sketch_of(photo)
    values = np.asarray(sketch)
    assert sketch.mode == "L" and sketch.size == photo.size
    assert values.max() > 240 and 0.03 < (values > 128).mean() < 0.2
    assert ((values > 20) & (values < 235)).mean() > 0.02  # soft rims


def test_sketch_follows_lightness_and_colour_but_not_grain() -> None:
    pytest.importorskip("skimage")
    photo = Image.new("RGB", (256, 256), (128, 128, 128))
    pen = ImageDraw.Draw(photo)
    pen.rectangle((30, 30, 110, 110), fill=(220, 220, 220))
    pen.ellipse((140, 140, 220, 220), fill=(206, 95, 95))  # as light as the ground
    grainy = photographed(photo, 6)
    for image in (photo, grainy):
        values = np.asarray(sketch_of(image))
        assert values[70, 26:36].max() > 200 and values[180, 135:146].max() > 200
        assert values[60:80, 60:80].max() == 0 and values[:20].max() == 0 and values[170:190, 170:190].max() == 0
        thick = np.asarray(sketch_of(image, thickness=8))
        assert thick.mean() > 2 * values.mean()


@pytest.mark.parametrize("size", [(1, 1), (7, 300)])
def test_sketch_of_nothing_is_black(size: tuple[int, int]) -> None:
    pytest.importorskip("skimage")
    assert sketch_of(Image.new("RGBA", size)).getextrema() == (0, 0)
    assert sketch_of(Image.new("L", size, 90)).size == size


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("skimage", "skimage.color", "mediapipe"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'spectral-diffusion\[conditions\]'"):
        sketch_of(Image.new("RGB", (8, 8)))
    with pytest.raises(UserError, match=r"pip install 'spectral-diffusion\[keypose\]'.*JSON"):
        keypose_of(Image.new("RGB", (8, 8)))
    monkeypatch.setitem(sys.modules, "mediapipe", types.ModuleType("mediapipe"))
    with pytest.raises(UserError, match="ships no pose model"):
        keypose_of(Image.new("RGB", (8, 8)))


class OneAtATime:
    """Mediapipe's pose model as far as we use it: it finds the widest patch of pure red as a person."""

    def __init__(self, **options: Any) -> None:
        assert options["static_image_mode"]

    def __enter__(self) -> OneAtATime:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def process(self, pixels: np.ndarray) -> types.SimpleNamespace:
        red = (pixels == (255, 0, 0)).all(-1)
        if not red.any():
            return types.SimpleNamespace(pose_landmarks=None, segmentation_mask=None)
        column = red.sum(0).argmax()
        left = right = int(column)
        while left > 0 and red[:, left - 1].any():
            left -= 1
        while right < red.shape[1] - 1 and red[:, right + 1].any():
            right += 1
        mask = red.copy()
        mask[:, :left] = mask[:, right + 1 :] = False
        rows = np.flatnonzero(mask.any(1))
        marks = []
        for index in range(33):
            y = (rows[0] + (rows[-1] - rows[0]) * index / 32) / red.shape[0]
            marks.append(types.SimpleNamespace(x=(left + right) / 2 / red.shape[1], y=y, visibility=float(index != 15)))
        return types.SimpleNamespace(pose_landmarks=types.SimpleNamespace(landmark=marks), segmentation_mask=1.0 * mask)


def test_keypose_finds_several_people(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("mediapipe")
    module.solutions = types.SimpleNamespace(pose=types.SimpleNamespace(Pose=OneAtATime))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mediapipe", module)
    picture = Image.new("RGB", (300, 100), "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((20, 10, 40, 90), fill="red")
    pen.rectangle((240, 20, 260, 70), fill="red")
    people = keypose_of(picture)
    assert [round(float(person[0, 0])) for person in people] == [30, 250]
    assert all(person.shape == (18, 2) for person in people)
    assert np.isnan(people[0][7]).all() and np.isfinite(people[0][[*range(7), *range(8, 18)]]).all()  # the left wrist
    assert people[0][1, 1] == pytest.approx((people[0][2, 1] + people[0][5, 1]) / 2)  # neck between the shoulders
    assert keypose_of(Image.new("RGB", (50, 50))) == []


def test_keypose_with_the_real_model() -> None:
    mediapipe = pytest.importorskip("mediapipe")
    if not hasattr(mediapipe, "solutions"):
        pytest.skip("this mediapipe ships no pose model")
    assert keypose_of(Image.new("RGB", (64, 64), "white")) == []


def written(folder: Path, data: Any) -> Path:
    path = folder / "pose.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def flat(count: int, confidence: float = 0.9) -> list[float]:
    return [value for index in range(count) for value in (10.0 + index, 100.0 + index, confidence)]


def test_openpose_18_and_25_points(tmp_path: Path) -> None:
    eighteen = flat(18)
    eighteen[3 * 4 : 3 * 5] = [0, 0, 0]
    file = {"version": 1.3, "people": [{"pose_keypoints_2d": eighteen}], "canvas_width": 512, "canvas_height": 256}
    (person,), canvas = read_keypoints(written(tmp_path, file))
    assert canvas == (512, 256) and person.shape == (18, 2)
    assert np.isnan(person[4]).all() and person[17].tolist() == [27, 117]
    (person,), canvas = read_keypoints(written(tmp_path, {"people": [{"pose_keypoints_2d": flat(25)}]}))
    assert canvas is None
    assert person[:, 0].tolist() == [10 + index for index in (*range(8), *range(9, 19))]  # without the middle hip
    (again,), _ = read_keypoints(written(tmp_path, [{"people": [{"pose_keypoints_2d": flat(25)}]}]))
    assert np.array_equal(again, person)


def test_coco_points_as_list(tmp_path: Path) -> None:
    rows = [[float(index), 50.0 + index] for index in range(1, 18)]
    (person, second), canvas = read_keypoints(written(tmp_path, [rows, [[x, y, 2] for x, y in rows]]))
    assert canvas is None and np.array_equal(person, second)
    assert person[0].tolist() == [1, 51] and person[1].tolist() == [6.5, 56.5]
    right_wrist, left_eye, right_ear = 4, 15, 16
    assert [person[at, 0] for at in (right_wrist, left_eye, right_ear)] == [11, 2, 5]
    (alone,), _ = read_keypoints(written(tmp_path, rows))
    (annotated,), _ = read_keypoints(written(tmp_path, [{"keypoints": [v for row in rows for v in (*row, 2)]}]))
    assert np.array_equal(alone, person) and np.array_equal(annotated, person)
    rows[5] = [0, 0]  # the left shoulder unseen: no neck either
    (person,), _ = read_keypoints(written(tmp_path, [rows]))
    assert np.isnan(person[[1, 5]]).all() and np.isfinite(person[2]).all()


def test_fractions_are_scaled_by_the_canvas(tmp_path: Path) -> None:
    rows = [[0.5, 0.25, 1.0]] * 17 + [None]
    people, canvas = read_keypoints(written(tmp_path, [rows]))
    assert canvas is None and are_fractions(people) and people[0][0].tolist() == [0.5, 0.25]
    file = {"people": [rows], "canvas_width": 200, "canvas_height": 100}
    (person,), canvas = read_keypoints(written(tmp_path, file))
    assert canvas == (200, 100) and person[0].tolist() == [100, 25] and np.isnan(person[17]).all()
    assert not are_fractions([person]) and not are_fractions([])


def test_a_limb_may_reach_outside_the_canvas(tmp_path: Path) -> None:
    rows = [[0.5, 0.1 + 0.045 * index, 1.0] for index in range(18)]
    rows[4][0], rows[10][1] = -0.02, 1.03
    file = {"people": [{"pose_keypoints_2d": [value for row in rows for value in row]}]}
    people, canvas = read_keypoints(written(tmp_path, file))
    assert canvas is None and are_fractions(people)
    assert read_control_image(ControlImage(file=tmp_path / "pose.json", kind="keypose")).image.size == (512, 512)
    (person,), _ = read_keypoints(written(tmp_path, {**file, "canvas_width": 200, "canvas_height": 100}))
    assert person[4, 0] == pytest.approx(-4) and person[10, 1] == pytest.approx(103) and person[0, 0] == 100
    assert not are_fractions([person])


@pytest.mark.parametrize("form", ["scores", "names", "flat", "results", "file"])
def test_points_that_were_only_guessed_are_left_out(tmp_path: Path, form: str) -> None:
    """MMPose's and transformers' files hold scores beside their points, COCO's results in them."""
    rows = [[float(index), 50.0 + index] for index in range(1, 18)]
    scores = [0.9] * 17
    scores[9] = scores[15] = 0.02  # the left wrist and ankle
    instance: dict[str, Any] = {"keypoints": rows, "keypoint_scores": scores}
    if form == "names":
        instance = {"keypoints": rows, "scores": scores}
    elif form == "flat":
        instance["keypoints"] = [value for row in rows for value in row]
    elif form == "results":
        instance = {"keypoints": [v for row, score in zip(rows, scores, strict=True) for v in (*row, score)]}
    data = {"meta_info": {}, "instance_info": [instance]} if form == "file" else [instance]
    (person,), _ = read_keypoints(written(tmp_path, data))
    assert [index for index in range(18) if np.isnan(person[index]).any()] == [7, 13]
    if form != "results":
        data = [{**instance, "scores" if form == "names" else "keypoint_scores": scores[:-1]}]
        with pytest.raises(UserError, match=r"Person 1 of .* has 17 points and 16 scores"):
            read_keypoints(written(tmp_path, data))


def test_empty_people_beside_others_are_left_out(tmp_path: Path) -> None:
    file = {"people": [{"pose_keypoints_2d": []}, {"pose_keypoints_2d": flat(18)}, {"pose_keypoints_2d": None}]}
    people, _ = read_keypoints(written(tmp_path, file))
    assert len(people) == 1


@pytest.mark.parametrize(
    "data,says",
    [
        ("{people", "not a JSON file"),
        ("[" * 200_000, "not a JSON file"),
        ([], "holds no people"),
        ({"people": []}, "holds no people"),
        ({"persons": []}, "holds no people"),
        (7, "holds no people"),
        ({"people": [{"pose_keypoints_2d": flat(18, 0.0)}]}, "holds no people"),
        ({"people": [{"pose_keypoints_2d": flat(16)}]}, "Person 1 of .* has 48 numbers"),
        ({"people": [flat(18), flat(18)[:-1]]}, "Person 2 of .* has 53 numbers"),
        ([[[1, 2], [3, 4]]], "has 2 points"),
        ([[[1, 2, 3, 4]] * 18], "give \\[x, y\\]"),
        ([[["1", 2]] * 18], "give \\[x, y\\]"),
        ([[[True, 2]] * 18], "give \\[x, y\\]"),
        ([["nose"] * 18], "has 18 numbers|give \\[x, y\\]"),
        ({"people": ["someone"]}, "person 1"),
        ({"people": [flat(18)], "canvas_width": 512}, "canvas_width and canvas_height"),
        ({"people": [flat(18)], "canvas_width": 0, "canvas_height": 9}, "canvas_width and canvas_height"),
        ([{"people": [flat(18)]}] * 2, "2 frames"),
        ([[[10**400, 2]] * 18], "give \\[x, y\\]"),
    ],
)
def test_bad_keypoint_files_in_a_sentence(tmp_path: Path, data: Any, says: str) -> None:
    path = written(tmp_path, data)
    with pytest.raises(UserError, match=says) as caught:
        read_keypoints(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_or_binary_keypoint_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_keypoints(tmp_path / "none.json")
    (tmp_path / "image.json").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="not a JSON file"):
        read_keypoints(tmp_path / "image.json")
    with pytest.raises(UserError, match="not a JSON file"):
        read_keypoints(tmp_path)


def test_orders_name_every_point_once() -> None:
    singles = [index for index in BLAZEPOSE if isinstance(index, int)]
    assert len(BLAZEPOSE) == 18 and len(set(singles)) == 17
