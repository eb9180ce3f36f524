"""Regions: a prompt of its own for every box."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from spectral_diffusion.adapters.apply import put_adapters
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.linalg import Factors
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.regions import (
    EncodedRegion,
    RegionalAttention,
    RegionalPrompts,
    bound_hook,
    cells_in,
    grid_of,
    norm_hook,
)
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.training.run import train_to_file

WHOLE = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT, MIDDLE = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.25, 0.0, 0.75, 1.0)


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base), "cpu")


def picture(base: Base, prompt: str, regions: list[Region] | None = None, **more: object) -> np.ndarray:
    config = Scene(num_inference_steps=3, device="cpu", regions=regions or [], **more)  # type: ignore[arg-type]
    return np.stack([np.asarray(image) for image in sample(base, [prompt] * 2, [1, 2], config)])


def test_one_region_over_everything_is_that_prompt_alone(base: Base) -> None:
    before = base.pipeline.unet.attn_processors
    alone = picture(base, "a red dog", guidance_scale=3.0)
    other = picture(base, "a blue cat", guidance_scale=3.0)
    covered = picture(base, "a blue cat", [Region(box=WHOLE, prompt="a red dog")], guidance_scale=3.0)
    assert np.array_equal(alone, covered) and not np.array_equal(alone, other)
    assert base.pipeline.unet.attn_processors == before
    assert np.array_equal(picture(base, "a blue cat", guidance_scale=3.0), other)
    shared = [Region(box=WHOLE, prompt="a red dog")]
    assert (
        np.abs(
            picture(base, "a blue cat", shared, guidance_scale=3.0, global_prompt_weight=1.0).astype(int) - other
        ).max()
        <= 1
    )


def attention(areas: list[tuple[float, ...]], pictures: int, batch: int, **more: float) -> tuple[torch.Tensor, ...]:
    """Regional cross-attention over 4 × 8 cells beside the plain one, and every area's prompts alone."""
    torch.manual_seed(0)
    attn = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)
    hidden, text = torch.randn(batch, 32, 8), torch.randn(batch, 5, 6)
    positive, negative = torch.randn(len(areas), 5, 6), torch.randn(len(areas), 5, 6)
    plain = AttnProcessor()
    held = [EncodedRegion(box, p, n) for box, p, n in zip(areas, positive, negative, strict=True)]
    processor = RegionalAttention(plain, RegionalPrompts(held, (4, 8), pictures, **more))

    def alone(which: torch.Tensor) -> torch.Tensor:
        return plain(attn, hidden, which.expand(batch, -1, -1))

    with torch.no_grad():
        return (
            processor(attn, hidden, text),
            plain(attn, hidden, text),
            *(alone(features) for features in positive),
            *(alone(features) for features in negative),
        )


def test_outside_is_global_inside_is_the_regions_own_and_overlaps_are_averaged() -> None:
    out, plain, left, middle, *_ = attention([LEFT, MIDDLE], pictures=2, batch=2)
    out, plain, left, middle = (t.view(2, 4, 8, 8) for t in (out, plain, left, middle))
    assert torch.allclose(out[:, :, 6:], plain[:, :, 6:])
    assert torch.allclose(out[:, :, :2], left[:, :, :2], atol=1e-6)
    assert torch.allclose(out[:, :, 4:6], middle[:, :, 4:6], atol=1e-6)
    assert torch.allclose(out[:, :, 2:4], (left + middle)[:, :, 2:4] / 2, atol=1e-6)


def test_a_share_of_the_global_prompt_acts_inside() -> None:
    out, plain, left, _ = attention([LEFT], pictures=2, batch=2, share=0.25)
    out, plain, left = (t.view(2, 4, 8, 8) for t in (out, plain, left))
    assert torch.allclose(out[:, :, :4], 0.75 * left[:, :, :4] + 0.25 * plain[:, :, :4], atol=1e-6)
    assert torch.allclose(out[:, :, 4:], plain[:, :, 4:])


def test_the_unconditional_half_reads_the_negative_prompts() -> None:
    out, plain, positive, negative = attention([RIGHT], pictures=1, batch=2)
    out, plain, positive, negative = (t.view(2, 4, 8, 8) for t in (out, plain, positive, negative))
    assert torch.allclose(out[:, :, :4], plain[:, :, :4])
    assert torch.allclose(out[0, :, 4:], negative[0, :, 4:], atol=1e-6)
    assert torch.allclose(out[1, :, 4:], positive[1, :, 4:], atol=1e-6)


