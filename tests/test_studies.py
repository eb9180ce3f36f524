"""Every study in its quick form, from photos to its page; and that what is compared is trained alike."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from spectral_diffusion.board.entry import read_entry
from spectral_diffusion.board.suite import read_suite
from spectral_diffusion.cli import app
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.settings import build, read_yaml
from spectral_diffusion.core.assets import concepts, preset
from spectral_diffusion.core.errors import Fix, NotFiniteError, UserError
from spectral_diffusion.core.files import write_json
from spectral_diffusion.core.machine import record_provenance
from spectral_diffusion.merging.merges.registry import all_merges
from spectral_diffusion.methods import all_methods
from spectral_diffusion.studies import continual, fusion, runner, scenes, sorting
from spectral_diffusion.studies.capacity import jobs
from spectral_diffusion.studies.families import TRIED as FURTHER
from spectral_diffusion.studies.families import family_jobs
from spectral_diffusion.studies.families import verdict as verdict_on_families
from spectral_diffusion.studies.fusion import (
    FAMILIES,
    JOINT,
    MERGES,
    NARROW,
    RANK,
    RATE_OF,
    TRIED,
    FusionCell,
    change_for,
    changes_for,
    family_rate,
    measured_cells,
    prior_subjects,
)
from spectral_diffusion.studies.narrow import narrow_jobs
from spectral_diffusion.studies.rank import lowest, weight_of_full_rank
from spectral_diffusion.studies.recipes import (
    MOST,
    TRIALS,
    FusionVariant,
    verdict,
    worth_reporting,
    worth_showing,
)
from spectral_diffusion.studies.registry import all_studies, get_study, not_allowed
from spectral_diffusion.studies.repeat import repeat
from spectral_diffusion.studies.report import write_record
from spectral_diffusion.studies.runner import (
    EVERY,
    MANY,
    TEST_CONCEPTS,
    TUNING_CONCEPTS,
    WIDER,
    NotMeasured,
    StudyRunner,
    TimeOver,
    study_settings,
    widened,
    without_paths,
)
from spectral_diffusion.studies.scenes import GROUPS, SLOTS, layout
from spectral_diffusion.studies.slots import check_equal, slot_jobs
from spectral_diffusion.studies.speed import METHODS
from spectral_diffusion.studies.styles import STYLE_MERGES, STYLES, TUNING_STYLE
from spectral_diffusion.studies.transformer import isolation_of, runners_of, scenes_of, shown_settings
from spectral_diffusion.training.output import state_path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all studies, so that what one has trained the next one finds."""
    return tmp_path_factory.mktemp("lab")


QUICKEST = {"rank"}  # of the rest each takes up to a minute


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICKEST else [pytest.mark.slow]) for n in sorted(all_studies())]
)
def test_a_study_from_photos_to_its_page(name: str, work: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["experiment", name, "--quick", "-o", str(tmp_path), "--work", str(work)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / f"{name}-quick.json").read_text())
    assert found["quick"] and found["verdict"] and found["tables"]
    for title, rows in found["tables"].items():
        assert rows and all(list(row) == list(rows[0]) for row in rows), title
    page = (tmp_path / f"{name}-quick.md").read_text()
    assert "it proves nothing" in page and all(f"## {title}" in page for title in found["tables"])
    wanted = [item for item in found["missing"] if "matplotlib" not in item]
    assert not wanted


