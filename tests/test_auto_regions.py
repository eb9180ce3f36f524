"""Regions that are found by attention: masks, what acts where, and when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_photos, make_tiny_base
from families import make_tiny_sdxl
from PIL import Image

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.apply import install_tokens
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes import generate as generate_module
from spectral_diffusion.scenes import sampling
from spectral_diffusion.scenes.auto_regions import AutoConcept, columns_of, disjoint, own_prompt
from spectral_diffusion.scenes.found_regions import FoundRegions
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.scenes.sampling import SceneInputs, SceneSampler, sample
from spectral_diffusion.training.run import train_to_file

PROMPT = "<rex> on the left and <mug> on the right, on the beach"


def test_masks_are_disjoint_and_follow_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        maps = torch.rand(3, 12, 20, generator=generator)
        maps[0, :, :6] += 2
        maps[1, :, 7:13] += 2
        maps[2, :, 14:] += 2
        masks = disjoint(maps)
        assert masks.dtype == torch.bool and int(masks.sum(0).max()) == 1
        for index, columns in enumerate((slice(0, 5), slice(8, 12), slice(15, 20))):
            assert masks[index, :, columns].float().mean() > 0.95
    noise = disjoint(torch.rand(4, 9, 9, generator=generator))
    assert int(noise.sum(0).max()) == 1 and noise.flatten(1).any(1).all()


def test_a_mask_is_one_piece_without_holes_and_nobody_is_left_out() -> None:
    left = torch.zeros(16, 32)
    left[:, :12], left[6:9, 4:7], left[:, 28:] = 1.0, 0.2, 0.9  # a hole, and a second piece
    right = torch.full((16, 32), 0.3)
    right[:, 14:26] = 1.0
    masks = disjoint(torch.stack([left, right]))
    assert masks[0, :, :11].all() and not masks[0, :, 26:].any()
    spread = 1 + 0.05 * torch.rand(16, 32, generator=torch.Generator().manual_seed(1))  # attention to nothing much
    spread[:, 12:20] += 0.1
    first, last = (0.3 + torch.exp(-((torch.arange(32.0) - at) ** 2) / 8).expand(16, 32) for at in (4.0, 28.0))
    crowd = disjoint(torch.stack([first, spread, last]))
    assert int(crowd.sum(0).max()) == 1 and crowd[1, :, 14:18].all()
    for index, columns in ((0, slice(2, 7)), (2, slice(26, 31))):
        assert crowd[index, :, columns].all() and 0.5 / 3 < crowd[index].float().mean() < 1.5 / 3


def test_a_region_reads_the_prompt_without_the_other_concepts() -> None:
    tokens = ["<rex>", "<mug>", "<Cat>"]
    assert own_prompt(PROMPT, "<rex>", tokens) == "<rex> on the left and on the right, on the beach"
    assert own_prompt("<rex>, <mug>, <cat> at sea", "<cat>", tokens) == "<cat> at sea"
    assert own_prompt("<REX> and <mug>.", "<rex>", tokens) == "<REX> and."
    assert own_prompt("<rex> <rex>_1 and <mug> <mug>_1", "<rex>", tokens) == "<rex> <rex>_1 and"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("auto")
    make_tiny_base(path / "sd")
    make_tiny_sdxl(path / "sdxl")
    return path


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pair(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, list[Path]]:
    """A base, and two adapters that change the picture a lot, convolutions included."""
    base, files = folder / request.param, []
    for seed, name in enumerate(("rex", "mug")):
        photos = make_photos(folder / request.param / "photos" / name, seed=seed)
        files.append(folder / request.param / "adapters" / f"{name}.safetensors")
        train_to_file(
            TrainConfig(
                concept=photos, output=files[-1], base=str(base), rank=2, steps=3, learning_rate=0.1, device="cpu",
                class_noun="thing", target_modules="attention+feed-forward+conv", crops_per_image=1,
            )
        )  # fmt: skip
    return base, files


def scene(base: Path, **more: Any) -> Scene:
    given = {"num_inference_steps": 3, "device": "cpu", "mixed_precision": "no", "guidance_scale": 3.0}
    return Scene(**{"prompt": PROMPT, "base": str(base), "width": 64, "height": 32, **given, **more})


def loaded(base: Path, files: list[Path]) -> tuple[Base, list[Adapter]]:
    from spectral_diffusion.adapters.formats.native import load_adapter

    found, adapters = load_base(str(base), "cpu"), [load_adapter(file) for file in files]
    for adapter in adapters:
        install_tokens(found, adapter)
    return found, adapters


def latents_of(monkeypatch: pytest.MonkeyPatch, sampler: SceneSampler, prompts: list[str], seeds: list[int]) -> Any:
    """What the steps of a sampler end with (n, c, h, w)."""
    ends: list[torch.Tensor] = []

    def kept(base: Base, latents: torch.Tensor, *size: int) -> list[Any]:
        ends.append(latents)
        return []

    monkeypatch.setattr(sampling, "decoded", kept)
    sampler.inputs = SceneInputs(bound=sampler.inputs.bound, concepts=sampler.inputs.concepts, preview=lambda *_: None)
    sampler.batch(prompts, seeds, 0, 1)
    return ends[-1]


@pytest.mark.parametrize("isolation", [0.0, pytest.param(0.6, marks=pytest.mark.slow), 1.0])
def test_dense_regions_are_those_of_boxes(
    pair: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch, isolation: float
) -> None:
    """The same picture as with boxes and adapters bound to them, which are computed cell by cell."""
    base, adapters = loaded(*pair)
    bound = [[(adapter, 0.9)] for adapter in adapters]
    tokens = [adapter.token for adapter in adapters]
    regions = [
        Region(box=box, prompt=own_prompt(PROMPT, token, tokens))
        for box, token in zip(((0, 0, 0.5, 1), (0.5, 0, 0.75, 1)), tokens, strict=True)
    ]
    boxed = SceneSampler(
        base, scene(pair[0], regions=regions, region_isolation=isolation), SceneInputs(bound=bound), sampling.QUIET
    )
    concepts = [AutoConcept(token, own) for token, own in zip(tokens, bound, strict=True)]
    found = SceneSampler(
        base, scene(pair[0], region_isolation=isolation), SceneInputs(concepts=concepts), sampling.QUIET
    )
    state = found._found_regions([PROMPT], [0])
    height, width = state.masks.shape[2:]
    masks = torch.zeros(1, 2, height, width, dtype=torch.bool)
    masks[0, 0, :, : width // 2], masks[0, 1, :, width // 2 : 3 * width // 4] = True, True
    monkeypatch.setattr(found, "_found_regions", lambda *_: FoundRegions(state.concepts, masks, isolation))
    wanted = latents_of(monkeypatch, boxed, [PROMPT], [0])
    dense = latents_of(monkeypatch, found, [PROMPT], [0])
    assert torch.allclose(wanted, dense, rtol=1e-4, atol=2e-4)
    plain = SceneSampler(base, scene(pair[0]), SceneInputs(), sampling.QUIET)
    assert not torch.allclose(latents_of(monkeypatch, plain, [PROMPT], [0]), dense, atol=1e-2)


def test_every_picture_of_a_batch_has_masks_of_its_own(
    pair: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = loaded(*pair)
    inputs = SceneInputs(concepts=[AutoConcept(adapter.token, [(adapter, 1.0)]) for adapter in adapters])
    sampler = SceneSampler(base, scene(pair[0], region_isolation=1.0), inputs, sampling.QUIET)
    prompts, seeds = [PROMPT, "<mug> and <rex> at night"], [3, 4]
    masks = sampler._found_regions(prompts, seeds).masks
    assert masks.shape[:2] == (2, 2) and not torch.equal(masks[0], masks[1])
    together = latents_of(monkeypatch, sampler, prompts, seeds)
    for index in (0, 1):
        alone = latents_of(monkeypatch, sampler, prompts[index : index + 1], seeds[index : index + 1])
        assert torch.allclose(alone, together[index : index + 1], atol=1e-3)
    layers = base.denoiser.network.attn_processors.values()
    assert not any(type(processor).__name__ in {"FoundAttention", "CapturingProcessor"} for processor in layers)
    assert all(not module._forward_hooks for module in base.denoiser.network.modules())


def test_tokens_are_found_where_the_encoder_reads_them(pair: tuple[Path, list[Path]]) -> None:
    base, _ = loaded(*pair)
    columns = columns_of(base, [PROMPT], "<mug>")
    assert len(columns) == 1 and int(columns[0].sum()) == base.known_tokens["<mug>"]
    with pytest.raises(UserError, match="reads no <mug> in 'nothing'"):
        columns_of(base, ["nothing"], "<mug>")
    with pytest.raises(UserError, match="name it early"):
        columns_of(base, ["very " * 99 + PROMPT], "<mug>")
    tokenizer = next(iter(base.tokenizers.values()))
    ids = tokenizer(base.spell(PROMPT, full=True)).input_ids
    assert "mug" in tokenizer.decode([ids[int(columns[0].nonzero()[0])]])


def test_regions_are_found_where_several_adapters_are_named(
    pair: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, files = pair
    used: list[list[str]] = []
    find = SceneSampler._found_regions

    def spied(self: SceneSampler, prompts: Any, seeds: Any) -> FoundRegions:
        used.append([concept.token for concept in self.inputs.concepts])
        return find(self, prompts, seeds)

    monkeypatch.setattr(SceneSampler, "_found_regions", spied)
    adapters = {str(file): 1.0 for file in files}

    def drawn(name: str, **more: Any) -> bytes:
        output = tmp_path / f"{name}.png"
        generate_to_file(scene(base, adapters=adapters, output=output, **more))
        from PIL import Image

        return Image.open(output).tobytes()

    found, again = drawn("found"), drawn("again")
    assert used == [["<rex>", "<mug>"]] * 2 and found == again
    used.clear()
    assert drawn("off", auto_regions=False) != found
    drawn("boxes", regions=[Region(box=(0, 0, 0.5, 1), prompt="<rex>")])
    drawn("one", prompt="<rex> on the beach")
    assert not used
    with pytest.raises(UserError, match="two concepts or more, each named in the prompt"):
        drawn("asked", prompt="<rex> on the beach", auto_regions=True)
    with pytest.raises(UserError, match="The scene has regions"):
        drawn("both", regions=[Region(box=(0, 0, 0.5, 1), prompt="<rex>")], auto_regions=True)


def test_an_adapter_that_the_prompt_does_not_name_acts_everywhere(pair: tuple[Path, list[Path]]) -> None:
    from spectral_diffusion.scenes.auto_regions import concepts_named

    base, adapters = loaded(*pair)
    named = dict(zip(map(str, pair[1]), adapters, strict=True))
    assert concepts_named(base, scene(pair[0]), named) == dict(zip(map(str, pair[1]), ("<rex>", "<mug>"), strict=True))
    assert concepts_named(base, scene(pair[0], prompt="<rex> at sea"), named) == {}


def test_no_regions_are_found_beside_layer_wise_vectors(pair: tuple[Path, list[Path]]) -> None:
    """Its words make every encoding longer than the maps are."""
    from spectral_diffusion.scenes.auto_regions import concepts_named

    base, adapters = loaded(*pair)
    layers = {name: rows[None] for name, rows in adapters[1].vectors.items()}
    layerwise = replace(adapters[1], name="ann", per_layer_vectors=layers)
    named = {**dict(zip(map(str, pair[1]), adapters, strict=True)), "ann.safetensors": layerwise}
    assert concepts_named(base, scene(pair[0]), named) == {}
    with pytest.raises(UserError, match="'ann' has layer-wise vectors"):
        concepts_named(base, scene(pair[0], auto_regions=True), named)


def test_an_adapter_may_act_everywhere_and_more_in_a_region(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (rex, mug) = pair
    region = Region(box=(0, 0, 0.5, 1), prompt="<rex>", adapters={str(rex): 0.9})
    more: dict[str, Any] = {"regions": [region], "output": tmp_path / "a.png"}
    generate_to_file(scene(base, adapters={str(rex): 0.1}, **more))
    fused, said = tmp_path / "fused", list[str]()
    fuse_to_folder(FuseConfig(adapters=[rex, mug], output=fused, device="cpu"))
    more["output"] = tmp_path / "b.png"
    generate_to_file(scene(fused, **more), Hooks(notify=said.append))
    assert any("<rex> is in the base already" in text for text in said)


def test_batches_share_one_sampler(
    pair: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads control networks and encodes regions, and the pictures are those of a batch at a time."""
    made: list[Any] = []
    sampler = generate_module.SceneSampler
    monkeypatch.setattr(generate_module, "SceneSampler", lambda *given: made.append(sampler(*given)) or made[-1])
    many = scene(pair[0], seeds=[0, 1, 2], batch_size=1, output=tmp_path / "a.png")
    several = [path for path in generate_to_file(many) if path != many.output]
    assert len(made) == 1 and len(several) == 3
    [one] = generate_to_file(scene(pair[0], seeds=[2], output=tmp_path / "one.png"))
    assert Image.open(one).tobytes() == Image.open(several[2]).tobytes()


