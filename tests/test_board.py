"""The board: entries of every kind on the same tasks, from their file to the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_photos
from families import make_tiny_klein, make_tiny_sdxl
from typer.testing import CliRunner

from spectral_diffusion.board.contestant import Contestant
from spectral_diffusion.board.entry import PEFT_KINDS, STOCK, BoardEntry, read_entry
from spectral_diffusion.board.measure import Board, halves, pairs_of, row_of
from spectral_diffusion.board.painters import Shot
from spectral_diffusion.board.suite import BoardSuite, read_suite
from spectral_diffusion.cli import app
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.data.image_io import open_photo
from spectral_diffusion.merging.export import export
from spectral_diffusion.studies.runner import EVERY, StudyRunner, study_settings

TINY = {
    "name": "tiny", "concepts": ["rex", "brew", "inky"], "counts": [2], "prompts": ["a photo of {}"],
    "generic": ["a red dog"], "pairs": ["{left} on the left and {right} on the right"], "pair_size": [128, 64],
    "train": {"base": "pocket", "steps": 2, "batch_size": 1, "rank": 2, "crops_per_image": 1, "learning_rate": 0.05},
    "generate": {"base": "pocket", "num_inference_steps": 1, "guidance_scale": 2.0, "mixed_precision": "no"},
}  # fmt: skip
PROGRAM = """
import json, pathlib, sys
from PIL import Image
job = pathlib.Path(sys.argv[1])
tasks = json.loads(job.read_text())
assert {"name", "token", "noun", "photos"} <= set(tasks["concepts"][0]) and tasks["num_inference_steps"] == 1
for picture in tasks["pictures"][: %s]:
    image = Image.new("RGB", (picture["width"], picture["height"]), "red")
    for concept in tasks["concepts"]:
        if concept["token"] in picture["prompt"]:
            photo = Image.open(pathlib.Path(concept["photos"]) / "1.png")
            side = picture["height"]
            left = 0 if picture["prompt"].startswith(("a photo", concept["token"])) else side
            image.paste(photo.resize((side, side)), (left, 0))
    image.save(job.parent / picture["file"])
"""


@pytest.fixture(scope="module")
def suite() -> BoardSuite:
    return BoardSuite(**TINY)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lab(suite: BoardSuite, tmp_path_factory: pytest.TempPathFactory) -> StudyRunner:
    settings = {"train": suite.train, "generate": suite.generate}
    return StudyRunner(folder=tmp_path_factory.mktemp("lab"), settings=settings)


def shots(contestant: Contestant, names: list[str]) -> list[Shot]:
    return [Shot(f"a photo of {word}", 3, 128, 128) for word in contestant.words(names).values()]


def pixels(contestant: Contestant, names: list[str]) -> torch.Tensor:
    import numpy as np

    images = contestant.together(names).paint(shots(contestant, names))
    return torch.stack([torch.from_numpy(np.array(image)).float() for image in images])


def test_the_shipped_suite_and_entries_are_whole() -> None:
    suite = read_suite("pocket")
    assert tuple(suite.concepts) == EVERY and suite.counts == [2, 4, 8, 16, 32]
    study = study_settings("pocket")
    assert suite.train == study["train"] and suite.generate == study["generate"]
    entries = [read_entry(path) for path in sorted(Path("docs/board/entries").glob("*.yaml"))]
    assert len({entry.slug for entry in entries}) == len(entries)
    merges = {entry.merge for entry in entries}
    assert {
        "stock:set_adapters",
        "stock:key-by-key",
        "stock:ties",
        "stock:dare_linear",
        "stock:cat",
        "stock:svd",
    } <= merges
    assert any(entry.joint for entry in entries) and any(entry.distill.steps for entry in entries)


def test_sums_of_diffusers_and_peft_and_ours_are_one_picture(suite: BoardSuite, lab: StudyRunner) -> None:
    """The same adapters by set_adapters, by PEFT's cat and by our sum: the same changes, so the same pixels."""
    names = ["rex", "brew"]
    made = {
        merge: pixels(Contestant(BoardEntry(name=merge, train={"method": "lora"}, merge=merge), suite, lab), names)
        for merge in ("spectral", "stock:set_adapters", "stock:cat", "stock:key-by-key")
    }
    for merge in ("stock:set_adapters", "stock:cat"):
        assert (made[merge] - made["spectral"]).abs().max() <= 2
    assert (made["stock:key-by-key"] - made["spectral"]).abs().max() > 2  # it has the concepts' products in it


