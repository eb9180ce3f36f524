"""Regions that are found by joint attention, on every transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_photos
from PIL import Image

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.apply import install_tokens
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import QUIET
from spectral_diffusion.models.attention_maps import AttentionMaps
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.denoiser import Conditioning
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.token_maps import attended, capture_token_maps
from spectral_diffusion.scenes.auto_regions import (
    WATCHED,
    AttentionTotals,
    AutoConcept,
    coarse_steps,
    concepts_named,
    word_columns_of,
)
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.scenes.png_metadata import read_settings
from spectral_diffusion.scenes.sampling import SceneInputs, SceneSampler, sample
from spectral_diffusion.scenes.token_regions import TokenRegions
from spectral_diffusion.training.run import train_to_file

PROMPT = "<rex> on the left and <mug> on the right, on the beach"


@pytest.fixture(scope="module")
def pair(family: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters that change the picture a lot."""
    folder, files = tmp_path_factory.mktemp("pair"), []
    for seed, (name, noun) in enumerate((("rex", "dog"), ("mug", "cup"))):
        files.append(folder / f"{name}.safetensors")
        train_to_file(
            TrainConfig(
                concept=make_photos(folder / name, seed=seed), output=files[-1], base=str(family), rank=2, steps=3,
                learning_rate=0.1, device="cpu", class_noun=noun, crops_per_image=1, resolution=32,
            )
        )  # fmt: skip
    return files


def scene(family: Path, **more: Any) -> Scene:
    given = {"num_inference_steps": 3, "device": "cpu", "mixed_precision": "no", "guidance_scale": 3.0}
    return Scene(**{"prompt": PROMPT, "base": str(family), "width": 64, "height": 32, **given, **more})


@pytest.fixture
def loaded(family: Path, pair: list[Path]) -> tuple[Base, list[Adapter]]:
    base, adapters = load_base(str(family), "cpu"), [load_adapter(file) for file in pair]
    for adapter in adapters:
        install_tokens(base, adapter)
    return base, adapters


def test_words_are_found_where_the_encoder_reads_them(loaded: tuple[Base, list[Adapter]]) -> None:
    """The encoders are causal: what a prompt's row has before the words does not depend on them."""
    base, _ = loaded
    columns = word_columns_of(base, PROMPT, "<rex>")
    others = word_columns_of(base, PROMPT, "<mug>")
    assert columns.any() and others.any() and not (columns & others).any()

    def row(prompt: str) -> torch.Tensor:
        return base.denoiser.prompt_rows(Conditioning.stack([base.denoiser.encode_one(base.spell(prompt))]))[0]  # type: ignore[attr-defined]

    for token, found in (("<rex>", columns), ("<mug>", others)):
        [one, other] = row(PROMPT), row(PROMPT.replace(token, "!?"))
        shortest = min(len(one), len(other))
        differs = (one[:shortest] - other[:shortest]).flatten(1).abs().amax(1) > 1e-5
        assert len(one) == len(found) and int(differs.nonzero()[0]) == int(found.nonzero()[0])
    twice = word_columns_of(base, "<rex> and again <REX>", "<rex>")
    assert twice.sum() > columns.sum()
    with pytest.raises(UserError, match="reads no <rex>"):
        word_columns_of(base, "a dog", "<rex>")


def test_attention_over_words_with_shared_keys() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(6, 4, 8), torch.randn(5, 2, 8)
    whole = keys.repeat_interleave(2, 1)
    want = torch.einsum("qhd,khd->hqk", query, whole).div(8**0.5).softmax(2).mean(0)
    assert torch.allclose(attended(query, keys), want, atol=1e-6)


