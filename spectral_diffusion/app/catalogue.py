"""The page in other languages: one catalogue of English sentences, and the script that shows their translations.

The page translates itself in the browser, so that everything is covered alike: components, what the server sends later,
and our own HTML. gradio's own ``I18n`` covers labels and texts that never change, but no choices and no messages.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
LANGUAGES = {"de": "Deutsch", "zh": "中文"}  # beside English
PLACE = "const CATALOGUES = {};"  # in the script


@cache
def catalogue() -> dict[str, dict[str, str]]:
    """English sentences, each with its translation by language."""
    texts: dict[str, dict[str, str]] = json.loads((HERE / "catalogue.json").read_text(encoding="utf-8"))
    return texts


def head() -> str:
    """What goes into the page's head: the script with the catalogue."""
    by_language = {tag: {source: texts[tag] for source, texts in catalogue().items()} for tag in LANGUAGES}
    data = json.dumps(by_language, ensure_ascii=False).replace("</", "<\\/")
    script = (HERE / "translate.js").read_text(encoding="utf-8")
    return f"<script>{script.replace(PLACE, PLACE.replace('{}', data))}</script>"
