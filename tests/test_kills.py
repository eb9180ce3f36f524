"""SIGKILL at random moments: the old file or the new one, never half of one, and a resume that is exact.

Children are forked from a process that has everything loaded, so that the kill falls into the work and not into
the start of Python.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from spectral_diffusion import svd_cache as spectrum
from spectral_diffusion.adapters.formats.native import load_adapter, save_adapter
from spectral_diffusion.config.fuse import FuseConfig
from spectral_diffusion.config.settings import build, read_yaml
from spectral_diffusion.config.train import OptimizerConfig, TrainConfig, ValidationConfig
from spectral_diffusion.core import assets as resources
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.linalg import matrix_shape
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.manifest import read_manifest
from spectral_diffusion.methods import all_methods, get_method
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.slots.ledger import LEDGER, Ledger
from spectral_diffusion.svd_cache import spectrum_of
from spectral_diffusion.training.run import state_path, train_to_file
from spectral_diffusion.training.status import read_status, reporting, status_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
KILLS = 40  # per kind of work


def killed(work: Callable[[], object], after: float) -> bool:
    """Run ``work`` in a forked child and kill it after some seconds; whether it had not ended by itself."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "the work failed by itself"
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def moments(work: Callable[[], object], prepare: Callable[[], None]) -> list[float]:
    """Random moments within the time that the work takes."""
    prepare()
    begun = time.monotonic()
    assert not killed(work, 600)
    whole = time.monotonic() - begun
    drawn = random.Random(0)
    return [drawn.uniform(0, 1.05) * whole for _ in range(KILLS)]


def test_spectrum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "KEEP_EVERY", 0.0)
    weights = {str(i): torch.randn(160, 96, generator=torch.Generator().manual_seed(i)) for i in range(12)}
    want = spectrum_of(weights, 8, tmp_path / "unbroken").bands
    folder = tmp_path / "killed"

    def clean() -> None:
        for file in folder.glob("*") if folder.exists() else ():
            file.unlink()

    kills = 0
    after_all = itertools.cycle(moments(lambda: spectrum_of(weights, 8, folder), clean))
    while kills < KILLS:  # how many of them come in time depends on what else the machine does
        after = next(after_all)
        clean()
        for _ in range(3):  # killed again on the way to the end
            kills += killed(lambda: spectrum_of(weights, 8, folder), after)
        seen: list[Event] = []
        found = spectrum_of(weights, 8, folder, Hooks(progress=seen.append)).bands
        assert len(seen) <= len(weights)
        for name, band in want.items():
            assert all(torch.equal(a, b) for a, b in zip(band, found[name], strict=True))
        assert not list(folder.glob("*.unfinished.safetensors"))


def test_training(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), "cpu")

    def settings(folder: Path, steps: int = 30) -> TrainConfig:
        return TrainConfig(
            concept=photos,
            output=folder / "rex.safetensors",
            base=str(tiny_base),
            rank=2,
            steps=steps,
            checkpointing_steps=1,
            learning_rate=1e-2,
            device="cpu",
        )

    want = train_to_file(settings(tmp_path / "unbroken"), base=base)
    folder = tmp_path / "killed"

    def clean() -> None:
        for file in folder.glob("*") if folder.exists() else ():
            file.unlink()

    def work() -> object:  # a finished adapter that stands there is trained anew
        return train_to_file(settings(folder), resume=state_path(settings(folder).output).exists(), base=base)

    kills = exact = 0
    for index, after in enumerate(moments(work, clean)):
        output = folder / "rex.safetensors"
        if index % 2 == 0:  # afresh; else over a finished adapter that stands there
            clean()
        old = load_adapter(output) if output.exists() else None
        kills += killed(work, after)
        if output.exists():
            whole = load_adapter(output)  # the hash in it is right
            reference = old or want
            assert all(torch.equal(whole.parameters[n], t) for n, t in reference.parameters.items())
        slots = Ledger(folder / LEDGER).read()
        assert all(str(slot) == "0:2" for concepts in slots.values() for slot in concepts.values())
        done = train_to_file(settings(folder), resume=True, base=base)
        exact += all(torch.equal(done.parameters[name], value) for name, value in want.parameters.items())
        assert not state_path(output).exists()
    assert kills >= KILLS // 2 and exact == KILLS


