"""Layer-wise tokens: a vector for every cross-attention layer, through training, files, pictures and fusions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import seldom
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, T2IAdapter
from families import clip_config, tiny_unet, tiny_vae
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.apply import install_tokens, put_adapters
from spectral_diffusion.adapters.attach import remove_adapters
from spectral_diffusion.adapters.formats.native import DIGEST, digest, load_adapter, save_adapter
from spectral_diffusion.app.base_cache import BaseCache
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.config.train import (
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PriorPreservationConfig,
    TrainConfig,
    ValidationConfig,
)
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.files import read_tensors, write_tensors
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.inspection import inspect_path
from spectral_diffusion.merging.export import export
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.per_layer_tokens import (
    LongForm,
    PerLayerAttention,
    cross_attention,
    per_layer_attention,
    spread,
    use_means,
)
from spectral_diffusion.models.prompt_encoder import PromptEncoder
from spectral_diffusion.models.tokens import known_tokens
from spectral_diffusion.scenes.control import ControlMap
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.training.memory import estimate
from spectral_diffusion.training.run import train_to_file
from tools.pocket.models import build_tokenizer

PROMPT = "a photo of <rex> dog"


@pytest.fixture(scope="module")
def loud(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with cross-attention that is heard; random as it is, words hardly move its pictures."""
    pipeline = load_base(str(tiny_base), "cpu").pipeline
    with torch.no_grad():
        for name, weight in pipeline.unet.named_parameters():
            if ".attn2.to_out.0.weight" in name:
                weight *= 30
    folder = tmp_path_factory.mktemp("loud")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def base(loud: Path) -> Base:
    return load_base(str(loud), "cpu")