@pytest.mark.slow
def test_what_is_measured_is_read_again_when_time_is_over(work: Path, tmp_path: Path) -> None:
    def again(kept: Path, page: Path, *options: str) -> list[str]:
        more = ["--quick", "--work", str(kept), "-o", str(page), "--hours", "0.0000001", *options]
        result = CliRunner().invoke(app, ["experiment", "slots", *more])
        assert result.exit_code == 0, result.output
        missing: list[str] = json.loads((page / "slots-quick.json").read_text())["missing"]
        return missing

    page = tmp_path / "page"
    result = CliRunner().invoke(app, ["experiment", "slots", "--quick", "--work", str(work), "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert again(work, tmp_path / "kept") == []
    assert again(tmp_path / "elsewhere", page, "--from-record") == []
    assert again(tmp_path / "elsewhere", page) != []  # measured anew unless the record is asked for
    assert again(tmp_path / "elsewhere", tmp_path / "nothing") != []


def test_families_are_trained_alike_and_unlike_ones_are_refused() -> None:
    lab = StudyRunner(settings=study_settings())
    # Those left out train one factor of two, a rotation's few angles, or with another loss on purpose.
    fewer = ("orthogonal", "rotation")
    alike = [n for n, change in FAMILIES.items() if not n.startswith(fewer) and "interference" not in change]
    counts = check_equal(lab, {name: change_for(name, 3) for name in alike})
    assert len(set(counts.values())) == 1
    with pytest.raises(ValueError, match="numbers"):
        check_equal(lab, {name: change_for(name, 0) for name in ("lora", "orthogonal")})
    with pytest.raises(ValueError, match="steps differ"):
        check_equal(lab, {"lora": change_for("lora", 0), "more": {**change_for("lora", 0), "steps": 999}})


def test_a_family_takes_the_rate_of_one_that_it_differs_from_in_one_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "best_rate", lambda lab, rates, **change: (1.0, [change]))
    for family, tuned in RATE_OF.items():
        change, other = FAMILIES[family], FAMILIES[tuned]
        differing = [key for key in {*change, *other} if change.get(key) != other.get(key)]
        assert tuned not in RATE_OF and len(differing) == 1
        assert family_rate(StudyRunner(), family, False) == (1.0, [change_for(tuned, 0)])


def test_nothing_asks_for_more_columns_than_the_pocket_base_has() -> None:
    columns = min(map(min, StudyRunner(settings=study_settings()).sides))
    assert columns == 64
    for group in GROUPS.values():
        for names in group.scenes:
            slots = [SLOTS[name] for name in names]
            assert RANK * (max(slots) + 1) <= columns and (len(set(slots)) == len(names) or len(names) == 10)
    assert max(NARROW * job.size for job in narrow_jobs(False)) <= columns
    assert max(RANK * job.size for job in slot_jobs(False)) <= columns
    suite = read_suite("pocket")
    for path in Path("docs/board/entries").glob("*.yaml"):
        entry = read_entry(path)
        if entry.own_slots or entry.joint:
            rank = int((entry.train or {}).get("rank", suite.train["rank"]))
            assert rank * max(entry.counts or suite.counts) <= columns, path.name


def test_where_columns_end_only_what_needs_none_is_measured() -> None:
    measured = jobs(64)
    for job in measured:
        if job.family == "spectral, own slots":
            assert job.rank * job.size <= 64
    beyond = {job.family for job in measured if job.rank == 8 and job.size == 32}
    assert beyond == {"spectral, same slot", "lora"}
    assert {job.size for job in measured if job.rank == 2} == {1, 2, 4, 8, 16, 32}


def test_slots_of_a_family_are_disjoint_at_every_rank() -> None:
    for rank, size in ((NARROW, len(MANY)), (RANK, len(TEST_CONCEPTS))):
        slots = [change_for("spectral, own slots", number, rank)["slot"] for number in range(size)]
        ends = [tuple(map(int, slot.split(":"))) for slot in slots]
        assert all(stop - start == rank for start, stop in ends) and len({start for start, _ in ends}) == size
    assert change_for("lora", 0).get("rank") is None and change_for("lora", 0, 2)["rank"] == 2


def test_what_is_reported_is_tuned_on_nothing_of_it() -> None:
    assert len(set(EVERY)) == 32 and EVERY[:16] == MANY and not set(EVERY) & set(TUNING_CONCEPTS)
    assert {path.parent.name for path in concepts().glob("*/concept.yaml")} == {
        *EVERY,
        *TUNING_CONCEPTS,
        *STYLES,
        TUNING_STYLE,
    }


def test_recipes_that_train_anew_are_reported_only_ahead_of_the_rest() -> None:
    plain, best, anew = (
        FusionVariant("plain", ""),
        FusionVariant("best", ""),
        FusionVariant("anew", "", train={"rank": 4}),
    )
    routed = FusionVariant("routed", "", routed=True)

    def order(score: float) -> list[str]:
        return [recipe.kind for recipe in worth_reporting([(0.5, plain), (0.8, best), (score, anew), (1.0, routed)])]

    assert order(0.7) == ["routed", "best", "plain"] and order(0.9) == ["routed", "anew", "best", "plain"]


def test_the_best_that_only_merges_is_reported_too() -> None:
    distilled = [FusionVariant("distilled", str(n), distill={"steps": n}) for n in range(9)]
    plain, poor = FusionVariant("sum", "λ = 1"), FusionVariant("sum", "λ = 2")
    scored = [(0.9, one) for one in distilled]
    assert worth_reporting([(0.4, poor), (0.5, plain), *scored]) == [*distilled[:MOST], plain]
    assert worth_reporting([(0.95, plain), (0.4, poor), *scored]) == [plain, *distilled[: MOST - 1]]


def test_the_sheet_shows_what_fuses_best_and_what_only_merges_best() -> None:
    routed, distilled = FusionVariant("routed", "", routed=True), FusionVariant("distilled", "", distill={"steps": 3})
    merged = [FusionVariant("sum", "λ = 1"), FusionVariant("gradient", "")]
    rows = [
        {"kind": kind, "of alone": f"{share} [0, 1]", "drift": "0.1 [0, 1]"}
        for kind, share in (("routed", 1.0), ("sum", 0.4), ("gradient", 0.7), ("distilled", 0.9))
    ]
    assert worth_showing([routed, merged[0], distilled, merged[1]], rows) == [distilled, merged[1]]
    assert worth_showing([routed, distilled, *merged], rows[:3]) == [merged[1]] and not worth_showing([distilled], [])


def test_the_preset_for_many_concepts_is_the_recipe_that_the_study_measures() -> None:
    kind = "whole U-Net distilled from SSR, 900 steps"
    [measured] = [r for r in TRIALS if r.kind == kind and r.setting.endswith("0.0002")]
    given = read_yaml(preset("pocket-distilled"))["fuse"]
    files = {"adapters": ["a"], "output": "b"}
    distilled = {**(measured.distill or {}), "prior_subjects": prior_subjects(StudyRunner(settings=study_settings()))}
    assert build(FuseConfig, given, files) == build(FuseConfig, {**measured.merge, "distill": distilled}, files)


def test_what_is_only_routed_gives_no_verdict_on_fusing() -> None:
    row = {"kind": "routed by prompt, not fused", "setting": "", "K": 8, "of alone": "1.00 [1, 1]", "drift": "0 [0, 0]"}
    assert verdict([row]) == "Nothing was measured yet."


@pytest.mark.slow
def test_a_row_of_which_time_left_a_part_unmeasured_is_told_as_missing(work: Path) -> None:
    lab = StudyRunner(settings=study_settings(quick=True), folder=work)
    job = FusionCell("spectral, own slots", "sum", 2)
    assert measured_cells(lab, [job], (0,), True)[2] == []
    for cell in (work / "cells").glob("generic-*.json"):
        cell.unlink()
    lab.most = -1.0
    assert measured_cells(lab, [job], (0,), True) == ([], [], ["spectral, own slots, K = 2, rank 8, seed 0: sum"])


def test_extras_have_one_seed_and_joint_loras_a_rate_that_fits_their_rank() -> None:
    joint, plain = FusionCell("lora", JOINT, 4), FusionCell("lora", "sum", 4)
    assert fusion.seeds_of(joint, (0, 1)) == (0,) and fusion.seeds_of(plain, (0, 1)) == (0, 1)
    assert fusion.seeds_of(FusionCell("lora, overlap penalty", "sum", 4), (0, 1)) == (0,)
    assert fusion.joint_rate(joint, 2.0) == 1.0
    assert fusion.joint_rate(FusionCell("spectral, own slots", JOINT, 4), 2.0) == 2.0


def test_families_are_compared_by_the_best_merge_of_each() -> None:
    def row(family: str, merge: str, share: str) -> dict[str, object]:
        return {"family": family, "merge": merge, "K": 8, "of alone": share, "drift": "0.20"}

    assert {job.family for job in family_jobs(quick=False)} == set(FURTHER)
    rows = [row("lora", "sum", "0.30 [0.20, 0.40]"), row("lora", "gradient", "0.80"), row("lora", JOINT, "0.70")]
    text = verdict_on_families([*rows, row("rotation, own slots", "sum", "0.40")])
    assert "keep lora 0.80 (gradient, drift 0.20), lora, trained jointly 0.70 (joint, drift 0.20)" in text
    assert text.endswith("rotation, own slots 0.40 (sum, drift 0.20).")


def test_tuned_columns_reach_twice_as_far_down_in_rank() -> None:
    assert lowest(weight_of_full_rank(), 3) == (34, 37)


def test_what_time_did_not_allow_is_told_by_what_it_belongs_to() -> None:
    assert not_allowed({"seed 1": ["lora"], "seed 2": ["top", "lora"]}, 2) == ["seed 1: lora", "seed 2: all"]


def test_every_method_and_merge_has_an_entry_in_a_study() -> None:
    variants = {"spectral-additive-s", "spectral-rotation-s"}  # of the study of slots
    assert set(all_methods()) - variants == set(METHODS)
    rows = [merge for merges in (*TRIED.values(), *FURTHER.values()) for merge in merges]
    tried = {MERGES[merge]["merge"] for merge in rows if merge != JOINT}
    tried |= {merge["merge"] for merge in STYLE_MERGES.values()}
    # cat is the sum again, dare is random, and svd only lowers a rank.
    assert set(all_merges()) - {"cat", "dare", "svd"} == tried


def test_a_sweep_goes_on_beyond_an_edge() -> None:
    measured: list[float] = []

    def peak_at(best: float) -> Callable[[float], float]:
        def measure(rate: float) -> float:
            measured.append(rate)
            return -abs(math.log(rate / best))

        return measure

    rate, values = widened(peak_at(1.0), (0.25, 1.0, 4.0))
    assert rate == 1.0 and list(values) == [0.25, 1.0, 4.0] and measured == [0.25, 1.0, 4.0]
    rate, values = widened(peak_at(16.0), (0.25, 1.0, 4.0))
    assert rate == 16.0 and list(values) == [0.25, 1.0, 4.0, 16.0, 64.0]
    rate, values = widened(peak_at(1 / 16), (0.25, 1.0, 4.0))
    assert rate == 1 / 16 and next(iter(values)) == 1 / 64
    assert len(widened(peak_at(1e9), (0.25, 1.0, 4.0))[1]) == 3 + WIDER  # no end of it is no reason to go on for ever


def test_a_training_that_diverged_is_not_tried_again_and_one_that_was_stopped_counts_all_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = StudyRunner(folder=tmp_path, settings=study_settings(quick=True))
    stop = KeyboardInterrupt
    ends: list[BaseException] = [stop(), stop(), stop(), NotFiniteError("It met NaN.", Fix("learning_rate", "lower"))]

    file = lab.adapter_path("rex")

    def train(*given: object, **more: object) -> None:
        if len(ends) < 4:  # the second has saved a state after a hundred seconds, the third none since
            saved = time.time() + (100 if len(ends) == 3 else -100)
            state_path(file).write_bytes(b"state")
            os.utime(state_path(file), (saved, saved))
        raise ends.pop(0)

    monkeypatch.setattr(runner, "train_to_file", train)
    with pytest.raises(KeyboardInterrupt):
        lab.trained("rex")
    assert not file.with_name(runner.STOPPED).exists()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            lab.trained("rex")
        assert json.loads(file.with_name(runner.STOPPED).read_text()) == pytest.approx(100, abs=1)
    with pytest.raises(NotMeasured, match="It met NaN"):
        lab.trained("rex")
    with pytest.raises(NotFiniteError, match="It met NaN"):  # from what was written down
        lab.trained("rex")
    assert not ends


def test_a_rate_that_diverges_is_no_best_one_and_ends_no_sweep() -> None:
    def measure(rate: float) -> float:
        if rate > 1:
            raise NotFiniteError("Training met NaN or infinity.")
        return rate

    rate, values = widened(measure, (0.25, 1.0))
    assert rate == 1.0 and values == {0.25: 0.25, 1.0: 1.0, 4.0: 0.0}


@pytest.mark.slow
def test_cells_are_measured_again_on_another_machine(work: Path, tmp_path: Path) -> None:
    """The same machine with an empty cache gives the figures of the record, to the last digit."""
    settings = study_settings(quick=True)
    first = StudyRunner(folder=tmp_path / "one", settings=settings)
    for rank in (1, 2):
        first.alone("rex", method="lora", rank=rank)
    write_record(tmp_path / "out" / "fusion-cells.json", first.used, whole=True)
    other = StudyRunner(folder=tmp_path / "two", settings=settings)
    page = repeat(tmp_path / "out", other, 5)
    found = json.loads((tmp_path / "out" / "machines.json").read_text())["rows"]
    assert len(found) == 2 and all(row["difference"] == 0 for row in found)
    assert "2 trainings measured again on other machines (1)" in page.read_text()
    assert not (tmp_path / "two" / "cells").exists()  # the cache of the lab's own making was not read
    write_json(tmp_path / "out" / "fusion.json", {"provenance": record_provenance()})
    repeat(tmp_path / "out", other, 1)  # a machine's own rows are replaced
    assert "on a machine of the record (1)" in page.read_text() and "other machines" not in page.read_text()
    assert len(json.loads((tmp_path / "out" / "machines.json").read_text())["rows"]) == 1
    with pytest.raises(UserError, match="no records of single adapters"):
        repeat(tmp_path / "empty", other, 1)


def test_no_key_of_a_cell_names_a_folder_of_this_machine() -> None:
    change = {
        "method": "lora",
        "interference": {"overlap_weight": 1.0, "earlier_adapters": ["/a/b/0f3/rex.safetensors"]},
    }
    assert without_paths(change) == {
        "method": "lora", "interference": {"overlap_weight": 1.0, "earlier_adapters": ["0f3"]},
    }  # fmt: skip
    assert without_paths({"rank": 2}) == {"rank": 2}


@pytest.mark.slow
def test_the_penalty_is_trained_against_the_concepts_before(work: Path) -> None:
    lab = StudyRunner(folder=work, settings=study_settings(quick=True))
    changes = changes_for(lab, "lora, overlap penalty", 1.0, TEST_CONCEPTS[:3], 0)
    earlier = [change.get("interference", {}).get("earlier_adapters", []) for change in changes]
    assert [len(files) for files in earlier] == [0, 1, 2] and earlier[2][:1] == earlier[1]


def test_two_bases_are_studied_alike_and_a_file_of_settings_lies_over_both(tmp_path: Path) -> None:
    recipe = tmp_path / "few.yaml"
    recipe.write_text("train: {steps: 7}")
    lab = StudyRunner(settings=study_settings(recipe), folder=tmp_path, recipe=recipe)
    runners = runners_of(lab, False)
    other = runners["pocket-transformer"]
    assert runners["pocket"] is lab and list(runners) == ["pocket", "pocket-transformer"]
    assert other.used is lab.used and other.begun == lab.begun and other.edges is not lab.edges
    assert other.fingerprint != lab.fingerprint and other.terms["base"] != lab.terms["base"]
    shown = {base: shown_settings(runner) for base, runner in runners.items()}
    assert [row["steps"] for row in shown.values()] == [7, 7]
    assert shown["pocket"]["target_modules"] != shown["pocket-transformer"]["target_modules"]
    own = runners_of(StudyRunner("my-klein", settings=study_settings(), folder=tmp_path), False)
    assert list(own) == ["pocket", "my-klein"]


def test_scenes_without_sketches_have_keys_of_their_own() -> None:
    lab = StudyRunner()
    assert set(layout(GROUPS["2"])) == {"width", "height", "rows", "puppets"}  # as in older records
    assert isolation_of(lab) == 1.0
    assert layout(scenes_of(lab, False)["2"]) == {**layout(GROUPS["2"]), "sketched": False, "isolation": 1.0}


def test_a_time_limit_never_ends_a_study_without_its_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is measured beside a cell is over with the time too."""

    def over(*given: object, **more: object) -> None:
        raise TimeOver("over")

    lab = StudyRunner(folder=tmp_path, settings=study_settings(None, True, "pocket"))
    for module, name, cell in ((scenes, "alone_rate", "scene_cell"), (continual, None, "chain_cell")):
        monkeypatch.setattr(module, cell, lambda *given, **more: {})
        if name:
            monkeypatch.setattr(module, name, over)
    monkeypatch.setattr(StudyRunner, "noun_baseline", over)
    monkeypatch.setattr(continual, "rotation_rate", lambda *given: 1.0)
    for study in ("scenes", "continual"):
        assert get_study(study).run(lab, True).missing


def test_answers_are_for_the_very_pictures_that_were_sorted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def images(folder: str) -> Callable[..., list[sorting.Shown]]:
        def found(lab: StudyRunner, variant: tuple[str, str], names: list[str], quick: bool) -> list[sorting.Shown]:
            out = []
            for number, name in enumerate(names):
                file = tmp_path / folder / f"{variant[1]}-{name}.png"
                file.parent.mkdir(exist_ok=True)
                Image.new("RGB", (16, 16), (40 * number, 9, 9)).save(file)
                out.append(sorting.Shown(variant, name, file))
            return out

        return found

    lab = StudyRunner(folder=tmp_path / "lab", settings=study_settings(None, False, "pocket"))
    monkeypatch.setattr(sorting, "variant_images", images("first"))
    assert sorting.run(lab, False).missing
    [place] = (tmp_path / "lab" / "sorting").iterdir()
    count = len(sorting.VARIANTS) * len(TEST_CONCEPTS)
    (place / "answers-a.txt").write_text("".join(f"{number} rex 3\n" for number in range(1, count + 1)))
    assert not sorting.run(lab, False).missing
    monkeypatch.setattr(sorting, "variant_images", images("second"))
    assert sorting.run(lab, False).missing
    quick = sorting.run(lab, True)
    assert not quick.missing and all(row["right by eye"] is None for row in quick.tables[0].rows)


def test_the_eye_and_the_encoder_are_compared_fusion_by_fusion() -> None:
    shown = [sorting.Shown(variant, name, Path("x.png")) for variant in sorting.VARIANTS for name in TEST_CONCEPTS]
    identity = [sorting.VARIANTS.index(image.variant) / 10 for image in shown]
    names = [image.concept for image in shown]
    same = sorting.Answers(names, [4 * score for score in identity])
    assert "correlation of 1.00 [1.00, 1.00], as wanted" in sorting.verdict(shown, identity, [same])
    other = sorting.Answers(names, [4 - 4 * score for score in identity])
    assert "correlation of -1.00" in sorting.verdict(shown, identity, [other])
    assert "agree with each other by 1.00" in sorting.verdict(shown, identity, [other, other])
    wrong = sorting.Answers(["rex"] * len(shown), [4.0] * len(shown))  # a wrong name counts 0, whatever its grade
    row = sorting.variant_row(sorting.VARIANTS[0], shown, identity, names, [wrong])
    assert row["right by eye"] == 1 / 8 and row["likeness by eye"] == 0.5 and row["right by the encoder"] == 1


@pytest.mark.parametrize(
    "line",
    [
        "1 rex",
        "1 rex five",
        "1 rex 5",
        "1 rex nan",
        "one rex 3",
        "1 max 3",
        "1 rex 3 4",
        "1 rex 4.5",
        "0 rex 3",
        "9 rex 3",
        "1 rex 3\n1 rex 2",
    ],
)
def test_answers_in_another_form_name_the_file_and_the_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "answers-a.txt"
    file.write_text(f"{line}\n\n")
    with pytest.raises(UserError, match=r"answers-a.txt: '.*' is not a line such as '12 rex 3', with a number"):
        sorting.read_answers(file, 1, ["rex", "fido"])
    file.write_text("1 rex 3.5\n")
    with pytest.raises(UserError, match="no answer for picture 2"):
        sorting.read_answers(file, 2, ["rex", "fido"])
    assert sorting.read_answers(file, 1, ["rex", "fido"]).grades == [3.5]
