"""Every kind of base: Stable Diffusion 1.x, 2.x (v-prediction, linear projections) and XL (two text encoders)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from families import clip_config, make_tiny_sdxl, tiny_unet, tiny_vae
from PIL import Image
from transformers import CLIPTextModel

from spectral_diffusion.adapters.adapter import check_base
from spectral_diffusion.adapters.apply import put_adapters
from spectral_diffusion.adapters.formats.checkpoint import checkpoint_tensors, unet_tensors
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.config.train import PriorPreservationConfig, TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.files import read_tensors, write_tensors
from spectral_diffusion.data.folder import load_concept
from spectral_diffusion.merging.export import ExportOptions, export
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.teacher_targets import predict
from spectral_diffusion.models.architectures import build_meta, count_table
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.prompt_encoder import PromptEncoder
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.training.run import train_to_file
from tools.pocket.models import build_tokenizer


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base of the kind."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "sd2":
        StableDiffusionPipeline(
            vae=tiny_vae(), text_encoder=CLIPTextModel(clip_config(24, act="gelu")), tokenizer=build_tokenizer(),
            unet=tiny_unet(24), scheduler=EulerDiscreteScheduler(prediction_type="v_prediction"),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(path)  # fmt: skip
        return path
    return make_tiny_sdxl(path)


def settings(photos: Path, folder: Path, output: Path, **more: object) -> TrainConfig:
    values = {"concept": photos, "output": output, "base": str(folder), "rank": 2, "steps": 4, "device": "cpu"}
    return TrainConfig(**{**values, "learning_rate": 1e-2, **more})  # type: ignore[arg-type]


def test_train_load_fuse_and_draw(photos: Path, folder: Path, tmp_path: Path) -> None:
    keep = PriorPreservationConfig(loss_weight=1.0, batch_size=1, num_images=2)
    adapter = train_to_file(settings(photos, folder, tmp_path / "rex.safetensors", prior=keep))
    loaded = load_adapter(tmp_path / "rex.safetensors")
    encoders = {layer.split(".")[0] for layer in loaded.layers} - {"unet"}
    assert set(loaded.vectors) == encoders == set(load_base(str(folder), "cpu").tokenizers)
    assert adapter.norm() > 0 and all(vectors.shape[0] == 2 for vectors in loaded.vectors.values())

    fuse_to_folder(FuseConfig(adapters=[tmp_path / "rex.safetensors"], output=tmp_path / "fused", device="cpu"))
    fused = load_base(str(tmp_path / "fused"), "cpu")
    unfused = load_base(str(folder), "cpu")
    put_adapters(unfused, [(loaded, 1.0)])
    prompt = f"a photo of {loaded.token} on the beach"
    config = Scene(
        num_inference_steps=2, guidance_scale=3.0, device="cpu", regions=[Region(box=(0, 0, 0.5, 1), prompt="a cup")]
    )
    pictures = [
        np.asarray(sample(base, [prompt], [1], config)[0], float)
        for base in (fused, unfused, load_base(str(folder), "cpu"))
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.abs(pictures[0] - pictures[2]).max() > 1


def test_a_half_precision_base_draws_its_samples(photos: Path, folder: Path, tmp_path: Path) -> None:
    watch = {"every": 1, "num_inference_steps": 2}
    config = settings(photos, folder, tmp_path / "rex.safetensors", dtype="bfloat16", steps=1, validation=watch)
    train_to_file(config)
    with Image.open(tmp_path / "rex-samples" / "step-000001.png") as grid:
        assert len(grid.convert("RGB").crop((0, 18, 96, 114)).getcolors(10_000) or []) > 1


def test_words_after_a_new_token_count_where_prompts_are_summed_up(folder: Path, tmp_path: Path) -> None:
    """Published configs of SDXL name 2 as the end token, which lets transformers look for the largest id instead."""
    old = shutil.copytree(folder, tmp_path / "old")
    for file in old.glob("text_encoder*/config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 2}))
    base, plain = load_base(str(old), "cpu"), load_base(str(folder), "cpu")
    assert base.fingerprint == plain.fingerprint
    one, two = (each.denoiser.encode(["a red dog"]).tensors.get("text_embeds") for each in (base, plain))
    assert one is None or (two is not None and torch.equal(one, two))
    base.add_token("<zed>", {name: rows.repeat(2, 1) for name, rows in first_rows(base).items()})
    prompts = ["<zed> <zed>_1 on the beach", "<zed> <zed>_1 in the snow"]
    pooled = base.denoiser.encode(prompts).tensors.get("text_embeds")
    assert pooled is None or not torch.allclose(pooled[0], pooled[1])
    base.pipeline.save_pretrained(tmp_path / "new")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "new")
    again = stock.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert pooled is None or torch.equal(again[2], pooled)


def first_rows(base: Base) -> dict[str, torch.Tensor]:
    return {name: base.models[name].get_input_embeddings().weight[5:6].clone() for name in base.tokenizers}


def test_an_empty_prompt_is_what_the_pipeline_takes_for_one(folder: Path) -> None:
    base = load_base(str(folder), "cpu")
    seen: list[torch.Tensor] = []
    base.pipeline.unet.register_forward_pre_hook(
        lambda module, inputs, named: seen.append(inputs[2] if len(inputs) > 2 else named["encoder_hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        base.pipeline(["a red dog"], num_inference_steps=1, guidance_scale=3.0, output_type="latent")
        predict(base, ["", "a red dog"], torch.zeros(2, 4, 8, 8), torch.tensor([5, 5]))
    stock, ours = seen
    assert torch.allclose(stock, ours, atol=1e-6) and not torch.allclose(ours[0], ours[1])
    zeros = not stock[0].any()
    assert zeros == ("text_encoder_2" in base.models)


def test_a_dropped_caption_is_the_empty_prompt_of_pictures(photos: Path, folder: Path) -> None:
    base = load_base(str(folder), "cpu")
    wanted = base.denoiser.encode(["", "a red dog"]).tensors
    with PromptEncoder(base, load_concept(photos, name="rex"), seed=0, size=16) as condition, torch.no_grad():
        given = condition(["", "a red dog"]).tensors
    assert torch.allclose(given["encoder_hidden_states"], wanted["encoder_hidden_states"], atol=1e-5)
    if "text_embeds" in wanted:
        assert torch.allclose(given["text_embeds"], wanted["text_embeds"], atol=1e-5)


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_without_regions_a_picture_is_the_stock_pipelines(folder: Path, negative: str) -> None:
    scene = Scene(num_inference_steps=2, guidance_scale=3.0, device="cpu", negative_prompt=negative)
    base = load_base(str(folder), "cpu")
    mine = sample(base, ["a red dog"], [7], scene)[0]
    pipe = load_base(str(folder), "cpu").pipeline
    pipe.scheduler = base.denoiser.scheduler(scene.sampler)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        "a red dog", negative_prompt=negative or None, num_inference_steps=2, guidance_scale=3.0,
        width=base.size, height=base.size, generator=[torch.Generator("cpu").manual_seed(7)],
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(mine), np.asarray(stock))


def test_training_is_conditioned_as_the_stock_pipeline_is(photos: Path, folder: Path) -> None:
    base, stock = load_base(str(folder), "cpu"), load_base(str(folder), "cpu")
    prompts = ["a photo of <rex> on the beach", "a red dog and <rex>"]
    with PromptEncoder(base, load_concept(photos, name="rex"), seed=0, size=16) as condition, torch.no_grad():
        mine = condition(prompts).tensors
        stock.add_token("<rex>", condition.vectors())
    theirs = stock.pipeline.encode_prompt(
        prompt=prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.equal(mine["encoder_hidden_states"], theirs[0])
    if "text_embeds" in mine:
        assert torch.equal(mine["text_embeds"], theirs[2])
        assert mine["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
        with PromptEncoder(base, load_concept(photos, name="rex"), seed=0, size=16) as condition:
            tall = condition(prompts, (12, 6)).tensors  # of a bucket
        assert tall["time_ids"].tolist() == [[24, 12, 0, 0, 24, 12]] * 2


def test_an_adapter_of_another_kind_of_base_is_refused(
    photos: Path, folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    train_to_file(settings(photos, folder, tmp_path / "rex.safetensors", steps=1))
    with pytest.raises(UserError, match="does not fit the base"):
        check_base(load_adapter(tmp_path / "rex.safetensors"), load_base(str(tiny_base), "cpu"))


def single_file(folder: Path, path: Path) -> None:
    """A base as a checkpoint in the original's spelling, its configs without weights in a folder beside it."""
    base = load_base(str(folder), "cpu")
    rows = {encoder: len(tokenizer) for encoder, tokenizer in base.tokenizers.items()}
    write_tensors(path, checkpoint_tensors(base.models, base.pipeline.vae, rows))
    shutil.copytree(folder, path.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))


