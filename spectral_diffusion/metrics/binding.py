"""What becomes of several subjects in one picture, in the words of MultiBind and of the subject collapse test.

MultiBind (arXiv 2603.21937) subtracts the similarity of the references from that of the generated subjects and names
four failures: drift, swap, dominance and blending. The Subject Collapse Rate (arXiv 2603.26078) is the share of
subjects that are lost. Neither has public code; the thresholds are ours, relative to what the encoder says of the
photos, so that they mean the same for every encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

RIGHT, DRIFT, BLENDING, SWAP, DOMINANCE = "right", "drift", "blending", "swap", "dominance"
KINDS = (RIGHT, DRIFT, BLENDING, SWAP, DOMINANCE)
KEPT = 0.5  # of the way from the nearest other subject's photos to one's own: at least that is still oneself
SEEN = 0.25  # of the way to another subject's photos: from there on that subject shows


def photo_similarity(references: Sequence[Tensor]) -> Tensor:
    """Mean cosines (k, k) of the subjects' photos with each other, a subject's own only with its other photos.

    Args:
        references: unit vectors (m, d) of the photos of each subject; of a single photo 1 is assumed.
    """
    centers = torch.stack([vectors.mean(0) for vectors in references])
    truth = centers @ centers.mT
    for index, vectors in enumerate(references):
        count = len(vectors)
        truth[index, index] = 1.0 if count == 1 else (truth[index, index] * count - 1) / (count - 1)
    return truth


def binding_of(similarity: Tensor, truth: Tensor) -> list[str]:
    """What became of each of k subjects in one picture.

    ======================  ==========================================================================
    :data:`RIGHT`           its place shows it, more than half of the way from the nearest other subject
    :data:`DRIFT`           its place shows neither it nor another subject
    :data:`BLENDING`        its place shows it and another subject at once
    :data:`SWAP`            its place shows another subject, which is not in its own place
    :data:`DOMINANCE`       its place shows another subject, which is in its own place too
    ======================  ==========================================================================

    Args:
        similarity: (k, k) of each place (row) with each subject's photos (column).
        truth: :func:`photo_similarity` of the same subjects.
    """
    k = len(truth)
    if k < 2:
        raise ValueError("binding is about two subjects or more")
    own = truth.diagonal()
    others = truth.masked_fill(torch.eye(k, dtype=torch.bool, device=truth.device), -torch.inf)
    # 0: as near as the nearest other subject is to it anyway, 1: as near as its own photos are to each other.
    nearest_other = others.max(1).values
    kept = (similarity.diagonal() - nearest_other) / (own - nearest_other).clamp(min=1e-6) >= KEPT
    # Of the way from what the two subjects share anyway to the other's own photos.
    gained = (similarity - truth) / (own[None] - truth).clamp(min=1e-6)
    gained.fill_diagonal_(-torch.inf)
    shown = similarity.argmax(1)
    kinds = []
    for index in range(k):
        nearest = int(shown[index])
        another = bool((gained[index] >= SEEN).any())
        if nearest == index:
            kinds.append(RIGHT if kept[index] else BLENDING if another else DRIFT)
        elif float(gained[index, nearest]) < SEEN:
            kinds.append(DRIFT)
        elif kept[index]:
            kinds.append(BLENDING)
        else:
            kinds.append(DOMINANCE if int(shown[nearest]) == nearest else SWAP)
    return kinds


def binding_counts(pictures: Sequence[Sequence[str]]) -> dict[str, int]:
    """How many subjects of these pictures are of each kind."""
    every = [kind for kinds in pictures for kind in kinds]
    return {kind: every.count(kind) for kind in KINDS}


def collapse_rate(counts: Mapping[str, int]) -> float:
    """The Subject Collapse Rate: the share of subjects that are not right."""
    return 1 - counts[RIGHT] / sum(counts.values())


def collapsed_pictures(pictures: Sequence[Sequence[str]]) -> float:
    """The share of pictures in which a subject is lost."""
    return sum(any(kind != RIGHT for kind in kinds) for kinds in pictures) / len(pictures)
