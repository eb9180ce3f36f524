"""Sketches and keyposes through a ControlNet: Z-Image's, at a tiny size with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, ZImageControlNetModel, ZImageControlNetPipeline
from families import make_tiny_klein, make_tiny_krea_2, make_tiny_z_image
from PIL import Image
from safetensors.torch import save_file

from spectral_diffusion.config.scene import ControlImage, Region, Scene
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.control import ControlMap, read_control_image
from spectral_diffusion.scenes.controlnet import load_controlnet
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.scenes.sampling import sample

SIDE = 32


def make_controlnet(folder: Path, shared: bool = False, **more: Any) -> Path:
    """A tiny union ControlNet; ``shared``: its blocks also refine the image's tokens, as version 2.1's do."""
    torch.manual_seed(5)
    network = ZImageControlNetModel(
        **{
            "control_layers_places": [0, 1], "control_in_dim": 6 if shared else 4, "dim": 32, "n_heads": 2,
            "n_refiner_layers": 1, "n_kv_heads": 2,
            "control_refiner_layers_places": [0] if shared else None,
            "add_control_noise_refiner": "control_layers" if shared else None, **more,
        }
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():  # before_proj and after_proj begin with zeros
            parameter.add_(0.2 * torch.randn_like(parameter))
    network.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_z_image(tmp_path_factory.mktemp("z") / "z-image")


@pytest.fixture(scope="module", params=[False, True], ids=["1.0", "2.1"])
def union(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_controlnet(tmp_path_factory.mktemp("union") / "union", request.param)


@pytest.fixture
def sketch(tmp_path: Path) -> Path:
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[8:24, 8] = pixels[8:24, 23] = 255
    Image.fromarray(pixels).save(tmp_path / "sketch.png")
    return tmp_path / "sketch.png"


@pytest.fixture
def draw(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Latents of a scene instead of its picture."""
    monkeypatch.setattr("spectral_diffusion.scenes.sampling.finished", lambda pipe, output, *rest: [output])

    def drawn(*controls: ControlImage, regions: Any = (), prompt: str = "a dog", **more: Any) -> torch.Tensor:
        scene = Scene(
            prompt=prompt, regions=list(regions), controls=list(controls), num_inference_steps=2, device="cpu",
            mixed_precision="no", guidance_scale=3.0, width=SIDE, height=SIDE, **more,
        )  # fmt: skip
        read: list[ControlMap] = [read_control_image(control) for control in controls]
        [found] = sample(load_base(str(base_folder), "cpu"), [prompt], [1], scene, controls=read)
        return found  # type: ignore[return-value]

    return drawn


def test_a_sketch_acts_as_in_the_stock_pipeline(base_folder: Path, union: Path, sketch: Path, draw: Any) -> None:
    control = ControlImage(file=sketch, adapter=str(union), conditioning_scale=0.8)
    found, without = draw(control), draw()
    stock = ZImageControlNetPipeline.from_pretrained(
        str(base_folder), controlnet=ZImageControlNetModel.from_pretrained(str(union))
    )
    want = stock(
        "a dog", negative_prompt="", control_image=Image.open(sketch).convert("RGB"), controlnet_conditioning_scale=0.8,
        guidance_scale=3.0, num_inference_steps=2, width=SIDE, height=SIDE, output_type="latent",
        generator=torch.Generator().manual_seed(1), max_sequence_length=96,
    ).images  # fmt: skip
    assert torch.equal(found, want) and not torch.allclose(found, without, atol=1e-3)
    assert torch.equal(draw(control.model_copy(update={"conditioning_scale": 0.0})), without)


def test_it_acts_with_regions_and_by_their_weights(union: Path, sketch: Path, draw: Any) -> None:
    control = ControlImage(file=sketch, adapter=str(union), conditioning_scale=1.0)
    everywhere = Region(box=(0, 0, 1, 1), prompt="a dog")
    assert torch.allclose(draw(control, regions=[everywhere]), draw(control), atol=1e-4)
    silent = everywhere.model_copy(update={"conditioning_scale": 0.0})
    assert torch.allclose(draw(control, regions=[silent]), draw(regions=[silent]), atol=1e-6)
    pair = [Region(box=(0, 0, 0.5, 1), prompt="a dog"), Region(box=(0.5, 0, 1, 1), prompt="a cup")]
    other = [pair[0], pair[1].model_copy(update={"prompt": "a hat"})]
    a, b = (draw(control, regions=regions, region_isolation=1.0) for regions in (pair, other))
    half = a.shape[-1] // 2
    assert torch.equal(a[..., :half], b[..., :half]) and not torch.equal(a[..., half:], b[..., half:])


