"""A concept's own words: new token vectors, while they are trained and once they are known.

A token such as ``<rex>`` has several vectors under diffusers' multi-vector convention, ``<rex>``,
``<rex>_1``, …, so that stock pipelines expand it by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import Fix, UserError
from ..core.rng import keyed_generator

Tokenizer = object  # transformers' tokenizers share no public base class that knows add_tokens


def split_words(token: str, count: int) -> list[str]:
    """``<rex>`` with 2 vectors to ``['<rex>', '<rex>_1']``."""
    return [token, *(f"{token}_{index}" for index in range(1, count))]


def expand(prompt: str, tokens: dict[str, int]) -> str:
    """Write every token of a prompt out in full: ``<rex> dog`` or ``<REX> dog`` to ``<rex> <rex>_1 dog``."""
    for token, count in tokens.items():
        prompt = token_text(token).sub(" ".join(split_words(token, count)), prompt)
    return prompt


def collapse(prompt: str, tokens: dict[str, int]) -> str:
    """Write every token short: ``<rex> <rex>_1 dog`` to ``<rex> dog``, for pipelines that expand by themselves.

    Expanding twice would not be harmless: stock pipelines would find ``<rex>`` inside ``<rex>_1`` again.
    """
    for token in tokens:
        prompt = token_text(token).sub(token, prompt)
    return prompt


def token_text(token: str) -> re.Pattern[str]:
    """A token in a prompt, short or in full, in upper or lower case, which tokenizers do not tell apart."""
    escaped = re.escape(token)
    return re.compile(rf"{escaped}(?:\s+{escaped}_\d+)*", re.IGNORECASE)


def typed_tokens(text: str) -> set[str]:
    """Every ``<word>`` of a text, in lower case."""
    return {word.lower() for word in re.findall(r"<[\w-]+>", text)}


def known_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The multi-vector tokens that a tokenizer holds, with their numbers of vectors."""
    added = set(tokenizer.get_added_vocab())  # type: ignore[attr-defined]
    found = {}
    for token in sorted(added):
        if re.fullmatch(r"<[^<>|]+>", token):
            count = 1
            while f"{token}_{count}" in added:
                count += 1
            found[token] = count
    return found


def embedding_of(text_encoder: nn.Module) -> nn.Embedding:
    """The text encoder's token embedding."""
    return cast(Any, text_encoder).get_input_embeddings()


def mean_noun_vector(tokenizer: Tokenizer, text_encoder: nn.Module, noun: str) -> Tensor:
    """The class noun's embedding (width,), the mean of its tokens' if it has several.

    Raises:
        UserError: it has none.
    """
    ids = tokenizer(noun, add_special_tokens=False).input_ids  # type: ignore[operator]
    if not ids:
        raise UserError(
            f"The class noun '{noun}' is empty for this base's tokenizer.", Fix("class_noun", so="to name another")
        )
    return embedding_of(text_encoder).weight.detach()[ids].float().mean(0).cpu()


def random_vectors(count: int, like: Tensor, *key: int | str) -> Tensor:
    """Random vectors (count, width) about as long as ``like`` (width,); the key decides them.

    As long as a common word's: the spread of a whole embedding table may be that of its unused rows.
    """
    width = len(like)
    return torch.randn(count, width, generator=keyed_generator(*key)) * like.norm() / width**0.5


def initial_vectors(noun: Tensor, token: str, seed: int) -> Tensor:
    """Two vectors (2, width): one random, the token's own, and one a copy of the class noun.

    The random one must differ from concept to concept even at one seed: adapters learn to answer to it.
    """
    [first] = random_vectors(1, noun, seed, "token", token)
    return torch.stack([first, noun])


def add_token_rows(tokenizer: Tokenizer, text_encoder: nn.Module, token: str, vectors: Tensor) -> None:
    """Add a token with its vectors (n, width) as plain rows of the embedding.

    Raises:
        UserError: the tokenizer knows that token already.
    """
    add_rows(tokenizer, text_encoder, split_words(token, len(vectors)), vectors)