def test_a_fused_base_finds_regions_for_its_tokens(pair: tuple[Path, list[Path]]) -> None:
    """Asked for: there every concept reads a text of its own, and no adapter is needed."""
    base, _ = loaded(*pair)
    from spectral_diffusion.scenes.auto_regions import concepts_named

    assert concepts_named(base, scene(pair[0], auto_regions=True), {}) == {"<rex>": "<rex>", "<mug>": "<mug>"}
    concepts = [AutoConcept(token) for token in ("<rex>", "<mug>")]
    [image] = sample(base, [PROMPT], [0], scene(pair[0]), concepts=concepts)
    assert image.size == (64, 32)


@pytest.mark.slow
@pytest.mark.parametrize("isolation", [0.0, 1.0])
def test_half_networks_take_found_regions(pair: tuple[Path, list[Path]], isolation: float) -> None:
    """Hooks of float32 statistics and of half layers share the masks."""
    for how in ({"dtype": "bfloat16"}, {"mixed_precision": "bf16"}):
        base, adapters = load_base(str(pair[0]), "cpu", how.get("dtype", "float32")), loaded(*pair)[1]
        for adapter in adapters:
            install_tokens(base, adapter)
        concepts = [AutoConcept(adapter.token, [(adapter, 0.2)]) for adapter in adapters]
        more = {key: value for key, value in how.items() if key != "dtype"}
        [image] = sample(base, [PROMPT], [0], scene(pair[0], region_isolation=isolation, **more), concepts=concepts)
        assert image.size == (64, 32)


