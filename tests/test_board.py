"""The board: entries of every kind on the same tasks, from their file to the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from conftest import make_photos, seldom
from families import make_tiny_klein, make_tiny_sdxl
from typer.testing import CliRunner

from spectral_diffusion.board.contestant import Contestant
from spectral_diffusion.board.entry import PEFT_KINDS, STOCK, BoardEntry, read_entry
from spectral_diffusion.board.measure import Board, halves, pairs_of, row_of
from spectral_diffusion.board.painters import Shot
from spectral_diffusion.board.stock import without_alpha
from spectral_diffusion.board.suite import BoardSuite, read_suite
from spectral_diffusion.cli import app
from spectral_diffusion.config.fuse import DistillConfig, FuseConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.data.image_io import open_photo
from spectral_diffusion.merging.export import export
from spectral_diffusion.merging.fuse import fuse_to_folder
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
    study = study_settings()
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


def test_a_distilled_entry_learns_no_prompt_that_drift_is_measured_on(suite: BoardSuite, lab: StudyRunner) -> None:
    entry = read_entry(Path("docs/board/entries/spectral-distilled.yaml"))
    subjects = Contestant(entry, suite, lab).distillation.prior_subjects
    assert "a green dog" in subjects and not any(s in prompt for s in subjects for prompt in suite.generic)
    chosen = entry.model_copy(update={"distill": DistillConfig(steps=3, prior_subjects=["a dog"])})
    assert Contestant(chosen, suite, lab).distillation.prior_subjects == ["a dog"]


@pytest.mark.slow
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


@pytest.mark.parametrize("merge", seldom([f"stock:{kind}" for kind in PEFT_KINDS if kind != "cat"], {"stock:ties"}))
def test_every_stock_merge_paints(merge: str, suite: BoardSuite, lab: StudyRunner) -> None:
    contestant = Contestant(BoardEntry(name=merge, train={"method": "lora"}, merge=merge), suite, lab)
    painter = contestant.together(["rex", "brew"])
    [image] = painter.paint(shots(contestant, ["rex"]))
    assert image.size == (128, 128) and painter.size > 0 and painter.seconds >= 0
    assert merge in STOCK


@pytest.mark.slow
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
    assert theirs.adapter("rex").token == "<rex>" and theirs.adapter("rex").noun == "dog"
    stock = read_entry(file).model_copy(update={"merge": "stock:set_adapters"})
    stock._folder = tmp_path
    assert (pixels(own, ["rex", "brew"]) - pixels(Contestant(stock, suite, lab), ["rex", "brew"])).abs().mean() < 1


def run_board(tmp_path: Path, entries: dict[str, dict[str, object]], *more: str) -> Result:
    """``board run`` with the tiny suite and these entries, by file name."""
    for name, entry in entries.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(entry))
    if not (tmp_path / "tiny.yaml").exists():
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    words = ["board", "run", "--suite", str(tmp_path / "tiny.yaml"), "-o", str(tmp_path / "out")]
    words += ["--work", str(tmp_path / "w"), *more]
    return CliRunner().invoke(
        app, [*words, *(w for name in entries for w in ("--entry", str(tmp_path / f"{name}.yaml")))]
    )


def test_a_run_from_entries_to_the_page_and_again(tmp_path: Path) -> None:
    """A program that pastes the photos is right everywhere; it runs only if it is allowed to."""
    (tmp_path / "program.py").write_text(PROGRAM % "None")
    command = [sys.executable, "program.py", f"--model={tmp_path}/weights", "{job}"]
    (tmp_path / "program.py").write_text(PROGRAM.replace("sys.argv[1]", "sys.argv[2]") % "None")
    entries: dict[str, dict[str, object]] = {
        "photos": {"name": "Photos", "command": command},
        "sum": {"name": "A sum", "train": {"method": "lora"}, "notes": "As it is.", "url": "https://example.org"},
        "joint": {"name": "Joint", "train": {"method": "lora"}, "joint": True},
    }
    refused = run_board(tmp_path, entries)
    assert refused.exit_code == 1 and "run_commands=true" in str(refused.exception) and not (tmp_path / "out").exists()
    done = run_board(tmp_path, entries, "--run-commands")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "README.md").read_text()
    assert "## 2 concepts" in page and "| Photos |" in page and "| A sum |" in page and "Subject Collapse Rate" in page
    shared = [path for path in (tmp_path / "out").rglob("*") if path.suffix in {".md", ".json"}]
    assert len(shared) == 4 and not any(str(tmp_path) in path.read_text() for path in shared)
    result = json.loads((tmp_path / "out" / "results" / "tiny-photos.json").read_text())
    row = row_of(result["counts"]["2"]["figures"])
    assert row["right concept"].startswith("1.00") and row["kept"].startswith("1.00")
    assert row["collapse rate"].startswith("0.00") and row["collapse alone"] == 0
    assert row["MB"] is None and row["seconds to merge"] is None and row["seconds per picture"] > 0
    assert (tmp_path / "out" / "results" / "tiny-a-sum.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*") if path.is_file()}
    again = run_board(tmp_path, entries, "--run-commands")
    assert again.exit_code == 0 and before == {path: path.stat().st_mtime_ns for path in before}
    # Another program behind the same words is measured anew.
    text = (tmp_path / "program.py").read_text()
    (tmp_path / "program.py").write_text(text.replace('/ "1.png"', '/ "2.png"'))
    assert run_board(tmp_path, {"photos": entries["photos"]}, "--run-commands").exit_code == 0
    other = json.loads((tmp_path / "out" / "results" / "tiny-photos.json").read_text())
    assert other["counts"]["2"]["figures"]["concepts"] != result["counts"]["2"]["figures"]["concepts"]


def test_names_that_begin_alike_have_files_of_their_own() -> None:
    long = "Spectral, narrow own slots, gradient fusion"
    first, second = (BoardEntry(name=name, train={}).slug for name in (long, f"{long}, distilled"))
    assert first != second and max(len(first), len(second)) <= 40
    assert BoardEntry(name="A sum", train={}).slug == "a-sum"


def test_results_of_others_bring_no_markup_and_no_other_tasks_into_the_page(tmp_path: Path) -> None:
    entries: dict[str, dict[str, object]] = {
        name: {"name": name, "train": {"method": "lora"}} for name in ("one", "two", "three")
    }
    assert run_board(tmp_path, entries).exit_code == 0
    results = tmp_path / "out" / "results"
    sent = json.loads((results / "tiny-one.json").read_text())
    sent["entry"] |= {"name": "A|B", "notes": "<img src=x onerror=alert(1)>"}
    (results / "tiny-sent.json").write_text(json.dumps(sent))
    other = json.loads((results / "tiny-two.json").read_text())
    other["counts"]["2"]["tasks"] = "another base"
    (results / "tiny-two.json").write_text(json.dumps(other))
    page = ["board", "page", "--suite", str(tmp_path / "tiny.yaml"), "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(app, page).exit_code == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "<img" not in text and "| A\\|B |" in text and "| two |" not in text
    assert "Left out, as measured on another base, photos or settings: two." in text
    sent["entry"]["name"] = "another"
    (results / "tiny-one.json").write_text(json.dumps(sent))
    assert "has the results of 'another'" in run_board(tmp_path, {"one": entries["one"]}).output


def test_what_an_entry_changes_is_what_is_trained(suite: BoardSuite, lab: StudyRunner) -> None:
    plain = Contestant(BoardEntry(name="a", train={"method": "lora"}), suite, lab).training("rex")
    assert plain["learning_rate"] == 0.05 and plain["seed"] == 0 and "slot" not in plain
    own = {"method": "lora", "learning_rate": 5e-4, "text_encoder_learning_rate": 1e-5, "seed": 4}
    assert Contestant(BoardEntry(name="a", train=own), suite, lab).training("rex") == own
    faster = Contestant(BoardEntry(name="a", train={"method": "lora", "rate": 2.0}), suite, lab).training("rex")
    assert faster["learning_rate"] == pytest.approx(0.1)
    slots = Contestant(BoardEntry(name="a", train={}, own_slots=True), suite, lab)
    assert [slots.training(name)["slot"] for name in suite.concepts] == ["0:2", "2:4", "4:6"]


@pytest.mark.slow
def test_what_was_merged_elsewhere_is_entered(suite: BoardSuite, lab: StudyRunner, tmp_path: Path) -> None:
    """A folder of the same fusion gives the pictures of the board's own; nobody is asked for a concept alone."""
    own = Contestant(BoardEntry(name="own", train={"method": "lora"}), suite, lab)
    files = [lab.adapter_path(name, **own.training(name)) for name in ("rex", "brew")]
    for name in ("rex", "brew"):
        own.adapter(name)
    fuse_to_folder(FuseConfig(adapters=files, output=tmp_path / "merged-2", merge="spectral"))
    export(tmp_path / "merged-2", tmp_path / "flat-2.safetensors", "kohya")
    (tmp_path / "entry.yaml").write_text('name: elsewhere\nfused: "merged-{n}"\n')
    theirs = Contestant(read_entry(tmp_path / "entry.yaml"), suite, lab)
    assert (pixels(own, ["rex", "brew"]) - pixels(theirs, ["rex", "brew"])).abs().mean() < 1
    figures = Board(suite, lab).measure(theirs, 2)
    assert set(figures["alone"].values()) == {None} and row_of(figures)["kept"] is None
    assert theirs.entry.shared()["fused"] == "merged-{n}" and figures["bytes"] > 1e6


