"""Names of concepts and tokens, as text alone."""

from __future__ import annotations

import re
import unicodedata

from .errors import UserError

LETTERS = {
    **dict(zip("абвгдезиклмнопрстуфыэ", "abvgdeziklmnoprstufye", strict=True)),
    **dict(zip("αβγδεζηικλμνξοπρσςτυφω", "avgdeziiklmnxoprsstyfo", strict=True)),
    **{"ж": "zh", "х": "kh", "ц": "ts", "ч": "ch", "ш": "sh", "щ": "shch", "ъ": "", "ь": "", "ю": "yu", "я": "ya"},
    **{"θ": "th", "χ": "ch", "ψ": "ps"},
}

# How a noun begins where "an" precedes it, with the words whose first letter misleads.
VOWEL_SOUND = re.compile(r"(?!uni[^mn]|uku|use|usa|uten|eu|ewe|one\b|once)[aeiou]|hour|honest|heir", re.IGNORECASE)


def check_token(token: str) -> str:
    """The token in lower case, if it can be one.

    Tokenizers lower-case what they read, so diffusers finds only such tokens in its table of those with several
    vectors: of ``<Rex>`` it would take the first vector alone. Prompts may write it in any case.

    Raises:
        UserError: not of the form ``<name>``.
    """
    if not re.fullmatch(r"<[A-Za-z0-9][A-Za-z0-9_-]*>", token) or re.search(r"_\d+>?$", token):
        raise UserError(f"Token '{token}' must look like <rex>: letters, digits, - or _ between < and >.")
    return token.lower()


def check_name(name: str) -> str:
    """A concept's name if it can be a file's name too, in Unicode's composed form.

    Raises:
        UserError: it holds anything but letters, digits, spaces and ``. _ + -``, or begins with a dot.
    """
    name = unicodedata.normalize("NFC", name)
    if not is_name(name, 100) or name[0] in " ." or ".." in name:
        raise UserError(f"The name '{name[:60]}' cannot be a file's name; use letters, digits, . _ + or -.")
    return name


def is_name(text: str, most: int) -> bool:
    """Whether a text has 1 … ``most`` characters, all of them letters (of any script) with their marks, digits, spaces
    or ``. _ + -``."""
    others = {*" ._+-", "\u200c", "\u200d"}  # joiners belong to the spelling of Persian and Indian languages
    fine = (sign.isalnum() or sign in others or unicodedata.category(sign)[0] == "M" for sign in text)
    return 0 < len(text) <= most and all(fine)


def latin(text: str) -> str:
    """A text without accents: ``Müller`` to ``Muller``; other scripts stay."""
    parts = unicodedata.normalize("NFKD", text)
    return "".join(sign for sign in parts if unicodedata.category(sign)[0] != "M")


def slug(name: str) -> str:
    """Letters a … z, digits and ``-`` that stand for a name in any script, empty if it has no letters.

    Cyrillic and Greek are transliterated; of other scripts every letter's Unicode name is taken, which spells Korean
    and Japanese and numbers Chinese: ``собака`` to ``sobaka``, ``고양이`` to ``goyangi``, ``犬`` to ``72ac``.
    """
    spelled = "".join(map(_spelled, unicodedata.normalize("NFC", name)))
    return re.sub(r"[^A-Za-z0-9-]+", "-", spelled).strip("-")[:40].strip("-")


def _spelled(sign: str) -> str:
    plain = latin(sign)
    if plain.isascii():
        return plain
    low = (plain if len(plain) == 1 else sign).lower()  # Korean syllables come apart
    if low in LETTERS:
        return LETTERS[low]
    word = unicodedata.name(low, "").partition(" WITH ")[0].split(" ")[-1]
    return word.rpartition("-")[2].lower() if sign.isalnum() else "-"


def with_article(noun: str) -> str:
    """``a dog``, ``an octopus``, ``a unicorn``, ``an hourglass``."""
    return f"{'an' if VOWEL_SOUND.match(noun) else 'a'} {noun}"