def test_masked_norms_bear_large_numbers_under_autocast(folder: Path) -> None:
    base = load_base(str(folder / "sd"), "cpu")
    norm = next(m for m in base.denoiser.network.modules() if isinstance(m, torch.nn.GroupNorm))
    masks = torch.zeros(1, 2, 64, 64, dtype=torch.bool)
    masks[:, 0, :, :32], masks[:, 1, :, 32:] = True, True
    state = FoundRegions([], masks, 1.0)
    x = 40 * torch.randn(1, norm.num_channels, 64, 64, generator=torch.Generator().manual_seed(0)) + 30
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        out = state._norm_hook(norm, (x,), norm(x))
    wanted = torch.cat([torch.nn.functional.group_norm(half, norm.num_groups, norm.weight, norm.bias, norm.eps)
                        for half in x.split(32, 3)], 3)  # fmt: skip
    assert out is not None and torch.allclose(out.float(), wanted, atol=2e-3)


@pytest.mark.slow
def test_large_pictures_without_small_layers_are_watched(tmp_path: Path) -> None:
    """SDXL attends at a half and a quarter of the latents only."""
    base = load_base(str(make_tiny_sdxl(tmp_path / "sdxl")), "cpu")
    for token in ("<rex>", "<mug>"):
        width = {
            name: model.get_input_embeddings().weight.shape[1] for name, model in base.models.items() if "text" in name
        }
        base.add_token(token, {name: torch.randn(1, size) for name, size in width.items()})
    concepts = [AutoConcept(token) for token in ("<rex>", "<mug>")]
    side = 4 * 36 * base.denoiser.vae_scale
    wide = scene(tmp_path / "sdxl", width=side, height=side, guidance_scale=0.0)
    sampler = SceneSampler(base, wide, SceneInputs(concepts=concepts), sampling.QUIET)
    masks = sampler._found_regions([PROMPT], [0]).masks
    assert 0.1 < masks[0, 0].float().mean() < 0.9 and 0.1 < masks[0, 1].float().mean() < 0.9