def settings(photos: Path, loud: Path, output: Path, **more: object) -> TrainConfig:
    values = {
        "concept": photos, "output": output, "base": str(loud), "rank": 2, "steps": 4, "device": "cpu",
        "per_layer_tokens": True, "embedding_learning_rate": 1e-2,
    }  # fmt: skip
    return TrainConfig(**{**values, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(loud: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rex").mkdir()
    random = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(random.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"rex/{index}.png")
    train_to_file(settings(folder / "rex", loud, folder / "rex.safetensors"))
    return folder / "rex.safetensors"


def with_rows(adapter: Adapter, change: float = 0.0, layer: int | None = None) -> Adapter:
    """The adapter with its mean in every layer, moved in one of them."""
    rows = {name: mean.repeat(len(adapter.per_layer_vectors[name]), 1, 1) for name, mean in adapter.vectors.items()}
    if layer is not None:
        for one in rows.values():
            one[layer] += change * torch.randn(one.shape[1:], generator=torch.Generator().manual_seed(0))
    return replace(adapter, per_layer_vectors=rows)


def drawn(base: Base, prompt: str = PROMPT, regions: list[Region] | None = None, **more: object) -> np.ndarray:
    drawings: Any = more.pop("drawings", ())
    scene = Scene(num_inference_steps=3, guidance_scale=3.0, device="cpu", regions=regions or [], **more)  # type: ignore[arg-type]
    images = sample(base, [prompt] * 2, [1, 2], scene, controls=drawings)
    return np.stack([np.asarray(image) for image in images]).astype(int)


def on(loud: Path, adapter: Adapter) -> Base:
    base = load_base(str(loud), "cpu")
    put_adapters(base, [(adapter, 1.0)])
    return base


@pytest.mark.parametrize("way", seldom(["plain", "negative", "region", "sketch"], {"plain", "region"}))
def test_equal_layers_draw_what_an_ordinary_token_draws(
    loud: Path, trained: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = load_adapter(trained)
    more: dict[str, object] = {}
    if way == "negative":
        more = {"negative_prompt": "a red cat <rex> " + "very " * 40}  # longer than the encoder reads
    if way == "region":
        region = Region(box=(0, 0, 0.5, 1), prompt="<rex> dog in the snow", negative_prompt="a cat")
        more = {"regions": [region], "prompt": "a cat"}
    if way == "sketch":
        network = T2IAdapter(in_channels=1, channels=[16, 24], num_res_blocks=1, downscale_factor=2)
        monkeypatch.setattr("spectral_diffusion.scenes.control.load_t2i_adapter", lambda *what: network)
        more = {"drawings": [ControlMap(Image.new("L", (16, 16), 200))]}
    ordinary = drawn(on(loud, replace(adapter, per_layer_vectors={})), **more)
    equal = drawn(on(loud, with_rows(adapter)), **more)
    assert np.abs(ordinary - equal).max() <= 1
    moved = drawn(on(loud, with_rows(adapter, 1.0, 1)), **more)
    assert np.abs(ordinary - moved).max() > 1


def test_rows_act_through_their_own_layer_alone(loud: Path, trained: Path) -> None:
    adapter = load_adapter(trained)
    seen: list[list[torch.Tensor]] = []
    for change in (0.0, 1.0):
        base = on(loud, with_rows(adapter, change, 2))
        unet, found = base.pipeline.unet, []
        names = [name.removesuffix(".processor") for name in cross_attention(unet)]
        for name in names:
            unet.get_submodule(name).to_k.register_forward_pre_hook(lambda layer, inputs, f=found: f.append(inputs[0]))
        drawn(base, PROMPT)
        seen.append(found[: len(names)])  # of the first step, in the order in which they ran
    differ = [not torch.equal(one, other) for one, other in zip(*seen, strict=True)]
    assert differ == [index == 2 for index in range(len(differ))] and len(differ) > 3
    assert {words.shape[1] for words in seen[0]} == {base.pipeline.tokenizer.model_max_length}


def test_several_tokens_layerwise_and_not_act_together(loud: Path, trained: Path) -> None:
    rex = with_rows(load_adapter(trained), 1.0, 0)
    tom = replace(with_rows(load_adapter(trained), -1.0, 3), name="tom", token="<tom>")
    plain = replace(load_adapter(trained), name="ann", token="<ann>", per_layer_vectors={})
    base = load_base(str(loud), "cpu")
    before = dict(base.pipeline.text_encoder._forward_hooks)
    for adapter in (rex, plain, tom):
        install_tokens(base, adapter)
    encoder, processors = base.pipeline.text_encoder, base.pipeline.unet.attn_processors
    assert len(encoder._forward_hooks) == len(before) + 1
    assert not any(isinstance(getattr(one, "inner", None), PerLayerAttention) for one in processors.values())
    known = known_tokens(base.pipeline.tokenizer)
    assert set(known) == {"<rex>", "<tom>", "<ann>"} and set(known.values()) == {2}
    both = drawn(base, "<rex> dog and <tom> dog and <ann>")
    for alone, prompt in ((rex, "<rex> dog"), (tom, "<tom> dog"), (plain, "<ann> dog")):
        other = load_base(str(loud), "cpu")
        install_tokens(other, alone)
        assert np.abs(drawn(base, prompt) - drawn(other, prompt)).max() <= 1
    assert not np.array_equal(both, drawn(base, "<ann> dog and <ann> dog and <ann>"))


def test_prompts_are_spread_over_their_layers() -> None:
    ladder = torch.tensor([[7, 20, 22, 24], [8, 21, 23, 25]])
    ids = torch.tensor([[1, 2, 3], [7, 8, 2], [4, 4, 8]])
    rows, prompt, place = spread(ids, ladder)
    assert prompt.tolist() == [0, 1, 1, 1, 2, 2, 2] and place.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert rows.tolist() == [[1, 2, 3], [20, 21, 2], [22, 23, 2], [24, 25, 2], [4, 4, 21], [4, 4, 23], [4, 4, 25]]
    cut = LongForm(4, 9).cut(torch.tensor([[1, 2, 3, 4, 5, 9], [1, 2, 9, 0, 0, 0]]))
    assert cut.tolist() == [[1, 2, 3, 9], [1, 2, 9, 0]]


def test_training_begins_as_an_ordinary_token_and_is_undone(base: Base, photos: Path) -> None:
    concept, layers = load_concept(photos), len(cross_attention(base.pipeline.unet))
    before, noisy = dict(base.pipeline.unet.attn_processors), torch.randn(2, 4, 8, 8)
    prompts = ["a photo of <rex>", "a photo of <other-1> dog"]
    found = []
    for count in (0, layers):
        with (
            PromptEncoder(base, concept, 0, 16, ("<other-1>",), count) as encode,
            per_layer_attention(base, count > 0),
        ):
            told = encode(prompts)
            found.append(base.denoiser.predict(noisy, torch.tensor([5, 9]), told).detach())
            assert encode.token_mask(prompts).sum(1).tolist() == [2, 0]
    assert torch.allclose(*found, atol=1e-5)
    assert told.tensors["encoder_hidden_states"].shape[1] == layers * base.pipeline.tokenizer.model_max_length
    assert base.pipeline.unet.attn_processors == before
    assert not base.pipeline.text_encoder._forward_hooks and not base.pipeline.text_encoder._forward_pre_hooks


def test_training_moves_the_layers_apart_and_is_kept_in_the_file(trained: Path, loud: Path) -> None:
    adapter, layers = load_adapter(trained), len(cross_attention(load_base(str(loud), "cpu").pipeline.unet))
    [rows], [mean] = adapter.per_layer_vectors.values(), adapter.vectors.values()
    assert rows.shape == (layers, *mean.shape) and torch.equal(rows.mean(0), mean)
    assert all(not torch.equal(rows[a], rows[b]) for a in range(layers) for b in range(a))
    assert inspect_path(trained)["per_layer_tokens"] == layers and inspect_path(trained)["vectors"] == 2


EVERYTHING = {
    "prior": PriorPreservationConfig(loss_weight=1.0, num_images=2, cut_mix_prob=0.5, batch_size=1),
    "objective": ObjectiveConfig(attention_loss_weight=0.1),
    "data": DataConfig(mask_weight=0.5),
    "optimizer": OptimizerConfig(ema_decay=0.9),
    "gradient_checkpointing": True,
}


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_stopped_run_resumes_bit_for_bit(photos: Path, loud: Path, tmp_path: Path, more: dict) -> None:
    (photos / "masks").mkdir()
    for index in range(3):
        mask = np.tile(np.arange(24) > 11, (20, 1)).astype(np.uint8) * 255
        Image.fromarray(mask).save(photos / f"masks/{index}.png")
    base = load_base(str(loud), "cpu")
    processors = dict(base.pipeline.unet.attn_processors)
    config = settings(photos, loud, tmp_path / "a" / "rex.safetensors", **more)
    whole = train_to_file(config, base=base)
    assert base.pipeline.unet.attn_processors == processors and not base.pipeline.text_encoder._forward_hooks
    config = settings(photos, loud, tmp_path / "b" / "rex.safetensors", **more)
    steps: list[Event] = []

    def watch(event: Event) -> None:
        if event.stage == "train":
            steps.append(event)

    with pytest.raises(Cancelled, match="step 2 of 4"):
        train_to_file(config, base=base, hooks=Hooks(progress=watch, should_stop=lambda: len(steps) >= 2))
    resumed = train_to_file(config, resume=True, base=base)
    assert all(torch.equal(whole.parameters[name], resumed.parameters[name]) for name in whole.parameters)
    assert all(
        torch.equal(whole.per_layer_vectors[name], resumed.per_layer_vectors[name]) for name in whole.per_layer_vectors
    )
    [rows] = whole.per_layer_vectors.values()
    assert not torch.equal(rows[0], rows[1])


def test_samples_on_the_way_change_nothing(photos: Path, loud: Path, tmp_path: Path) -> None:
    plain = train_to_file(settings(photos, loud, tmp_path / "a" / "rex.safetensors"))
    watch = ValidationConfig(every=2, num_inference_steps=2, prompts=["{}"], model_card=True)
    watched = train_to_file(settings(photos, loud, tmp_path / "b" / "rex.safetensors", validation=watch))
    assert all(
        torch.equal(plain.per_layer_vectors[name], watched.per_layer_vectors[name]) for name in plain.per_layer_vectors
    )
    assert len(list((tmp_path / "b").rglob("step-*.png"))) == 2


def test_files_go_round_and_damaged_ones_are_told(trained: Path, tmp_path: Path) -> None:
    adapter, again = load_adapter(trained), tmp_path / "again.safetensors"
    save_adapter(adapter, again)
    tensors, metadata = read_tensors(trained)
    assert read_tensors(again)[1] == metadata and DIGEST in metadata  # its hash tells of every tensor
    for damage in (lambda t: t[:, :1], lambda t: t[0]):
        changed = {**tensors, "layerwise.text_encoder": damage(tensors["layerwise.text_encoder"]).contiguous()}
        write_tensors(again, changed, {**metadata, DIGEST: digest(changed, metadata)})
        with pytest.raises(UserError, match="layer-wise token vectors have a wrong shape"):
            load_adapter(again)
    changed = {name: value for name, value in tensors.items() if not name.startswith("layerwise.")}
    write_tensors(again, changed, {**metadata, DIGEST: digest(changed, metadata)})  # as a file of an ordinary token
    assert load_adapter(again).per_layer_vectors == {}
    with pytest.raises(UserError, match="has vectors for 1 layers"):
        on(
            Path(adapter.base),
            replace(adapter, per_layer_vectors={n: t[:1] for n, t in adapter.per_layer_vectors.items()}),
        )


def test_it_draws_as_an_adapter_and_as_a_regions(trained: Path, loud: Path, tmp_path: Path) -> None:
    adapter = load_adapter(trained)
    moved = tmp_path / "moved.safetensors"
    save_adapter(with_rows(adapter, 1.0, 1), moved)
    mean = tmp_path / "mean.safetensors"
    save_adapter(replace(adapter, per_layer_vectors={}), mean)
    pictures = []
    for file in (moved, mean):
        for more in (
            {"prompt": PROMPT, "adapters": {str(file): 1.0}},
            {"prompt": "a cat", "regions": [Region(box=(0, 0, 0.5, 1), prompt=PROMPT, adapters={str(file): 1.0})]},
        ):
            scene = Scene(
                num_inference_steps=2,
                device="cpu",
                base=str(loud),
                output=tmp_path / f"{len(pictures)}.png",
                seed=1,
                **more,
            )  # type: ignore[arg-type]
            [path] = generate_to_file(scene)
            pictures.append(np.asarray(Image.open(path)).astype(int))
    assert np.abs(pictures[0] - pictures[2]).max() > 1 and np.abs(pictures[1] - pictures[3]).max() > 1


def test_a_kept_base_is_lent_as_it_was(trained: Path, loud: Path) -> None:
    keeper, adapter = BaseCache(), load_adapter(trained)
    adapter = with_rows(adapter, 1.0, 1)
    with keeper.acquire(str(loud), "cpu") as base:
        plain = drawn(base, "a red dog")
    pictures = []
    for _ in range(2):
        with keeper.acquire(str(loud), "cpu") as base:
            put_adapters(base, [(adapter, 1.0)])
            pictures.append(drawn(base))
            remove_adapters(base.models)  # tokens stay, as for ordinary ones
            assert np.array_equal(drawn(base, "a red dog"), plain)
    assert np.array_equal(*pictures)
    with keeper.acquire(str(loud), "cpu") as base:
        assert np.array_equal(drawn(base, "a red dog"), plain) and not known_tokens(base.pipeline.tokenizer)
        put_adapters(base, [(replace(adapter, per_layer_vectors={}), 1.0)])
        assert np.array_equal(drawn(base), drawn(on(loud, replace(adapter, per_layer_vectors={}))))


def test_fusions_and_exports_hold_the_mean_and_say_so(trained: Path, loud: Path, tmp_path: Path) -> None:
    adapter, notes = load_adapter(trained), []
    fuse_to_folder(
        FuseConfig(adapters=[trained], output=tmp_path / "fused", device="cpu"), hooks=Hooks(notify=notes.append)
    )
    told = [note for note in notes if "layer-wise" in note]
    assert told == [f"Note: {adapter.name} has layer-wise vectors; a stock pipeline cannot hold them, so their mean is "
                    "written."]  # fmt: skip
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "fused", safety_checker=None)
    ids = stock.tokenizer.convert_tokens_to_ids(["<rex>", "<rex>_1"])
    assert torch.equal(stock.text_encoder.get_input_embeddings().weight[ids], adapter.vectors["text_encoder"])
    notes.clear()
    [written] = export(trained, tmp_path / "e.safetensors", "embedding", hooks=Hooks(notify=notes.append))
    assert len(notes) == 1 and "their mean is written" in notes[0]
    assert torch.equal(read_tensors(written)[0]["<rex>"], adapter.vectors["text_encoder"])
    base = on(loud, adapter)
    use_means(base)
    assert np.array_equal(drawn(base), drawn(on(loud, replace(adapter, per_layer_vectors={}))))


@pytest.mark.slow
def test_memory_counts_every_encoding(loud: Path, base: Base, photos: Path, tmp_path: Path) -> None:
    whole, part = (
        estimate(
            base.models, base.pipeline.vae, settings(photos, loud, tmp_path / "a.safetensors", per_layer_tokens=on), 16
        )
        for on in (True, False)
    )
    assert whole.phases["training"] > part.phases["training"] and whole.weights == part.weights


def test_two_text_encoders_are_refused_before_any_work(photos: Path, tmp_path: Path) -> None:
    xl = tmp_path / "xl"
    StableDiffusionXLPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(clip_config(16)), tokenizer=build_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(24, act="gelu")), tokenizer_2=build_tokenizer(),
        unet=tiny_unet(40, addition_embed_type="text_time", addition_time_embed_dim=8,
                       projection_class_embeddings_input_dim=24 + 6 * 8),
        scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    ).save_pretrained(xl)  # fmt: skip
    with pytest.raises(UserError, match="needs a base with one text encoder"):
        train_to_file(settings(photos, xl, tmp_path / "out" / "rex.safetensors"))
    assert not list((tmp_path / "out").iterdir())