def test_isolated_regions_attend_to_themselves_only() -> None:
    torch.manual_seed(0)
    attn, hidden = Attention(8, heads=2, dim_head=4), torch.randn(2, 32, 8)
    text = torch.zeros(5, 6)
    state = RegionalPrompts([EncodedRegion(LEFT, text, text)], (4, 8), 2, isolation=1.0)
    with torch.no_grad():
        out = RegionalAttention(AttnProcessor(), state)(attn, hidden).view(2, 4, 8, 8)
        moved = hidden.view(2, 4, 8, 8).clone()
        moved[:, :, 4:] += 1.0  # whatever happens outside does not reach in
        again = RegionalAttention(AttnProcessor(), state)(attn, moved.view(2, 32, 8)).view(2, 4, 8, 8)
        assert torch.allclose(out[:, :, :4], again[:, :, :4], atol=1e-6)
        assert not torch.allclose(out[:, :, 4:], again[:, :, 4:], atol=1e-3)
        state.step = 5
        state.window = (0, 5)
        assert torch.equal(RegionalAttention(AttnProcessor(), state)(attn, hidden), AttnProcessor()(attn, hidden))


def test_isolated_regions_are_normalized_by_their_own_mean_and_deviation() -> None:
    """What happens in one region does not move another; a region over everything is the norm as it is."""
    text, norm = torch.zeros(5, 6), nn.GroupNorm(2, 4)
    nn.init.normal_(norm.weight)
    picture = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    brighter = picture.clone()
    brighter[..., 4:] = 3 * brighter[..., 4:] + 1
    plain = norm(picture), norm(brighter)
    halves = [EncodedRegion(LEFT, text, text), EncodedRegion(RIGHT, text, text)]
    for isolation, same in ((1.0, True), (0.5, False)):
        state = RegionalPrompts(halves, (6, 8), 3, isolation=isolation)
        with norm.register_forward_hook(norm_hook(state)):
            before, after = norm(picture), norm(brighter)
            assert torch.equal(before[..., :4], after[..., :4]) is same
        assert not torch.allclose(before[..., 4:], plain[0][..., 4:], atol=1e-3)
        state.window = (1, 2)  # not at this step
        with norm.register_forward_hook(norm_hook(state)):
            assert torch.equal(norm(picture), plain[0])
    whole = RegionalPrompts([EncodedRegion(WHOLE, text, text)], (6, 8), 3, isolation=1.0)
    with norm.register_forward_hook(norm_hook(whole)):
        assert torch.allclose(norm(picture), plain[0], atol=1e-6)
    assert not torch.allclose(plain[0][..., :4], plain[1][..., :4], atol=1e-2)


def test_every_level_of_an_odd_picture_finds_its_grid() -> None:
    assert (
        grid_of(7 * 9, 14, 18) == (7, 9) and grid_of(4 * 5, 14, 18) == (4, 5) and grid_of(14 * 18, 14, 18) == (14, 18)
    )
    with pytest.raises(ValueError, match="no halving"):
        grid_of(50, 14, 18)


def test_a_mask_is_the_box_it_paints() -> None:
    mask = torch.zeros(64, 128)
    mask[16:48, 64:] = 1
    for height, width in ((16, 32), (4, 8)):
        assert torch.equal(cells_in(mask, height, width), cells_in((0.5, 0.25, 1.0, 0.75), height, width))


@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
@pytest.mark.parametrize("count", [1, 3])
def test_any_size_and_number_of_pictures(base: Base, size: tuple[int, int], count: int) -> None:
    regions = [Region(box=LEFT, prompt="a red dog"), Region(box=MIDDLE, prompt="a cup", negative_prompt="blue")]
    scene = Scene(
        num_inference_steps=2,
        device="cpu",
        regions=regions,
        region_isolation=0.5,
        width=size[1],
        height=size[0],
        guidance_scale=1.0,
    )
    assert all(
        image.size == (size[1], size[0]) for image in sample(base, ["a beach"] * count, list(range(count)), scene)
    )


def test_a_region_without_a_negative_prompt_has_the_scenes(base: Base) -> None:
    def drawn(own: str | None, whole: str) -> bytes:
        region = Region(box=(0, 0, 1, 1), prompt="a red dog", negative_prompt=own)
        scene = Scene(num_inference_steps=2, device="cpu", regions=[region], width=16, height=16, negative_prompt=whole)
        return sample(base, ["a beach"], [1], scene)[0].tobytes()

    assert drawn(None, "blue") == drawn("blue", "blue") != drawn("", "blue")
    assert drawn(None, "") == drawn("", "")


