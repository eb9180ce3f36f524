"""The studies: statistics, what the lab keeps, what is listed. Their quick forms are in ``test_studies.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from spectral_diffusion.cli import app
from spectral_diffusion.cli.experiments import _command
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.metrics.statistics import difference_text, interval, leading, mean_text, share_text
from spectral_diffusion.studies.registry import Findings, all_studies, get_study
from spectral_diffusion.studies.report import (
    markdown,
    measured_on,
    page_name,
    read_record,
    read_records,
    record_path,
    write_record,
)
from spectral_diffusion.studies.runner import TEST_CONCEPTS, TUNING_CONCEPTS, StudyRunner, study_settings
from spectral_diffusion.studies.speed import crossing


def test_intervals_hold_the_mean_and_shrink_with_more_values() -> None:
    few, many = [0.0, 1.0, 0.4, 0.6], [0.0, 1.0, 0.4, 0.6] * 25
    low, high = interval(few)
    assert low < 0.5 < high and interval(many)[1] - interval(many)[0] < high - low
    assert mean_text([0.5] * 5) == "0.50 [0.50, 0.50]" and mean_text([0.2, 0.6]) == "0.40 (0.20 to 0.60)"
    assert mean_text([0.5]) == "0.50" and share_text([1.0, 0.0], [2.0, 0.0]) == "—"
    assert share_text([1.0, 2.0], [2.0, 4.0]) == "0.50 (0.50 to 0.50)" and share_text([1.0], [-1.0]) == "—"
    assert leading("0.50 [0.40, 0.60]") == 0.5 and leading(share_text([1.0], [-1.0])) == float("-inf")


def test_what_is_of_one_concept_is_drawn_together() -> None:
    """Three concepts whose seeds agree are three draws, not nine."""
    values, names = [0.2, 0.5, 0.8] * 3, ("rex", "brew", "posy")
    plain, clustered = interval(values), interval(values, names)
    assert clustered[1] - clustered[0] > 1.4 * (plain[1] - plain[0])
    assert interval(values, ["rex"]) == plain  # one concept alone: between its pictures
    assert interval([0.2, 0.5, 0.8], names) == interval([0.2, 0.5, 0.8])
    assert share_text([0.1, 0.4, 0.4] * 3, [0.2, 0.5, 0.8] * 3, names) == "0.60 (0.50 to 0.80)"
    five = ("rex", "brew", "posy", "inky", "bolt")
    assert share_text([0.1, 0.4, 0.4, 0.3, 0.2] * 3, [0.2, 0.5, 0.8, 0.6, 0.4] * 3, five).startswith("0.56 [0.50, 0.")


def test_differences_are_paired() -> None:
    """What all share with a concept cancels out."""
    base = [0.2, 0.5, 0.8]
    assert difference_text([value + 0.1 for value in base], base) == "+0.10 (0.10 to 0.10)"
    assert difference_text(base, [0.8, 0.5, 0.2]) == "+0.00 (-0.60 to 0.60)"


def test_a_page_is_never_replaced_by_one_that_says_less(tmp_path: Path) -> None:
    study, whole, part = get_study("rank"), Findings([], "yes"), Findings([], "yes", missing=("seed 1",))
    assert page_name(study, part, tmp_path, quick=False) == "rank"
    (tmp_path / "rank.json").write_text('{"quick": false, "missing": []}')
    assert page_name(study, part, tmp_path, quick=False) == "rank-unfinished"
    assert page_name(study, whole, tmp_path, quick=True) == "rank-quick"
    assert page_name(study, whole, tmp_path, quick=False) == "rank"
    (tmp_path / "rank.json").write_text('{"quick": false, "missing": ["seed 1", "seed 2"]}')
    assert page_name(study, part, tmp_path, quick=False) == "rank"


def test_a_page_that_a_person_wrote_is_kept(tmp_path: Path) -> None:
    (tmp_path / "rank.md").write_text("# My notes on rank\n")
    refused = CliRunner().invoke(app, ["experiment", "rank", "-o", str(tmp_path)])
    assert isinstance(refused.exception, UserError) and "rank.md was not written by this program" in str(
        refused.exception
    )
    assert [path.name for path in tmp_path.iterdir()] == ["rank.md"]
    (tmp_path / "rank.md").unlink()
    for _ in range(2):  # the second replaces the first one's page
        assert CliRunner().invoke(app, ["experiment", "rank", "-o", str(tmp_path)]).exit_code == 0


def test_where_a_curve_reaches_a_gain() -> None:
    assert crossing((10, 20), (0.2, 0.4), 0.1) == pytest.approx(5)
    assert crossing((10, 20), (0.2, 0.4), 0.3) == pytest.approx(15)
    assert crossing((10, 20), (0.2, 0.4), 0.5) is None


def test_tables_show_dashes_and_put_numbers_right() -> None:
    text = markdown([{"method": "a", "n": 1200, "x": 0.5}, {"method": "b", "n": None, "x": 0.25}])
    assert text.splitlines()[1] == "| --- | ---: | ---: |" and "| b | — | 0.250 |" in text and "1,200" in text


def test_what_was_measured_is_kept_and_time_is_capped(tmp_path: Path) -> None:
    lab = StudyRunner(folder=tmp_path, settings=study_settings(quick=True))
    made: list[int] = []

    def compute() -> dict[str, int]:
        made.append(1)
        return {"x": len(made)}

    assert lab.cell("one", {"a": 1}, compute) == lab.cell("one", {"a": 1}, compute) == {"x": 1}
    assert lab.cell("one", {"a": 2}, compute) == {"x": 2}
    lab.most = -1.0
    assert lab.cell("one", {"a": 2}, compute) == {"x": 2}
    with pytest.raises(UserError, match="run it again"):
        lab.cell("one", {"a": 3}, compute)


def test_what_a_page_rests_on_is_read_from_its_record(tmp_path: Path) -> None:
    lab = StudyRunner(folder=tmp_path / "here", settings=study_settings(quick=True))
    lab.cell("one", {"a": 1}, lambda: {"x": 0.25})
    write_record(record_path(tmp_path, "speed"), lab.used, whole=True)
    elsewhere = StudyRunner(
        folder=tmp_path / "there", settings=study_settings(quick=True), most=-1.0, known=read_records(tmp_path)
    )
    assert elsewhere.cell("one", {"a": 1}, lambda: {}) == {"x": 0.25} and elsewhere.used == lab.used
    [used] = lab.used.values()
    assert used["made"]["cpu"] and used["made"]["date"] and len(measured_on(lab.used)) == 1
    with pytest.raises(UserError, match="run it again"):  # of another recipe, so another cell
        StudyRunner(folder=tmp_path / "there", most=-1.0, known=lab.used).cell("one", {"a": 1}, lambda: {})
    with pytest.raises(UserError, match="run it again"):  # of another machine
        elsewhere.cell("one", {"a": 1}, lambda: {}, timed=True)
    record_path(tmp_path, "speed").write_text("[]")
    with pytest.raises(UserError, match=r"speed-cells\.json is not a record"):
        read_records(tmp_path)


def test_a_record_loses_nothing_that_was_measured(tmp_path: Path) -> None:
    def measured(number: int, quick: bool) -> dict[str, dict[str, object]]:
        lab = StudyRunner(folder=tmp_path / "lab", settings=study_settings(quick=quick))
        lab.cell("one", {"a": number}, lambda: {"x": number})
        return lab.used

    path = tmp_path / "speed-cells.json"
    first, second, quick = measured(1, False), measured(2, False), measured(3, True)
    write_record(path, first, whole=True)
    write_record(path, quick, whole=True)  # of other settings
    write_record(path, second, whole=False)  # time was over
    assert read_record(path) == first | second | quick
    write_record(path, second, whole=True)
    assert read_record(path) == second | quick


def test_nothing_is_tuned_on_what_is_reported() -> None:
    assert not set(TUNING_CONCEPTS) & set(TEST_CONCEPTS) and len(TEST_CONCEPTS) == 8
    quick, whole = study_settings(quick=True), study_settings()
    assert quick["train"]["steps"] < whole["train"]["steps"]
    assert quick["train"]["prior"]["nouns"] == whole["train"]["prior"]["nouns"]


def test_settings_of_ones_own_lie_over_the_shipped_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {steps: 3, prior: {num_images: 5}}\n")
    mine, shipped = study_settings(file), study_settings()
    assert mine["train"]["steps"] == 3 and mine["train"]["prior"] == {**shipped["train"]["prior"], "num_images": 5}
    assert mine["generate"] == shipped["generate"]
    for wrong in ("tran: {steps: 3}\n", "quick:\n"):
        file.write_text(wrong)
        with pytest.raises(UserError, match=r"mine\.yaml: '(tran|quick)' must be one of train, generate, quick"):
            study_settings(file)
    result = CliRunner().invoke(app, ["experiment", "rank", "--recipe", str(file), "--executor", "slurm"])
    assert isinstance(result.exception, UserError) and "mine.yaml" in str(result.exception)


def test_a_page_says_the_command_that_makes_it_without_folders() -> None:
    plain = _command("rank", "pocket", None, "pocket", False)
    assert plain == "spectral-diffusion experiment rank --base pocket"
    whole = _command("rank", "/home/me/base", Path("/home/me/mine.yaml"), "openai/clip", True)
    assert whole.endswith("rank --base base --recipe mine.yaml --encoder openai/clip --quick")


def test_every_study_says_what_it_is_of_the_paper() -> None:
    result = CliRunner().invoke(app, ["experiment"])
    assert result.exit_code == 0
    for study in all_studies().values():
        assert study.name in result.output and study.claim.endswith(".")
    missing = CliRunner().invoke(app, ["experiment", "fusoin"])
    assert isinstance(missing.exception, UserError) and "fusion" in str(missing.exception)
