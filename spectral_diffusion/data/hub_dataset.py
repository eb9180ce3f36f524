"""Photo folders on the Hugging Face hub: ``hub:user/dataset`` where a photo folder to train on is named."""

from __future__ import annotations

import functools
import logging
import re
import shutil
import tempfile
from pathlib import Path

from ..core.cache import cache_folder
from ..core.errors import UserError
from ..core.hub import NAME, PREFIX, hub_problem, is_dataset, is_unreachable
from .image_io import SUFFIXES

log = logging.getLogger(__name__)
NAMED = re.compile(rf"{PREFIX}({NAME})/({NAME}?)(?:@([\w][\w./-]*))?")
WANTED = ["concept.yaml", "*metadata.jsonl", "*metadata.csv", "*.txt", "*.caption"]


def local_folder(folder: Path) -> Path:
    """The folder itself; of ``hub:user/dataset`` or ``hub:user/dataset@revision`` a downloaded copy.

    Only pictures, captions and ``concept.yaml`` are downloaded, into the cache, once per process. Where the hub cannot
    be reached an earlier copy is used, with a warning in the log.

    Raises:
        UserError: not such a name, a dataset that cannot be downloaded, or one without picture files.
    """
    return _downloaded(Path(folder).as_posix()) if is_dataset(folder) else folder


@functools.cache
def _downloaded(name: str) -> Path:
    match = NAMED.fullmatch(name)
    if not match:
        raise UserError(f"'{name}' names no dataset of the hub; write hub:user/dataset or hub:user/dataset@revision.")
    user, dataset, revision = match.groups()
    copies = cache_folder() / "datasets" / user / dataset
    try:
        copy = _copy_of(f"{user}/{dataset}", revision, copies)
    except Exception as error:  # the hub's client raises nearly everything
        earlier = sorted(copies.glob(f"*/{dataset}"), key=lambda path: path.stat().st_mtime)
        if revision or not earlier or not is_unreachable(error):
            raise UserError(f"Cannot download the dataset {user}/{dataset}: {hub_problem(error)}.") from error
        copy = earlier[-1]
        log.warning("The hub cannot be reached; %s/%s is the copy that was downloaded last.", user, dataset)
    if not any(path.suffix.lower() in SUFFIXES for path in copy.rglob("*")):
        raise UserError(
            f"The dataset {user}/{dataset} holds no picture files, perhaps because they are inside parquet files; "
            "download it, save its pictures into a folder, and name that."
        )
    return copy


def _copy_of(repository: str, revision: str | None, copies: Path) -> Path:
    """The whole copy of a dataset's present commit in ``copies``, downloaded if it is not there."""
    from huggingface_hub import HfApi, snapshot_download

    commit = str(HfApi().dataset_info(repository, revision=revision).sha)
    copy = copies / commit[:12] / copies.name  # a concept is called as its folder
    if copy.is_dir():
        return copy
    copies.mkdir(parents=True, exist_ok=True)
    pictures = [f"*{end}" for suffix in sorted(SUFFIXES) for end in (suffix, suffix.upper())]
    scratch = Path(tempfile.mkdtemp(dir=copies, prefix="."))
    try:
        snapshot_download(
            repository, repo_type="dataset", revision=commit, local_dir=scratch / copies.name,
            allow_patterns=[*WANTED, *pictures],
        )  # fmt: skip
        (scratch / copies.name).mkdir(exist_ok=True)  # of a dataset without any of them
        copy.parent.mkdir(exist_ok=True)
        if not copy.is_dir():  # another process may have been quicker
            (scratch / copies.name).rename(copy)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return copy
