"""The words for what becomes of several subjects in one picture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spectral_diffusion.metrics.binding import (
    BLENDING,
    DOMINANCE,
    DRIFT,
    RIGHT,
    SWAP,
    binding_counts,
    binding_of,
    collapse_rate,
    collapsed_pictures,
    photo_similarity,
)


def photos_of(subject: int) -> torch.Tensor:
    noise = torch.randn(5, 6, generator=torch.Generator().manual_seed(subject))
    return F.normalize(torch.eye(6)[subject] + 0.2 * noise, dim=1)


REFERENCES = [photos_of(subject) for subject in range(3)]
TRUTH = photo_similarity(REFERENCES)


def seen(*places: torch.Tensor) -> list[str]:
    """What becomes of the three subjects if these vectors are in their places."""
    centers = torch.stack([vectors.mean(0) for vectors in REFERENCES])
    return binding_of(torch.stack([F.normalize(place, dim=0) for place in places]) @ centers.mT, TRUTH)


A, B, C = (vectors.mean(0) for vectors in REFERENCES)
NOTHING = torch.eye(6)[5]


def test_photos_are_compared_with_their_own_others() -> None:
    vectors = REFERENCES[0]
    pairs = vectors @ vectors.mT
    off = pairs[~torch.eye(5, dtype=torch.bool)]
    assert torch.allclose(TRUTH[0, 0], off.mean(), atol=1e-6)
    assert torch.allclose(TRUTH[0, 1], (vectors @ REFERENCES[1].mT).mean(), atol=1e-6)
    assert float(photo_similarity([vectors[:1], REFERENCES[1]])[0, 0]) == 1


@pytest.mark.parametrize(
    "places, kinds",
    [
        ((A, B, C), [RIGHT, RIGHT, RIGHT]),
        ((B, A, C), [SWAP, SWAP, RIGHT]),
        ((B, C, A), [SWAP, SWAP, SWAP]),
        ((A, A, A), [RIGHT, DOMINANCE, DOMINANCE]),
        ((A, NOTHING, C), [RIGHT, DRIFT, RIGHT]),
        ((B, NOTHING, C), [SWAP, DRIFT, RIGHT]),
        ((NOTHING, NOTHING, NOTHING), [DRIFT, DRIFT, DRIFT]),
        ((0.5 * A + 0.4 * B + NOTHING, B, C), [BLENDING, RIGHT, RIGHT]),
    ],
)
def test_each_failure_has_its_word(places: tuple[torch.Tensor, ...], kinds: list[str]) -> None:
    assert seen(*places) == kinds


def test_look_alikes_are_judged_by_what_tells_them_apart() -> None:
    """Two subjects whose photos are near each other: neither drifts by being like the other as much as photos are."""
    truth = torch.tensor([[0.9, 0.7], [0.7, 0.9]])
    assert binding_of(truth.clone(), truth) == [RIGHT, RIGHT]
    assert binding_of(torch.tensor([[0.75, 0.74], [0.70, 0.88]]), truth)[0] == DRIFT
    assert binding_of(torch.tensor([[0.77, 0.76], [0.70, 0.88]]), truth)[0] == BLENDING


def test_rates_count_subjects_and_pictures() -> None:
    pictures = [[RIGHT, RIGHT], [RIGHT, DRIFT], [SWAP, SWAP]]
    counts = binding_counts(pictures)
    assert counts == {RIGHT: 3, DRIFT: 1, BLENDING: 0, SWAP: 2, DOMINANCE: 0}
    assert collapse_rate(counts) == pytest.approx(0.5) and collapsed_pictures(pictures) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="two subjects"):
        binding_of(torch.ones(1, 1), torch.ones(1, 1))
