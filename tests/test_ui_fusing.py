"""The fuse tab's controller: what is told before, the fusion, the comparison, taking out, downloads."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_photos
from safetensors import SafetensorError
from safetensors.torch import load_file

from spectral_diffusion import pocket
from spectral_diffusion.adapters.formats.import_lora import import_lora
from spectral_diffusion.app import bases, comparing, downloads, fusing, speeds
from spectral_diffusion.app.adapters import read_adapter
from spectral_diffusion.app.sentences import errors_in_app, in_app
from spectral_diffusion.app.streaming import cancellable
from spectral_diffusion.app.workspace import Workspace
from spectral_diffusion.config.fuse import CalibrationConfig, DistillConfig, FuseConfig
from spectral_diffusion.config.settings import read_yaml
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.assets import preset
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.inspection import inspect_paths
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.manifest import MANIFEST
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.training.run import train_to_file


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the tiny base, in slots of their own."""
    folder = tmp_path_factory.mktemp("trained")
    for index, name in enumerate(("rex", "mug")):
        train_to_file(
            TrainConfig(
                concept=make_photos(folder / "photos" / name, seed=index), output=folder / f"{name}.safetensors",
                base=str(tiny_base), rank=2, steps=2, device="cpu", learning_rate=0.1,
            )
        )  # fmt: skip
    return folder


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Workspace:
    place = Workspace(tmp_path / "workspace")
    place.adapters.mkdir(parents=True)
    for name in ("rex", "mug"):
        (place.adapters / f"{name}.safetensors").write_bytes((trained / f"{name}.safetensors").read_bytes())
    return place


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow above 20 kB, which the system enforces."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _full(*args: Any) -> None:
    raise OSError(28, "No space left on device")


BOTH = {"rex": 1.0, "mug": 0.5}


def test_what_is_told_before(workspace: Workspace) -> None:
    found = comparing.together(workspace, ["rex", "mug"], BOTH)
    assert [(row.concept, row.columns) for row in found.rows] == [("rex", "0:2"), ("mug", "2:4")] and not found.warnings
    cosines = inspect_paths([workspace.adapters / "rex.safetensors", workspace.adapters / "mug.safetensors"])["cosines"]
    expected = float(cosines["rex · mug"])
    for row, other in zip(found.rows, ("mug", "rex"), strict=True):
        name, number = row.neighbour.split(", ")
        assert name == other and float(number) == pytest.approx(expected, abs=0.006)
    more = comparing.together(workspace, ["rex", "mug"], {"rex": 1.0, "mug": 1.0})
    share = [float(one.rows[0].disturbed.partition("%")[0]) for one in (found, more)]
    assert share[1] > share[0]  # a stronger neighbour acts more
    [alone] = comparing.together(workspace, ["rex"], {}).rows
    assert "choose a second" in alone.sentence
    assert [comparing._sentence(share).split(":")[0] for share in (0.0, 0.2, 0.9, 3.0)] == [
        "keeps its looks", "keeps most of its looks", "loses some of its looks", "is at risk"
    ]  # fmt: skip
    assert (alone.disturbed, alone.neighbour) == ("–", "–") and comparing.together(workspace, [], {}).rows == []


def test_of_three_the_most_alike_is_the_neighbour(workspace: Workspace) -> None:
    (workspace.adapters / "rex2.safetensors").write_bytes((workspace.adapters / "rex.safetensors").read_bytes())
    found = comparing.together(workspace, ["mug", "rex", "rex2"], {})
    assert [row.neighbour for row in found.rows[1:]] == ["rex2, 1.00", "rex, 1.00"]
    assert any("share" in warning for warning in found.warnings) and not any("=" in one for one in found.warnings)


