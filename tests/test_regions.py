"""Regions: a prompt of its own for every box."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from PIL import Image

from spectral_diffusion.base import Base, load_base
from spectral_diffusion.config import GenerateConfig, RegionConfig
from spectral_diffusion.errors import UserError
from spectral_diffusion.generation.pipeline import generate_to_file, read_settings, sample
from spectral_diffusion.generation.regions import Region, RegionalCrossAttention, grid_of

WHOLE = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT, MIDDLE = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.25, 0.0, 0.75, 1.0)


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base), "cpu")


def picture(base: Base, prompt: str, regions: list[RegionConfig] | None = None, **more: object) -> np.ndarray:
    config = GenerateConfig(steps=3, device="cpu", regions=regions or [], **more)  # type: ignore[arg-type]
    return np.stack([np.asarray(image) for image in sample(base, [prompt] * 2, [1, 2], config)])


def test_one_region_over_everything_is_that_prompt_alone(base: Base) -> None:
    before = base.pipeline.unet.attn_processors
    alone = picture(base, "a red dog", guidance=3.0)
    other = picture(base, "a blue cat", guidance=3.0)
    covered = picture(base, "a blue cat", [RegionConfig(box=WHOLE, prompt="a red dog")], guidance=3.0)
    assert np.array_equal(alone, covered) and not np.array_equal(alone, other)
    assert base.pipeline.unet.attn_processors == before
    assert np.array_equal(picture(base, "a blue cat", guidance=3.0), other)
    shared = [RegionConfig(box=WHOLE, prompt="a red dog")]
    assert np.abs(picture(base, "a blue cat", shared, guidance=3.0, region_share=1.0).astype(int) - other).max() <= 1


def attention(regions: list[Region], pictures: int, batch: int, cells: int = 32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    attn = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)
    hidden, text = torch.randn(batch, cells, 8), torch.randn(batch, 5, 6)
    positive, negative = torch.randn(len(regions), 1, 5, 6), torch.randn(len(regions), 1, 5, 6)
    plain = AttnProcessor()
    processor = RegionalCrossAttention(plain, regions, positive, negative, (4, 8), pictures)

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
    out, plain, left, middle, *_ = attention([Region(LEFT, "a"), Region(MIDDLE, "b")], pictures=2, batch=2)
    out, plain, left, middle = (t.view(2, 4, 8, 8) for t in (out, plain, left, middle))
    assert torch.allclose(out[:, :, 6:], plain[:, :, 6:])
    assert torch.allclose(out[:, :, :2], left[:, :, :2], atol=1e-6)
    assert torch.allclose(out[:, :, 4:6], middle[:, :, 4:6], atol=1e-6)
    assert torch.allclose(out[:, :, 2:4], (left + middle)[:, :, 2:4] / 2, atol=1e-6)


def test_the_unconditional_half_reads_the_negative_prompts() -> None:
    out, plain, positive, negative = attention([Region(RIGHT, "a")], pictures=1, batch=2)
    out, plain, positive, negative = (t.view(2, 4, 8, 8) for t in (out, plain, positive, negative))
    assert torch.allclose(out[:, :, :4], plain[:, :, :4])
    assert torch.allclose(out[0, :, 4:], negative[0, :, 4:], atol=1e-6)
    assert torch.allclose(out[1, :, 4:], positive[1, :, 4:], atol=1e-6)


def test_every_level_of_an_odd_picture_finds_its_grid() -> None:
    assert (
        grid_of(7 * 9, 14, 18) == (7, 9) and grid_of(4 * 5, 14, 18) == (4, 5) and grid_of(14 * 18, 14, 18) == (14, 18)
    )
    with pytest.raises(ValueError, match="no halving"):
        grid_of(50, 14, 18)


def test_regions_in_files_and_on_the_command_line(tiny_base: Path, tmp_path: Path) -> None:
    config = GenerateConfig(
        prompt="a beach", output=tmp_path / "a.png", base=str(tiny_base), steps=2, device="cpu", width=24,
        regions=[RegionConfig(box=LEFT, prompt="<rex>"), RegionConfig(box=RIGHT, prompt="a cup")],
    )  # fmt: skip
    notes: list[str] = []
    generate_to_file(config, note=notes.append)
    assert any("<rex> is no token" in note for note in notes)
    settings = read_settings(tmp_path / "a.png")
    again = GenerateConfig(**settings).model_copy(update={"output": tmp_path / "b.png"})
    generate_to_file(again)
    with Image.open(tmp_path / "a.png") as one, Image.open(tmp_path / "b.png") as two:
        assert np.array_equal(np.asarray(one), np.asarray(two))
    with pytest.raises(UserError, match="is too small for this picture"):
        generate_to_file(config.model_copy(update={"regions": [RegionConfig(box=(0, 0, 0.01, 1), prompt="x")]}))
    for box in ((0.5, 0, 0.5, 1), (0, 0, 1.5, 1), (-0.1, 0, 1, 1)):
        with pytest.raises(ValueError, match="a box is left, top, right, bottom"):
            RegionConfig(box=box, prompt="x")
