"""Publish an adapter, a fused folder or an exported file on the Hugging Face hub."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from .adapters.adapter import Adapter
from .adapters.formats.card import MARK, TERMS, model_card
from .adapters.formats.native import load_adapter
from .adapters.formats.reading import is_foreign
from .core.errors import Fix, UserError
from .core.files import is_file, is_folder, read_header, read_text
from .core.hooks import QUIET, Hooks
from .core.hub import hub_problem, is_repository
from .core.paths import without_folders
from .merging.export import TOKEN
from .merging.manifest import MANIFEST, read_manifest

ADAPTER_FILE = "adapter.safetensors"  # in a repository or in a folder of one adapter
CARD = "README.md"
PICTURE = re.compile(r"!\[[^\]]*\]\(([^()/\\]+)\)")  # in a card, beside it
LICENSES = "creativeml-openrail-m, apache-2.0, cc-by-4.0, cc-by-nc-4.0 or other"


@dataclass(frozen=True)
class Publication:
    """What goes into a repository: its files by their names there, and its card."""

    files: dict[str, Path]
    card: str


def publish(
    path: Path,
    repo_id: str,
    license: str = "",
    consent: bool = False,
    private: bool = False,
    token: str | None = None,
    hooks: Hooks = QUIET,
) -> str:
    """Upload it with a model card in one commit, into a new repository or an own earlier one; returns its address.

    A card that is there already is kept: a person may have edited it. The login is the hub client's own
    (``hf auth login`` or ``HF_TOKEN``) and is written nowhere.

    Args:
        path: an adapter, a fused folder, or a file or folder that :func:`.merging.export.export` wrote.
        license: as the hub spells it, such as ``apache-2.0``.
        consent: the word of who publishes it that they may share what it shows.
        token: a login for this call alone.

    Raises:
        UserError: nothing of ours is at ``path``, no license or consent, or the hub refuses.
    """
    check_terms(license, consent)
    if not is_repository(repo_id):
        raise UserError(f"'{repo_id}' is no name of the hub; it is user/name in letters, digits, '-', '_' and '.'.")
    prepared = publication(Path(path), license)
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi(token=token.strip() if token else None)
    try:
        address = hub.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not hub.repo_info(repo_id).private:
            raise UserError(
                f"'{repo_id}' is there already, and everybody sees it; choose another name, or make it private."
            )
        operations = [CommitOperationAdd(name, file) for name, file in prepared.files.items()]
        if hub.file_exists(repo_id, CARD):
            hooks.notify(f"The repository has a {CARD} already, which is kept; check the license in it.")
        else:
            operations.append(CommitOperationAdd(CARD, prepared.card.encode()))
        hub.create_commit(repo_id, operations, commit_message="Upload with spectral-diffusion")
    except UserError:
        raise
    except Exception as error:  # the hub's client raises nearly everything
        # Without the cause: what the client says may hold the login.
        raise UserError(f"Cannot publish {path} as '{repo_id}': {hub_problem(error)}.") from None
    return str(address)


def check_terms(license: str, consent: bool) -> None:
    """Refuse to publish without a license and a word of consent.

    Raises:
        UserError: one is missing.
    """
    if not license:
        raise UserError("What is published needs a license.", Fix("license", "openrail++", f"or {LICENSES}"))
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UserError(f"'{license}' is not how the hub spells a license; it knows openrail++, {LICENSES}.")
    if not consent:
        raise UserError(
            "Publish only what you may share: pictures of a person, or of a thing somebody else made, need their "
            "consent.",
            Fix("consent", "true", "to say that you have it"),
        )


def publication(path: Path, license: str = "") -> Publication:
    """What :func:`publish` would upload.

    Raises:
        UserError: nothing of ours is there.
    """
    if is_file(path) and path.suffix == ".safetensors":
        if not is_foreign(path):
            return Publication({ADAPTER_FILE: path}, adapter_card(load_adapter(path), license))
        card = path.with_suffix(".md")
        text = _exported_card(path, card, license)
        beside = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*.safetensors"))
        words = [file for file in beside if TOKEN in read_header(file)[1]]  # embeddings that the export wrote
        shown = [path.parent / name for name in PICTURE.findall(text)]
        files = [path, *words, *(file for file in shown if file.parent == path.parent and is_file(file))]
        return Publication({file.name: file for file in files}, text)
    if is_folder(path):
        inside = {
            file.relative_to(path).as_posix(): file
            for file in sorted(path.rglob("*"))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.name != CARD and not file.is_symlink()
        }
        manifest = read_manifest(path)
        if manifest is None:
            return Publication(inside, _exported_card(path, path / CARD, license))
        return Publication(inside, fused_card(path, manifest, license))
    raise UserError(
        f"There is nothing to publish at {path}: it is an adapter (.safetensors), a fused folder or an exported file."
    )


def adapter_card(adapter: Adapter, license: str = "") -> str:
    """The card of one adapter."""
    facts = {
        "method": adapter.method.name, "rank": adapter.rank, "slot": str(adapter.slot or ""),
        "trained numbers": f"{adapter.count():,}", "load it with": "`spectral_diffusion.Adapter.from_pretrained`",
    }  # fmt: skip
    base = without_folders(dict(adapter.config)).get("base", adapter.base)
    return model_card(
        adapter.name, without_folders(str(base)), dict.fromkeys(adapter.tokens, adapter.noun), facts, [ADAPTER_FILE],
        license=license, library="spectral-diffusion", words="They are in the file.",
    )  # fmt: skip


def fused_card(folder: Path, manifest: dict[str, object], license: str = "") -> str:
    """The card of a fused folder, a pipeline that stock diffusers opens."""
    concepts = manifest["concepts"]
    assert isinstance(concepts, dict)
    tokens = {str(about["token"]): str(about.get("noun", "")) for about in concepts.values()}
    facts = {"merge": manifest.get("merge"), "concepts": ", ".join(concepts)}
    return model_card(
        folder.resolve().name, str(without_folders(str(manifest.get("base", "")))), tokens, facts,
        ["a diffusers pipeline", MANIFEST], license=license, words="They are words of its tokenizer.",
    )  # fmt: skip


def _exported_card(path: Path, card: Path, license: str) -> str:
    """The card that an export wrote, with the license in its front matter.

    Raises:
        UserError: there is none.
    """
    text = read_text(card) if is_file(card) else ""
    if MARK not in text or not text.startswith("---\n"):
        raise UserError(
            f"{path} is neither an adapter nor a fused folder, nor an export of this program with its card."
        )
    if not license:
        return text
    text = "\n".join(
        TERMS[line.partition("** ")[0]].format(license) if line.partition("** ")[0] in TERMS else line
        for line in text.split("\n")
    )
    front, _, rest = text[4:].partition("---\n")
    named = re.search(r"^base_model: (.*)$", front, re.MULTILINE)
    if named and not is_repository(named[1]):
        front = front.replace(f"{named[0]}\n", "")
    return f"---\nlicense: {license}\n{front}---\n{rest}"
