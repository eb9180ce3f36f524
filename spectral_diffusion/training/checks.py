"""Checks of a concept's photos and captions before training: notes and refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..config.train import TrainConfig
from ..core.errors import UserError, nearest
from ..data.folder import Concept, and_more
from ..models.prompt_encoder import PromptEncoder
from .batch import caption_templates

SHOWN = 3  # captions that are named one by one


def notes_on(concept: Concept, condition: PromptEncoder, config: TrainConfig) -> Iterator[str]:
    """All notes on a concept that is about to be trained.

    Raises:
        UserError: a caption whose token the base would never see.
    """
    yield from notes_on_photos(concept, config, condition.size)
    yield from few(list(unknown_tokens(concept, condition)))
    yield from few(list(cut_captions(concept, condition, config)))


def notes_on_photos(concept: Concept, config: TrainConfig, size: int) -> Iterator[str]:
    """Drawings that are left out, photos that lack what others have, and photos that are enlarged.

    Args:
        size: side in pixels of what is trained on.
    """
    photos = concept.photos
    if concept.control_images:
        names = and_more([path.name for path in concept.control_images], SHOWN)
        yield f"Left out, as drawings of the photos: {names}."
    bare = sum(photo.caption is None for photo in photos)
    if 0 < bare < len(photos):
        yield f"{bare} of {len(photos)} photos have no caption; the templates are used instead."
    unmasked = sum(photo.mask is None for photo in photos)
    if (config.data.mask_weight or config.objective.attention_loss_weight) and 0 < unmasked < len(photos):
        yield f"{unmasked} of {len(photos)} photos have no mask and count as a whole."
    small = [photo for photo in photos if is_small_photo(photo.size, size, config.data.aspect_buckets)]
    if small:
        names = and_more([f"{photo.path.name} ({photo.size[0]}×{photo.size[1]})" for photo in small], SHOWN)
        yield f"Smaller than the resolution of {size} and enlarged: {names}."


def is_small_photo(sides: tuple[int, int], size: int, buckets: bool) -> bool:
    """Whether a photo (width, height) has fewer pixels than the crops that are made of it."""
    return sides[0] * sides[1] < size * size if buckets else min(sides) < size


def unknown_tokens(concept: Concept, condition: PromptEncoder) -> Iterator[str]:
    """A sentence for every word of a caption that is written as a token and is none."""
    own = [each.token for each in (concept, *concept.joint)]
    known = {*own, "<TOK>"}.union(*condition.known.values())
    for photo in concept.photos:
        named = set(re.findall(r"<[^<>|\s]+>", photo.caption or "")) - known
        for word in sorted(named):
            if word.lower() not in {token.lower() for token in own}:
                yield (
                    f"The caption of {photo.path.name} names {word[:40]}, which is no token of this training or its "
                    f"base{nearest(word, known)}; it is read as plain text."
                )


def cut_captions(concept: Concept, condition: PromptEncoder, config: TrainConfig) -> Iterator[str]:
    """A sentence for every caption and template that is longer than the base reads.

    Raises:
        UserError: the concept's own token is cut off, or may be where parts of captions are shuffled.
    """
    texts: dict[str, tuple[str, str]] = {}
    for photo in concept.photos:
        token = concept.token_of(photo)
        if photo.caption:
            texts[f"caption of {photo.path.name}"] = photo.caption, token
        else:
            texts |= {f"template '{text[:40]}'": (text, token) for text in caption_templates(config, concept)}
    for source, (text, token) in texts.items():
        prompt = concept.prompt(text, token)
        lost, used = condition.truncated_text(prompt)
        if not lost:
            continue
        if not used:
            raise UserError(
                f"The {source} is longer than this base reads, and {token} is in the part that is cut off; "
                "move it nearer to the front."
            )
        front = ", ".join(part.strip() for part in prompt.split(",")[: config.data.keep_tokens])
        if config.data.shuffle_caption and not (token in front and condition.truncated_text(front)[1]):
            raise UserError(
                f"The {source} is longer than this base reads, and data.shuffle_caption can move {token} into "
                "the part that is cut off; move it into the first data.keep_tokens parts."
            )
        yield f"The {source} is longer than this base reads; cut off: '{lost[:80]}'."


def few(sentences: Sequence[str]) -> list[str]:
    """The first sentences, and how many more there are."""
    left = len(sentences) - SHOWN
    return [*sentences[:SHOWN], *([f"And {left} more captions like the last one."] if left > 0 else [])]
