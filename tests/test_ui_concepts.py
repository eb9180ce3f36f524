"""The concepts tab: photo folders made, changed and deleted on a scratch workspace; hostile uploads; the slot map."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import make_photos
from PIL import Image
from processes import client_of

from spectral_diffusion.app import concept_html as cards
from spectral_diffusion.app import concepts, editing, uploads
from spectral_diffusion.app.adapter_headers import AdapterInfo, adapter_headers, owner_of_adapter
from spectral_diffusion.app.jobs import Record
from spectral_diffusion.app.overview import look, slot_clashes, strips
from spectral_diffusion.app.workspace import Workspace, visible
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.slots.ledger import LEDGER, Ledger, Slot, SlotRequest
from spectral_diffusion.slots.picture import Stretch, stretches


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def tom(workspace: Workspace, photos: Path) -> Path:
    """A concept of three photos; returns its folder."""
    editing.add_concept(workspace, "tom", "cat", sorted(photos.iterdir()))
    return workspace.concepts / "tom"


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def label_of(name: str, slot: Slot | None, kind: str = "columns", base: str = "b", capacity: int = 32) -> AdapterInfo:
    return AdapterInfo(Path(f"{name}.safetensors"), name, "dog", f"<{name}>", "m", kind, slot, "pocket", base, capacity)


# --- adding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "a\\b", ".hidden", "", "  ", "a\0b", "x" * 41, "é<b>", None])
def test_unsafe_names_are_refused(workspace: Workspace, photos: Path, tmp_path: Path, name: Any) -> None:
    before = files_in(tmp_path)
    with pytest.raises(UserError, match="name"):
        editing.add_concept(workspace, name, "dog", photos.iterdir())
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "tom/..", "tom/001.png", ".trash"])
def test_names_are_looked_up_never_joined(workspace: Workspace, tom: Path, name: str) -> None:
    for call in (concepts.view_concept, editing.delete_concept, editing.copy_concept, editing.tidy_concept):
        with pytest.raises(UserError, match="No concept"):
            call(workspace, name)
    for photo in ("../tom/001.png", str(tom / "001.png"), "concept.yaml", "", None):
        with pytest.raises(UserError, match="photo"):
            editing.remove_photo(workspace, "tom", photo)
        with pytest.raises(UserError, match="photo"):
            editing.write_caption(workspace, "tom", photo, "x")


def test_upload_is_copied(workspace: Workspace, photos: Path, tom: Path) -> None:
    assert {path.name for path in files_in(workspace.root)} == {"001.png", "002.png", "003.png", "concept.yaml"}
    shutil.rmtree(photos)
    concept, thumbnails = concepts.view_concept(workspace, "tom")
    assert (concept.name, concept.noun, concept.token, len(thumbnails)) == ("tom", "cat", "<tom>", 3)
    with pytest.raises(UserError, match="already"):
        editing.add_concept(workspace, "tom", "cat", [])


def test_what_cannot_be_used_is_told_by_name(workspace: Workspace, photos: Path) -> None:
    bad, text, double = photos / "bad.png", photos / "notes.md", photos / "double.png"
    bad.write_bytes(b"not an image")
    text.write_text("hello")
    Image.open(photos / "0.png").save(double, compress_level=0)  # another file, the same picture
    _, problems = editing.add_concept(workspace, "tom", "cat", [bad, text, photos / "0.png", double])
    assert len(problems) == 3
    for problem, words in zip(problems, ("bad.png is not", "notes.md is not", "double.png is the same"), strict=True):
        assert problem.startswith(words)
    with pytest.raises(UserError, match=r"bad\.png"):
        editing.add_concept(workspace, "tim", "cat", [bad])
    with pytest.raises(UserError, match="No photos"):
        editing.add_concept(workspace, "tim", "cat", [])
    assert next(iter(concepts.concept_folders(workspace))) == "tom"
    assert [path.name for path in workspace.concepts.iterdir()] == ["tom"]


def test_captions_come_along(workspace: Workspace, photos: Path) -> None:
    (photos / "0.txt").write_text("a photo of <TOK>\non a mat", encoding="utf-8")
    (photos / "1.txt").write_bytes(b"\xff\xfe\x00")
    _, problems = editing.add_concept(workspace, "tom", "cat", photos.iterdir())
    assert problems == ["1.txt is not a caption in UTF-8"]
    captions = [photo.caption for photo in load_concept(workspace.concepts / "tom").photos]
    assert captions == ["a photo of <TOK> on a mat", None, None]


def test_other_kinds_of_images_are_never_decoded(workspace: Workspace, tmp_path: Path) -> None:
    """Pillow would hand PostScript to an interpreter; what a file is called does not count."""
    fake = tmp_path / "photo.png"
    fake.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match=r"photo\.png is not a readable image"):
        editing.add_concept(workspace, "tom", "cat", [fake])


def test_limits_of_uploads(workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, value, words in (
        ("PIXELS", 300, "million pixels"),
        ("FILE_BYTES", 100, "MB"),
        ("PHOTOS", 0, "too many"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(uploads, limit, value)
            room = value if limit == "PHOTOS" else 9
            with uploads.looked_through([photos / "0.png"], room=room) as intake:
                assert not intake.photos and words in intake.problems[0]


# --- zips ----------------------------------------------------------------------------------------------------


def test_zip_of_photos_with_captions(workspace: Workspace, photos: Path, tmp_path: Path) -> None:
    packed = tmp_path / "cat.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for photo in sorted(photos.iterdir()):
            archive.write(photo, f"cat/image/{photo.name}")
        archive.writestr("cat/caption/1.txt", "a photo of <TOK>")
        archive.writestr("__MACOSX/cat/image/._0.png", b"x")
        archive.writestr("cat/.DS_Store", b"x")
    assert editing.add_concept(workspace, "tom", "cat", [packed]) == ("tom", [])
    assert [photo.caption for photo in load_concept(workspace.concepts / "tom").photos] == [
        None,
        "a photo of <TOK>",
        None,
    ]


def test_hostile_members_are_left_out_one_by_one(workspace: Workspace, photos: Path, tmp_path: Path) -> None:
    packed, good = tmp_path / "evil.zip", (photos / "0.png").read_bytes()
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(packed, "w") as archive:
        for name in ("../up.png", "/etc/root.png", "a/../../b.png", "C:/x.png", "..\\win.png"):
            archive.writestr(name, good)
        archive.writestr(link, "/etc/passwd")
        archive.writestr("run.sh", "rm")
        archive.writestr("inner.zip", b"PK")
        archive.writestr("good.png", good)
    before = files_in(tmp_path)
    _, problems = editing.add_concept(workspace, "tom", "cat", [packed])
    assert sum("leads out of the zip" in problem for problem in problems) == 5
    assert sum("is a link" in problem for problem in problems) == 1 and len(problems) == 8
    made = files_in(tmp_path) - before
    assert {path.relative_to(workspace.concepts).as_posix() for path in made} == {"tom/001.png", "tom/concept.yaml"}


def test_zip_bombs_stop_at_the_limit(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "bomb.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.png", "b.png", "c.png"):
            archive.writestr(name, bytes(600_000))
    lying = bytearray(packed.read_bytes())  # the promised sizes are not believed
    at = lying.find((600_000).to_bytes(4, "little"), lying.find(b"PK\1\2"))
    lying[at : at + 4] = (10).to_bytes(4, "little")
    packed.write_bytes(lying)
    monkeypatch.setattr(uploads, "UNPACKED_BYTES", 1_000_000)
    monkeypatch.setattr(uploads, "FILE_BYTES", 700_000)
    with uploads.looked_through([packed]) as intake:
        assert not intake.photos
        assert any("too much" in problem for problem in intake.problems)
    monkeypatch.setattr(uploads, "FILE_BYTES", 1000)
    with uploads.looked_through([packed]) as intake:
        assert any("unpacks to more" in problem for problem in intake.problems)
    monkeypatch.setattr(uploads, "MEMBERS", 2)
    with uploads.looked_through([packed]) as intake:
        assert intake.problems == ("bomb.zip holds more than 2 files; pack only the photos",)
    monkeypatch.setattr(uploads, "DIRECTORY_BYTES", 50)
    with uploads.looked_through([packed]) as intake:
        assert intake.problems == ("bomb.zip holds too many files; pack only the photos",)


@pytest.mark.parametrize("data", [b"", b"PK\3\4 nonsense", b"PK\5\6" + bytes(18), bytes(1000)])
def test_damaged_zips_are_a_sentence(workspace: Workspace, tmp_path: Path, data: bytes) -> None:
    packed = tmp_path / "bad.zip"
    packed.write_bytes(data)
    with pytest.raises(UserError, match="None of the photos can be used"):
        editing.add_concept(workspace, "tom", "cat", [packed])
    assert not workspace.concepts.exists()


# --- changing ------------------------------------------------------------------------------------------------


def test_captions_are_written_beside_the_photo(workspace: Workspace, tom: Path) -> None:
    editing.write_caption(workspace, "tom", "002.png", "  a photo of <tom>\n in the rain ")
    assert (tom / "002.txt").read_text() == "a photo of <TOK> in the rain\n"
    concept, _ = concepts.view_concept(workspace, "tom")
    assert concept.prompt(concept.photos[1].caption or "") == "a photo of <tom> in the rain"
    editing.write_caption(workspace, "tom", "002.png", "")
    assert not (tom / "002.txt").exists()
    with pytest.raises(UserError, match="at most"):
        editing.write_caption(workspace, "tom", "002.png", "x" * 401)
    (tom / "metadata.jsonl").write_text(json.dumps({"file_name": "001.png", "text": "a cat"}))
    with pytest.raises(UserError, match=r"metadata\.jsonl"):
        editing.write_caption(workspace, "tom", "001.png", "b")


def test_photos_come_and_go(workspace: Workspace, tom: Path, tmp_path: Path) -> None:
    more = make_photos(tmp_path / "more", 2, seed=1)
    shutil.copy(tom / "001.png", more / "again.png")
    count, problems = editing.add_photos(workspace, "tom", sorted(more.iterdir()))
    assert count == 2 and problems == ["again.png is the same picture as a photo that is there already"]
    assert {path.name for path in tom.iterdir()} == {*(f"00{n}.png" for n in range(1, 6)), "concept.yaml"}
    (tom / "004.txt").write_text("x")
    editing.remove_photo(workspace, "tom", "004.png")
    assert {path.name for path in workspace.trash.rglob("004.*")} == {"004.png", "004.txt"}
    for name in ("001.png", "002.png", "003.png"):
        editing.remove_photo(workspace, "tom", name)
    with pytest.raises(UserError, match="last photo"):
        editing.remove_photo(workspace, "tom", "005.png")


def test_broken_photos_and_duplicates_are_flagged_and_tidied(workspace: Workspace, tom: Path) -> None:
    shutil.copy(tom / "001.png", tom / "004.png")
    (tom / "005.png").write_bytes(b"nonsense")
    concept, thumbnails = concepts.view_concept(workspace, "tom")
    assert len(thumbnails) == 4
    assert "001.png, 004.png" in concept.notes[0] and "005.png" in concept.skipped[0]
    assert next(card for card in look(workspace).cards if card.folder == "tom").problem == "1 broken photo"
    assert editing.tidy_concept(workspace, "tom") == "Removed 004.png, 005.png."
    concept, _ = concepts.view_concept(workspace, "tom")
    assert len(concept.photos) == 3 and not concept.notes and not concept.skipped
    with pytest.raises(UserError, match="no broken"):
        editing.tidy_concept(workspace, "tom")


def test_ready_made_ones_are_copied_not_changed(workspace: Workspace, photos: Path) -> None:
    before = files_in(concepts.concept_folders(workspace)["rex"])
    for call in (
        lambda: editing.write_caption(workspace, "rex", "1.png", "x"),
        lambda: editing.remove_photo(workspace, "rex", "1.png"),
        lambda: editing.add_photos(workspace, "rex", photos.iterdir()),
        lambda: editing.delete_concept(workspace, "rex", True),
        lambda: editing.change_concept(workspace, "rex", "max", "dog", ""),
    ):
        with pytest.raises(UserError, match="ready-made"):
            call()
    with pytest.raises(UserError, match="already"):
        editing.add_concept(workspace, "rex", "dog", photos.iterdir())
    ready = load_concept(concepts.concept_folders(workspace)["rex"])
    assert editing.copy_concept(workspace, "rex") == "rex"
    mine = load_concept(concepts.own_folders(workspace)["rex"])
    assert (mine.name, mine.noun, mine.token) == (ready.name, ready.noun, ready.token)
    assert [photo.caption for photo in mine.photos] == [photo.caption for photo in ready.photos]
    editing.write_caption(workspace, "rex", "1.png", "a photo of <rex>")
    assert look(workspace).problems == []  # an own one hides its ready-made namesake, so no tokens clash
    with pytest.raises(UserError, match="yours already"):
        editing.copy_concept(workspace, "rex")
    editing.delete_concept(workspace, "rex")
    assert concepts.concept_folders(workspace)["rex"].parent == ready.photos[0].path.parent.parent
    assert files_in(concepts.concept_folders(workspace)["rex"]) == before


def test_rename(workspace: Workspace, tom: Path) -> None:
    (tom / "concept.yaml").write_text("name: tom\nnoun: cat\ntoken: <tom>\nrepeats: 3\n")
    name, notes = editing.change_concept(workspace, "tom", "tim", "tiger", "tim")
    concept, _ = concepts.view_concept(workspace, name)
    assert (concept.name, concept.noun, concept.token) == ("tim", "tiger", "<tim>") and len(notes) == 1
    assert concept.photos[0].repeats == 3 and "tom" not in concepts.concept_folders(workspace)
    for new in ("rex", "../x", "captions"):
        with pytest.raises(UserError):
            editing.change_concept(workspace, "tim", new, "tiger", "")
    with pytest.raises(UserError, match=r"belongs to rex; take <rex-2>"):
        editing.change_concept(workspace, "tim", "tim", "tiger", "<rex>")
    assert (workspace.concepts / "tim" / "001.png").exists()


def test_deleted_concept_lies_in_the_trash(workspace: Workspace, tom: Path) -> None:
    before = {path.name for path in files_in(tom)}
    words = editing.delete_concept(workspace, "tom")
    [place] = workspace.trash.iterdir()
    assert place.name in words and {path.name for path in files_in(place / "tom")} == before
    assert "tom" not in concepts.concept_folders(workspace)
    (broken := workspace.concepts / "odd").mkdir()
    (broken / "1.png").write_bytes(b"x")
    editing.delete_concept(workspace, "odd")  # one that cannot even be read
    assert not broken.exists()


def test_deleting_with_the_adapter_frees_the_slot_and_nobody_elses(workspace: Workspace, tom: Path) -> None:
    ledger = Ledger(workspace.adapters / LEDGER)
    for name in ("tom", "rex"):
        ledger.reserve("base", name, SlotRequest(4, "next", 32))
    for name in ("tom.safetensors", "tom.yaml", "tom.state.safetensors", "rex.safetensors", "tom2.safetensors"):
        (workspace.adapters / name).write_bytes(b"x")
    words = editing.delete_concept(workspace, "tom", with_adapter=True)
    assert "freed" in words
    assert list(ledger.read()["base"]) == ["rex"]
    there = {path.name for path in workspace.adapters.iterdir() if not path.name.startswith(".")}
    assert there == {"rex.safetensors", "tom2.safetensors", LEDGER}
    assert {path.name for path in workspace.trash.rglob("tom.*")} == {
        "tom.safetensors",
        "tom.yaml",
        "tom.state.safetensors",
    }


def test_concept_in_training_is_left_alone(workspace: Workspace, tom: Path) -> None:
    job = workspace.jobs / "1_tom"
    job.mkdir(parents=True)
    (job / "job.json").write_text(Record(concept="tom", state="running").model_dump_json())
    for call in (
        lambda: editing.delete_concept(workspace, "tom"),
        lambda: editing.change_concept(workspace, "tom", "tim", "cat", ""),
    ):
        with pytest.raises(UserError, match="in training"):
            call()
    (job / "job.json").write_text(Record(concept="tom", state="done").model_dump_json())
    editing.delete_concept(workspace, "tom")
    assert not tom.exists()


def test_full_disk_is_a_sentence_and_leaves_nothing_half_done(
    workspace: Workspace, tom: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in files_in(workspace.root)}

    def full(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    monkeypatch.setattr("spectral_diffusion.core.files.os.fsync", full)
    more = make_photos(photos.parent / "more", 1, seed=5)
    for call in (
        lambda: editing.add_concept(workspace, "tim", "cat", photos.iterdir()),
        lambda: editing.add_photos(workspace, "tom", more.iterdir()),
        lambda: editing.copy_concept(workspace, "rex"),
        lambda: editing.write_caption(workspace, "tom", "001.png", "x"),
    ):
        with pytest.raises(UserError, match=r"No space left on device; free some space"):
            call()
    assert {path: path.read_bytes() for path in files_in(workspace.root)} == before


# --- a workspace that changes under our feet -------------------------------------------------------------------


def test_links_that_lead_out_are_not_read(workspace: Workspace, tom: Path, tmp_path: Path) -> None:
    secret = make_photos(tmp_path / "secret", 1, seed=9)
    (tom / "004.png").symlink_to(secret / "0.png")
    with pytest.raises(UserError, match=r"link that leads out of it, 004\.png"):
        concepts.view_concept(workspace, "tom")
    assert next(card for card in look(workspace).cards if card.folder == "tom").photos == []
    (workspace.concepts / "elsewhere").symlink_to(secret)
    assert "elsewhere" not in concepts.concept_folders(workspace)


def test_shelf_of_a_damaged_workspace_says_so_and_goes_on(workspace: Workspace, tom: Path) -> None:
    (workspace.concepts / "odd").mkdir()
    (workspace.concepts / "worse").mkdir()
    (workspace.concepts / "worse" / "concept.yaml").write_text("name: [")
    workspace.adapters.mkdir()
    (workspace.adapters / "bad.safetensors").write_bytes(b"garbage")
    (workspace.adapters / "rex.state.safetensors").write_bytes(b"garbage")
    (workspace.adapters / LEDGER).write_text("{")
    shelf = look(workspace)
    problems = {card.folder: bool(card.problem) for card in shelf.cards}
    assert problems["odd"] and problems["worse"] and not problems["tom"] and not problems["rex"]
    assert len(shelf.problems) == 2 and str(workspace.root) not in shelf.problems[0]
    assert "bad.safetensors" in shelf.problems[0] and LEDGER in shelf.problems[1]
    assert shelf.first_run and 'data-name="tom"' in cards.cards(shelf, "tom")


def test_cards_escape_what_comes_from_files(workspace: Workspace, tom: Path) -> None:
    (tom / "concept.yaml").write_text('name: tom\nnoun: "<img src=x onerror=alert(1)>"\ntoken: <tom>\n')
    page = cards.cards(look(workspace))
    assert "<img src=x" not in page and "&lt;img src=x" in page and "&lt;tom&gt;" in page


# --- tokens and slots ----------------------------------------------------------------------------------------


def test_tokens_are_suggested_and_clashes_told(workspace: Workspace, tom: Path, photos: Path) -> None:
    suggest = concepts.suggest_token
    assert suggest(workspace, "max_2") == "<max-2>" and suggest(workspace, "tom") == "<tom-2>"
    assert suggest(workspace, "") == suggest(workspace, "../") == ""
    with pytest.raises(UserError, match="belongs to tom"):
        editing.add_concept(workspace, "tim", "cat", photos.iterdir(), "<tom>")
    with pytest.raises(UserError, match="must look like"):
        editing.add_concept(workspace, "tim", "cat", photos.iterdir(), "<a b>")
    (tom / "concept.yaml").write_text("name: tom\nnoun: cat\ntoken: <rex>\n")
    [problem] = look(workspace).problems
    assert "'tom'" in problem and "'rex'" in problem and "<rex>" in problem


def test_tokens_of_the_base_are_told(workspace: Workspace, tom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "<|endoftext|>" in concepts.pocket_tokens()
    for module in ("concepts", "overview", "editing"):
        monkeypatch.setattr(f"spectral_diffusion.app.{module}.pocket_tokens", lambda: frozenset({"<tom>"}))
    [problem] = look(workspace).problems
    assert "<tom>" in problem and "pocket base" in problem
    assert concepts.suggest_token(workspace, "tom") == "<tom-2>"


def test_strip_of_who_sits_where() -> None:
    slots = {"a": Slot.interval(0, 4), "b": Slot.interval(2, 6), "c": Slot.interval(-2, 0), "d": None}
    assert stretches(slots, 12) == [
        Stretch(0, 2, ("a",)),
        Stretch(2, 4, ("a", "b")),
        Stretch(4, 6, ("b",)),
        Stretch(6, 10, ()),
        Stretch(10, 12, ("c",)),
    ]


def test_strips_join_adapters_and_ledger() -> None:
    found = [label_of("a", Slot.interval(0, 8), capacity=320), label_of("x", None)]
    ledgers = {("b", "columns"): {"a": Slot.interval(0, 8), "kept": Slot.interval(8, 12)}}
    [strip] = strips(found, ledgers)
    assert (strip.base, strip.kind, strip.reserved) == ("pocket", "columns", {"kept"})
    assert strip.free == 320 - 12 and strip.beyond == 320 - 64 and strip.stretches[-1].stop == 64
    assert [run.owners for run in strip.stretches] == [("a",), ("kept",), ()]
    page = cards.strip(strip, {"a": "#123456"})
    assert "#123456" in page and "flex:52" in page and "308 free" in page
    assert len(strips(found, ledgers | {("other", "rows"): {"y": Slot.interval(0, 2)}})) == 2


def test_slot_clashes_are_told() -> None:
    a, b = label_of("a", Slot.interval(0, 8)), label_of("b", Slot.interval(4, 12))
    rows = label_of("c", Slot.interval(0, 8), kind="rows")
    known = {("b", "columns"): {"a": a.slot, "b": b.slot}, ("b", "rows"): {"c": rows.slot}}
    [words] = slot_clashes([a, b, rows], known)  # type: ignore[arg-type]
    assert "'a'" in words and "'b'" in words and "share 4 columns" in words
    [words] = slot_clashes([a], {("b", "columns"): {"a": Slot.interval(0, 8), "d": Slot.interval(6, 9)}})
    assert words.startswith("'d' has reserved the columns 6:9")
    [words] = slot_clashes([a], {})
    assert "came from elsewhere" in words


def test_adapters_find_their_concept() -> None:
    said = {"tom": ("tom", "cat", "<tom>"), "tim": ("old", "cat", "<jim>")}
    assert owner_of_adapter(label_of("tom", None), said) == "tom"
    assert owner_of_adapter(label_of("old", None), said) == "tim"  # by its name
    assert owner_of_adapter(label_of("jim", None), said) == "tim"  # by its token, after a renaming
    assert owner_of_adapter(label_of("ann", None), said) is None


def test_labels_agree_with_the_adapters_themselves(workspace: Workspace, tiny_base: Path, photos: Path) -> None:
    from spectral_diffusion.config.train import TrainConfig
    from spectral_diffusion.training.run import train_to_file

    output = workspace.adapters / "rex.safetensors"
    quick: dict[str, Any] = {
        "rank": 2,
        "steps": 1,
        "batch_size": 1,
        "crops_per_image": 1,
        "device": "cpu",
        "mixed_precision": "no",
    }
    one = train_to_file(TrainConfig(concept=photos, output=output, base=str(tiny_base), **quick))
    [label], problems = adapter_headers(workspace)
    assert not problems and (label.name, label.noun, label.token) == (one.name, one.noun, one.token)
    assert (label.slot, label.method, label.kind) == (one.slot, one.method.name, "columns")
    assert label.fingerprint == one.fingerprint.exact and label.base == tiny_base.name
    assert label.capacity == min(min(size) for size in one.sizes.values())
    shelf = look(workspace)
    assert not shelf.first_run and not shelf.problems and not shelf.notes
    assert next(card for card in shelf.cards if card.folder == "rex").adapters == [label]
    assert "columns 0:2" in cards.cards(shelf) and "rex" in cards.slot_map_html(shelf)
    output.write_bytes(output.read_bytes()[:-100])  # the file breaks under our feet
    assert adapter_headers(workspace)[0] == [] and "rex.safetensors" in adapter_headers(workspace)[1][0]


# --- the page ------------------------------------------------------------------------------------------------


def test_handlers_say_what_to_do(workspace: Workspace, photos: Path) -> None:
    gr = pytest.importorskip("gradio")
    from spectral_diffusion.app.page import Page
    from spectral_diffusion.app.tabs.concepts import ConceptHandlers
    from spectral_diffusion.app.tabs.concepts_layout import NOTHING

    nothing: Any = None
    handlers = ConceptHandlers(Page(workspace, *[nothing] * 9))
    guide, problems, shelf, slots, trash, _ = handlers.overview(None)
    assert not trash.visible
    assert guide.visible and not problems.visible and 'data-name="rex"' in shelf and "Free" in slots
    assert handlers.show(None)[0] == handlers.show("../x")[0] == NOTHING
    panel = handlers.show("rex")
    assert "`<rex>`" in panel[0] and panel[1].visible and panel[3].visible and len(panel[7]) == 8
    with pytest.raises(gr.Error, match="cannot be the name"):
        handlers.add("../x", "cat", [], "")
    words, name = handlers.add("tom", "cat", [str(path) for path in photos.iterdir()], "")
    assert (words, name) == ("Added 'tom'.", "tom")
    assert handlers.kind("thing").visible and handlers.kind("style").value == "style"
    handlers.add("ink", "style", [str(path) for path in photos.iterdir()], "")
    assert "`in <ink> style`" in handlers.show("ink")[0]
    assert handlers.suggest("tom", "", "") == ("<tom-2>", "<tom-2>") == handlers.suggest("Tom", "", "")
    assert handlers.suggest("tim", "<mine>", "<tom-2>") == ("<mine>", "<tim>")
    panel = handlers.show("tom")
    assert not panel[3].visible and panel[6].visible and panel[7] == ["001.png", "002.png", "003.png"]
    assert handlers.next_photo("tom", "003.png", panel[7])[0] == "001.png"
    assert handlers.to_training("tom")[0][0] == "tom"
    with pytest.raises(gr.Error, match="No concept is chosen"):
        handlers.to_training(None)
    bad = photos / "bad.png"
    bad.write_bytes(b"x")
    gallery, told = handlers.preview([str(bad), str(photos / "0.png")])
    assert gallery.visible and "**1 photo**" in told and "bad.png is not a readable image: left out" in told
    assert handlers.delete("tom", False)[0] is None and not (workspace.concepts / "tom").exists()
    *_, trash, line = handlers.overview(None)
    assert trash.visible and line.startswith("Trash: 1 deletion, 1 MB.")
    asking, line = handlers.empty_trash()
    assert not asking.visible and line.startswith("Emptied the trash: 1 deletion, ") and not visible(workspace.trash)
    *_, trash, again = handlers.overview(None)
    assert not trash.visible and again == ""  # the sentence was for the one who emptied it


def test_add_concept_endpoint(workspace: Workspace, photos: Path) -> None:
    gr = pytest.importorskip("gradio")
    from gradio_client import handle_file

    from spectral_diffusion.app.page import Page
    from spectral_diffusion.app.tabs import concepts as tab_of_concepts

    with gr.Blocks(analytics_enabled=False) as blocks:
        states = [gr.State(None) for _ in range(4)]
        with gr.Tabs() as tabs, gr.Tab("Concepts", id="concepts") as tab:
            tab_of_concepts.build(
                Page(workspace, blocks, tabs, gr.HTML(), gr.Timer(active=False), gr.State({}), *states), tab
            )
    _, url, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        client = client_of(url)
        assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/add_concept"]
        uploads = [handle_file(photos / "0.png"), handle_file(photos / "1.png")]
        assert client.predict("tom", "cat", uploads, api_name="/add_concept") == "Added 'tom'."
        with pytest.raises(Exception, match="'tom' is taken already"):
            client.predict("tom", "cat", uploads, api_name="/add_concept")
    finally:
        blocks.close()
    assert concepts.about(workspace.concepts / "tom") == ("tom", "cat", "<tom>")
