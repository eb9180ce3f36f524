"""What the repository says to its host and to readers is valid: workflows, forms, citation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"


def check(schema: str, *files: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_and_citation_follow_their_schemas() -> None:
    pytest.importorskip("check_jsonschema")
    check("github-workflows", *sorted((GITHUB / "workflows").glob("*.yml")))
    check("github-issue-forms", GITHUB / "ISSUE_TEMPLATE" / "bug.yml", GITHUB / "ISSUE_TEMPLATE" / "request.yml")
    check("github-issue-config", GITHUB / "ISSUE_TEMPLATE" / "config.yml")
    check("citation-file-format", ROOT / "CITATION.cff")


def test_workflows_run_what_the_makefile_has() -> None:
    targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    for path in (GITHUB / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            for step in job["steps"]:
                for line in step.get("run", "").splitlines():
                    if line.strip().startswith("make "):
                        assert line.split()[1] in targets, line
    versions = yaml.safe_load((GITHUB / "workflows" / "test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert versions["python"][0] == "3.10" and 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()


def test_issue_forms_ask_for_the_doctor() -> None:
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    assert any("doctor --json" in part["attributes"]["label"] for part in form["body"])


def test_the_paper_is_cited_the_same_everywhere() -> None:
    number = "arXiv:2405.13952"
    for name in ("README.md", "CITATION.cff"):
        assert number in (ROOT / name).read_text(encoding="utf-8"), name
    version = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] in version
