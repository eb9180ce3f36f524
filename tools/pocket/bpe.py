"""Byte-pair encoding of a list of words, the same on every machine: the library's trainer breaks ties by chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import pre_tokenizers

WORD_END = "</w>"
Pair = tuple[str, str]


def alphabet() -> list[str]:
    """What any text is written in: a letter for every byte, and the same at the end of a word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*letters, *(letter + WORD_END for letter in letters)]


def whole_words(words: Iterable[str]) -> list[Pair]:
    """Merges, in their order, that make each of the words one token; of equally frequent pairs the first by name."""
    parts = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(words))]
    merges: list[Pair] = []
    while counts := Counter(pair for word in parts for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        parts = [merged(word, best) for word in parts]
    return merges


def merged(word: list[str], pair: Pair) -> list[str]:
    """A word's parts with every such pair, from the left, as one."""
    out: list[str] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def vocabulary_of(merges: Iterable[Pair], special: Iterable[str]) -> dict[str, int]:
    """Tokens to their ids: letters, merges, special tokens."""
    tokens = [*alphabet(), *(first + second for first, second in merges), *special]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}
