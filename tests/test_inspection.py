"""What inspect tells: norms, cosines, interference, warnings, the picture of the slots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_photos
from typer.testing import CliRunner

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.formats.native import load_adapter, save_adapter
from spectral_diffusion.cli import app
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.inspection import blocks, inspect_paths, interference, layer_norms
from spectral_diffusion.linalg import Factors, row_space
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.slots.ledger import Slot
from spectral_diffusion.slots.picture import CLASH, color_of, slot_map
from spectral_diffusion.training.run import train_to_file


@pytest.fixture(scope="module")
def two(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one base, both in the slot 0:2."""
    folder = tmp_path_factory.mktemp("two")
    files = []
    for index, (name, method) in enumerate((("rex", "spectral-additive"), ("mug", "spectral-rotation"))):
        files.append(folder / name / f"{name}.safetensors")
        train_to_file(
            TrainConfig(
                concept=make_photos(folder / f"photos-{name}", seed=index), output=files[-1], base=str(tiny_base),
                method=method, rank=2, slot="0:2", name=name, token=f"<{name}>", steps=3, device="cpu",
                learning_rate=3e-2, text_encoder_learning_rate=3e-2,
            )
        )  # fmt: skip
    return files


def moved(adapter: Adapter, layer: str, rows: slice) -> None:
    """Let an adapter read only some inputs."""
    keep = torch.zeros(adapter.sizes[layer][1], 1)
    keep[rows] = 1
    adapter.parameters[f"{layer}.A"] = adapter.parameters[f"{layer}.A"] * keep.mT


def test_inputs_that_a_change_does_not_read_are_nobodys_interference() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (4, 7)))
    down[2:] = 0  # as imported files of mixed ranks are padded, and what AdaLoRA took away
    basis = row_space(Factors(up, down))
    assert basis.shape == (7, 2) and torch.allclose(basis.mT @ basis, torch.eye(2).double(), atol=1e-12)
    assert torch.allclose(down.double() @ basis @ basis.mT, down.double(), atol=1e-6)
    assert row_space(Factors(torch.zeros(9, 4), down)).shape == (7, 0)


def test_interference_is_what_others_do_to_the_inputs_that_a_change_reads(tiny_base: Path, photos: Path) -> None:
    config = TrainConfig(
        concept=photos, output=photos / "a.safetensors", base=str(tiny_base), method="lora", rank=2, steps=3,
        device="cpu", learning_rate=3e-2, text_encoder_learning_rate=3e-2,
    )  # fmt: skip
    one = train_to_file(config)
    two = load_adapter(config.output)
    two.name = "other"
    assert interference([one, two], {}) == pytest.approx({one.name: 1.0, "other": 1.0})  # the very same change
    assert interference([one, two], {"other": 0.5})[one.name] == pytest.approx(0.5)
    for layer in one.layers:  # disjoint inputs: nobody touches the other's
        moved(one, layer, slice(0, 8))
        moved(two, layer, slice(8, None))
    assert max(interference([one, two], {}).values()) < 1e-6


def test_adapters_together_are_told_and_drawn(two: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    found = inspect_paths(two)
    assert set(found["concepts"]) == {"rex", "mug"} and "share 2 columns" in found["warnings"][0]
    assert set(found["interference"]) == {"rex", "mug"} and found["interference"]["rex"] > 0
    layers = found["layer_norms"]["rex"]
    total = sum(norm**2 for norm in blocks(layers).values()) ** 0.5
    assert total == pytest.approx(found["norms"]["rex"], rel=1e-4)

    picture = tmp_path / "slots.png"
    result = CliRunner().invoke(app, ["inspect", *map(str, two), "--picture", str(picture)])
    assert result.exit_code == 0 and "Warning:" in result.output and "norms by block" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    every = CliRunner().invoke(app, ["inspect", str(two[0]), "--layers"]).output
    assert all(layer in every for layer in layer_norms(load_adapter(two[0])))


def test_other_bases_and_shared_words_are_told(two: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    twin = load_adapter(two[0])
    twin.fingerprint = load_base("pocket", "cpu").fingerprint
    save_adapter(twin, tmp_path / "twin.safetensors")
    warnings = " ".join(inspect_paths([two[0], tmp_path / "twin.safetensors"])["warnings"])
    assert "on another base" in warnings and "Two adapters are called 'rex'" in warnings and "token <rex>" in warnings


def test_the_slot_map_shows_columns_in_the_concepts_colour_and_clashes_in_red() -> None:
    image = slot_map({"a": Slot.interval(0, 2), "b": Slot((1, 4)), "c": None}, {"a": 1.0, "b": None}, 16)
    colours = {colour for _, colour in image.getcolors(100_000) or []}
    assert {color_of(0), color_of(1), CLASH} <= colours
    bottom = slot_map({"a": Slot((-2, -1)), "b": Slot((-2, -1))}, {"a": None, "b": None}, 16)
    assert CLASH in {colour for _, colour in bottom.getcolors(100_000) or []}
    alone = slot_map({"a": Slot.interval(0, 2)}, {"a": None}, 16)
    assert CLASH not in {colour for _, colour in alone.getcolors(100_000) or []}
