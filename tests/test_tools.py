"""The pocket world's own drawings: puppets and their keypoints, concepts that no pretraining shows, measures."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.metrics.classifiers import BACKDROPS, CLASSIFIERS, HEADS, NOUNS, TINTS, windows
from spectral_diffusion.metrics.identity import IdentityEncoder, auc
from spectral_diffusion.scenes.keypose import COLORS as POSE_COLOURS
from spectral_diffusion.scenes.keypose import POINTS, draw_keypose
from tools.pocket import puppets
from tools.pocket.art import HELD_OUT, PRETRAINING
from tools.pocket.concepts import CONCEPTS, PATTERNS, Look, noun_of, where_second
from tools.pocket.identity import near_miss, random_look
from tools.pocket.judges import TRAINED
from tools.pocket.render import Renderer, WorldConfig
from tools.pocket.report import edge_f1, iou, silhouette
from tools.pocket.world import CLASSES, COLOURS, PLAIN, SETTINGS, Backdrop, Thing

CONCEPT_FOLDER = Path(__file__).parent.parent / "concepts"


@pytest.mark.parametrize("noun", puppets.NOUNS)
def test_a_puppets_keypoints_lie_on_its_drawing(noun: str) -> None:
    random = Random(f"test/{noun}")
    for word in (*puppets.POSES, "", ""):
        look = puppets.random_look(random, noun, (200, 30, 40))
        image, points = puppets.draw_figure(puppets.random_pose(random, word), look, 96)
        assert image.height == 96 and points.shape == (POINTS, 2)
        drawn = np.asarray(image.getchannel("A").filter(ImageFilter.MaxFilter(5))) > 0
        for x, y in points:
            column, row = (int(np.clip(round(v), 0, top - 1)) for v, top in ((x, image.width), (y, image.height)))
            assert drawn[row, column]


def test_poses_mean_what_they_say() -> None:
    look = puppets.random_look(Random(0), "robot", (10, 200, 30))
    jump, stand = (puppets.joints(puppets.POSES[word][0], look) for word in ("jumping", "standing"))
    wrists, shoulders = [4, 7], [2, 5]
    assert (jump[wrists, 1] < jump[shoulders, 1]).all() and (stand[wrists, 1] > stand[shoulders, 1]).all()
    assert np.ptp(jump[[10, 13], 0]) > np.ptp(stand[[10, 13], 0])


def test_keyposes_have_openpose_colours_and_leave_out_unseen_points() -> None:
    person = np.stack([np.linspace(10, 110, POINTS), np.linspace(20, 100, POINTS)], 1)
    pixels = np.asarray(draw_keypose([person], 128, 128, thickness=6))
    for (x, y), colour in zip(person, POSE_COLOURS, strict=True):
        assert np.abs(pixels[round(y), round(x)].astype(int) - colour).max() < 40
    assert not np.asarray(draw_keypose([np.full((POINTS, 2), np.nan)], 64, 64)).any()


def test_puppet_scenes_tell_poses_and_keypoints() -> None:
    world = WorldConfig(puppets=1.0)
    picture = Renderer({}).render(
        Random(3), world, [Thing("robot", "red", "jumping"), Thing("bear", "blue")], Backdrop(None, "white"), 128, 64
    )
    assert "a jumping red robot" in picture.caption and "a blue bear" in picture.caption
    assert len(picture.people) == 2 and picture.image.shape == (64, 128, 3)
    centres = sorted(person[:, 0].mean() for person in picture.people)
    assert centres[0] < 64 < centres[1]
    for person in picture.people:
        inside = person[(person >= 0).all(1) & (person < [128, 64]).all(1)].astype(int)
        assert picture.mask[inside[:, 1], inside[:, 0]].mean() > 0.7


def test_the_concepts_are_look_alikes_that_no_pretraining_shows() -> None:
    assert len(CONCEPTS) >= 10 and HELD_OUT not in PRETRAINING
    nouns = [noun_of(look) for look in CONCEPTS.values()]
    assert all(nouns.count(noun) >= 2 for noun in ("octopus", "dog", "teapot"))
    assert sum(isinstance(look, puppets.Look) for look in CONCEPTS.values()) >= 3
    palette = np.array(list(COLOURS.values()), float)
    for name, look in CONCEPTS.items():
        concept = load_concept(CONCEPT_FOLDER / name)
        assert concept.name == name and concept.noun == noun_of(look) and 6 <= len(concept.photos) <= 8
        assert not concept.skipped and all(photo.caption for photo in concept.photos)
        if isinstance(look, Look):
            assert look.drawing == HELD_OUT and look.pattern in PATTERNS
            assert max(np.abs(palette - colour).sum(1).min() for colour in (look.first, look.second)) > 60
        else:  # pretraining's puppets never wear anything extra
            assert look.extra and not any(puppets.random_look(Random(i), look.kind, (1, 2, 3)).extra for i in range(50))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_shows_both_colours(pattern: str) -> None:
    share = where_second(pattern, 80, 60).mean()
    assert 0.15 < share < 0.85


def test_near_misses_differ_in_one_thing() -> None:
    random = Random(1)
    for _ in range(200):
        look = random_look(random)
        other = near_miss(look, random)
        assert other != look and type(other) is type(look)
        assert not isinstance(look, Look) or look.drawing in PRETRAINING


def test_the_identity_encoder_gives_unit_vectors_of_a_few_megabytes() -> None:
    encoder = IdentityEncoder()
    vectors = encoder(torch.randn(3, 3, 128, 128))
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert sum(p.numel() for p in encoder.parameters()) * 2 < 5e6


def test_auc_counts_pairs() -> None:
    assert auc(torch.tensor([3.0, 4]), torch.tensor([1.0, 2])) == 1
    assert auc(torch.tensor([1.0, 4]), torch.tensor([2.0, 3])) == 0.5
    assert auc(torch.tensor([1.0]), torch.tensor([1.0])) == 0.5


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_judges_answer_every_question(name: str) -> None:
    answers = CLASSIFIERS[name]().eval()(torch.randn(2, 3, 128, 128))
    assert {head: tuple(logits.shape) for head, logits in answers.items()} == {h: (2, n) for h, n in HEADS.items()}
    assert len(NOUNS) >= 43


def test_windows_cut_a_picture_from_left_to_right() -> None:
    pixels = np.zeros((128, 256, 3), np.uint8)
    pixels[:, 128:] = 255
    left, right = windows(Image.fromarray(pixels), 2)
    assert left.size == right.size == (128, 128)
    assert np.asarray(left).mean() < 40 and np.asarray(right).mean() > 215


def test_measures_tell_right_from_wrong() -> None:
    one, two = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    one[10:40, 20] = True
    two[10:40, 50] = True
    assert edge_f1(one, one) == 1 and edge_f1(one, np.roll(one, 1, 1)) == 1 and edge_f1(one, two) == 0
    assert iou(one, one) == 1 and iou(one, two) == 0
    pixels = np.full((64, 64, 3), 240, np.uint8)
    pixels[20:50, 20:40] = (200, 30, 30)
    found = silhouette(Image.fromarray(pixels))
    assert found[20:50, 20:40].all() and found.sum() == 600


def test_the_judges_words_are_the_worlds() -> None:
    assert (*list(CLASSES)[:TRAINED], *puppets.NOUNS) == NOUNS
    assert (*COLOURS, "own") == TINTS and (*SETTINGS, *PLAIN) == BACKDROPS
