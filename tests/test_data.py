"""Photo folders: captions from every place, upright and opaque pictures, keyed randomness."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_photos
from PIL import Image, ImageOps

from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.data.folder import load_concept, open_photo
from spectral_diffusion.data.samples import keyed_generator, photo_of, random_crop


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


def test_captions_of_another_folder_are_not_taken(tmp_path: Path) -> None:
    for name in ("rex/1.png", "mug/image/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    for place in ("captions", "rex/captions", "mug/captions"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.txt").write_text(f"<TOK> in {place}")
    for name in ("rex", "mug"):
        assert [photo.caption for photo in load_concept(tmp_path / name).photos] == [f"<TOK> in {name}/captions"]


def test_odd_photos_stop_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "rex"
    folder.mkdir()
    Image.new("RGB", (8, 4), "red").save(folder / "1.png")
    Image.new("RGB", (8, 4), "green").save(folder / f"{'x' * 245}.png")  # no caption or mask can have its name
    line = json.dumps({"file_name": "1.png", "text": "one\u2028two"}, ensure_ascii=False)  # no line ends there
    (folder / "metadata.jsonl").write_text(line, encoding="utf-8")
    assert [photo.caption for photo in load_concept(folder).photos] == ["one\u2028two", None]


def test_an_exif_that_cannot_be_read_leaves_the_photo_as_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(image: Image.Image) -> Image.Image:
        raise struct.error("argument out of range")

    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png")
    assert open_photo(tmp_path / "a.png").size == (8, 4)


def test_concept_yaml_names_things_and_a_misspelt_key_is_told(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "IMG 0042")
    (folder / "concept.yaml").write_text("name: rex\nnoun: dog\ntoken: <my-rex>\n")
    concept = load_concept(folder)
    assert (concept.name, concept.noun, concept.token) == ("rex", "dog", "<my-rex>")
    (folder / "concept.yaml").write_text("nuon: dog\n")
    with pytest.raises(UserError, match=r"Unknown key 'nuon'.*did you mean 'noun'"):
        load_concept(folder)


def test_a_blank_key_is_not_given_and_a_word_must_be_one(tmp_path: Path) -> None:
    make_photos(tmp_path / "rex")
    (tmp_path / "rex" / "concept.yaml").write_text("noun:\ntoken:\n")
    assert (load_concept(tmp_path / "rex").noun, load_concept(tmp_path / "rex").token) == ("rex", "<rex>")
    (tmp_path / "rex" / "concept.yaml").write_text("noun: true\n")
    with pytest.raises(UserError, match="must give noun as a word"):
        load_concept(tmp_path / "rex")


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
    config = TrainConfig(concept=Path("x"), output=Path("y"), batch_size=3)
    seen = [photo_of(step, sample, 7, config) for step in range(7) for sample in range(3)]
    assert all(sorted(seen[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert seen[:7] != seen[7:14] or seen[7:14] != seen[14:]


def test_hub_folders_with_metadata_in_either_form_and_folders_below(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 2)
    make_photos(folder / "deep" / "er", 2, seed=1)
    make_photos(folder / "train", 1, seed=2)
    make_photos(folder / "unnamed", 1, seed=3)
    (folder / "metadata.csv").write_text(
        'file_name,text,n\n0.png,"<TOK>, on\ngrass",1\ndeep/er/1.png,"a ""good"" one"\n'
    )
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "deep/er/0.png", "text": "below", "n": 3}) + "\n")
    (folder / "train" / "metadata.csv").write_text("\ufefffile_name,text\n0.png,of its own\n", encoding="utf-8")
    (folder / "1.caption").write_text("kohya's ending")
    concept = load_concept(folder)
    assert {photo.path.relative_to(folder).as_posix(): photo.caption for photo in concept.photos} == {
        "0.png": "<TOK>, on\ngrass",
        "1.png": "kohya's ending",
        "deep/er/0.png": "below",
        "deep/er/1.png": 'a "good" one',
        "train/0.png": "of its own",
    }
    assert not concept.skipped
    assert [note.partition(";")[0] for note in concept.notes] == ["Not read: 1 photo in unnamed/"]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    make_photos(tmp_path / "other")
    folder = make_photos(tmp_path / "rex")
    for outside in ("../other/0.png", str(tmp_path / "other" / "0.png"), "a/../../other/0.png"):
        row = json.dumps({"file_name": outside, "text": "x"}) if name.endswith("l") else f"file_name,text\n{outside},x"
        (folder / name).write_text(row)
        with pytest.raises(UserError, match=r"line \d names a file outside of its folder"):
            load_concept(folder)


@pytest.mark.parametrize("text", ["name,text\n0.png,x\n", "file_name,text\n0.png\n", 'file_name,text\n0.png,"x\n'])
def test_damaged_csv_names_the_line(tmp_path: Path, text: str) -> None:
    folder = make_photos(tmp_path / "rex")
    (folder / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=r"metadata\.csv line 2 has no file_name and text"):
        load_concept(folder)
    (folder / "metadata.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        load_concept(folder)


def test_repeats_come_from_folder_names_and_from_the_concept_file(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 1)
    for index, place in enumerate(("10_rex", "image", "close"), 1):
        make_photos(folder / place, 1, seed=index)

    def repeats(text: str) -> dict[str, int]:
        (folder / "concept.yaml").write_text(text)
        return {photo.path.parent.name: photo.repeats for photo in load_concept(folder).photos}

    assert repeats("noun: dog\n") == {"rex": 1, "10_rex": 10, "image": 1}
    assert repeats("repeats: 3\n") == {"rex": 3, "10_rex": 10, "image": 3}
    both = repeats("repeats: {close: 4, 10_rex: 2, .: 5}\n")
    assert both == {"rex": 5, "10_rex": 2, "image": 1, "close": 4}


def test_odd_repeats_are_told_in_a_sentence(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 1)
    make_photos(folder / "close", 1)
    for odd in ("0", "-1", "1.5", "many", "[1]", "true", "1001", "{close: 0}", "{close: }"):
        (folder / "concept.yaml").write_text(f"repeats: {odd}\n")
        with pytest.raises(UserError, match=r"repeats in .*concept\.yaml must say a whole number from 1 to 1000, not"):
            load_concept(folder)
    for missing in ("clsoe", "../rex", "close/deeper", "3"):
        (folder / "concept.yaml").write_text(f"repeats: {{{missing}: 2}}\n")
        with pytest.raises(UserError, match=rf"name the folder '{missing}', which is not there"):
            load_concept(folder)
    (folder / "concept.yaml").unlink()
    (folder / "2023_spring").mkdir()
    with pytest.raises(UserError, match=r"The name of the folder .*2023_spring must say a whole number from 1 to 1000"):
        load_concept(folder)


def test_photos_that_are_the_same_are_told_and_kept(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 3)
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    with Image.open(folder / "1.png") as image:
        image.save(folder / "again.bmp")  # other bytes, the same pixels
    concept = load_concept(folder)
    assert len(concept.photos) == 5 and not concept.skipped
    assert concept.notes == ("3 photos are the same: 1.png, again.bmp, copy.png.",)
    rows = [json.dumps({"file_name": name, "text": "x"}) for name in ("gone.png", "a" * 5000, "\ud800.png", "2.png")]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    assert load_concept(folder).notes[1:] == ("Named in the metadata but not among the photos: 'gone.png' and 2 more.",)
