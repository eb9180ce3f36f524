"""Prompts to what a U-Net is conditioned on, while a concept's words are trained: SD 1.x, 2.x and SDXL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor, nn

from ..core.machine import to_device
from .base import Base
from .denoiser import Conditioning
from .tokens import (
    NewTokenEmbedding,
    collapse,
    embedding_of,
    expand,
    initial_vectors,
    known_tokens,
    mean_noun_vector,
    random_vectors,
)


class Words(Protocol):
    """What a concept is called: its token and its class noun."""

    @property
    def token(self) -> str: ...

    @property
    def noun(self) -> str: ...


def trigger_words(concept: Words) -> str:
    """A concept's name in prompts on a base whose text encoder learns no words: its token's letters and its noun."""
    return f"{concept.token.strip('<>')} {concept.noun}"


class PromptEncoder:
    """Called with prompts it encodes them for the network. As a context it puts the concept's tokens in place.

    Args:
        joint: further concepts whose tokens are trained beside the concept's.
        frozen: more words, random and never trained, that prompts may hold.
        size: side of square pictures in pixels.
        layers: train separate vectors of the token for this many cross-attention layers; 0: one set for all. Separate
            ones give the long form, inside :func:`.per_layer_tokens.per_layer_attention`.
    """

    def __init__(
        self,
        base: Base,
        concept: Words,
        seed: int,
        size: int,
        frozen: Sequence[str] = (),
        layers: int = 0,
        joint: Sequence[Words] = (),
    ) -> None:
        self.base, self.concepts, self.size = base, (concept, *joint), size
        self.embeddings = {name: embedding_of(base.models[name]) for name in base.tokenizers}
        self.known = {name: known_tokens(tokenizer) for name, tokenizer in base.tokenizers.items()}
        self.tokens: dict[str, NewTokenEmbedding] = {}
        for name, embedding in self.embeddings.items():
            nouns = [mean_noun_vector(base.tokenizers[name], base.models[name], each.noun) for each in self.concepts]
            others = random_vectors(len(frozen), nouns[0], seed, "others", concept.token)
            rows = torch.cat(
                [initial_vectors(noun, each.token, seed) for noun, each in zip(nouns, self.concepts, strict=True)]
            )
            rows = rows.repeat(layers, 1, 1) if layers else rows
            words = [each.token for each in self.concepts]
            self.tokens[name] = NewTokenEmbedding(embedding, words, rows, frozen, others)
        self.initial_norm = {name: mean_norms(tokens) for name, tokens in self.tokens.items()}

    def __enter__(self) -> PromptEncoder:
        for name, tokens in self.tokens.items():
            self.base.models[name].set_input_embeddings(tokens)  # type: ignore[operator]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, embedding in self.embeddings.items():
            self.base.models[name].set_input_embeddings(embedding)  # type: ignore[operator]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The token's trained rows, ``token.<text encoder>``."""
        return {f"token.{name}": tokens.vectors for name, tokens in self.tokens.items()}

    def vectors(self, concept: int = 0) -> dict[str, Tensor]:
        """Copies of a token's rows by text encoder, (n, width) each; the mean of the layers' where they differ."""
        out = {}
        for name, tokens in self.tokens.items():
            own = slice(concept * tokens.each, (concept + 1) * tokens.each)
            rows = tokens.vectors.detach()[..., own, :].cpu().clone()
            out[name] = rows.mean(0) if rows.dim() == 3 else rows
        return out

    def joint_vectors(self) -> dict[str, dict[str, Tensor]]:
        """The same of the further concepts' tokens, by token."""
        return {each.token: self.vectors(index) for index, each in enumerate(self.concepts) if index}

    def per_layer_vectors(self) -> dict[str, Tensor]:
        """Copies of the rows of every layer by text encoder, (layers, n, width) each; none where they are the same."""
        copies = {name: tokens.vectors.detach().cpu().clone() for name, tokens in self.tokens.items()}
        return {name: rows for name, rows in copies.items() if rows.dim() == 3}

    @contextmanager
    def frozen_beyond_norm(self, limit: float) -> Iterator[None]:
        """While the optimizer takes a step, freeze tokens whose mean norm has reached ``limit`` times the first one.

        It never asks the device which rows these are, as the answer would have to be waited for.
        """
        kept = []
        with torch.no_grad():
            for name, tokens in self.tokens.items():
                rows = tokens.vectors
                free = (mean_norms(tokens) < limit * self.initial_norm[name]).repeat_interleave(tokens.each)[:, None]
                if rows.grad is not None:
                    rows.grad.mul_(free)
                kept.append((rows, free, rows.detach().clone()))
        yield
        with torch.no_grad():
            for rows, free, before in kept:
                rows.copy_(torch.where(free, rows, before))

    def __call__(self, prompts: Sequence[str], shape: Sequence[int] | None = None) -> Conditioning:
        """What the network is given beside latents of a ``shape`` (height, width); default: square pictures."""
        if not self.tokens:
            return self._frozen(prompts)
        ids = {name: self.token_ids(name, prompts) for name in self.tokens}
        denoiser = self.base.denoiser
        height, width = (denoiser.vae_scale * cells for cells in shape) if shape else (self.size, self.size)
        return denoiser.encode_ids(ids, [not prompt for prompt in prompts], (height, width))

    def _frozen(self, prompts: Sequence[str]) -> Conditioning:
        """The same of a family without words to learn."""
        return self.base.denoiser.encode([self._spelled(prompt) for prompt in prompts])

    def _spelled(self, prompt: str) -> str:
        """A prompt as a pipeline takes it, with the trigger in place of the concept's token."""
        for concept in self.concepts:
            words = trigger_words(concept).replace("\\", r"\\")
            prompt = re.sub(re.escape(concept.token), words, prompt, flags=re.IGNORECASE)
        return self.base.spell(prompt)

    def token_mask(self, prompts: Sequence[str]) -> Tensor:
        """Which words of the prompts are a trained token's, (n, length), as the first text encoder counts them."""
        name, tokens = next(iter(self.tokens.items()))
        place = self.token_ids(name, prompts) - tokens.base.num_embeddings
        return (place >= 0) & (place < tokens.count)

    def token_ids(self, name: str, prompts: Sequence[str]) -> Tensor:
        """Token ids (n, length); new words get the ids behind the vocabulary, in their order."""
        tokenizer = self.base.tokenizers[name]
        rows = []
        for prompt in prompts:
            row = [number for _, numbers in self.split_prompt(name, prompt) for number in numbers]
            row = [tokenizer.bos_token_id, *row[: tokenizer.model_max_length - 2], tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(row)))
        return to_device(torch.tensor(rows), self.tokens[name].vectors.device)

    def split_prompt(self, name: str, prompt: str) -> list[tuple[str, list[int]]]:
        """A prompt cut at the new words, each part with its ids; the base's own tokens are written out in full."""
        tokenizer, tokens = self.base.tokenizers[name], self.tokens[name]
        known = self.known[name]
        written = expand(collapse(prompt, known), known | {each.token: tokens.each for each in self.concepts})
        return [
            (part, [tokens.id_of(part)])
            if part in tokens.words
            else (part, tokenizer(part, add_special_tokens=False).input_ids)
            for part in split_keep(written, tokens.words)
        ]

    def truncated_text(self, prompt: str) -> tuple[str, bool]:
        """The end of a prompt that a text encoder never sees, and whether it sees the concept's own word."""
        if not self.tokens:
            written = self._spelled(prompt)
            end = self.base.denoiser.unread_text(written)
            return end, any(trigger_words(each) in written.removesuffix(end) for each in self.concepts)
        for name, tokens in self.tokens.items():
            tokenizer = self.base.tokenizers[name]
            room, lost, seen = tokenizer.model_max_length - 2, [], False
            ends = tokens.words[tokens.each - 1 : tokens.count : tokens.each]
            for part, numbers in self.split_prompt(name, prompt):
                seen = seen or (part in ends and room > 0)
                if rest := numbers[max(0, room) :]:
                    lost.append(part if part in tokens.words else tokenizer.decode(rest))
                room -= len(numbers)
            if lost:
                return collapse(" ".join(lost), {each.token: tokens.each for each in self.concepts}).strip(), seen
        return "", True


def mean_norms(tokens: NewTokenEmbedding) -> Tensor:
    """The mean norm of each token's trained rows, (tokens,)."""
    norms = tokens.vectors.detach().norm(dim=-1).unflatten(-1, (-1, tokens.each))
    return norms.movedim(-2, 0).flatten(1).mean(1)


def split_keep(text: str, names: list[str]) -> list[str]:
    """Cut a text at the given words, keeping them as parts of their own."""
    longest_first = sorted(names, key=len, reverse=True)
    return [p.strip() for p in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if p.strip()]
