"""Photo folders on the Hugging Face hub: ``hub:user/dataset`` wherever a photo folder is named."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from ..core.cache import cache_folder
from ..core.errors import UserError
from ..core.hub import hub_problem
from .image_io import SUFFIXES

PREFIX = "hub:"
NAMED = re.compile(r"hub:/?([\w.-]+)/([\w.-]+?)(?:@([\w./-]+))?")
WANTED = ["concept.yaml", "*metadata.jsonl", "*metadata.csv", "*.txt", "*.caption"]


def local_folder(folder: Path) -> Path:
    """The folder itself; of ``hub:user/dataset`` or ``hub:user/dataset@revision`` a downloaded copy.

    Only pictures, captions and ``concept.yaml`` are downloaded, into the cache, once per process; without the hub an
    earlier copy is used.

    Raises:
        UserError: not such a name, a dataset that cannot be downloaded, or one without picture files.
    """
    name = Path(folder).as_posix()
    return _downloaded(name) if name.startswith(PREFIX) else folder


@functools.cache
def _downloaded(name: str) -> Path:
    match = NAMED.fullmatch(name)
    if not match:
        raise UserError(f"'{name}' names no dataset of the hub; write hub:user/dataset or hub:user/dataset@revision.")
    user, dataset, revision = match.groups()
    from huggingface_hub import HfApi, snapshot_download

    copies = cache_folder() / "datasets" / user / dataset
    pictures = [f"*{end}" for suffix in sorted(SUFFIXES) for end in (suffix, suffix.upper())]
    try:
        commit = HfApi().dataset_info(f"{user}/{dataset}", revision=revision).sha
        copy = copies / str(commit)[:12] / dataset  # a concept is called as its folder
        snapshot_download(
            f"{user}/{dataset}", repo_type="dataset", revision=commit, local_dir=copy,
            allow_patterns=[*WANTED, *pictures],
        )  # fmt: skip
    except Exception as error:  # the hub's client raises nearly everything
        earlier = sorted(copies.glob(f"*/{dataset}"), key=lambda path: path.stat().st_mtime)
        if not earlier or revision:
            raise UserError(f"Cannot download the dataset {user}/{dataset}: {hub_problem(error)}.") from error
        copy = earlier[-1]
    if not any(path.suffix.lower() in SUFFIXES for path in copy.rglob("*")):
        raise UserError(
            f"The dataset {user}/{dataset} holds no picture files, perhaps because they are inside parquet files; "
            "download it, save its pictures into a folder, and name that."
        )
    return copy