def check_single_file(folder: Path, path: Path, photos: Path) -> None:
    single_file(folder, path)
    one, other = load_base(str(folder), "cpu"), load_base(str(path), "cpu")
    assert one.fingerprint == other.fingerprint
    vaes = one.pipeline.vae.state_dict(), other.pipeline.vae.state_dict()
    assert set(vaes[0]) == set(vaes[1]) and all(torch.equal(vaes[0][name], vaes[1][name]) for name in vaes[0])
    assert one.prediction_type == other.prediction_type
    adapter = train_to_file(settings(photos, path, path.with_name("rex.safetensors"), steps=1))
    assert adapter.fingerprint == one.fingerprint and check_base(adapter, one) is None


def test_a_single_file_of_stable_diffusion_2_and_xl_is_the_same_base(
    photos: Path, folder: Path, tmp_path: Path
) -> None:
    check_single_file(folder, tmp_path / "checkpoint.safetensors", photos)


def test_a_single_file_of_stable_diffusion_1_is_the_same_base(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    check_single_file(tiny_base, tmp_path / "checkpoint.safetensors", photos)


def test_a_single_file_without_its_configs_asks_for_them_by_name(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    single_file(tiny_base, path)
    shutil.rmtree(path.with_suffix(""))
    with pytest.raises(UserError, match=r"stable-diffusion-v1-5/stable-diffusion-v1-5.* the folder .*checkpoint"):
        load_base(str(path), "cpu")
    write_tensors(path, {"lora_unet_x": torch.zeros(1)})
    with pytest.raises(UserError, match="is no Stable Diffusion checkpoint"):
        load_base(str(path), "cpu")


def test_a_checkpoint_tells_what_its_network_predicts(photos: Path, folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(folder, tmp_path / "base")
    file = base / "scheduler" / "scheduler_config.json"
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **scheduler}))
    train_to_file(settings(photos, base, tmp_path / "rex.safetensors", steps=1))
    export(tmp_path / "rex.safetensors", tmp_path / "all.safetensors", "checkpoint", ExportOptions(device="cpu"))
    tensors, metadata = read_tensors(tmp_path / "all.safetensors")
    marks = {"v_pred", "ztsnr"} if (folder / "text_encoder_2").is_dir() else set()
    assert {name for name, value in tensors.items() if not value.numel()} == marks
    assert metadata["modelspec.prediction_type"] == "v" and "modelspec.architecture" in metadata


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_every_weight_of_the_full_size_has_a_name_that_diffusers_reads_back(arch: str) -> None:
    unet = build_meta(arch)["unet"]
    back = convert_ldm_unet_checkpoint(unet_tensors(unet), unet.config)
    assert {name: tuple(value.shape) for name, value in back.items()} == {
        name: tuple(value.shape) for name, value in unet.state_dict().items()
    }


def test_keys_of_older_transformers_are_mapped(tiny_base: Path, tmp_path: Path) -> None:
    """Before 5.6 CLIPTextModel kept everything under ``text_model.``; such folders are on every disk."""
    old = tmp_path / "old"
    shutil.copytree(tiny_base, old)
    path = old / "text_encoder" / "model.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, {f"text_model.{n.removeprefix('text_model.')}": t for n, t in tensors.items()}, metadata)
    assert load_base(str(old), "cpu").fingerprint == load_base(str(tiny_base), "cpu").fingerprint


def test_the_attention_layers_of_sdxl_are_counted() -> None:
    rows = count_table("sdxl", (8,))
    assert {row["layers"] for row in rows} == {560 + 4 * 12 + 4 * 32}  # 70 transformer layers with 8 each