def add_rows(tokenizer: Tokenizer, text_encoder: nn.Module, names: list[str], vectors: Tensor) -> None:
    """Add words with a vector (width,) each as rows of the embedding; the new table keeps the old one's buffers.

    Raises:
        UserError: the tokenizer knows one of them already, in upper or lower case, which it does not tell apart.
    """
    known = {word.lower(): word for word in tokenizer.get_added_vocab()}  # type: ignore[attr-defined]
    if same := known.get(names[0].lower()):
        raise UserError(f"The token {same} is there already; give one of the concepts another token.")
    if tokenizer.add_tokens(names) != len(names):  # type: ignore[attr-defined]
        raise UserError(f"The token {names[0]} is there already; give one of the concepts another token.")
    old = embedding_of(text_encoder)
    ids = tokenizer.convert_tokens_to_ids(names)  # type: ignore[attr-defined]
    with torch.no_grad():
        table = old.weight.new_zeros(max(len(tokenizer), old.num_embeddings), old.embedding_dim)  # type: ignore[arg-type]
        table[: old.num_embeddings] = old.weight
        table[ids] = vectors.to(table)
    new = nn.Embedding.from_pretrained(table, freeze=True)
    for name, buffer in old.named_buffers():
        new.register_buffer(name, buffer, persistent=False)
    text_encoder.set_input_embeddings(new)  # type: ignore[operator]
    text_encoder.config.vocab_size = new.num_embeddings  # type: ignore[union-attr]


def pool_at_end(tokenizer: Tokenizer, text_encoder: nn.Module) -> None:
    """Let a text encoder's pooled output be read at the tokenizer's end token.

    Configs of before transformers 4.31, SDXL's among them, name another one, for which it is read at the largest id:
    that is the end token's only as long as there are no new words.
    """
    end = tokenizer.eos_token_id  # type: ignore[attr-defined]
    for module in text_encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end
    text_encoder.config.eos_token_id = end  # type: ignore[union-attr]


def ids_of(tokenizer: Tokenizer, tokens: Iterable[str]) -> list[int]:
    """The rows of tokens that the tokenizer holds, one after another."""
    known = known_tokens(tokenizer)
    return tokenizer.convert_tokens_to_ids([word for token in tokens for word in split_words(token, known[token])])  # type: ignore[attr-defined]


@contextmanager
def trainable_rows(tokenizer: Tokenizer, text_encoder: nn.Module, tokens: Iterable[str]) -> Iterator[nn.Parameter]:
    """The vectors (n, width) of tokens that are there already as one parameter, written into the table at the end.

    Only they are one: an optimizer's state for a whole table would be twice as large as the table.
    """
    table, ids = embedding_of(text_encoder), ids_of(tokenizer, tokens)
    weight = table.weight
    rows = nn.Parameter(weight.detach()[ids].float())
    places = torch.full((table.num_embeddings,), -1, device=weight.device)
    places[ids] = torch.arange(len(ids), device=weight.device)

    def act(module: nn.Module, args: tuple[Tensor], found: Tensor) -> Tensor:
        place = places[args[0]]
        return torch.where((place >= 0)[..., None], rows[place.clamp(min=0)].to(found.dtype), found)

    handle = table.register_forward_hook(act)
    try:
        yield rows
    finally:
        handle.remove()
        with torch.no_grad():
            weight[ids] = rows.to(weight.dtype)


class NewTokenEmbedding(nn.Module):
    """The frozen embedding of a base with new rows behind it: trainable ones of tokens, then frozen ones.

    ``words`` are the new words: the tokens' ``count``, ``each`` of every token, then the frozen ones. Vectors (layers,
    n, width) have a row for every layer and word, of which the words' own ids are the first layer's (see
    :mod:`.per_layer_tokens`).
    """

    frozen: Tensor

    def __init__(
        self,
        base: nn.Embedding,
        tokens: Sequence[str],
        vectors: Tensor,
        frozen_words: Sequence[str] = (),
        frozen: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.count, self.each = vectors.shape[-2], vectors.shape[-2] // len(tokens)
        self.words = [*(word for token in tokens for word in split_words(token, self.each)), *frozen_words]
        self.vectors = nn.Parameter(vectors.to(base.weight.device, torch.float32))
        rows = vectors.flatten(0, -2)[:0] if frozen is None else frozen[: len(frozen_words)]
        self.register_buffer("frozen", rows.to(self.vectors), persistent=False)
        if vectors.dim() == 3:
            ids = base.num_embeddings + torch.arange(len(vectors) * self.count).view(len(vectors), self.count)
            self.register_buffer("ladder", torch.cat([ids[:1], ids]).mT.to(self.vectors.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def id_of(self, word: str) -> int:
        """The id of one of the new words: behind the vocabulary, frozen ones behind the rows of every layer."""
        index = self.words.index(word)
        rows = self.vectors.shape[:-1].numel()
        return self.base.num_embeddings + (index if index < self.count else index + rows - self.count)

    def forward(self, ids: Tensor) -> Tensor:
        fresh = ids >= self.base.num_embeddings
        known = self.base(ids.masked_fill(fresh, 0))
        rows = torch.cat([self.vectors.flatten(0, -2), self.frozen])
        mine = F.embedding((ids - self.base.num_embeddings).clamp_min(0), rows)
        return torch.where(fresh[..., None], mine.to(known.dtype), known)