def test_every_watched_step_has_a_map_of_every_joint_layer(
    loaded: tuple[Base, list[Adapter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = loaded
    seen: list[tuple[int, int]] = []
    rows, columns = grid_of(base)
    cells = rows * columns
    cells += -cells % base.denoiser.token_multiple
    after = AttentionTotals.after_step

    def watched(totals: AttentionTotals, maps: AttentionMaps, step: int) -> None:
        for value in maps.found.values():
            assert value.shape == (1, cells, totals.columns.shape[2])
            assert torch.allclose(value.sum(2), torch.ones(1, cells))
        seen.append((step, len(maps.found)))
        after(totals, maps, step)

    monkeypatch.setattr(AttentionTotals, "after_step", watched)
    plain = scene(Path(base.name), num_inference_steps=16)
    concepts = [AutoConcept(adapter.token, [(adapter, 1.0)]) for adapter in adapters]
    SceneSampler(base, plain, SceneInputs(concepts=concepts), QUIET)._found_tokens(PROMPT, 0)
    assert coarse_steps(base, plain) == 4 and [step for step, _ in seen] == [1, 2, 3, 4]
    assert len({count for _, count in seen}) == 1 and seen[0][1] > 0
    assert coarse_steps(base, scene(Path(base.name), num_inference_steps=4)) == WATCHED


def grid_of(base: Base) -> tuple[int, int]:
    """Rows and columns of the scene's tokens."""
    return 32 // base.denoiser.token_side, 64 // base.denoiser.token_side


def test_watching_changes_no_picture_and_leaves_nothing_behind(loaded: tuple[Base, list[Adapter]]) -> None:
    base, _ = loaded
    before = sample(base, ["a dog"], [0], scene(Path(base.name)))
    columns = word_columns_of(base, "a dog", "dog")
    with capture_token_maps(base.denoiser, grid_of(base)[0] * grid_of(base)[1], len(columns)) as maps:
        during = sample(base, ["a dog"], [0], scene(Path(base.name)))
        assert maps.found
    count = len(maps.found)
    after = sample(base, ["a dog"], [0], scene(Path(base.name)))
    assert before[0].tobytes() == during[0].tobytes() == after[0].tobytes() and len(maps.found) == count


def test_found_regions_are_those_of_masks(
    loaded: tuple[Base, list[Adapter]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, adapters = loaded
    states: list[TokenRegions] = []
    find = SceneSampler._found_tokens

    def kept(sampler: SceneSampler, prompt: str, seed: int) -> TokenRegions:
        states.append(find(sampler, prompt, seed))
        return states[-1]

    monkeypatch.setattr(SceneSampler, "_found_tokens", kept)
    concepts = [AutoConcept(adapter.token, [(adapter, 1.0)]) for adapter in adapters]
    plain = scene(Path(base.name), negative_prompt="a cat")
    both = sample(base, [PROMPT] * 2, [0, 1], plain.model_copy(update={"batch_size": 2}), concepts=concepts)
    own = ["<rex> on the left and on the right, on the beach", "on the left and <mug> on the right, on the beach"]
    for seed, (image, state) in enumerate(zip(both, states, strict=True)):
        assert state.cells.any(1).all()
        regions = []
        rows, columns = grid_of(base)
        for index, cells in enumerate(state.cells[:, : rows * columns]):
            mask = Image.fromarray((cells.view(rows, columns) * 255).byte().numpy()).resize(
                (64, 32), Image.Resampling.NEAREST
            )
            mask.save(tmp_path / f"{seed}-{index}.png")
            regions.append(Region(prompt=own[index], mask=tmp_path / f"{seed}-{index}.png"))
        masked = plain.model_copy(update={"regions": regions})
        [expected] = sample(base, [PROMPT], [seed], masked, bound=[[(adapter, 1.0)] for adapter in adapters])
        assert image.tobytes() == expected.tobytes()


def test_a_picture_whose_tokens_are_padded_has_places(loaded: tuple[Base, list[Adapter]]) -> None:
    base, adapters = loaded
    concepts = [AutoConcept(adapter.token, [(adapter, 1.0)]) for adapter in adapters]
    multiple = base.denoiser.side_multiple
    sides = {"width": 3 * max(16, multiple), "height": 5 * max(8, multiple)}
    [image] = sample(base, [PROMPT], [0], scene(Path(base.name), **sides), concepts=concepts)
    assert image.size == tuple(sides.values())


def test_what_a_region_cannot_bind_acts_everywhere(
    family: Path, pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, own = load_base(str(family), "cpu"), {str(path): load_adapter(path) for path in pair}
    first = own[str(pair[0])]
    first.sizes = {**first.sizes, "transformer.proj_out": (1, 1)}
    assert concepts_named(base, scene(family), own) == {}
    assert len(concepts_named(base, scene(family, auto_regions=True), own)) == 2
    both = load_adapter(pair[1])
    both.earlier = {"<rex>": {}}  # of two concepts, which one place could not show
    again = {str(pair[0]): load_adapter(pair[0]), str(pair[1]): both}
    assert concepts_named(base, scene(family), again) == {}
    assert concepts_named(base, scene(family, prompt="<mug> here"), again) == {}


def test_a_reference_picture_leaves_no_places(family: Path, pair: list[Path], tmp_path: Path) -> None:
    base, own = load_base(str(family), "cpu"), {str(path): load_adapter(path) for path in pair}
    if base.family.controls != "reference":
        pytest.skip("this family reads no reference picture")
    Image.new("L", (64, 32)).save(tmp_path / "sketch.png")
    control = {"controls": [{"file": tmp_path / "sketch.png", "kind": "sketch"}]}
    assert concepts_named(base, scene(family, **control), own) == {}
    with pytest.raises(UserError, match="reference picture"):
        concepts_named(base, scene(family, auto_regions=True, **control), own)


def test_adapters_that_are_named_get_places_by_default(family: Path, pair: list[Path], tmp_path: Path) -> None:
    adapters = dict.fromkeys(map(str, pair), 1.0)
    files = {}
    for name, more in (("found", {}), ("everywhere", {"auto_regions": False})):
        [files[name]] = generate_to_file(scene(family, output=tmp_path / f"{name}.png", adapters=adapters, **more))
    found, everywhere = (Image.open(file) for file in files.values())
    assert found.tobytes() != everywhere.tobytes()
    assert read_settings(files["found"])["auto_regions"] is True
    own = {path: load_adapter(Path(path)) for path in adapters}
    base = load_base(str(family), "cpu")
    assert set(concepts_named(base, scene(family), own).values()) == {"<rex>", "<mug>"}
    assert concepts_named(base, scene(family, prompt="<rex> alone"), own) == {}