@pytest.mark.parametrize("merge", [f"stock:{kind}" for kind in PEFT_KINDS if kind != "cat"])
def test_every_stock_merge_paints(merge: str, suite: BoardSuite, lab: StudyRunner) -> None:
    contestant = Contestant(BoardEntry(name=merge, train={"method": "lora"}, merge=merge), suite, lab)
    painter = contestant.together(["rex", "brew"])
    [image] = painter.paint(shots(contestant, ["rex"]))
    assert image.size == (128, 128) and painter.size > 0 and painter.seconds >= 0
    assert merge in STOCK


def test_files_of_other_programs_are_entered_as_they_are(suite: BoardSuite, lab: StudyRunner, tmp_path: Path) -> None:
    """kohya files with textual-inversion files beside them make the pictures of the adapters they came from."""
    own = Contestant(BoardEntry(name="own", train={"method": "lora"}), suite, lab)
    for name in ("rex", "brew"):
        own.adapter(name)
        written = export(lab.adapter_path(name, **own.training(name)), tmp_path / f"{name}.safetensors", "kohya")
        written[1].rename(tmp_path / f"{name}.word.safetensors")
    file = tmp_path / "kohya.yaml"
    file.write_text('name: kohya\nadapters: "{concept}.safetensors"\nembeddings: "{concept}.word.safetensors"\n')
    theirs = Contestant(read_entry(file), suite, lab)
    assert (pixels(own, ["rex", "brew"]) - pixels(theirs, ["rex", "brew"])).abs().mean() < 1
    stock = read_entry(file).model_copy(update={"merge": "stock:set_adapters"})
    stock._folder = tmp_path
    assert (pixels(own, ["rex", "brew"]) - pixels(Contestant(stock, suite, lab), ["rex", "brew"])).abs().mean() < 1


def test_a_run_from_entries_to_the_page_and_again(tmp_path: Path) -> None:
    """A program that pastes the photos is right everywhere; one command runs only if it is allowed to."""
    (tmp_path / "program.py").write_text(PROGRAM % "None")
    entries = {
        "photos.yaml": {"name": "Photos", "command": [sys.executable, str(tmp_path / "program.py"), "{job}"]},
        "sum.yaml": {"name": "A sum", "train": {"method": "lora"}, "notes": "As it is.", "url": "https://example.org"},
        "joint.yaml": {"name": "Joint", "train": {"method": "lora"}, "joint": True},
    }
    for name, entry in entries.items():
        (tmp_path / name).write_text(yaml.safe_dump(entry))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    words = [
        "board",
        "run",
        "--suite",
        str(tmp_path / "tiny.yaml"),
        "-o",
        str(tmp_path / "out"),
        "--work",
        str(tmp_path / "w"),
    ]
    words += [word for name in entries for word in ("--entry", str(tmp_path / name))]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 1 and "run_commands=true" in str(refused.exception) and not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*words, "--run-commands"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "README.md").read_text()
    assert "## 2 concepts" in page and "| Photos |" in page and "| A sum |" in page and "Subject Collapse Rate" in page
    assert str(tmp_path) not in page.replace(str(tmp_path / "program.py"), "").replace(sys.executable, "")
    result = json.loads((tmp_path / "out" / "results" / "photos.json").read_text())
    row = row_of(result["figures"]["2"])
    assert (
        row["right concept"].startswith("1.00")
        and row["collapse rate"].startswith("0.00")
        and row["kept"].startswith("1.00")
    )
    assert (tmp_path / "out" / "results" / "a-sum.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*") if path.is_file()}
    again = CliRunner().invoke(app, [*words, "--run-commands"])
    assert again.exit_code == 0 and before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("name", ["klein", "sdxl"])