def test_one_unreadable_adapter_hides_no_other(workspace: Workspace) -> None:
    (workspace.adapters / "bad.safetensors").write_bytes(b"garbage")
    assert not comparing.together(workspace, ["rex", "mug"], BOTH).warnings  # nobody asked for it
    found = comparing.together(workspace, ["rex", "bad", "mug", "gone"], BOTH)
    assert found.rows == comparing.together(workspace, ["rex", "mug"], BOTH).rows
    assert [warning.split()[0] for warning in found.warnings] == ["adapters/bad.safetensors", "No"]
    with pytest.raises(UserError, match=r"^adapters/bad\.safetensors"):
        fusing.fuse_chosen(workspace, ["rex", "bad"], "pair", {})


@pytest.mark.parametrize("merge", ["spectral", "fedavg", "ties"])
def test_fuse_and_take_out_again(workspace: Workspace, merge: str, tmp_path: Path) -> None:
    message = fusing.fuse_chosen(workspace, ["rex", "mug"], "pair", BOTH, merge=merge)
    assert "Saved 'pair'" in message and bases.base_choices(workspace) == [*pocket.BASES, "fused/pair"]
    [saved] = fusing.fusions(workspace)
    assert (saved.name, dict(saved.concepts), saved.merge) == ("pair", {"mug": 0.5, "rex": 1.0}, merge)
    fusing.take_out(workspace, "pair", "mug", "rest")
    fresh = FuseConfig(adapters=[workspace.adapters / "rex.safetensors"], output=tmp_path / "fresh", merge=merge)
    fuse_to_folder(fresh)
    one, other = load_base(str(workspace.fused / "rest"), "cpu"), load_base(str(tmp_path / "fresh"), "cpu")
    assert one.fingerprint == other.fingerprint


def test_a_fusion_is_distilled_if_asked_and_stops_when_asked(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"distill": {"num_images": 2, "num_prior_images": 2, "noises_per_image": 2, "batch_size": 4}}
    monkeypatch.setattr(fusing, "preset_part", lambda name, verb: few)
    seen: list[Event] = []
    fusing.fuse_chosen(workspace, ["rex", "mug"], "clever", BOTH, Hooks(progress=seen.append), distill_steps=2)
    assert {"teacher images", "distill"} <= {event.stage for event in seen}
    [saved] = fusing.fusions(workspace)
    assert (saved.distill_steps, saved.merge, saved.problem) == (2, "spectral", "")

    stop = threading.Event()

    def watched(event: Event) -> None:
        if event.stage == "distill":
            stop.set()

    with pytest.raises(UserError, match="nothing was saved"):
        fusing.fuse_chosen(
            workspace,
            ["rex", "mug"],
            "dull",
            BOTH,
            Hooks(progress=cancellable(stop, watched, "Stopped; nothing was saved.")),
            distill_steps=9,
        )
    assert bases.fused_names(workspace) == ["clever"]


