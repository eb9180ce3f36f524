"""Photo folders: captions from every place, upright and opaque pictures, keyed randomness."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_photos
from PIL import Image

from spectral_diffusion.config import TrainConfig
from spectral_diffusion.data.folder import load_concept, open_photo
from spectral_diffusion.data.samples import keyed_generator, photo_of, random_crop
from spectral_diffusion.errors import UserError


def test_captions_come_from_metadata_then_text_then_template(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 3)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "<TOK> in the sun"}) + "\n")
    (folder / "0.txt").write_text("never read")
    (folder / "1.txt").write_text(" a dog\nwith  a ball ")
    concept = load_concept(folder)
    assert [photo.caption for photo in concept.photos] == ["<TOK> in the sun", "a dog with a ball", None]
    assert concept.prompt("<TOK> in the sun") == "<rex> in the sun"
    assert concept.prompt("a photo of {}") == "a photo of <rex>"
    assert concept.prompt("a dog with a ball") == "<rex>, a dog with a ball"
    assert concept.prompt("my <rex> here") == "my <rex> here"


def test_image_and_caption_folders_side_by_side(tmp_path: Path) -> None:
    make_photos(tmp_path / "vase" / "image", 2)
    (tmp_path / "vase" / "caption").mkdir()
    (tmp_path / "vase" / "caption" / "1.txt").write_text("<TOK>, indoors")
    concept = load_concept(tmp_path / "vase", noun="vase")
    assert [photo.caption for photo in concept.photos] == [None, "<TOK>, indoors"]
    assert (concept.name, concept.token, concept.noun) == ("vase", "<vase>", "vase")


def test_concept_yaml_names_things_and_a_misspelt_key_is_told(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "IMG 0042")
    (folder / "concept.yaml").write_text("name: rex\nnoun: dog\ntoken: <my-rex>\n")
    concept = load_concept(folder)
    assert (concept.name, concept.noun, concept.token) == ("rex", "dog", "<my-rex>")
    (folder / "concept.yaml").write_text("nuon: dog\n")
    with pytest.raises(UserError, match=r"Unknown key 'nuon'.*did you mean 'noun'"):
        load_concept(folder)


@pytest.mark.parametrize("line", ["{", "[]", '{"file_name": "0.png"}', "3"])
def test_damaged_metadata_names_the_line(tmp_path: Path, line: str) -> None:
    folder = make_photos(tmp_path / "rex")
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": "x"}}\n\n{line}\n')
    with pytest.raises(UserError, match="line 3"):
        load_concept(folder)


def test_photos_are_turned_upright_and_put_on_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_photo(tmp_path / "turned.jpg").size == (4, 8)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_photo(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    deep.save(tmp_path / "deep.png")
    assert open_photo(tmp_path / "deep.png").getpixel((1, 1)) == (255, 255, 255)
    Image.new("CMYK", (4, 4)).save(tmp_path / "print.jpg")
    assert open_photo(tmp_path / "print.jpg").mode == "RGB"


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    for name in ("empty.png", "text.png"):
        with pytest.raises(UserError, match="is not a readable image"):
            open_photo(tmp_path / name)


def test_crops_are_keyed_and_in_range() -> None:
    image = Image.effect_noise((50, 30), 80).convert("RGB")
    one, again, other = (random_crop(image, 16, 1.3, keyed_generator(0, "crop", k)) for k in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == (3, 16, 16) and one.min() >= -1 and one.max() <= 1
    assert random_crop(Image.new("RGB", (1, 1)), 16, 1.0, keyed_generator(0)).shape == (3, 16, 16)


def test_every_photo_is_seen_once_an_epoch() -> None:
    config = TrainConfig(concept=Path("x"), output=Path("y"), batch=3)
    seen = [photo_of(step, sample, 7, config) for step in range(7) for sample in range(3)]
    assert all(sorted(seen[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert seen[:7] != seen[7:14] or seen[7:14] != seen[14:]
