"""Two pictures beside each other, and the first picture without any training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_photos
from PIL import Image

from spectral_diffusion import pocket
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.app.canvas import Canvas, CanvasRegion, read_canvas
from spectral_diffusion.app.first_run import CONCEPTS, adopt, first_scene
from spectral_diffusion.app.generation import GenerateRequest
from spectral_diffusion.app.overview import look
from spectral_diffusion.app.pairs import generate_both, labels_of, other_request
from spectral_diffusion.app.workspace import Workspace
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.png_metadata import read_settings
from spectral_diffusion.slots.ledger import LEDGER, Ledger, SlotRequest
from spectral_diffusion.training.run import train_to_file

QUICK: dict[str, Any] = {"num_inference_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for seed, name in enumerate(("tom", "jim")):
        config = TrainConfig(
            concept=make_photos(folder / name, seed=seed), output=folder / "adapters" / f"{name}.safetensors",
            base=str(tiny_base), device="cpu", steps=1, rank=2, learning_rate=0.1, prior={"loss_weight": 0.0},
        )  # fmt: skip
        train_to_file(config)
    return folder / "adapters"


@pytest.fixture
def workspace(tmp_path: Path, adapters: Path) -> Workspace:
    workspace = Workspace(tmp_path / "workspace")
    shutil.copytree(adapters, workspace.adapters)
    return workspace


def scene_of(path: Path) -> dict[str, Any]:
    return dict(read_settings(path))


def test_both_pictures_differ_in_what_was_said_alone(workspace: Workspace, tiny_base: Path) -> None:
    first = GenerateRequest(base=str(tiny_base), adapters=["tom"], strength="1")
    second = other_request(first, None, None, "0.2")
    pair = generate_both(workspace, first, second, prompt="a <tom>", num_images=2, seed=5, **QUICK)
    assert len(pair.pictures) == 2 and pair.labels == ("strength 1", "strength 0.2")
    for one, two in pair.pictures:
        left, right = scene_of(one), scene_of(two)
        assert list(left["adapters"].values()) == [1.0] and list(right["adapters"].values()) == [0.2]
        for scene in (left, right):
            scene.pop("adapters")
            scene.pop("output", None)
        assert left == right
    assert pair.sheet is not None and pair.sheet.parent.parent == workspace.pictures
    with Image.open(pair.sheet) as sheet, Image.open(pair.pictures[0][0]) as picture:
        assert sheet.width > 2 * picture.width and sheet.height > 2 * picture.height


def test_what_is_different_is_asked_and_named() -> None:
    region = CanvasRegion((0.0, 0.0, 1.0, 1.0), "a <tom>", "tom")
    first = GenerateRequest(base="pocket", adapters=[], strength="", canvas=Canvas(regions=(region,)))
    for nothing in ((None, None, None), ("", [], "  ")):
        with pytest.raises(UserError, match="Say what is different"):
            other_request(first, *nothing)
    other = other_request(first, "fused/both", ["jim"], None)
    assert other.canvas.regions[0].concept == "" and first.canvas.regions[0].concept == "tom"
    assert labels_of(first, other) == ("pocket, tom", "fused/both, jim")
    assert other_request(first, "fused/both", None, None).canvas == first.canvas


def test_a_stop_leaves_no_half_pair(workspace: Workspace, tiny_base: Path) -> None:
    first = GenerateRequest(base=str(tiny_base), adapters=["tom"])
    pair = generate_both(
        workspace,
        first,
        other_request(first, None, None, "2"),
        Hooks(should_stop=lambda: True),
        prompt="a dog",
        **QUICK,
    )
    assert not pair.pictures and pair.sheet is None and "Stopped" in pair.message


# --- the first picture ---------------------------------------------------------------------------------------


def test_ready_made_adapters_are_of_the_pocket_base_in_slots_of_their_own() -> None:
    base = load_base("pocket", "cpu")
    made = [load_adapter(pocket.adapter(name)) for name in CONCEPTS]
    assert all(adapter.fingerprint and adapter.fingerprint.same(base.fingerprint) for adapter in made)
    assert made[0].slot and made[1].slot and not made[0].slot.overlaps(made[1].slot)
    home = str(Path.home())
    assert home == "/" or not any(home.encode() in pocket.adapter(name).read_bytes() for name in CONCEPTS)


def test_ready_made_adapters_are_taken_over_with_their_slots(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    assert look(workspace).first_run
    assert adopt(workspace) == list(CONCEPTS)
    overview = look(workspace)
    assert not overview.first_run and not overview.notes and not overview.problems
    [entries] = Ledger(workspace.adapters / LEDGER).read().values()
    assert set(entries) == set(CONCEPTS)
    mine = workspace.adapters / "rex.safetensors"
    mine.write_bytes(b"mine")
    adopt(workspace)
    assert mine.read_bytes() == b"mine"  # an own file stays


def test_a_taken_slot_is_a_sentence(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    made = load_adapter(pocket.adapter("rex"))
    assert made.fingerprint
    ledger = Ledger(workspace.adapters / LEDGER)
    for owner, rank in (("fido", 64), ("brew", 16)):  # of another, and of one that is being trained at another rank
        ledger.reserve(made.fingerprint.exact, owner, SlotRequest(rank, "next", 64))
        before = ledger.read()
        with pytest.raises(UserError, match=rf"The ready-made '.*' was trained in .* your '{owner}' has .* yourself"):
            adopt(workspace)
        assert ledger.read() == before and not list(workspace.adapters.glob("*.safetensors"))
        ledger.release(owner)
    ledger.path.write_text("damaged")
    with pytest.raises(UserError, match=r"slots\.json"):
        adopt(workspace)


def test_the_first_scene_fits_the_page() -> None:
    scene = first_scene()
    regions = read_canvas(scene.canvas).regions
    assert [region.concept for region in regions] == list(CONCEPTS)
    assert (scene.fields["width"], scene.fields["height"]) == (256, 128)


@pytest.mark.slow
def test_the_first_picture_shows_both(tmp_path: Path) -> None:
    """In seconds, and each in its own half by the identity encoder."""
    from spectral_diffusion.app.generation import generate
    from spectral_diffusion.core.assets import concepts
    from spectral_diffusion.data.folder import load_concept, open_photo
    from spectral_diffusion.metrics.encoders import load_encoder

    workspace = Workspace(tmp_path / "workspace")
    adopt(workspace)
    scene = first_scene()
    request = GenerateRequest(scene.base, scene.adapters, scene.strength, read_canvas(scene.canvas))
    drawn = generate(workspace, request, seed=scene.seed, **scene.fields)
    encoder = load_encoder("pocket")
    with Image.open(drawn.pictures[0]) as picture:
        halves = [picture.convert("RGB").crop((128 * side, 0, 128 * side + 128, 128)) for side in (0, 1)]
    looks = encoder.embed(halves)
    photos = [
        encoder.embed([open_photo(photo.path) for photo in load_concept(concepts() / name).photos]) for name in CONCEPTS
    ]
    means = [[float((half[None] @ mine.mT).mean()) for mine in photos] for half in looks]
    assert means[0][0] > means[0][1] and means[1][1] > means[1][0], means