def resumes_exactly(config: TrainConfig, base: Base, kills: int) -> None:
    """Kill a training so often, at moments when it trains, and go on each time to the end: always the same bits."""
    unbroken = config.model_copy(update={"output": config.output.parent / "unbroken" / config.output.name})
    want = train_to_file(unbroken, base=base)
    status, state = status_path(config.output), state_path(config.output)

    def work() -> None:
        with reporting(status) as reporter:
            reporter.begin(config, config.output, resume=True)
            train_to_file(config, resume=True, base=base, hooks=Hooks(progress=reporter.progress))

    begun = time.monotonic()
    assert not killed(work, 600)
    whole, drawn = time.monotonic() - begun, random.Random(1)
    happened = 0
    while happened < kills:
        for file in (config.output, status, state):
            file.unlink(missing_ok=True)
        happened += killed(work, drawn.uniform(0.4, 1.0) * whole)
        if not config.output.exists() and (found := read_status(status)):
            assert found.state == "lost"
        done = train_to_file(config, resume=True, base=base)
        for name, value in {**want.parameters, **want.vectors}.items():
            assert torch.equal({**done.parameters, **done.vectors}[name], value), name
        assert not state.exists()


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_every_method(photos: Path, tiny_base: Path, tmp_path: Path, method: str) -> None:
    """With everything that a state holds beside parameters: averages, parts of batches, a warm-up."""
    base, of = load_base(str(tiny_base), "cpu"), get_method(method)
    allowed = of.ranks([matrix_shape(weight) for weight in base.weights().values()])
    rank = 4 if 4 in allowed else allowed[0]
    config = TrainConfig(
        concept=photos,
        output=tmp_path / "rex.safetensors",
        base=str(tiny_base),
        rank=rank,
        method=method,
        steps=12,
        checkpointing_steps=1,
        batch_size=1,
        learning_rate=1e-2,
        device="cpu",
        lr_scheduler="cosine",
        optimizer=OptimizerConfig(lr_warmup_steps=3, gradient_accumulation_steps=2, ema_decay=0.9),
    )
    resumes_exactly(config, base, 2)


def test_training_on_pocket(tmp_path: Path) -> None:
    config = build(
        TrainConfig, read_yaml(resources.preset("pocket"))["train"],
        {"concept": resources.concepts() / "rex", "output": tmp_path / "rex.safetensors", "steps": 12,
         "checkpointing_steps": 2},
    )  # fmt: skip
    config = config.model_copy(update={"validation": ValidationConfig(every=4, num_inference_steps=4)})
    resumes_exactly(config, load_base("pocket", "cpu"), 1)


def test_fusing(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    files = []
    for name in ("rex", "brew"):
        config = TrainConfig(
            concept=photos, name=name, token=f"<{name}>", output=tmp_path / f"{name}.safetensors", steps=2, rank=2,
            base=str(tiny_base), learning_rate=1e-1, device="cpu",
        )  # fmt: skip
        train_to_file(config, base=base)
        files.append(config.output)
    output = tmp_path / "fused"

    def fuse(strength: float) -> object:
        return fuse_to_folder(FuseConfig(adapters=files, output=output, scales={"rex": strength}, device="cpu"))

    fuse(1.0)
    weights = {1.0: _unet(output)}
    fuse(0.5)
    weights[0.5] = _unet(output)
    assert not torch.equal(weights[1.0], weights[0.5])
    kills = 0
    for index, after in enumerate(moments(lambda: fuse(0.5), lambda: None)):
        strength = (1.0, 0.5)[index % 2]
        kills += killed(lambda s=strength: fuse(s), after)
        recipe = read_manifest(output)
        assert recipe is not None
        assert torch.equal(_unet(output), weights[recipe["concepts"]["rex"]["scale"]])
    assert kills >= KILLS // 2


def _unet(folder: Path) -> torch.Tensor:
    unet = StableDiffusionPipeline.from_pretrained(folder).unet
    return torch.cat([value.reshape(-1) for value in unet.state_dict().values()])


def test_saving_over_an_adapter(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        concept=photos, output=tmp_path / "rex.safetensors", base=str(tiny_base), steps=1, rank=2, device="cpu"
    )
    adapter = train_to_file(config)
    kills = 0
    written = {}
    for scale in (1.0, 2.0):
        adapter.parameters = {name: value * 0 + scale for name, value in adapter.parameters.items()}
        written[scale] = dict(adapter.parameters)
    for index, after in enumerate(moments(lambda: save_adapter(adapter, config.output), lambda: None)):
        adapter.parameters = written[(1.0, 2.0)[index % 2]]
        kills += killed(lambda: save_adapter(adapter, config.output), after)
        try:
            found = load_adapter(config.output).parameters
        except UserError as error:
            pytest.fail(str(error))
        assert len({float(value.mean()) for value in found.values()}) == 1
    assert kills >= KILLS // 2