@pytest.mark.slow
def test_a_failed_entry_leaves_the_others_and_old_figures_are_not_mixed(tmp_path: Path) -> None:
    good: dict[str, object] = {"name": "good", "train": {"method": "lora"}}
    bad: dict[str, object] = {"name": "bad", "adapters": "{concept}.safetensors"}
    done = run_board(tmp_path, {"bad": bad, "good": good})
    assert done.exit_code == 1 and "does not exist" in done.output and "1 of 2 entries" in str(done.exception)
    file = tmp_path / "out" / "results" / "tiny-good.json"
    assert file.is_file() and "| good |" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# My notes\n")
    kept = run_board(tmp_path, {"good": good}, "-o", str(tmp_path / "mine"))
    assert isinstance(kept.exception, UserError) and "README.md was not written by" in str(kept.exception)
    # A word about it keeps the figures; another number of concepts joins them; other prompts replace all.
    assert run_board(tmp_path, {"good": {**good, "notes": "Better said."}}, "--n", "3").exit_code == 0
    assert list(json.loads(file.read_text())["counts"]) == ["2", "3"]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "prompts": ["a picture of {}"]}))
    replaced = run_board(tmp_path, {"good": good}, "--n", "3")
    assert "earlier figures for 2 concepts" in " ".join(replaced.output.split())
    assert list(json.loads(file.read_text())["counts"]) == ["3"]
    # The page can be written without the photos, and says what is no result.
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "folder": "gone", "nouns": {}}))
    page = ["board", "page", "--suite", str(tmp_path / "tiny.yaml"), "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(app, page).exit_code == 0
    (tmp_path / "out" / "results" / "tiny-odd.json").write_text('{"suite": "tiny"}')
    assert "is no result of a board" in str(CliRunner().invoke(app, page).exception)


@pytest.mark.slow
def test_dare_drops_the_same_numbers_every_time(suite: BoardSuite, lab: StudyRunner) -> None:
    contestant = Contestant(BoardEntry(name="d", train={"method": "lora"}, merge="stock:dare_linear"), suite, lab)
    torch.manual_seed(1)
    first = pixels(contestant, ["rex", "brew"])
    torch.manual_seed(2)
    assert torch.equal(first, pixels(contestant, ["rex", "brew"]))


def test_alphas_are_in_the_factors_before_they_are_added() -> None:
    B, A = torch.randn(6, 2), torch.randn(2, 5)
    kohya = {"x.lora_up.weight": B, "x.lora_down.weight": A, "x.alpha": torch.tensor(1.0)}
    found = without_alpha(kohya)
    assert torch.equal(found["x.lora_up.weight"], B / 2) and torch.equal(found["x.lora_down.weight"], A)
    assert found.keys() == {"x.lora_up.weight", "x.lora_down.weight"}
    peft = {"x.lora_A.weight": A, "x.lora_B.weight": B}
    assert all(torch.equal(value, peft[key]) for key, value in without_alpha(peft).items())


@pytest.mark.parametrize("name", seldom(["klein", "sdxl"], {"klein"}))
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
    words = Contestant(read_entry(entry), read_suite(str(tmp_path / "suite.yaml"), folder=tmp_path / "photos"),
                       StudyRunner(str(base), tmp_path / "w", {"train": small["train"]}, concepts=tmp_path / "photos",
                                   nouns=small["nouns"])).words(["pet_dog1"])  # fmt: skip
    assert words["pet_dog1"] == ("pet-dog1 dog" if name == "klein" else "<pet-dog1>")


def test_a_program_that_fails_is_one_sentence(suite: BoardSuite, lab: StudyRunner, tmp_path: Path) -> None:
    def painted(program: str) -> None:
        (tmp_path / "program.py").write_text(program)
        command = [sys.executable, str(tmp_path / "program.py"), "{job}"]
        contestant = Contestant(BoardEntry(name="it", command=command), suite, lab, allow_commands=True)
        contestant.together(["rex"]).paint(shots(contestant, ["rex"]))

    with pytest.raises(UserError, match=r"failed \(3\).*no weights"):
        painted("import sys; print('no weights', file=sys.stderr); sys.exit(3)")
    with pytest.raises(UserError, match=r"failed \(4\).*in Latin-1: \ufffd"):
        painted(r"import os, sys; os.write(2, b'in Latin-1: \xe9'); sys.exit(4)")
    with pytest.raises(UserError, match=r"made no 00000\.png"):
        painted(PROGRAM % "0")
    with pytest.raises(UserError, match="could not run"):
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