def change(outside: int, inside: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(outside, 2, generator=generator), torch.randn(2, inside, generator=generator))


def test_a_bound_change_touches_its_own_cells_alone_and_overlaps_are_averaged() -> None:
    text, name = torch.zeros(5, 6), "unet.attn1.to_q"
    one, two = change(6, 8, 1), change(6, 8, 2)
    state = RegionalPrompts(
        [EncodedRegion(LEFT, text, text, {name: one}), EncodedRegion(MIDDLE, text, text, {name: two})], (4, 8), 1
    )
    layer, x = nn.Linear(8, 6, bias=False), torch.randn(2, 32, 8)
    with torch.no_grad():
        plain = layer(x)
        added = (bound_hook(name, state)(layer, (x,), plain) - plain).view(2, 4, 8, 6)  # type: ignore[operator]
        first, second = ((x @ f.delta().mT).view(2, 4, 8, 6) for f in (one, two))
    assert float(added[:, :, 6:].abs().max()) == 0
    assert torch.allclose(added[:, :, :2], first[:, :, :2], atol=1e-5)
    assert torch.allclose(added[:, :, 2:4], (first + second)[:, :, 2:4] / 2, atol=1e-5)
    assert torch.allclose(added[:, :, 4:6], second[:, :, 4:6], atol=1e-5)

    convolution, pixels = nn.Conv2d(8, 6, 3, padding=1, bias=False), torch.randn(1, 8, 4, 8)
    kernel = change(6, 72, 3)
    state = RegionalPrompts([EncodedRegion(LEFT, text, text, {name: kernel})], (4, 8), 1)
    with torch.no_grad():
        plain = convolution(pixels)
        added = bound_hook(name, state)(convolution, (pixels,), plain) - plain  # type: ignore[operator]
        whole = nn.functional.conv2d(pixels, kernel.delta().view(6, 8, 3, 3), padding=1)
    assert torch.allclose(added[..., :4], whole[..., :4], atol=1e-4) and float(added[..., 4:].abs().max()) == 0


@pytest.mark.parametrize("targets", ["attention", "attention+feed-forward+projection+conv"])
def test_an_adapter_bound_to_everything_is_that_adapter(tiny_base: Path, photos: Path, targets: str) -> None:
    adapter = train_to_file(
        TrainConfig(
            concept=photos, output=photos / "a.safetensors", base=str(tiny_base), rank=2, steps=4, device="cpu",
            target_modules=targets, learning_rate=0.1, text_encoder_learning_rate=0.1,
        )
    )  # fmt: skip
    prompt, plain, everywhere, bound = "a photo of <rex>", *(load_base(str(tiny_base), "cpu") for _ in range(3))
    scene = Scene(num_inference_steps=3, guidance_scale=3.0, device="cpu")
    put_adapters(everywhere, [(adapter, 0.8)])
    for base in (plain, bound):
        base.add_token(adapter.token, adapter.vectors)
    wanted = np.asarray(sample(everywhere, [prompt], [1], scene)[0], float)
    over = scene.model_copy(update={"regions": [Region(box=WHOLE, prompt=prompt)]})
    found = np.asarray(sample(bound, ["a cup"], [1], over, bound=[[(adapter, 0.8)]])[0], float)
    without = np.asarray(sample(plain, [prompt], [1], scene)[0], float)
    assert np.abs(found - wanted).max() <= 1 and np.abs(without - wanted).max() > 3
    again = np.asarray(sample(bound, [prompt], [1], scene)[0], float)
    assert np.array_equal(again, without)  # nothing is left behind

    both, twice = (load_base(str(tiny_base), "cpu") for _ in range(2))  # beside one that acts everywhere
    put_adapters(both, [(adapter, 0.5)])
    put_adapters(twice, [(adapter, 0.9)])
    wanted = np.asarray(sample(twice, [prompt], [1], scene)[0], float)
    found = np.asarray(sample(both, ["a cup"], [1], over, bound=[[(adapter, 0.4)]])[0], float)
    half = np.asarray(sample(both, [prompt], [1], scene)[0], float)
    assert np.abs(found - wanted).max() <= 1 < np.abs(half - wanted).max()


def test_too_small_regions_are_refused(base: Base) -> None:
    with pytest.raises(UserError, match="Region 1 is too small for this picture"):
        picture(base, "a beach", [Region(box=(0, 0, 0.01, 1), prompt="x")])
