"""What a step sees: masks go with their photos, buckets lose none, caches keep the bits, captions vary as asked."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_photos
from PIL import Image
from pydantic import ValidationError

from spectral_diffusion.config.settings import build
from spectral_diffusion.config.train import DataConfig, TrainConfig
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.core.rng import keyed_generator
from spectral_diffusion.data import latents_cache as cache
from spectral_diffusion.data import samples as samples_module
from spectral_diffusion.data.captions import vary
from spectral_diffusion.data.crops import best_frame, bucket_frames, choose_crop, crops_of, cut_mask, cut_photo
from spectral_diffusion.data.folder import Concept, load_concept
from spectral_diffusion.data.masks import LEAST, loss_weights, reduce_mask
from spectral_diffusion.data.order import Order
from spectral_diffusion.data.samples import PhotoCrops
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.vae import at_once, decode, encode
from spectral_diffusion.training.batch import sample_batch
from spectral_diffusion.training.losses import weighted_mse
from spectral_diffusion.training.run import train_to_file

SHAPES = [(24, 20), (20, 20), (40, 20), (20, 40), (60, 20), (21, 20)]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base), "cpu")


def settings(folder: Path, **more: object) -> TrainConfig:
    """Tiny settings; keywords of DataConfig go there."""
    data = {name: more.pop(name) for name in list(more) if name in DataConfig.model_fields}
    values = {"concept": folder, "output": folder / "a.safetensors", "rank": 2, "steps": 6, "device": "cpu", **more}
    return TrainConfig(**values, data=DataConfig(**data))  # type: ignore[arg-type]


def make_shapes(folder: Path, shapes: Iterable[tuple[int, int]] = SHAPES, masks: bool = False) -> Path:
    """Photos of these sizes; their left halves bright, and white in the masks."""
    (folder / "masks").mkdir(parents=True)
    for index, (width, height) in enumerate(shapes):
        pixels = np.random.default_rng(index).integers(0, 90, (height, width, 3), dtype=np.uint8)
        pixels[:, : width // 2] += 160
        Image.fromarray(pixels).save(folder / f"{index}.png")
        if masks:
            mask = np.zeros((height, width), np.uint8)
            mask[:, : width // 2] = 255
            Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    return folder


# --- crops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["random", "center", "head"])
@pytest.mark.parametrize("frame", [(16, 16), (24, 8), (8, 24)])
def test_a_mask_goes_with_its_photo_under_every_crop_and_flip(where: str, frame: tuple[int, int]) -> None:
    """A photo that is its own mask must stay so; only along edges may the two kinds of resizing differ."""
    dice = np.random.default_rng(0)
    mirrored, alike = 0, []
    for case in range(40):
        size = (int(dice.integers(10, 90)), int(dice.integers(10, 90)))
        cells = Image.fromarray((dice.random((4, 4)) > 0.5).astype(np.uint8) * 255)
        mask = cells.resize(size, Image.Resampling.NEAREST)
        config = settings(Path("x"), crops_per_image=3, resize_ratio=1.4, flip=0.5, crop=where, seed=case)
        for crop in crops_of(size, frame, "", config, 0):
            photo, cover = cut_photo(mask.convert("RGB"), crop), cut_mask(mask, crop)
            assert photo.shape[1:] == cover.shape[1:] == (frame[1], frame[0])
            assert set(cover.unique().tolist()) <= {0.0, 1.0}
            inside = F.max_pool2d(cover[None], 3, 1, 1) == -F.max_pool2d(-cover[None], 3, 1, 1)  # away from edges
            alike.append(((photo.mean(0) > 0).float() == cover)[inside[0]].float())
            mirrored += crop.mirrored
    assert len(torch.cat(alike)) > 5000 and torch.cat(alike).mean() > 0.995
    assert 30 < mirrored < 90


def test_crops_lie_where_they_are_asked_for() -> None:
    for index in range(30):
        places = {
            where: choose_crop((30, 70), (16, 16), 1.5, keyed_generator(0, index), where)
            for where in ("random", "center", "head")
        }
        for where, crop in places.items():
            assert 0 <= crop.left <= crop.resized[0] - 16 and 0 <= crop.top <= crop.resized[1] - 16, where
        assert places["head"].top == 0 and places["head"].left == places["random"].left
        assert abs(2 * places["center"].top - (places["center"].resized[1] - 16)) <= 1


def test_photos_are_mirrored_as_often_as_asked_but_not_where_the_caption_names_a_side() -> None:
    for share in (0.0, 0.3, 1.0):
        config = settings(Path("x"), crops_per_image=200, flip=share)
        crops = [crop for index in range(5) for crop in crops_of((20, 20), (16, 16), "", config, index)]
        assert abs(sum(crop.mirrored for crop in crops) / len(crops) - share) < 0.06
    config = settings(Path("x"), crops_per_image=50, flip=1.0)
    assert not any(crop.mirrored for crop in crops_of((20, 20), (16, 16), "its Left ear", config, 0))
    assert all(crop.mirrored for crop in crops_of((20, 20), (16, 16), "leftovers", config, 0))


# --- masks -----------------------------------------------------------------------------------------------------


def test_masks_are_found_everywhere_and_are_no_photos(tmp_path: Path) -> None:
    folder = make_shapes(tmp_path / "rex", SHAPES[:3])
    Image.new("L", SHAPES[0], 255).save(folder / "masks" / "0.png")
    Image.new("L", SHAPES[1], 255).save(folder / "1-masklabel.png")
    cut_out = Image.new("RGBA", (20, 20), (255, 0, 0, 255))
    cut_out.paste((0, 0, 0, 0), (0, 0, 10, 20))
    cut_out.save(folder / "9.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 255)).save(folder / "9b.png")  # opaque
    concept = load_concept(folder)
    masks = {photo.path.name: photo.mask for photo in concept.photos}
    assert masks == {
        "0.png": folder / "masks" / "0.png",
        "1.png": folder / "1-masklabel.png",
        "2.png": None,
        "9.png": folder / "9.png",
        "9b.png": None,
    }
    assert not concept.skipped


@pytest.mark.parametrize("live", [False, True])
def test_the_weights_of_a_step_stand_where_the_thing_is(base: Base, tmp_path: Path, live: bool) -> None:
    folder = make_shapes(tmp_path / "rex", masks=True)
    (folder / "masks" / "1.png").unlink()  # a photo without a mask counts as a whole
    concept = load_concept(folder)
    config = settings(
        folder,
        mask_weight=0.75,
        flip=0.5,
        batch_size=4,
        aspect_buckets=True,
        cache_latents=not live,
        latents_cache_dir=tmp_path / "c",
    )
    crops = PhotoCrops(concept, base, config, 16)
    shapes = set()
    for step in range(12):
        seen = sample_batch(step, crops, concept, config, base.denoiser)
        assert seen.weights is not None
        assert seen.weights.shape == (4, 1, *seen.latents.shape[2:]) == (4, 1, *seen.noise.shape[2:])
        shapes.add(seen.latents.shape[2:])
        for weights, photo in zip(seen.weights, crops.order.photos(step), strict=True):
            if photo == 1:
                assert (weights == 1).all()
            else:
                assert torch.allclose(weights.mean(), torch.ones(()))
                low, high = weights.unique().tolist()[0], weights.unique().tolist()[-1]
                assert low == high or 0.2 < low / high < 0.8
    assert len(shapes) > 2


def test_a_white_mask_gives_the_plain_loss_bit_for_bit() -> None:
    for shape in ((2, 4, 8, 8), (3, 4, 7, 5), (1, 8, 16, 24)):
        plain, masked = (torch.randn(shape, generator=keyed_generator(0), requires_grad=True) for _ in range(2))
        target = torch.randn(shape, generator=keyed_generator(1))
        white = reduce_mask(torch.ones(shape[0], 1, 8 * shape[2] + 3, 8 * shape[3]), *shape[2:])
        for weight in (0.3, 1.0):
            one, two = F.mse_loss(plain, target), weighted_mse(masked, target, loss_weights(white, weight))
            assert torch.equal(one, two)
            (one_grad,), (two_grad,) = (torch.autograd.grad(a, b) for a, b in ((one, plain), (two, masked)))
            assert torch.equal(one_grad, two_grad)


def test_a_masked_loss_sees_the_inside_alone_and_small_things_are_made_up_for() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :2] = 1
    error = torch.zeros(1, 4, 8, 8)
    error[..., 2:] = 5
    assert weighted_mse(error, torch.zeros_like(error), loss_weights(mask, 1.0)) == 0
    even = torch.full_like(error, 3.0)
    for weight in (0.4, 1.0):
        assert weighted_mse(even, torch.zeros_like(even), loss_weights(mask, weight)) == pytest.approx(9.0)
    inside, outside = (loss_weights(mask, 0.9)[0, 0, 0, x].item() for x in (0, 7))
    assert outside / inside == pytest.approx(0.1)
    assert (loss_weights(torch.zeros(1, 1, 8, 8), 1.0) == 0).all()  # nothing of the thing in sight: no loss, no NaN
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 0, 0] = 1
    assert loss_weights(mask, 1.0).max() == 1 / LEAST


def test_training_with_white_masks_equals_training_without(tiny_base: Path, tmp_path: Path) -> None:
    folder = make_shapes(tmp_path / "rex", SHAPES[:3])

    def trained(place: str, weight: float) -> dict[str, torch.Tensor]:
        output = tmp_path / place / "a.safetensors"
        config = settings(folder, output=output, base=str(tiny_base), mask_weight=weight)
        return train_to_file(config).parameters

    for index, size in enumerate(SHAPES[:3]):
        Image.new("L", size, 255).save(folder / "masks" / f"{index}.png")
    plain, white = trained("plain", 0.0), trained("white", 1.0)
    assert all(torch.equal(plain[name], white[name]) for name in plain)
    for index, size in enumerate(SHAPES[:3]):
        half = Image.new("L", size, 255)
        half.paste(0, (0, 0, size[0] // 2, size[1]))
        half.save(folder / "masks" / f"{index}.png")
    masked = trained("half", 1.0)
    assert any(not torch.equal(plain[name], masked[name]) for name in plain)


@pytest.mark.parametrize("live", [False, True])
def test_bad_masks_are_told_in_a_sentence(base: Base, tmp_path: Path, live: bool) -> None:
    folder = make_shapes(tmp_path / "rex", SHAPES[:2])
    config = settings(folder, mask_weight=1.0, cache_latents=not live, latents_cache_dir=tmp_path / "c")
    told = (
        (None, r"data.mask_weight needs masks, and none of the photos of 'rex' has one"),
        (Image.new("L", (20, 24), 255), r"mask .*0\.png has 20×24 pixels, its photo 0\.png 24×20; save both alike"),
        (Image.new("L", SHAPES[0], 0), r"The mask .*0\.png is black all over; paint"),
    )
    for mask, sentence in told:
        if mask:
            mask.save(folder / "masks" / "0.png")
        with pytest.raises(UserError, match=sentence):
            PhotoCrops(load_concept(folder), base, config, 16)
        PhotoCrops(
            load_concept(folder), base, settings(folder, latents_cache_dir=tmp_path / "c"), 16
        )  # not asked for: not read
    (folder / "masks" / "0.png").write_text("no picture")
    with pytest.raises(UserError, match=r"0\.png is not a readable image"):
        PhotoCrops(load_concept(folder), base, config, 16)
    (folder / "masks" / "0.png").unlink()
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(folder / "5.png")
    with pytest.raises(UserError, match=r"The photo .*5\.png is transparent all over"):
        PhotoCrops(load_concept(folder), base, config, 16)


# --- buckets and order -----------------------------------------------------------------------------------------


def test_every_bucket_fits_the_networks_and_is_as_large_as_asked(base: Base) -> None:
    assert base.denoiser.side_multiple == 4
    for size, step in ((16, 4), (64, 16), (512, 64), (1024, 64), (500, 64)):
        frames = bucket_frames(size, step)
        assert len(set(frames)) == len(frames) > 5
        for width, height in frames:
            assert width % step == height % step == 0 and width * height <= size * size
        for ratio in (0.5, 0.6, 0.75, 1.0, 1.2, 4 / 3, 1.5, 1.9):
            width, height = best_frame((round(1000 * ratio), 1000), frames)
            kept = min(width / height / ratio, ratio * height / width)
            assert kept * width * height >= 0.7 * (size // step * step) ** 2, (size, ratio)
        assert best_frame((77, 77), bucket_frames(512, 64)) == (512, 512)
        assert best_frame((3, 2), bucket_frames(512, 64))[::-1] == best_frame((2, 3), bucket_frames(512, 64))
    with pytest.raises(
        UserError, match=r"data\.aspect_buckets needs a resolution of at least 64 on this base; 48 is too small"
    ):
        bucket_frames(48, 64)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("repeats", [(1,) * 12, (1, 2, 3, 1, 1, 5, 1, 1, 1, 1, 2, 1)])
def test_no_photo_is_lost_and_every_photo_is_seen_equally_often(batch: int, repeats: tuple[int, ...]) -> None:
    for seed in range(3):
        config = settings(Path("x"), batch_size=batch, seed=seed)
        shapes = [SHAPES[index % 5 % 3] for index in range(12)]
        order = Order.of(shapes, repeats, config)
        steps = sum(order.turns)
        times = steps * batch // sum(repeats)  # a cycle shows every photo so often
        assert steps * batch == times * sum(repeats) and 1 <= times <= batch
        for cycle in range(3):
            seen = [order.photos(step) for step in range(cycle * steps, (cycle + 1) * steps)]
            assert all(len(photos) == batch and len({shapes[photo] for photo in photos}) == 1 for photos in seen)
            counts = Counter(photo for photos in seen for photo in photos)
            assert counts == {photo: times * often for photo, often in enumerate(repeats)}
        if batch == 1:
            assert times == 1
        largest = max(order.groups, key=len)
        seen = [photo for step in range(4 * steps) for photo in order.photos(step) if photo in largest]
        epochs = [tuple(seen[start : start + len(largest)]) for start in range(0, len(seen), len(largest))]
        assert len(set(epochs)) > 1 and len({tuple(sorted(epoch)) for epoch in epochs}) == 1


def test_one_bucket_is_the_plain_epoch_in_its_plain_order() -> None:
    config = settings(Path("x"), batch_size=3)
    one = Order.of([(16, 16)] * 7, [1] * 7, config)
    flat = [photo for step in range(14) for photo in one.photos(step)]
    assert all(sorted(flat[start : start + 7]) == list(range(7)) for start in range(0, 42, 7))
    assert flat == [samples_module.photo_of(step, sample, 7, config) for step in range(14) for sample in range(3)]


def test_with_buckets_photos_keep_their_shape_and_train(tiny_base: Path, base: Base, tmp_path: Path) -> None:
    folder = make_shapes(tmp_path / "rex")
    config = settings(folder, aspect_buckets=True, batch_size=2, latents_cache_dir=tmp_path / "c")
    concept = load_concept(folder)
    crops = PhotoCrops(concept, base, config, 16)
    for step in range(40):
        latents = sample_batch(step, crops, concept, config, base.denoiser).latents
        for photo in crops.order.photos(step):
            (width, height), (rows, columns) = concept.photos[photo].size, latents.shape[2:]
            assert (width > height) == (columns > rows) or abs(width - height) < 5
            assert rows % 2 == columns % 2 == 0 and rows * columns <= 64
    keep = {"loss_weight": 1.0, "batch_size": 2, "num_images": 3, "cut_mix_prob": 0.5}
    more = {"base": str(tiny_base), "prior": keep, "aspect_buckets": True, "mask_weight": 0.5, "flip": 0.5}
    make_shapes(tmp_path / "masked", masks=True)
    folder = tmp_path / "masked"
    whole = train_to_file(settings(folder, output=tmp_path / "w" / "a.safetensors", **more))
    config, asked = settings(folder, output=tmp_path / "s" / "a.safetensors", **more), iter(range(100))
    with pytest.raises(Cancelled):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(asked) >= 3))
    again = train_to_file(config, resume=True)
    assert whole.norm() > 0
    assert all(torch.equal(whole.parameters[name], again.parameters[name]) for name in whole.parameters)


# --- the cache -------------------------------------------------------------------------------------------------


class Encodings:
    """Counts how many crops a VAE encodes."""

    def __init__(self, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, encode = 0, base.pipeline.vae.encode

        def counting(pixels: torch.Tensor) -> object:
            self.count += len(pixels)
            return encode(pixels)

        monkeypatch.setattr(base.pipeline.vae, "encode", counting)


def everything(crops: PhotoCrops) -> list[torch.Tensor]:
    """All latents and masks that there are."""
    chosen = [[(photo, crop) for crop in range(len(crops.crops[photo]))] for photo in range(len(crops.photos))]
    return [part for one in chosen for part in crops.take(one) if part is not None]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_cached_crops_have_the_same_bits_and_are_not_encoded_again(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_shapes(tmp_path / "rex", masks=True)
    config = settings(
        folder, mask_weight=1.0, aspect_buckets=True, flip=0.5, resize_ratio=1.3, latents_cache_dir=tmp_path / "cache"
    )
    encodings = Encodings(base, monkeypatch)
    first = everything(PhotoCrops(load_concept(folder), base, config, 16))
    assert encodings.count == 4 * len(SHAPES) and len(first) == 2 * len(SHAPES)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == len(SHAPES)
    again = everything(PhotoCrops(load_concept(folder), base, config, 16))
    assert same(first, again) and encodings.count == 4 * len(SHAPES)
    elsewhere = config.model_copy(
        update={"data": config.data.model_copy(update={"latents_cache_dir": tmp_path / "other"})}
    )
    assert same(first, everything(PhotoCrops(load_concept(folder), base, elsewhere, 16)))
    live = config.model_copy(update={"data": config.data.model_copy(update={"cache_latents": False})})
    encodings.count = 0
    crops = PhotoCrops(load_concept(folder), base, live, 16)
    assert encodings.count == 0
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(first, everything(crops), strict=True))
    assert encodings.count == 4 * len(SHAPES)


def test_an_autoencoder_that_overflows_in_float16_encodes_in_float32(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), "cpu", "float16")
    vae, pixels = base.pipeline.vae, torch.rand(3, 3, 16, 16) * 2 - 1
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    found = encode(vae, pixels)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    with torch.no_grad():
        whole = copy.deepcopy(vae).float().encode(pixels).latent_dist.mean
        drawn = copy.deepcopy(vae).float().decode(found / vae.config.scaling_factor).sample
    assert found.dtype == torch.float32 and torch.equal(found, whole)
    assert torch.equal(decode(vae, found / vae.config.scaling_factor), drawn) and vae.dtype == torch.float16
    assert [at_once(side, side) for side in (64, 512, 1024, 2048)] == [8, 2, 1, 1]


def test_a_photo_that_cannot_be_encoded_is_named(tiny_base: Path, tmp_path: Path) -> None:
    base, folder = load_base(str(tiny_base), "cpu"), make_shapes(tmp_path / "rex")
    next(base.pipeline.vae.encoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match=r"NaN or infinity of .*0\.png"):
        PhotoCrops(load_concept(folder), base, settings(folder, latents_cache_dir=tmp_path / "cache"), 16)
    assert not (tmp_path / "cache").exists()


def test_photos_without_a_mask_are_kept_apart_from_those_that_count_as_whole(base: Base, tmp_path: Path) -> None:
    folder = make_shapes(tmp_path / "rex", SHAPES[:2], masks=True)
    (folder / "masks" / "0.png").unlink()
    plain = settings(folder, latents_cache_dir=tmp_path / "cache")
    everything(PhotoCrops(load_concept(folder), base, plain, 16))
    masked = settings(folder, latents_cache_dir=tmp_path / "cache", mask_weight=1.0)
    found = PhotoCrops(load_concept(folder), base, masked, 16).take([(0, 0), (1, 0)])[1]
    assert found is not None and bool((found[0] == 1).all()) and not bool((found[1] == 1).all())


def test_a_damaged_cache_file_is_made_again(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shapes(tmp_path / "rex", SHAPES[:2], masks=True)
    config = settings(folder, mask_weight=1.0, latents_cache_dir=tmp_path / "cache")
    first = everything(PhotoCrops(load_concept(folder), base, config, 16))
    encodings = Encodings(base, monkeypatch)
    [file, other] = sorted((tmp_path / "cache").glob("*.safetensors"))
    whole = file.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for number, damaged in enumerate((b"", b"garbage", whole[:-8], flipped, other.read_bytes()), 1):
        file.write_bytes(damaged)
        assert same(first, everything(PhotoCrops(load_concept(folder), base, config, 16)))
        assert encodings.count == 4 * number, number
        assert same(first, everything(PhotoCrops(load_concept(folder), base, config, 16)))
        assert encodings.count == 4 * number, "the mended file was not used"


def test_what_is_kept_belongs_to_photo_mask_settings_and_encoder(
    base: Base, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_shapes(tmp_path / "rex", SHAPES[:2], masks=True)
    config = settings(folder, mask_weight=1.0, resize_ratio=1.2, latents_cache_dir=tmp_path / "cache")
    everything(PhotoCrops(load_concept(folder), base, config, 16))
    encodings = Encodings(base, monkeypatch)

    def made(config: TrainConfig, base: Base = base) -> int:
        encodings.count = 0
        PhotoCrops(load_concept(folder), base, config, 16)
        return encodings.count

    assert made(config) == 0
    assert made(config.model_copy(update={"steps": 9, "batch_size": 7})) == 0  # they decide nothing here
    assert made(config.model_copy(update={"seed": 1})) == 8
    assert made(config.model_copy(update={"crops_per_image": 5})) == 10
    assert made(config.model_copy(update={"data": config.data.model_copy(update={"crop": "head"})})) == 8
    Image.effect_noise(SHAPES[0], 90).convert("RGB").save(folder / "0.png")
    assert made(config) == 4 and made(config) == 0
    half = Image.new("L", SHAPES[1], 255)
    half.paste(0, (0, 0, 5, 5))
    half.save(folder / "masks" / "1.png")
    assert made(config) == 4 and made(config) == 0
    other = load_base(str(tiny_base), "cpu")
    with torch.no_grad():
        other.pipeline.vae.decoder.conv_in.bias += 1
    encodings = Encodings(other, monkeypatch)
    assert made(config, other) == 0  # what decodes does not matter
    with torch.no_grad():
        other.pipeline.vae.encoder.conv_in.bias += 1
    assert made(config, other) == 8


def test_a_full_cache_lets_go_of_what_was_not_used_for_the_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def make(name: str) -> None:
        def crops() -> tuple[torch.Tensor, None]:
            made.append(name)
            return torch.ones(100), None

        cache.cached_latents(tmp_path, name, crops)

    size = 0
    for age, name in enumerate(("old", "used", "new")):
        make(name)
        size = (tmp_path / f"{name}.safetensors").stat().st_size
        os.utime(tmp_path / f"{name}.safetensors", (age, age))
    monkeypatch.setattr(cache, "MOST", 3 * size + 10)
    (tmp_path / "mine.txt").write_text("not a cache's")
    os.utime(tmp_path / "mine.txt", (0, 0))
    make("old")  # is there, and counts as used now
    make("more")
    assert made == ["old", "used", "new", "more"]
    assert {path.stem for path in tmp_path.iterdir()} == {"old", "new", "more", "mine"}


def test_a_cache_that_cannot_be_written_costs_time_only(base: Base, tmp_path: Path) -> None:
    folder = make_shapes(tmp_path / "rex", SHAPES[:2])
    (tmp_path / "file").write_text("in the way")
    config = settings(folder, latents_cache_dir=tmp_path / "file" / "cache")
    latents = everything(PhotoCrops(load_concept(folder), base, config, 16))
    assert same(
        latents,
        everything(PhotoCrops(load_concept(folder), base, settings(folder, latents_cache_dir=tmp_path / "c"), 16)),
    )


def test_crops_encoded_at_every_step_resume_bit_for_bit(tiny_base: Path, tmp_path: Path) -> None:
    folder = make_shapes(tmp_path / "rex", SHAPES[:3])
    (folder / "0.txt").write_text("<TOK>, couch, lamp, book, chair")
    more = {
        "base": str(tiny_base),
        "cache_latents": False,
        "shuffle_caption": True,
        "tag_dropout": 0.4,
        "caption_dropout": 0.2,
    }
    whole = train_to_file(settings(folder, output=tmp_path / "w" / "a.safetensors", **more))
    config, asked = settings(folder, output=tmp_path / "s" / "a.safetensors", **more), iter(range(100))
    with pytest.raises(Cancelled):
        train_to_file(config, hooks=Hooks(should_stop=lambda: next(asked) >= 2))
    moved = config.model_copy(
        update={"data": config.data.model_copy(update={"latents_cache_dir": tmp_path / "elsewhere"})}
    )
    again = train_to_file(moved, resume=True)  # where the cache lies decides nothing
    assert all(torch.equal(whole.parameters[name], again.parameters[name]) for name in whole.parameters)


# --- captions --------------------------------------------------------------------------------------------------

CAPTION = "<rex>, couch, scenery, plant, lamp, indoors"


def varied(**data: object) -> list[str]:
    config = DataConfig(**data)  # type: ignore[arg-type]
    return [vary(CAPTION, "<rex>", config, 0, "caption", step, sample) for step in range(800) for sample in range(2)]


def test_captions_stay_as_they_are_unless_asked() -> None:
    assert set(varied()) == {CAPTION}
    odd = "a  photo of <rex>,with odd,  spacing"
    assert vary(odd, "<rex>", DataConfig(), 0, 1) == odd


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_whole_captions_are_dropped_as_often_as_asked(share: float) -> None:
    captions = varied(caption_dropout=share)
    assert set(captions) == {"", CAPTION}
    assert abs(captions.count("") / len(captions) - share) < 0.04
    assert set(varied(caption_dropout=1.0)) == {""}


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_parts_are_dropped_as_often_as_asked_and_held_parts_hold(keep: int, shuffle: bool) -> None:
    parts = CAPTION.split(", ")
    captions = [caption.split(", ") for caption in varied(tag_dropout=0.3, keep_tokens=keep, shuffle_caption=shuffle)]
    assert all(caption[:keep] == parts[:keep] for caption in captions)
    assert all("<rex>" in caption for caption in captions)
    for part in set(parts[keep:]) - {"<rex>"}:
        assert abs(sum(part not in caption for caption in captions) / len(captions) - 0.3) < 0.04
    in_order = [[part for part in parts if part in caption] == caption for caption in captions]
    assert all(in_order) if not shuffle else sum(in_order) < 0.6 * len(captions)


def test_shuffling_loses_nothing_and_puts_every_part_everywhere() -> None:
    captions = [caption.split(", ") for caption in varied(shuffle_caption=True, keep_tokens=2)]
    assert all(sorted(caption) == sorted(CAPTION.split(", ")) for caption in captions)
    assert all(caption[:2] == ["<rex>", "couch"] for caption in captions)
    for place in range(2, 6):
        counts = Counter(caption[place] for caption in captions)
        assert len(counts) == 4 and min(counts.values()) > 0.2 * len(captions)


def test_a_step_draws_its_captions_by_key(base: Base, tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 2)
    for index in range(2):
        (folder / f"{index}.txt").write_text("couch, <TOK>, lamp, book, chair")
    config = settings(
        folder,
        batch_size=4,
        shuffle_caption=True,
        caption_dropout=0.2,
        tag_dropout=0.2,
        latents_cache_dir=tmp_path / "c",
    )
    concept = load_concept(folder)
    crops = PhotoCrops(concept, base, config, 16)
    first, again = ([sample_batch(step, crops, concept, config, base.denoiser) for step in range(20)] for _ in range(2))
    assert [one.prompts for one in first] == [two.prompts for two in again]
    prompts = [prompt for one in first for prompt in one.prompts]
    assert len(set(prompts)) > 20 and all("<rex>" in prompt for prompt in prompts if prompt) and "" in prompts
    plain = sample_batch(
        3, crops, concept, settings(folder, batch_size=4), base.denoiser
    )  # captions take nothing from the other draws
    assert torch.equal(plain.noise, first[3].noise) and torch.equal(plain.timesteps, first[3].timesteps)
    assert torch.equal(plain.latents, first[3].latents)


# --- settings --------------------------------------------------------------------------------------------------


def test_settings_of_the_data_are_checked() -> None:
    known = {"concept": "c", "output": "o.safetensors"}
    for change, sentence in (
        ({"bucket": True}, "Unknown setting 'data.bucket'"),
        ({"crop": "foot"}, "Setting 'data.crop' cannot be 'foot'"),
        ({"mask_weight": 1.2}, "Setting 'data.mask_weight' cannot be 1.2"),
        ({"flip": -1}, "Setting 'data.flip' cannot be -1"),
        ({"class_images_dir": "dogs"}, "class_images_dir needs prior.loss_weight above 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            build(TrainConfig, known, {"data": change})
    build(TrainConfig, known, {"data": {"class_images_dir": "dogs"}, "prior": {"loss_weight": 1.0}})
    with pytest.raises(ValidationError):
        DataConfig(keep_tokens=-1)


def test_repeats_change_how_often_photos_are_seen(base: Base, tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "rex", 2)
    make_photos(folder / "3_close", 1, seed=5)
    concept: Concept = load_concept(folder)
    config = settings(folder, batch_size=5, latents_cache_dir=tmp_path / "c")
    crops = PhotoCrops(concept, base, config, 16)
    counts = Counter(concept.photos[p].path.parent.name for step in range(20) for p in crops.order.photos(step))
    assert counts == {"rex": 40, "3_close": 60}
    even = replace(concept, photos=tuple(replace(photo, repeats=1) for photo in concept.photos))
    counts = Counter(
        PhotoCrops(even, base, config, 16).order.photos(0) + PhotoCrops(even, base, config, 16).order.photos(1)
    )
    assert set(counts) == {0, 1, 2} and max(counts.values()) - min(counts.values()) <= 1