def test_the_page_fuses_as_the_command_line_does(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted(**changes: Any) -> FuseConfig:
        return fusing.fuse_settings(workspace, ["rex", "mug"], workspace.fused / "pair", {}, **changes)

    large = read_yaml(preset("sd15-12gb"))["fuse"]["distill"]
    assert (
        wanted().distill == DistillConfig(**large) and wanted(distill_steps=300, prior_weight=2.0).distill.steps == 300
    )
    monkeypatch.setattr(
        fusing, "read_adapter", lambda workspace, name: replace(read_adapter(workspace, name), base="pocket")
    )
    [pocket, distilled] = [read_yaml(preset(name))["fuse"] for name in ("pocket", "pocket-distilled")]
    assert wanted(distill_steps=300).distill == DistillConfig(**pocket["distill"], steps=300)
    untouched = pytest.importorskip("spectral_diffusion.app.tabs.fuse").changes_for("gradient", 0, "", None)
    assert wanted(**untouched).calibration == CalibrationConfig(**pocket["calibration"])
    whole = wanted(preset="pocket-distilled")
    assert whole.distill == DistillConfig(**distilled["distill"]) and whole.merge == distilled["merge"]
    assert whole.calibration == CalibrationConfig(**distilled["calibration"])
    monkeypatch.undo()
    with pytest.raises(UserError, match="only on the pocket base"):
        wanted(preset="pocket-distilled")
    monkeypatch.setattr(fusing, "preset_of_base", lambda workspace, base: "sdxl-12gb")
    assert wanted().dtype == read_yaml(preset("sdxl-12gb"))["fuse"]["dtype"] == "float16"


def test_while_one_runs_the_other_waits(workspace: Workspace) -> None:
    pytest.importorskip("gradio")
    from spectral_diffusion.app.page import Page
    from spectral_diffusion.app.tabs.fuse import FuseHandlers, changes_for, ready
    from spectral_diffusion.app.tabs.fuse_layout import DISTILLATION, WHOLE

    nothing: Any = None
    tickets: dict[Any, str] = {}
    handlers, visitor = FuseHandlers(Page(workspace, *[nothing] * 9)), SimpleNamespace(session_hash="me")
    for begin, runs in ((handlers.begin_compare, handlers.compares), (handlers.begin_save, handlers.saves)):
        compare, save, stop, tickets[runs] = begin(visitor)
        assert not compare.interactive and not save.interactive and stop.visible
        event = runs.take(tickets[runs])
        handlers.left(visitor)
        assert event.is_set() == (runs is handlers.compares)  # what is to be saved is saved all the same
        assert "value" not in handlers.stop(visitor)[-1]  # it says itself how it ended
        assert event.is_set()
    compare, save, stop = ready(True)
    assert compare.interactive and save.interactive and not stop.visible
    assert not handlers.done("", visitor)[0].interactive  # both have been asked for and neither has ended
    for runs, ticket in tickets.items():
        assert runs.busy("me")
        updates = handlers.done(ticket, visitor)
    assert updates[0].interactive
    *_, ticket = handlers.begin_save(visitor)  # and now it is stopped before its turn
    compare, save, stop, line = handlers.stop(visitor)
    assert save.interactive and not stop.visible and "while it waited" in line
    assert all("value" not in update for update in handlers.save(ticket, "x", False, ["rex"], {}, "", 0, "", 1.0, 0))
    assert not workspace.fused.exists()
    assert WHOLE in DISTILLATION.values() and changes_for("ties", WHOLE, "", 1.0) == {"preset": WHOLE}
    changes = changes_for("ties", 300, "density=0.3", 1.0)
    assert fusing.fuse_settings(workspace, ["rex"], Path("x"), {}, **changes).options == {"density": 0.3}
    assert [one["interactive"] for one in handlers.about_distillation(WHOLE)[1:]] == [False, False]


def test_taking_out_and_fusions_of_programs_are_stopped(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    from spectral_diffusion.app.page import Page
    from spectral_diffusion.app.tabs.fuse import FuseHandlers

    nothing: Any = None
    handlers, visitor = FuseHandlers(Page(workspace, *[nothing] * 9)), SimpleNamespace(session_hash="me")
    fusing.fuse_chosen(workspace, ["rex", "mug"], "pair", BOTH)
    take, stop, ticket = handlers.begin_taking(visitor)
    assert not take.interactive and stop.visible
    take, stop, line = handlers.stop_taking(visitor)
    assert take.interactive and not stop.visible and "while it waited" in line
    assert all("value" not in update for update in handlers.take_out(ticket, "pair", "mug", "rest"))

    def at_work(name: str, work: Any, press: Any) -> None:
        """Press Stop as soon as the base is loaded."""
        monkeypatch.setattr(name, lambda *given, **more: press() and work(*given, **more))

    *_, ticket = handlers.begin_taking(visitor)
    from spectral_diffusion.merging import fuse, unfuse

    at_work(f"{unfuse.__name__}.load_base", load_base, lambda: handlers.stop_taking(visitor))
    with pytest.raises(Exception, match="Stopped; nothing was saved"):
        handlers.take_out(ticket, "pair", "mug", "rest", lambda *given, **more: None)  # type: ignore[arg-type]
    assert handlers.taking_done(ticket, visitor)[0].interactive
    assert handlers.cancel_for_program(visitor) == "Nothing was being fused."
    at_work(f"{fuse.__name__}.load_base", load_base, lambda: handlers.cancel_for_program(visitor) == "Stopping.")
    with pytest.raises(Exception, match="Stopped; nothing was saved"):
        handlers.fuse(["rex", "mug"], "other", request=visitor)
    assert not handlers.saves.busy("me") and bases.fused_names(workspace) == ["pair"]


def test_before_and_after_of_every_concept(workspace: Workspace) -> None:
    before = set(workspace.root.rglob("*"))
    found = comparing.compare(workspace, ["rex", "mug"], {"rex": 0.0, "mug": 1.0}, seed=3)
    assert [words for _, words in found] == ["rex alone", "rex in the fusion", "mug alone", "mug in the fusion"]
    pictures = [image.tobytes() for image, _ in found]
    sheet = comparing.sheet_of(found)
    assert sheet.width > 2 * found[0][0].width and sheet.height > 2 * found[0][0].height
    assert pictures[0] != pictures[1] and pictures[0] != pictures[2]  # at strength 0 nothing of rex is left
    assert "before and after" in fusing.estimate(workspace, ["rex", "mug"])  # it was measured
    again = comparing.compare(workspace, ["rex", "mug"], {"rex": 0.0, "mug": 1.0}, seed=3)
    assert [image.tobytes() for image, _ in again] == pictures
    assert set(workspace.root.rglob("*")) == before | {workspace.root / speeds.FILE}


def test_downloads_are_read_by_others(workspace: Workspace, tiny_base: Path, tmp_path: Path) -> None:
    fusing.fuse_chosen(workspace, ["rex", "mug"], "pair", BOTH)
    packed, notes = downloads.download(workspace, "pair", "kohya")
    assert not notes and list(packed.parent.iterdir()) == [packed]
    assert workspace.pictures in packed.parents
    with zipfile.ZipFile(packed) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "out")
    assert "pair.safetensors" in names and any(name.endswith(".md") for name in names)
    adapter = import_lora(tmp_path / "out" / "pair.safetensors", None, str(tiny_base), device="cpu")
    assert len(adapter.layers) > 0 and all(torch.isfinite(value).all() for value in adapter.parameters.values())
    words = [load_file(tmp_path / "out" / name) for name in names if "rex" in name and name != "pair.safetensors"]
    assert any("<rex>" in held for held in words)
    fusing.delete_fusion(workspace, "pair")
    assert not packed.exists()


def test_whole_weights_go_out_as_a_checkpoint_only(workspace: Workspace) -> None:
    fusing.fuse_chosen(workspace, ["rex", "mug"], "pair", BOTH, merge="ties")
    for kind in ("kohya", "comfyui", "diffusers"):
        with pytest.raises(UserError, match="which no LoRA holds; choose the checkpoint"):
            downloads.download(workspace, "pair", kind)
    packed, _ = downloads.download(workspace, "pair", "checkpoint")
    with zipfile.ZipFile(packed) as archive:
        assert archive.getinfo("pair.safetensors").file_size > 100_000


def test_a_full_rank_method_is_cut_with_the_error_told(workspace: Workspace, tiny_base: Path, photos: Path) -> None:
    output = workspace.adapters / "full.safetensors"
    train_to_file(
        TrainConfig(
            concept=photos,
            name="full",
            class_noun="dog",
            output=output,
            base=str(tiny_base),
            method="oft",
            rank=2,
            steps=2,
            device="cpu",
        )
    )
    fusing.fuse_chosen(workspace, ["full"], "one", {})
    _, notes = downloads.download(workspace, "one", "kohya")
    assert "only comes near it" in notes[0] and "% away from the exact change" in notes[1]
    [row] = comparing.together(workspace, ["full"], {}).rows
    assert row.disturbed == row.neighbour == "–"


def test_a_taken_name_is_replaced_only_on_demand(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    fusing.fuse_chosen(workspace, ["rex", "mug"], "pair", BOTH)
    before = load_base(str(workspace.fused / "pair"), "cpu").fingerprint
    recipe = (workspace.fused / "pair" / MANIFEST).read_bytes()
    with pytest.raises(UserError, match="already; choose another name, or tick"):
        fusing.fuse_chosen(workspace, ["rex"], "pair", {})
    with pytest.raises(UserError, match="No adapter 'gone'"):
        fusing.fuse_chosen(workspace, ["gone"], "pair", {}, replace=True)
    assert (workspace.fused / "pair" / MANIFEST).read_bytes() == recipe and not list(workspace.trash.glob("*"))
    monkeypatch.setattr("spectral_diffusion.app.trash.os.link", _full)  # a disk without second names
    fusing.fuse_chosen(workspace, ["rex"], "pair", {}, replace=True)
    [kept] = workspace.trash.glob("*/pair")
    assert (kept / MANIFEST).read_bytes() == recipe and load_base(str(kept), "cpu").fingerprint == before
    assert fusing.concepts_in(workspace, "pair") == ["rex"]


def test_a_failed_replacement_leaves_all_as_it_was(workspace: Workspace, small_disk: None) -> None:
    place = workspace.fused / "pair"
    place.mkdir(parents=True)
    (place / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"Cannot write to the workspace's folder fused: File too large.*; free some"):
        fusing.fuse_chosen(workspace, ["rex", "mug"], "pair", BOTH, replace=True)
    assert [path.name for path in workspace.fused.rglob("*")] == ["pair", MANIFEST]
    assert not list(workspace.trash.iterdir())


def test_a_full_disk_is_a_sentence(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    fusing.fuse_chosen(workspace, ["rex", "mug"], "pair", BOTH)
    monkeypatch.setattr("spectral_diffusion.core.files.os.fsync", _full)
    for folder, call in (
        ("fused", lambda: fusing.take_out(workspace, "pair", "mug", "rest")),
        ("pictures", lambda: downloads.download(workspace, "pair", "kohya")),
    ):
        with pytest.raises(UserError, match=f"folder {folder}: No space left on device; free some space there"):
            call()
    assert bases.fused_names(workspace) == ["pair"]
    assert [path for path in workspace.pictures.rglob("*") if path.is_file()] == []


def test_a_failed_write_names_its_folder_and_what_to_do(workspace: Workspace) -> None:
    denied = SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")
    sentence = r"folder fused: .*Permission denied.*; give this user the right to write there"
    with pytest.raises(UserError, match=sentence), errors_in_app(workspace, "fused"):
        raise denied
    fusing.fuse_chosen(workspace, ["rex", "mug"], "pair", BOTH)
    workspace.trash.write_bytes(b"a file where the trash belongs")
    with pytest.raises(UserError, match=r"folder \.trash: File exists"):
        fusing.fuse_chosen(workspace, ["rex", "mug"], "pair", BOTH, replace=True)


def test_sentences_show_no_paths_and_no_options(workspace: Workspace, tmp_path: Path) -> None:
    for said, wanted in {
        f"{workspace.root}/fused/pair exists.": "fused/pair exists.",
        "Adapter 'rex' does not fit the base '/my models/sd': trained on 'x' (fingerprint ab).": (
            "Adapter 'rex' does not fit the base 'sd': trained on 'x' (fingerprint ab)."
        ),
        "No such file: /home/ann/a.safetensors.": "No such file: a.safetensors.",
        "Fine: a/b, 1/2, </s>, https://x.org/y and - or _.": "Fine: a/b, 1/2, </s>, https://x.org/y and - or _.",
    }.items():
        assert in_app(said, workspace) == wanted
    fusing.fuse_chosen(workspace, ["rex", "mug"], "pair", BOTH)
    recipe = workspace.fused / "pair" / MANIFEST
    held = json.loads(recipe.read_text())
    recipe.write_text(json.dumps(held | {"base": str(tmp_path / "gone" / "base")}))
    (workspace.fused / "other").mkdir()
    calls = {
        "No base 'base'.*needed to fuse the rest anew": lambda: fusing.take_out(workspace, "pair", "mug", "rest"),
        "^fused/other exists and .*Choose another name": lambda: fusing.fuse_chosen(workspace, ["rex"], "other", {}),
        "which is not positive. Change the strengths": lambda: fusing.fuse_chosen(
            workspace, ["rex"], "none", {"rex": -1.0}, merge="fedavg"
        ),
    }
    for sentence, call in calls.items():
        with pytest.raises(UserError, match=sentence) as caught:
            call()
        said = str(caught.value)
        assert str(tmp_path) not in said and " -" not in said and "=" not in said


def test_pages_wait_for_no_torch() -> None:
    pytest.importorskip("gradio")
    modules = ", ".join(f"spectral_diffusion.app.{name}" for name in ("fusing", "comparing", "downloads", "tabs.fuse"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0
    assert bases.MANIFEST == MANIFEST and {"gradient", "ties"} <= fusing.merge_summaries().keys()


def test_bad_wishes_and_damaged_files_are_sentences(workspace: Workspace) -> None:
    for message, call in (
        ("No concepts are chosen", lambda: fusing.fuse_chosen(workspace, [], "", {})),
        ("No concepts are chosen", lambda: comparing.compare(workspace, None, {})),
        ("cannot be the name", lambda: fusing.fuse_chosen(workspace, ["rex"], "../x", {})),
        ("No adapter 'rx'.*did you mean 'rex'", lambda: fusing.fuse_chosen(workspace, ["rx"], "pair", {})),
        ("Unknown merge", lambda: fusing.fuse_chosen(workspace, ["rex"], "pair", {}, merge="magic")),
        ("No fused folder", lambda: fusing.take_out(workspace, "../x", "rex", "rest")),
        ("No fused folder", lambda: downloads.download(workspace, "pair", "kohya")),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert not workspace.fused.exists()
    fusing.fuse_chosen(workspace, ["rex", "mug"], "pair", BOTH)
    with pytest.raises(UserError, match="choose another name"):
        fusing.take_out(workspace, "pair", "mug", "pair")
    fusing.fuse_chosen(workspace, ["rex"], "one", {})
    with pytest.raises(UserError, match="all that 'one' holds; delete the fusion instead"):
        fusing.take_out(workspace, "one", "rex", "rest")
    fusing.delete_fusion(workspace, "one")
    with pytest.raises(UserError, match="No format"):
        downloads.download(workspace, "pair", "pickle")
    recipe = workspace.fused / "pair" / "manifest.json"
    endless = json.loads(recipe.read_text())
    endless["settings"]["distill"]["steps"] = math.inf
    for damaged in ("{", json.dumps(endless)):
        recipe.write_text(damaged)
        [broken] = fusing.fusions(workspace)
        assert broken.problem == "fused/pair/manifest.json is damaged; fuse the adapters again."
    assert "Deleted" in fusing.delete_fusion(workspace, "pair") and not fusing.fusions(workspace)
    assert list(workspace.trash.rglob("manifest.json"))  # nothing is lost


def test_strengths() -> None:
    parse = fusing.parse_strengths
    assert parse("", ["a", "b"]) == {"a": 1.0, "b": 1.0}
    assert parse("0.5", ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert parse("a = 0.5; b=-1", ["a", "b"]) == {"a": 0.5, "b": -1.0}
    assert parse("my dog = 0.5, dog=2 0.25", ["cat", "dog", "my dog"]) == {"cat": 0.25, "dog": 0.25, "my dog": 0.25}
    assert parse("my dog = 0.5, dog=2", ["dog", "my dog"]) == {"dog": 2.0, "my dog": 0.5}
    for text, sentence in {"rx=1": "did you mean 'rex'", "rex=x": "not a number", "nan": "not a number"}.items():
        with pytest.raises(UserError, match=sentence):
            parse(text, ["rex"])