def test_found_regions_keep_to_their_steps_and_read_the_global_prompt(
    pair: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = loaded(*pair)
    concepts = [AutoConcept(adapter.token, [(adapter, 1.0)]) for adapter in adapters]

    def drawn(**more: Any) -> torch.Tensor:
        sampler = SceneSampler(base, scene(pair[0], **more), SceneInputs(concepts=concepts), sampling.QUIET)
        ends: torch.Tensor = latents_of(monkeypatch, sampler, [PROMPT], [0])
        return ends

    plain = SceneSampler(base, scene(pair[0]), SceneInputs(), sampling.QUIET)
    without = latents_of(monkeypatch, plain, [PROMPT], [0])
    last = drawn(region_start=0.9)
    assert not torch.allclose(last, without) and torch.equal(drawn(region_start=0.8), last)  # of three steps the third
    always, early, shared = drawn(), drawn(region_end=0.5), drawn(global_prompt_weight=1.0)
    assert not torch.allclose(always, last) and not torch.allclose(always, early) and not torch.allclose(always, shared)


def test_old_pictures_are_made_again_as_they_were(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    from PIL import Image, PngImagePlugin

    from spectral_diffusion.core.files import parse_json
    from spectral_diffusion.scenes.png_metadata import SETTINGS_KEY, read_settings

    output = tmp_path / "found.png"
    generate_to_file(scene(pair[0], adapters={str(file): 1.0 for file in pair[1]}, output=output))
    assert read_settings(output)["auto_regions"] is True
    import json

    with Image.open(output) as image:
        metadata = parse_json(image.info[SETTINGS_KEY])
        del metadata["settings"]["auto_regions"]
        info = PngImagePlugin.PngInfo()
        info.add_text(SETTINGS_KEY, json.dumps(metadata))
        image.save(tmp_path / "old.png", pnginfo=info)
    assert read_settings(tmp_path / "old.png")["auto_regions"] is False