def test_a_picture_with_a_sketch_is_written(base_folder: Path, union: Path, sketch: Path, tmp_path: Path) -> None:
    scene = Scene(
        prompt="a dog", base=str(base_folder), device="cpu", width=SIDE, height=SIDE, num_inference_steps=1,
        controls=[ControlImage(file=sketch, adapter=str(union))], output=tmp_path / "out.png",
    )  # fmt: skip
    assert generate_to_file(scene) == [tmp_path / "out.png"]


def test_what_does_not_fit_is_refused_in_a_sentence(
    base_folder: Path, sketch: Path, tmp_path: Path, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(base_folder), "cpu")
    control = ControlImage(file=sketch, adapter=str(make_controlnet(tmp_path / "union")))
    with pytest.raises(UserError, match="Z-Image takes one control image, and there are 2"):
        draw(control, control)
    wide = make_controlnet(tmp_path / "wide", dim=64)
    with pytest.raises(UserError, match="for another network: dim is 64 there and 32 here"):
        load_controlnet(base, str(wide))
    deep = make_controlnet(tmp_path / "deep", control_layers_places=[0, 5])
    with pytest.raises(UserError, match="for another network: it has a layer 5"):
        load_controlnet(base, str(deep))
    with pytest.raises(UserError, match=r"No such file: .*gone\.safetensors"):
        load_controlnet(base, str(tmp_path / "gone.safetensors"))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="Cannot load the ControlNet"):
        load_controlnet(base, str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="Cannot load the ControlNet 'alibaba-pai/Z-Image-Turbo-Fun"):
        load_controlnet(base, None)  # offline
    krea = load_base(str(make_tiny_krea_2(tmp_path / "krea")), "cpu")
    scene = Scene(prompt="a dog", controls=[control], width=SIDE, height=SIDE)
    with pytest.raises(UserError, match="Sketches and keyposes work on Stable Diffusion"):
        sample(krea, ["a dog"], [1], scene, controls=[read_control_image(control)])


def test_a_single_file_is_read_with_the_config_beside_it(base_folder: Path, tmp_path: Path) -> None:
    folder = make_controlnet(tmp_path / "union")
    (folder / "diffusion_pytorch_model.safetensors").rename(tmp_path / "union.safetensors")
    base = load_base(str(base_folder), "cpu")
    network = load_controlnet(base, str(tmp_path / "union.safetensors"))
    assert network.config.dim == 32 and not any(parameter.requires_grad for parameter in network.parameters())


def test_klein_reads_a_sketch_as_a_reference_picture(sketch: Path, tmp_path: Path) -> None:
    folder = make_tiny_klein(tmp_path / "klein")
    drawing = Image.open(sketch).convert("RGB").resize((2 * SIDE, 2 * SIDE), Image.Resampling.BILINEAR)
    stock = Flux2KleinPipeline.from_pretrained(str(folder))
    want = stock(
        prompt="a dog", image=[drawing], width=2 * SIDE, height=2 * SIDE, num_inference_steps=2,
        guidance_scale=3.0, generator=[torch.Generator().manual_seed(1)], text_encoder_out_layers=(1, 2, 3),
        max_sequence_length=96,
    ).images[0]  # fmt: skip
    control = ControlImage(file=sketch)
    scene = Scene(
        prompt="a dog", base=str(folder), device="cpu", width=2 * SIDE, height=2 * SIDE, num_inference_steps=2, seed=1,
        guidance_scale=3.0, mixed_precision="no", controls=[control], output=tmp_path / "out.png",
    )  # fmt: skip
    [path] = generate_to_file(scene)
    difference = np.abs(np.asarray(Image.open(path), int) - np.asarray(want, int))
    assert difference.max() <= 1
    weak = scene.model_copy(update={"controls": [control.model_copy(update={"conditioning_scale": 0.5})]})
    with pytest.raises(UserError, match="as a reference picture, without a weight or an adapter"):
        generate_to_file(weak)
    region = scene.model_copy(update={"regions": [Region(box=(0, 0, 1, 1), prompt="a dog")]})
    with pytest.raises(UserError, match="as a reference picture, which regions do not know"):
        generate_to_file(region)
