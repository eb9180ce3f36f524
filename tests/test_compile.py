"""torch.compile: adapted networks are one graph, and trainings and pictures are those of the uncompiled network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_photos, make_tiny_base, seldom
from families import MAKERS
from PIL import Image
from torch._dynamo.utils import counters

from spectral_diffusion.adapters.attach import AdapterSpec, inject_adapter, unloading
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.adapters.frozen import frozen_tensors
from spectral_diffusion.config.scene import Region, Scene
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.methods import get_method
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.scenes.generate import generate_to_file
from spectral_diffusion.slots.ledger import Slot
from spectral_diffusion.training.run import train_to_file

LONGER = pytest.mark.slow
METHODS = [
    "spectral-additive", "spectral-rotation",
    *(pytest.param(name, marks=LONGER) for name in ("lora", "spectral-additive-s", "oft", "vera")),
]  # fmt: skip


@pytest.fixture(scope="module", params=["klein", *(pytest.param(name, marks=LONGER) for name in ("sd", "z-image"))])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compile") / request.param
    return make_tiny_base(path) if request.param == "sd" else MAKERS[request.param](path)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graphs run by torch itself: generating code for a CPU takes minutes."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))


def loss_of(base: Base) -> torch.Tensor:
    denoiser, generator = base.denoiser, torch.Generator().manual_seed(0)
    side = 32 // denoiser.vae_scale
    noisy = torch.randn(2, denoiser.latent_channels, side, side, generator=generator)
    conditioning = denoiser.encode(["a dog", "a cat"])
    return denoiser.predict(noisy, torch.tensor([10, 500]), conditioning).square().mean()


@pytest.mark.parametrize("method", seldom(METHODS, METHODS[:1]))
def test_an_adapted_network_is_one_graph(folder: Path, method: str) -> None:
    if folder.name == "z-image" and method != "spectral-additive":
        pytest.skip("one method shows that its network can be compiled")
    base, kind, rank = load_base(str(folder), "cpu"), get_method(method), 1 if method == "oft" else 2
    slot = Slot.interval(0, rank) if kind.slot else None
    frozen = frozen_tensors(kind, base.weights(), rank, slot, cached=False)
    with unloading(base.models):
        injected = inject_adapter(base.models, AdapterSpec(kind, rank), "one", frozen)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in injected.named_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        parameters = [p for name, p in injected.named_parameters() if not name.startswith("text")]
        want = loss_of(base)
        gradients = torch.autograd.grad(want, parameters, allow_unused=True)
        one_graph = folder.name != "z-image"  # its stock forward reads lengths of lists from tensors
        base.denoiser.network.compile(backend="aot_eager", fullgraph=one_graph)
        found = loss_of(base)
        assert counters["stats"]["unique_graphs"] == 1 or not one_graph
        assert torch.allclose(found, want, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(found, parameters, allow_unused=True), gradients, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-7))


def trained(folder: Path, tmp_path: Path, on: bool, **more: Any) -> Path:
    photos = tmp_path / "rex"
    if not photos.exists():
        make_photos(photos)
    config = TrainConfig(
        concept=photos, output=tmp_path / str(on) / "rex.safetensors", base=str(folder), rank=2, steps=3, device="cpu",
        noise_offset=0.0, mixed_precision="no", compile=on, **more,
    )  # fmt: skip
    train_to_file(config)
    return config.output


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True, "method": "spectral-rotation"}])
def test_a_compiled_training_is_the_same(
    folder: Path, tmp_path: Path, without_inductor: None, more: dict[str, Any]
) -> None:
    plain, compiled = (load_adapter(trained(folder, tmp_path, on, **more)) for on in (False, True))
    assert counters["stats"]["unique_graphs"] > 0
    for name, value in plain.parameters.items():
        assert torch.allclose(value, compiled.parameters[name], atol=1e-5), name


@pytest.mark.slow
def test_compiled_pictures_are_the_same(folder: Path, tmp_path: Path, without_inductor: None) -> None:
    adapter = trained(folder, tmp_path, False)
    pictures = []
    for on in (False, True):
        scene = Scene(
            prompt="a beach", base=str(folder), device="cpu", mixed_precision="no", num_inference_steps=2, width=32,
            height=32, output=tmp_path / f"{on}.png", compile=on,
            regions=[Region(box=(0, 0, 0.5, 1), prompt="<rex>", adapters={str(adapter): 1.0})],
        )  # fmt: skip
        [path] = generate_to_file(scene)
        pictures.append(np.asarray(Image.open(path), dtype=float))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 and counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_hooks_that_come_and_go_act_in_a_compiled_network(folder: Path, without_inductor: None) -> None:
    """Regions and the strengths of validation images are hooks."""
    base, other = (load_base(str(folder), "cpu") for _ in range(2))

    def losses(base: Base) -> list[float]:
        layer = next(module for module in base.denoiser.network.modules() if isinstance(module, torch.nn.Linear))
        found = [float(loss_of(base))]
        for factor in (2.0, 3.0):
            hook = layer.register_forward_hook(lambda module, inputs, output, factor=factor: output * factor)
            found.append(float(loss_of(base)))
            hook.remove()
        return [*found, float(loss_of(base))]

    with torch.no_grad(), base.denoiser.compiled(True):
        compiled = losses(base)
    with torch.no_grad():
        want = losses(other)
    assert compiled == pytest.approx(want, rel=1e-5) and len({round(value, 5) for value in want}) == 3


@pytest.mark.slow
def test_inductor_trains_the_same(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "sd")
    plain, compiled = (load_adapter(trained(folder, tmp_path, on)) for on in (False, True))
    for name, value in plain.parameters.items():
        assert torch.allclose(value, compiled.parameters[name], atol=1e-4), name
