"""What mkdocs cannot find in docs/: the front page, pages from the root of the repository, and generated references.

mkdocs calls the functions ``on_…`` by their names.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # mkdocs runs this file alone
BORROWED = {  # page to its file in the repository
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "licenses.md": "spectral_diffusion/pocket/LICENSES.md",
    "comfyui.md": "integrations/comfyui/README.md",
}
PYTHON = (  # modules with classes that people use from Python, and what they are
    ("spectral_diffusion.api", "Everything under `import spectral_diffusion as sd` ([with examples](../api.md))."),
    ("spectral_diffusion.core.hooks", "Follow and stop long jobs."),
    ("spectral_diffusion.core.errors", "Errors that a person can fix."),
    ("spectral_diffusion.methods.registry", "Register a method."),
    ("spectral_diffusion.merging.merges.registry", "Register a merge."),
    ("spectral_diffusion.slots.ledger", "Slots and their ledger."),
    ("spectral_diffusion.models.denoiser", "What a model family has to do."),
    ("spectral_diffusion.linalg", "The mathematics."),
)
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are elsewhere."""
    for page, source in BORROWED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=with_links(text, source, page)))
    files.append(File.generated(config, "reference/python.md", content=python_page()))
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links out of docs/ at the pages that were made of those files."""
    source = page.file.src_uri
    known = source in BORROWED or source.startswith("reference/")
    return markdown if known else with_links(markdown, f"docs/{source}", source)


def with_links(text: str, source: str, page: str) -> str:
    """A file's text with its links as they are on its page; files that are on no page become plain text."""
    pages = {file: name for name, file in BORROWED.items()}

    def relinked(match: re.Match[str]) -> str:
        label, target = match.groups()
        path, hash_sign, anchor = target.partition("#")
        file = (ROOT / source).parent.joinpath(path).resolve()
        if not file.exists() or not file.is_relative_to(ROOT):
            return match[0]  # for the strict build to refuse
        inside = file.relative_to(ROOT).as_posix()
        inside = f"{inside}/README.md" if file.is_dir() and (file / "README.md").is_file() else inside
        goal = pages.get(inside) or (inside.removeprefix("docs/") if inside.startswith("docs/") else None)
        if goal is None or (ROOT / inside).is_dir():
            return f"`{inside}`" if label in (inside, Path(inside).name) else f"{label} (`{inside}`)"
        up = "../" * page.count("/")
        return f"[{label}]({up}{goal}{hash_sign}{anchor})"

    return LINK.sub(relinked, text)


def python_page() -> str:
    """The page that mkdocstrings fills from docstrings."""
    lines = ["# Python reference", ""]
    for module, about in PYTHON:
        lines += [f"## {module.removeprefix('spectral_diffusion.')}", "", about, ""]
        lines += [f"::: {module}", "    options:", "      show_root_heading: false", "      heading_level: 3", ""]
    return "\n".join(lines)


def cli_page() -> str:
    """Every verb's help."""
    import typer

    from spectral_diffusion.cli.verbs import app

    group: Any = typer.main.get_command(app)
    lines = ["# Command line", "", "`spectral-diffusion VERB --help` prints the same.", ""]
    for name in group.list_commands(None):
        lines += verb_help(group.get_command(None, name), f"spectral-diffusion {name}")
    return "\n".join(lines)


def verb_help(command: Any, name: str) -> list[str]:
    """A verb's help and that of the verbs in it."""
    from typer.testing import CliRunner

    from spectral_diffusion.cli.verbs import app

    words = name.split()[1:]
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"}).output
    shown = re.sub(r"^Usage: \S+", "Usage: spectral-diffusion", shown.strip())
    lines = [f"## {name.partition(' ')[2]}", "", "```text", shown, "```", ""]
    for part in getattr(command, "commands", {}):
        lines += verb_help(command.commands[part], f"{name} {part}")
    return lines
