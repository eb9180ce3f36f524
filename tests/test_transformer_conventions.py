"""A family's time, sign, guidance, packing and scale of latents, as the stock pipeline has them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_photos
from diffusers import DiffusionPipeline, Flux3ModularPipeline
from families import SPELLINGS
from safetensors.torch import load_file, save_file

from spectral_diffusion.adapters.formats.import_lora import import_lora
from spectral_diffusion.config.scene import Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.merging.export import ExportOptions, export
from spectral_diffusion.models.base import Base, base_of
from spectral_diffusion.models.denoiser import Conditioning
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.vae import decode, encode, on_white
from spectral_diffusion.scenes.sampling import sample
from spectral_diffusion.training.memory import Peak
from spectral_diffusion.training.run import train_to_file

HEIGHT, WIDTH, STEPS = 32, 64, 3
PROMPTS = ["a dog", "a red cup on the beach"]
SAME = ["a dog on a long beach", "a red cup on the sand"]  # as long as each other
OFF = {"klein": 1.0, "z-image": 0.0, "krea-2": 0.0, "qwen-image-2.1": 1.0}  # the guidance scale of no guidance
FEED_FORWARD = {
    "klein": {"linear_in", "linear_out", "mlp_gate", "mlp_value"}, "z-image": {"w1", "w2", "w3"},
    "krea-2": {"gate", "up", "down", "to_gate"}, "qwen-image-2.1": {"proj", "out", "gate_layer"},
}  # fmt: skip


@dataclass
class Recorded:
    """A call of a stock pipeline: its steps' latents, timesteps and velocities, its network's times, and its ends."""

    steps: list[tuple[torch.Tensor, float, torch.Tensor]] = field(default_factory=list)
    times: list[torch.Tensor] = field(default_factory=list)
    callback: list[torch.Tensor] = field(default_factory=list)
    decoded: list[torch.Tensor] = field(default_factory=list)
    images: Any = None


@pytest.fixture(scope="module")
def base(family: Path) -> Base:
    return load_base(str(family), "cpu")


@contextmanager
def times_of(network: Any) -> Iterator[list[torch.Tensor]]:
    """The times that a network is called with while the context is open."""
    found: list[torch.Tensor] = []

    def called(module: Any, inputs: Any, options: dict[str, Any], outputs: Any) -> None:
        found.append(options["timestep"] if "timestep" in options else inputs[1])

    handle = network.register_forward_hook(called, with_kwargs=True)
    yield found
    handle.remove()


def run_stock(family: Path, base: Base, prompts: list[str], guidance: float, output_type: str = "pil") -> Recorded:
    """The stock pipeline with its own prompts and noise; nothing of ours is between."""
    stock: Any = DiffusionPipeline.from_pretrained(str(family))
    stock.set_progress_bar_config(disable=True)
    found, step, decoder = Recorded(), stock.scheduler.step, stock.vae.decode

    def stepped(velocity: torch.Tensor, timestep: Any, latents: torch.Tensor, **more: Any) -> Any:
        found.steps.append((latents.clone(), float(timestep), velocity.clone()))
        return step(velocity, timestep, latents, **more)

    def after(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        found.callback.append(tensors["latents"].clone())
        return tensors

    def decoding(latents: torch.Tensor, *rest: Any, **more: Any) -> Any:
        found.decoded.append(latents.clone())
        return decoder(latents, *rest, **more)

    stock.scheduler.step, stock.vae.decode = stepped, decoding
    takes = inspect.signature(stock.__call__).parameters
    nothing = {"negative_prompt": [""] * len(prompts)} if "negative_prompt" in takes else {}
    with times_of(stock.transformer) as found.times:
        found.images = stock(
            prompt=list(prompts), **nothing, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))], output_type=output_type,
            callback_on_step_end=after, **base.denoiser.guidance_options(guidance), **SPELLINGS.get(family.name, {}),
        ).images  # fmt: skip
    return found


@pytest.mark.parametrize("guided", [False, True])
def test_a_prediction_is_the_velocity_of_the_stock_pipeline(family: Path, base: Base, guided: bool) -> None:
    """At the same σ, for the same latents and prompts: pins time, sign, packing, prompts and guidance."""
    guidance = 3.0 if guided else OFF[family.name]
    # Qwen's pipeline pads prompts of several lengths and then moves the pictures: the denoiser does not.
    texts = SAME if family.name.startswith("qwen") else PROMPTS
    found, denoiser = run_stock(family, base, texts, guidance, "latent"), base.denoiser
    assert len(found.steps) == STEPS and (denoiser.effective_guidance(guidance) > 1) == guided
    weight = denoiser.effective_guidance(guidance)
    with torch.no_grad(), times_of(denoiser.network) as ours:
        prompts, nothing = denoiser.encode(texts), denoiser.encode([""] * len(texts))
        for latents, timestep, velocity in found.steps:
            at, wanted = (denoiser.step_latents(tensor, HEIGHT, WIDTH) for tensor in (latents, velocity))
            times = torch.full((len(PROMPTS),), timestep - 1)  # where σ = (t + 1) / T is the scheduler's
            sigma = denoiser.sigmas(times)  # type: ignore[attr-defined]
            assert torch.allclose(sigma, torch.tensor(timestep / denoiser.num_timesteps))
            predicted = denoiser.predict(at, times, prompts)
            if guided:
                predicted = weight * predicted + (1 - weight) * denoiser.predict(at, times, nothing)
            assert wanted.std() > 0.1 and torch.allclose(predicted, wanted, atol=1e-4 * float(wanted.std()))
    if not guided:
        assert torch.allclose(torch.stack(ours), torch.stack(found.times))


def test_the_target_is_what_the_scheduler_integrates(base: Base) -> None:
    """A step of the scheduler along the target from any σ to 0 is the clean picture."""
    denoiser, scheduler = base.denoiser, base.denoiser.scheduler("euler")
    clean, noise = torch.randn(2, denoiser.latent_channels, 4, 4), torch.randn(2, denoiser.latent_channels, 4, 4)
    scheduler.set_timesteps(sigmas=[0.6], mu=0.0)
    time = scheduler.timesteps[0]
    times = time.repeat(2) - 1
    noisy, target = denoiser.add_noise(clean, noise, times), denoiser.target(clean, noise, times)
    assert torch.allclose(scheduler.step(target, time, noisy).prev_sample, clean, atol=1e-5)


def test_a_prompt_is_predicted_alike_alone_and_beside_others(base: Base) -> None:
    denoiser = base.denoiser
    side, times = 32 // denoiser.vae_scale, torch.tensor([300, 300, 300])
    latents = torch.randn(3, denoiser.latent_channels, side, side)
    prompts = ["", *PROMPTS]
    with torch.no_grad():
        apart = [denoiser.encode([prompt]) for prompt in prompts]
        alone = torch.cat([denoiser.predict(latents[i : i + 1], times[:1], apart[i]) for i in range(3)])
        stacked = Conditioning.stack([part[0] for part in apart])
        for together in (denoiser.encode(prompts), stacked):
            assert len(together) == 3
            assert torch.allclose(denoiser.predict(latents, times, together), alone, atol=1e-5)
    assert not torch.allclose(denoiser.predict(latents[:1], times[:1], apart[1]), alone[:1], atol=1e-4)


def test_latents_have_the_scale_that_the_stock_pipeline_decodes(family: Path, base: Base) -> None:
    denoiser = base.denoiser
    found = run_stock(family, base, PROMPTS[:1], OFF[family.name])
    output = run_stock(family, base, PROMPTS[:1], OFF[family.name], "latent").images
    [raw] = found.decoded
    raw = raw[:, :, 0] if raw.dim() == 5 else raw
    last = denoiser.step_latents(found.callback[-1], HEIGHT, WIDTH)
    assert last.shape == (1, denoiser.latent_channels, HEIGHT // denoiser.vae_scale, WIDTH // denoiser.vae_scale)
    assert torch.allclose(denoiser.denormalize(last), raw, atol=1e-5)
    assert torch.allclose(denoiser.raw_output(output, HEIGHT, WIDTH), raw, atol=1e-5)
    assert torch.allclose(denoiser.from_output(output, HEIGHT, WIDTH), last, atol=1e-5)
    assert torch.allclose(denoiser.normalize(denoiser.denormalize(last)), last, atol=1e-5)
    assert torch.allclose(denoiser.denormalize(denoiser.normalize(raw)), raw, atol=1e-5)
    assert not torch.allclose(denoiser.denormalize(last).flatten(), last.flatten(), atol=1e-2)  # the scale is no 1
    pixels = decode(base.pipeline.vae, raw)
    assert pixels.shape == (1, 3, HEIGHT, WIDTH)
    assert encode(base.pipeline.vae, pixels).shape == raw.shape


@pytest.mark.parametrize("guided", [False, True])
def test_a_scene_is_the_stock_pipelines_picture(family: Path, base: Base, guided: bool) -> None:
    guidance = 3.0 if guided else OFF[family.name]
    scene = Scene(
        prompt="a dog", width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, guidance_scale=guidance, device="cpu",
        mixed_precision="no",
    )  # fmt: skip
    [ours] = sample(base, PROMPTS[:1], [0], scene)
    [stock] = run_stock(family, base, PROMPTS[:1], guidance).images
    assert ours.size == (WIDTH, HEIGHT) and ours.mode == "RGB"
    assert np.abs(np.asarray(ours, float) - np.asarray(on_white(stock), float)).max() <= 1


def test_the_memory_of_a_prediction_is_counted_as_it_is_taken(base: Base) -> None:
    denoiser = base.denoiser
    prompts, side = denoiser.encode([PROMPTS[0]] * 2), 32 // denoiser.vae_scale
    latents = torch.randn(2, denoiser.latent_channels, side, side)

    def peak(predict: Any) -> int:
        with Peak(iter(denoiser.network.parameters())) as counted, torch.no_grad():
            predict(latents, torch.tensor([300, 300]), prompts)
        return counted.most

    assert peak(denoiser.hollow_predict) == pytest.approx(peak(denoiser.predict), rel=0.1)


def test_a_package_that_a_family_needs_is_named(family: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*inputs: Any, **options: Any) -> None:
        raise AttributeError("VIDEO_PROCESSOR_MAPPING")

    monkeypatch.setattr(base.family.pipeline_class, "from_pretrained", fails)
    monkeypatch.setattr("spectral_diffusion.models.loading.find_spec", lambda package: None)
    wanted = "needs torchvision; install it with pip install torchvision" if base.family.requires else "VIDEO"
    with pytest.raises(UserError, match=wanted):
        load_base(str(family), "cpu")


def test_a_modular_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "modular_model_index.json").write_text('{"_class_name": "Flux3ModularPipeline"}')
    with pytest.raises(UserError, match=r"is a modular pipeline; these families can be used: .*Qwen-Image-2\.1\."):
        load_base(str(tmp_path), "cpu")
    with pytest.raises(UserError, match=r"a Flux3ModularPipeline; these families can be used: Stable Diffusion"):
        base_of(Flux3ModularPipeline())


def test_a_base_in_bfloat16_trains_and_draws(family: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "rex")
    config = TrainConfig(
        concept=photos, output=tmp_path / "rex.safetensors", base=str(family), rank=2, steps=2, device="cpu",
        dtype="bfloat16", noise_offset=0.0, batch_size=2, learning_rate=1e-2,
    )  # fmt: skip
    adapter = train_to_file(config)
    assert all(torch.isfinite(value).all() for value in adapter.parameters.values())
    scene = Scene(prompt="a dog", num_inference_steps=2, device="cpu", dtype="bfloat16")
    [image] = sample(load_base(str(family), "cpu", "bfloat16"), ["a dog"], [0], scene)
    assert image.size == (32, 32)


def test_loras_of_other_programs_are_read_with_feed_forward_layers_too(family: Path, tmp_path: Path) -> None:
    """No preset takes modulations, and every spelling names the layers of the presets."""
    photos = make_photos(tmp_path / "rex")
    config = TrainConfig(
        concept=photos, output=tmp_path / "rex.safetensors", base=str(family), rank=2, steps=1, device="cpu",
        noise_offset=0.0, target_modules="attention+feed-forward", method="lora",
    )  # fmt: skip
    adapter = train_to_file(config)
    assert not any(word in layer for layer in adapter.layers for word in ("mod", "norm", "time", "txt_in", "img_in"))
    kinds = {layer.rpartition(".")[2] for layer in adapter.layers}
    assert kinds >= FEED_FORWARD[family.name]
    for kind in ("kohya", "diffusers"):
        export(config.output, tmp_path / f"{kind}.safetensors", kind, ExportOptions(dtype="float32"))
        again = import_lora(tmp_path / f"{kind}.safetensors", None, str(family), device="cpu")
        assert set(again.layers) == set(adapter.layers)
    written = load_file(tmp_path / "kohya.safetensors")
    if any(key.startswith("diffusion_model.") for key in written):  # kohya's own spelling of it is read as well
        save_file(as_kohya(written), tmp_path / "flat.safetensors")
        again = import_lora(tmp_path / "flat.safetensors", None, str(family), device="cpu")
        assert all(torch.allclose(again.factors(x).delta(), adapter.factors(x).delta()) for x in adapter.layers)


def as_kohya(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dotted names after ``diffusion_model.`` as kohya's tools write them, with an alpha."""
    out: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        layer, _, factor = key.removeprefix("diffusion_model.").removesuffix(".weight").rpartition(".")
        name = f"lora_unet_{layer.replace('.', '_')}"
        out[f"{name}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = value
        out[f"{name}.alpha"] = torch.tensor(float(min(value.shape)))
    return out
