"""What lies in a photo folder is used, or somebody says that it is not: captions, masks, drawings, other folders."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from conftest import make_photos
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spectral_diffusion.config.control import ControlConfig
from spectral_diffusion.config.train import DataConfig, TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.data.control_pairs import read_pairs
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.data.image_io import DRAWN
from spectral_diffusion.data.masks import is_mask, open_mask
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.prompt_encoder import PromptEncoder
from spectral_diffusion.training.checks import notes_on, notes_on_photos
from spectral_diffusion.training.prior_images import read_class_images


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base), "cpu")


def settings(folder: Path, **more: object) -> TrainConfig:
    return TrainConfig(concept=folder, output=folder / "a.safetensors", **more)  # type: ignore[arg-type]


def said(folder: Path, base: Base, **more: object) -> list[str]:
    concept = load_concept(folder, name="rex")
    return list(notes_on(concept, PromptEncoder(base, concept, 0, 16), settings(folder, **more)))


def test_captions_and_masks_are_found_in_any_case_ending_and_unicode_form(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 3)
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (folder / "2.png").rename(folder / f"{apart}.png")
    (folder / "0.TXT").write_text("one")
    (folder / "1.png.txt").write_text("two")
    (folder / f"{composed}.txt").write_text("three")
    (folder / "masks").mkdir()
    for name in ("0.PNG", "1.jpg", f"{composed}.png.webp"):
        Image.new("L", (24, 20), 255).save(folder / "masks" / name, format="PNG")
    concept = load_concept(folder)
    assert [photo.caption for photo in concept.photos] == ["one", "two", "three"]
    assert not concept.notes
    (folder / "metadata.csv").write_text(f"file_name,text\n0.PNG,first\n{composed}.png,last\n", encoding="utf-8")
    for text in ("0.TXT", f"{composed}.txt"):
        (folder / text).unlink()
    concept = load_concept(folder)
    assert [photo.caption for photo in concept.photos] == ["first", "two", "last"]
    assert [photo.mask and photo.mask.name for photo in concept.photos] == ["0.PNG", "1.jpg", f"{composed}.png.webp"]
    assert not concept.notes


def test_a_caption_of_exactly_a_photos_name_comes_first(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 1)
    for name in ("0.TXT", "0.png.txt", "0.txt"):
        (folder / name).write_text(name)
    concept = load_concept(folder)
    assert concept.photos[0].caption == "0.txt"
    assert concept.notes == (
        "Not used as captions: 0.TXT, 0.png.txt (no photo has that name, or its caption is elsewhere).",
    )


def test_captions_and_masks_of_no_photo_are_named(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 2)
    (folder / "7.txt").write_text("of nothing")
    (folder / "0.txt").write_text("never read")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "<TOK> in the sun"}))
    (folder / "masks").mkdir()
    Image.new("L", (24, 20), 255).save(folder / "masks" / "9.png")
    concept = load_concept(folder)
    assert concept.photos[0].caption == "<TOK> in the sun" and concept.photos[0].mask is None
    assert [note.partition(" (")[0] for note in concept.notes] == [
        "Not used as captions: 0.txt, 7.txt",
        "Not used as masks: masks/9.png",
    ]


def test_drawings_of_photos_and_masks_beside_them_are_no_photos(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 2)
    for name in ("0_sketch.png", "1.keypose.png", "0-condlabel.png"):
        Image.effect_noise((24, 20), 90).save(folder / name)
    Image.new("L", (24, 20), 255).save(folder / "0_mask.png")
    Image.effect_noise((24, 20), 90).convert("RGB").save(folder / "1_mask.png")  # a photo of a mask
    Image.effect_noise((24, 20), 90).save(folder / "my_sketch.png")  # of no photo
    info = PngInfo()
    info.add_text(DRAWN, "sketch")
    Image.effect_noise((24, 20), 90).save(folder / "edges.png", pnginfo=info)  # drawn by this program
    concept = load_concept(folder)
    assert [photo.path.name for photo in concept.photos] == ["0.png", "1.png", "1_mask.png", "my_sketch.png"]
    assert {photo.path.name: photo.mask and photo.mask.name for photo in concept.photos if photo.mask} == {
        "0.png": "0_mask.png"
    }
    assert sorted(path.name for path in concept.control_images) == [
        "0-condlabel.png",
        "0_sketch.png",
        "1.keypose.png",
        "edges.png",
    ]
    [note] = notes_on_photos(load_concept(folder, name="rex"), settings(folder), 16)
    assert note.startswith("Left out, as drawings of the photos: ") and note.endswith(" and 1 more.")
    told: list[str] = []
    config = ControlConfig(folder=folder, output=tmp_path / "out")
    assert [pair.condition.name for pair in read_pairs(config, Hooks(notify=told.append))] == ["0_sketch.png"]


def test_what_is_black_and_white_is_a_mask() -> None:
    mask = Image.new("RGB", (40, 40), "white")
    mask.paste("black", (0, 0, 20, 40))
    assert is_mask(mask) and is_mask(mask.convert("L"))
    assert not is_mask(Image.new("RGB", (40, 40), "red")) and not is_mask(Image.new("RGB", (40, 40), "gray"))


def test_a_mask_that_is_no_image_is_named_as_the_mask(tmp_path: Path) -> None:
    photo = make_photos(tmp_path / "rex", 1) / "0.png"
    mask = photo.parent / "masks" / "0.png"
    mask.parent.mkdir()
    mask.write_bytes(b"")
    with pytest.raises(UserError, match=r"The mask .*masks/0\.png is not a readable image; paint it again, or take"):
        open_mask(photo, mask, (24, 20))


def test_photos_in_folders_below_are_named(tmp_path: Path, base: Base) -> None:
    folder = make_photos(tmp_path / "rex", 1)
    for place in ("session1", "session2", "10_rex/deep"):
        make_photos(folder / place, 2)
    make_photos(folder / "masks", 1)
    *_, note = load_concept(folder).notes
    assert note.startswith("Not read: 6 photos in 10_rex/deep/, session1/, session2/; move them up")
    (folder / "concept.yaml").write_text("repeats: {session1: 1, session2: 1}\n")
    assert len(load_concept(folder).photos) == 5
    nested = make_photos(tmp_path / "only" / "a", 2).parent
    with pytest.raises(UserError, match=r"no readable photo; put .* there\. Not read: 2 photos in a/; .*\{a: 1\}"):
        load_concept(nested)
    notes: list[str] = []
    read_class_images(folder, base, settings(folder), "dog", 16, Hooks(notify=notes.append))
    assert notes[-1] == f"In {folder}: Not read: 2 photos in 10_rex/deep/; move them up."


def test_folders_of_two_names_are_two_concepts(tmp_path: Path) -> None:
    for place in ("10_rex dog", "5_mug cup"):
        make_photos(tmp_path / "img" / place, 1)
    with pytest.raises(UserError, match=r"holds folders of two names, '10_rex dog' and '5_mug cup': train each"):
        load_concept(tmp_path / "img")
    assert len(load_concept(tmp_path / "img", name="rex").photos) == 2  # who says so means one
    (tmp_path / "img" / "5_mug cup").rename(tmp_path / "img" / "5_Rex_closer")
    assert len(load_concept(tmp_path / "img").photos) == 2


def test_kinds_of_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 1)
    for name in ("IMG_0001.HEIC", "IMG_0002.heic", "IMG_0003.avif"):
        (folder / name).write_bytes(b"x")
    (folder / "clip.mp4").write_bytes(b"x")
    assert load_concept(folder).skipped == (
        "IMG_0001.HEIC and 2 more are AVIF and HEIC, which is not read here: save as JPEG",
        "1 file of other kinds (clip.mp4)",
    )
    (folder / "0.png").unlink()
    with pytest.raises(UserError, match=r"no readable photo \(IMG_0001\.HEIC and 2 more are AVIF and HEIC"):
        load_concept(folder)


def test_photos_without_what_others_have_are_counted(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 3)
    (folder / "0.txt").write_text("<TOK> in the sun")
    Image.new("L", (24, 20), 255).save(folder / "1-masklabel.png")
    concept = load_concept(folder)
    assert list(notes_on_photos(concept, settings(folder), 16)) == [
        "2 of 3 photos have no caption; the templates are used instead."
    ]
    masked = settings(folder, data=DataConfig(mask_weight=1.0))
    assert "2 of 3 photos have no mask and count as a whole." in list(notes_on_photos(concept, masked, 16))


def test_small_photos_are_told(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 1)
    Image.new("RGB", (12, 9), "red").save(folder / "thumb.png")
    [note] = notes_on_photos(load_concept(folder), settings(folder), 16)
    assert note == "Smaller than the resolution of 16 and enlarged: thumb.png (12×9)."
    assert not list(notes_on_photos(load_concept(make_photos(tmp_path / "mug")), settings(folder), 16))


# --- captions and the base's tokenizer -------------------------------------------------------------------------


def test_a_caption_that_is_cut_is_told_and_one_that_loses_its_token_refused(tmp_path: Path, base: Base) -> None:
    folder = make_photos(tmp_path / "rex", 1)
    long = "a red dog on the grass " * 8
    (folder / "0.txt").write_text(f"<TOK> and {long}")
    [note] = said(folder, base)
    assert note.startswith("The caption of 0.png is longer than this base reads; cut off: '") and "grass" in note
    with pytest.raises(UserError, match=r"data\.shuffle_caption can move <rex>"):
        said(folder, base, data={"shuffle_caption": True, "keep_tokens": 0})
    (folder / "0.txt").write_text(f"{long} and <TOK>")
    with pytest.raises(UserError, match=r"caption of 0\.png is longer .* <rex> is in the part that is cut off"):
        said(folder, base)
    (folder / "0.txt").unlink()
    with pytest.raises(UserError, match=r"The template 'a red dog .* <rex> is in the part that is cut off"):
        said(folder, base, templates=[f"{long} and {{}}"])
    assert not said(folder, base)


def test_what_is_cut_off_is_what_training_never_sees(tmp_path: Path, base: Base) -> None:
    concept = load_concept(make_photos(tmp_path / "rex", 1))
    condition = PromptEncoder(base, concept, 0, 16)
    room = base.pipeline.tokenizer.model_max_length - 2
    fits = "<rex>" + " dog" * (room - 2)
    assert condition.truncated_text(fits) == ("", True)
    assert condition.truncated_text(f"{fits} cat") == ("cat", True)
    assert condition.truncated_text("dog " * (room - 1) + "<rex>")[1] is False  # its second vector is lost


def test_words_that_only_look_like_tokens_are_told(tmp_path: Path, base: Base) -> None:
    folder = make_photos(tmp_path / "rex", 2)
    (folder / "0.txt").write_text("a photo of <Rexx> and <other>")
    (folder / "1.txt").write_text("<REX> on the grass")
    concept = load_concept(folder)
    assert concept.prompt("<REX> on the grass") == "<rex> on the grass"  # the same word for a tokenizer
    first, second = said(folder, base)
    assert "names <Rexx>, which is no token" in first and "did you mean '<rex>'" in first
    assert "names <other>" in second


def test_tokens_of_a_fused_base_are_written_out_in_training_too(tmp_path: Path, tiny_base: Path) -> None:
    fused = load_base(str(tiny_base), "cpu")
    width = fused.models["text_encoder"].config.hidden_size
    import torch

    fused.add_token("<mug>", {"text_encoder": torch.zeros(2, width)})
    condition = PromptEncoder(fused, load_concept(make_photos(tmp_path / "rex", 1)), 0, 16)
    own = fused.pipeline.tokenizer.convert_tokens_to_ids(["<mug>", "<mug>_1"])
    for prompt in ("<rex> beside <mug>", "<rex> beside <mug> <mug>_1"):
        row = condition.token_ids("text_encoder", [prompt])[0].tolist()
        assert [row[4], row[5]] == own and own[1] not in row[6:]