def test_the_suites_of_large_bases_on_tiny_ones(name: str, tmp_path: Path) -> None:
    """Their settings, with fewer steps, from photo folders that say no noun to a page; DINOv2 of one layer judges."""
    base = {"klein": make_tiny_klein, "sdxl": make_tiny_sdxl}[name](tmp_path / "base")
    settings = yaml.safe_load((Path("configs/board") / f"{name}.yaml").read_text())
    assert len(settings["concepts"]) == 32 == len(settings["nouns"]) and settings["encoder"] == "facebook/dinov2-base"
    small = {
        **settings, "concepts": settings["concepts"][:2], "counts": [2], "base": str(base), "pair_size": [64, 32],
        "encoder": "pocket", "prompts": ["a photo of {}"], "generic": ["a red dog"], "loading": {"dtype": "float32"},
        "pairs": ["{left} and {right}"],
        "train": {**settings["train"], "base": str(base), "steps": 2, "rank": 2, "resolution": 32, "dtype": "float32"},
        "generate": {**settings["generate"], "base": str(base), "num_inference_steps": 1, "dtype": "float32"},
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(small))
    for concept in small["concepts"]:
        make_photos(tmp_path / "photos" / concept)
    words = ["board", "run", "--suite", str(tmp_path / "suite.yaml"), "--concepts", str(tmp_path / "photos")]
    words += ["-o", str(tmp_path / "out"), "--work", str(tmp_path / "w")]
    for merge in ("spectral", "stock:set_adapters", "stock:ties"):
        entry = tmp_path / f"{merge.replace(':', '-')}.yaml"
        entry.write_text(yaml.safe_dump({"name": merge, "train": {"method": "lora"}, "merge": merge}))
        words += ["--entry", str(entry)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "README.md").read_text()
    assert f"# Board: {name}" in page and page.count("| stock:ties |") == 1


def test_a_program_that_fails_is_one_sentence(suite: BoardSuite, lab: StudyRunner, tmp_path: Path) -> None:
    def painted(program: str) -> None:
        (tmp_path / "program.py").write_text(program)
        command = [sys.executable, str(tmp_path / "program.py"), "{job}"]
        contestant = Contestant(BoardEntry(name="it", command=command), suite, lab, allow_commands=True)
        contestant.together(["rex"]).paint(shots(contestant, ["rex"]))

    with pytest.raises(UserError, match=r"failed \(3\).*no weights"):
        painted("import sys; print('no weights', file=sys.stderr); sys.exit(3)")
    with pytest.raises(UserError, match=r"made no 00000\.png"):
        painted(PROGRAM % "0")
    with pytest.raises(UserError, match="could not run"):
        BoardEntry(name="x", command=["/no/such", "{job}"])
        gone = Contestant(BoardEntry(name="x", command=["/no/such", "{job}"]), suite, lab, allow_commands=True)
        gone.together(["rex"]).paint(shots(gone, ["rex"]))


@pytest.mark.parametrize(
    "text, words",
    [
        ("name: x", "exactly one of"),
        ("name: x\ntrain: {}\ncommand: [a, '{job}']", "exactly one of"),
        ("name: x\nadapters: a.safetensors", r"\{concept\}"),
        ("name: x\ncommand: [a]", r"\{job\}"),
        ("name: x\ntrain: {}\nmerge: stock:tie", "stock:ties"),
        ("name: x\nadapters: '{concept}.safetensors'\njoint: true", "joint"),
        ("name: '…'\ntrain: {}", "no letter"),
        ("name: x\ntrain: {}\nnotsuch: 1", "notsuch"),
    ],
)
def test_a_wrong_entry_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "entry.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_entry(tmp_path / "entry.yaml")


def test_wrong_suites_are_one_sentence(tmp_path: Path) -> None:
    for change, words in (
        ({"counts": [1]}, "counts has 1"),
        ({"counts": [4]}, "do not fit together: counts has 4, but there are 3"),
        ({"concepts": ["rex", "rex"]}, "names one twice"),
        ({"pairs": ["two dogs"]}, "left"),
        ({"concepts": ["rex", "nobody"]}, "no folder 'nobody'"),
    ):
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**TINY, **change}))
        with pytest.raises(UserError, match=words):
            read_suite(str(tmp_path / "suite.yaml"))
    with pytest.raises(UserError, match=r"No suite 'pokket'.*pocket"):
        read_suite("pokket")


def test_pairs_are_neighbours_and_halves_their_places(suite: BoardSuite, lab: StudyRunner, tmp_path: Path) -> None:
    words = {name: f"<{name}>" for name in EVERY[:5]}
    assert list(pairs_of(suite, words)) == [("rex", "fido"), ("brew", "posy")]
    photo = open_photo(Path("concepts/rex/1.png"))
    wide = photo.resize((256, 128))
    wide.paste(photo, (0, 0))
    assert halves(wide)[0].tobytes() == photo.tobytes() and halves(wide)[1].size == (128, 128)
    assert Board(suite, lab).size == 128
