"""What the app looks after by itself: the trash, and how long things take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from spectral_diffusion.app import generation, speeds, trash
from spectral_diffusion.app.trash import discard
from spectral_diffusion.app.workspace import Workspace

DAY = 86400.0


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


def thing(workspace: Workspace, name: str, size: int = 10) -> Path:
    workspace.root.mkdir(exist_ok=True)
    path = workspace.root / name
    path.write_bytes(b"x" * size)
    return path


def test_what_was_deleted_stays_a_month(workspace: Workspace) -> None:
    assert trash.contents(workspace).line() == "" and trash.empty(workspace) == ""
    discard(workspace, "old", [thing(workspace, "old", 3_000_000)])
    [old] = workspace.trash.iterdir()
    now = time.time()
    assert trash.contents(workspace).line().startswith("Trash: 1 deletion, 3 MB. Each is deleted for good after 30")
    assert trash.empty(workspace, now=now + 29 * DAY) == "" and old.exists()
    new = discard(workspace, "new", [thing(workspace, "new")])
    new = new.rename(new.with_name(time.strftime(trash.STAMP, time.localtime(now + 10 * DAY)) + "-new-x"))
    line = trash.empty(workspace, now=now + 31 * DAY)
    assert line == "Emptied the trash: 1 deletion of more than 30 days ago, 3 MB."
    assert not old.exists() and (new / "new").exists()
    assert trash.empty(workspace, older_than=0, now=now + 11 * DAY) == "Emptied the trash: 1 deletion, 1 MB."
    assert list(workspace.trash.iterdir()) == []


def test_what_others_put_there_stays_and_links_are_not_followed(workspace: Workspace, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    workspace.trash.mkdir(parents=True)
    (workspace.trash / "mine").mkdir()
    (workspace.trash / "mine" / "link").symlink_to(outside)
    (workspace.trash / "link").symlink_to(outside)
    assert trash.empty(workspace) == ""
    assert trash.empty(workspace, now=time.time() + 40 * DAY) == "" and (workspace.trash / "mine").exists()
    assert trash.empty(workspace, older_than=0).startswith("Emptied the trash: 1 deletion")
    assert (outside / "precious").exists() and not (workspace.trash / "mine").exists()


def test_what_cannot_be_deleted_is_said(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    discard(workspace, "old", [thing(workspace, "old")])

    def refuse(path: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(trash.shutil, "rmtree", refuse)
    assert trash.empty(workspace, older_than=0) == (
        "1 in it cannot be deleted; look at the folder .trash of the workspace."
    )


def test_times_are_measured_and_shown(workspace: Workspace) -> None:
    assert speeds.expected(workspace, "fuse pocket ties", 2) is None and speeds.line(None, "this fusion") == ""
    clock = iter([0.0, 8.0, 10.0, 14.0, 20.0, 30.0])
    with speeds.measured(workspace, "fuse pocket ties", 2, lambda: next(clock)):
        pass
    assert speeds.expected(workspace, "fuse pocket ties", 3) == 12
    with speeds.measured(workspace, "fuse pocket ties", 2, lambda: next(clock)):
        pass
    assert speeds.expected(workspace, "fuse pocket ties", 2) == 6  # the mean of 8 and 4
    with pytest.raises(ValueError), speeds.measured(workspace, "fuse pocket ties", 2, lambda: next(clock)):
        raise ValueError
    assert speeds.expected(workspace, "fuse pocket ties", 2) == 6
    assert speeds.line(6.0, "this fusion") == "About 6 s for this fusion, by what was measured here."
    assert speeds.line(300.0, "this fusion").startswith("About 5 min for")
    (workspace.root / speeds.FILE).write_text("{")
    assert speeds.expected(workspace, "fuse pocket ties", 2) is None


def test_the_time_of_pictures_follows_the_fields(workspace: Workspace) -> None:
    fields: dict[str, Any] = {
        "num_inference_steps": 20, "num_images": 1, "guidance_scale": 4.0, "global_prompt_weight": 0.0, "width": 0,
        "height": None,
    }  # fmt: skip
    assert generation.estimate(workspace, "pocket", 0, **fields) == ""
    speeds.remember(workspace, "generate pocket", speeds.work_of_pictures(20, 1, 4.0, 0, 0, 128, 128), 5.0)
    assert generation.estimate(workspace, "pocket", 0, **fields).startswith("About 5 s for this picture,")
    assert generation.estimate(workspace, "pocket", 0, **fields | {"num_images": 4}).startswith("About 20 s for these")
    wide = fields | {"width": 256, "height": 128}
    assert generation.estimate(workspace, "pocket", 2, **wide).startswith("About 15 s")  # three passes in place of two
    assert generation.estimate(workspace, "fused/none", 0, **fields) == ""
    assert generation.estimate(workspace, "pocket", 0, **fields | {"num_inference_steps": None}) == ""
