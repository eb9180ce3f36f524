"""Errors name settings as the person knows them: flags on the command line, fields in the app, keywords in Python."""

from __future__ import annotations

import ast
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spectral_diffusion
from spectral_diffusion import cli
from spectral_diffusion.app import fusing
from spectral_diffusion.app.jobs import QueueJob, Record, how_it_ended, last_error
from spectral_diffusion.app.sentences import FIELDS, rendered
from spectral_diffusion.app.workspace import Workspace, sentence_of
from spectral_diffusion.cli import speller
from spectral_diffusion.core.errors import ELSEWHERE, Fix, UserError
from spectral_diffusion.training.checkpoint import ANEW
from spectral_diffusion.training.status import read_status, reporting

ROOT = Path(spectral_diffusion.__file__).parent
FLAG = re.compile(r"(?<![\w-])(?<!var\()--(?![a-z-]+:)[a-z]|(?<![\w-])-o\b")  # but no variable of a style sheet
COMMANDS = {  # of the process that a job is, and of a cluster's own programs
    "app/queue.py": {"--config", "--status", "--resume"},
    "batch/concepts.py": {"-o", "--config", "--status", "--resume", "--force"},
    "batch/process.py": {"--resume"},
    "batch/kubernetes.py": {"--shard"},
    "batch/slurm.py": {
        "--noheader", "--array", "--states=all", "--jobs=", "--format=%A|%F_%K|%F|%T", "--quiet",
    },
}  # fmt: skip


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Every string of a module and the parts of its f-strings, without docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    loose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in loose:
            yield node.lineno, node.value


def test_the_library_names_no_flags() -> None:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        if not where.startswith("cli/"):
            known = COMMANDS.get(where, set())
            found += [(where, *one) for one in sentences(path) if FLAG.search(one[1]) and one[1] not in known]
    assert not found
    for text in ("use --rank", "choose another with -o.", "--resume", "(--base)"):
        assert FLAG.search(text)
    for text in ("--line: #888", "var(--line)", "a-o", "text--more", " -- "):
        assert not FLAG.search(text)


@pytest.mark.parametrize(
    ("words", "fix", "flag", "keyword"),
    [
        ("train photos", Fix("rank", "4"), "--rank 4", "rank=4"),
        ("train photos", ELSEWHERE, "-o to write elsewhere", "output=… to write elsewhere"),
        ("train photos", Fix("init_from_adapter", "a"), "--continue a", "init_from_adapter=a"),
        ("train photos", Fix("param_budget", "200000"), "--budget 200000", "param_budget=200000"),
        ("train photos", Fix("force", "true"), "--force", "force=true"),
        ("train photos", ANEW, "--force and no --resume to start anew", "force=true and resume=false to start anew"),
        ("train photos", Fix("slot_lr_power", "0"), "--slot-lr-power 0", "slot_lr_power=0"),
        ("train photos", Fix("optimizer.name", "adamw"), "optimizer.name=adamw", "optimizer.name=adamw"),
        ("fuse a b", Fix("allow_base", "true"), "--allow-base", "allow_base=true"),
        ("fuse a b", Fix("scales", "0.8"), "--strength NAME=0.8", "scales=0.8"),
        ("evaluate a", Fix("others", "false"), "--no-others", "others=false"),
        ("unfuse a", Fix("allow_base", "true"), "allow_base=true", "allow_base=true"),  # which has no such flag
        ("evaluate a", Fix("encoders"), "--encoder", "encoders=…"),
        ("generate", Fix("adapters"), "--adapter", "adapters=…"),
        ("unfuse a", Fix("subtract", "true"), "--subtract", "subtract=true"),
        ("extract sketch a.png", ELSEWHERE, "-o to write elsewhere", "output=… to write elsewhere"),
    ],
)
def test_a_fix_is_a_flag_where_the_verb_has_one(words: str, fix: Fix, flag: str, keyword: str) -> None:
    error = UserError("It is wrong.", fix)
    assert error.render(speller(words.split())) == f"It is wrong. Use {flag}."
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == f"It is wrong. Use {keyword}."


def test_several_fixes_are_alternatives() -> None:
    assert str(UserError("It is wrong.")) == "It is wrong."
    error = UserError("It is wrong.", Fix("rank", "4"), Fix("method", "lora", "which takes any"))
    assert str(error) == "It is wrong. Use rank=4, or method=lora which takes any."
    assert error.render(lambda fix: "") == "It is wrong."


def test_the_command_line_says_what_to_do_on_the_same_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.safetensors").mkdir()
    words = ["export", str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "a.safetensors"), "--device", "nowhere"]
    monkeypatch.setattr(sys, "argv", ["spectral-diffusion", *words])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err.startswith("Error: ")
    with pytest.raises(SystemExit, match="2"):
        cli.fail(UserError("It is wrong.", ELSEWHERE, Fix("dtype", "float32")))
    assert capsys.readouterr().err == "Error: It is wrong. Use -o to write elsewhere, or --dtype float32.\n"


def test_the_app_speaks_of_its_fields(tmp_path: Path) -> None:
    shown = {
        Fix("rank", "4"): "It is wrong. Set “Rank” to 4.",
        Fix("method", so="to choose another"): "It is wrong. Change “Method” to choose another.",
        Fix("distill.steps", "0"): "It is wrong. Set “Distillation” to none.",
        ELSEWHERE: "It is wrong. Choose another name to write elsewhere.",
        Fix("device", "cpu"): "It is wrong.",
        ANEW: "It is wrong.",
    }
    for fix, wanted in shown.items():
        assert rendered(UserError("It is wrong.", fix)) == sentence_of(UserError("It is wrong.", fix)) == wanted
        assert not FLAG.search(wanted)
    tabs = "".join(path.read_text("utf-8") for path in (ROOT / "app" / "tabs").glob("*.py"))
    assert all(f'label="{label}"' in tabs for label in FIELDS.values())
    workspace = Workspace(tmp_path)
    (workspace.fused / "other").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        fusing.fuse_chosen(workspace, ["rex"], "other", {})
    assert not FLAG.search(str(caught.value))


def test_a_training_hands_its_fixes_to_the_app(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    job = QueueJob(workspace.jobs / "1_rex", Record(concept="rex", state="running"))
    job.folder.mkdir(parents=True)
    with pytest.raises(UserError), reporting(job.status_file) as reporter:
        raise UserError("It is wrong.", Fix("rank", "4"), ANEW)
    job.folder.joinpath("log.txt").write_text("Error: It is wrong. Use -o to write elsewhere.\n")
    assert last_error(job.log) == "It is wrong."  # of a training that could not write its status
    job = job.write(pid=reporter.status.pid)
    assert how_it_ended(job, workspace) == {"state": "failed", "message": "It is wrong. Set “Rank” to 4."}
    status = read_status(job.status_file)
    assert status and status.message == "It is wrong." and status.fixes == [Fix("rank", "4"), ANEW]
