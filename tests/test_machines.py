"""Machines: several processes are one with a larger batch; the memory that training takes is known before it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import shards_on_cpus
from families import make_tiny_klein
from processes import free_port, in_two_processes
from torch import nn

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.config.train import PriorPreservationConfig, TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.linalg import matrix_shape
from spectral_diffusion.methods import get_method
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.training import memory
from spectral_diffusion.training.distributed import World, microbatch
from spectral_diffusion.training.memory import Estimate, Peak, estimate, memory_note
from spectral_diffusion.training.run import state_path, train_to_file
from spectral_diffusion.training.sharding import check_sharding
from spectral_diffusion.training.status import read_status


def launch(count: int, *words: object) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` of some processes on the CPU, or the plain command for one."""
    command = [sys.executable, "-m", "spectral_diffusion.cli", *map(str, words)]
    if count > 1:
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
        more = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command = [sys.executable, *launcher, *more, "--main_process_port", str(free_port()), *command[1:]]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def check_alike(outputs: dict[int, Path]) -> None:
    """The two adapters differ by roundings, and have learnt something."""
    one, two = (load_adapter(outputs[count]) for count in (1, 2))
    for name, value in {**one.parameters, **one.vectors}.items():
        other = {**two.parameters, **two.vectors}[name]
        assert torch.allclose(value, other, atol=2e-5, rtol=1e-3), name
    assert any(value.abs().max() > 1e-3 for name, value in one.parameters.items() if name.endswith(".E"))


MORE = {"method": "adalora", "rank": 4, "steps": 6, "learning_rate": 0.01}  # has a penalty and an allocator


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_are_one_with_twice_the_batch(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With preservation, cut-mix and a penalty; only one process writes and tells."""
    base = load_base(str(tiny_base), "cpu")
    outputs = {count: tmp_path / str(count) / "rex.safetensors" for count in (1, 2)}

    def work(count: int, rank: int = 0) -> None:
        notes: list[str] = []
        config = TrainConfig(
            concept=photos, output=outputs[count], base=str(tiny_base), device="cpu", batch_size=6 // count, **MORE,
            prior=PriorPreservationConfig(loss_weight=0.5, num_images=3, cut_mix_prob=0.4, batch_size=2 // count),
        )  # fmt: skip
        train_to_file(config, base=base, hooks=Hooks(notify=notes.append))
        assert bool(notes) == (rank == 0)

    work(1)
    in_two_processes(lambda rank: work(2, rank))
    check_alike(outputs)
    assert sorted(path.name for path in outputs[2].parent.iterdir()) == ["rex.safetensors", "rex.yaml"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@shards_on_cpus
def test_two_processes_with_a_sharded_base_are_one(photos: Path, tmp_path: Path) -> None:
    """Of a transformer, whose steps differ by roundings; each process keeps a half of every frozen weight."""
    folder = make_tiny_klein(tmp_path / "klein")
    outputs = {count: tmp_path / str(count) / "rex.safetensors" for count in (1, 2)}
    common = {
        "concept": photos, "base": str(folder), "device": "cpu", "rank": 2, "steps": 4, "learning_rate": 0.01,
        "gradient_checkpointing": True,
    }  # fmt: skip
    prior = {"loss_weight": 0.5, "num_images": 2}

    def work(count: int) -> None:
        more = {"batch_size": 4 // count, "prior": {**prior, "batch_size": 2 // count}, "shard_base": count > 1}
        train_to_file(TrainConfig(output=outputs[count], **common, **more))  # type: ignore[arg-type]

    work(1)
    halves: list[float] = []

    def work_and_look(rank: int) -> None:
        from spectral_diffusion.training import loop

        train = loop.Trainer.train

        def look(trainer: loop.Trainer) -> Adapter:
            weights = [p for p in trainer.denoiser.network.parameters() if not p.requires_grad]
            halves.append(sum(p.to_local().numel() for p in weights) / sum(p.numel() for p in weights))  # type: ignore[attr-defined]
            assert all(type(parameter) is nn.Parameter for parameter in trainer.trained.values())
            return train(trainer)

        loop.Trainer.train = look  # type: ignore[method-assign]
        work(2)
        assert 0.45 < halves[0] < 0.56

    in_two_processes(work_and_look)
    one, two = (load_adapter(outputs[count]) for count in (1, 2))
    for name, value in {**one.parameters, **one.vectors}.items():
        assert torch.allclose(value, {**two.parameters, **two.vectors}[name], atol=2e-5, rtol=1e-3), name


def test_a_base_is_sharded_only_where_all_compute_together() -> None:
    def refused(count: int = 2, **more: object) -> str:
        with pytest.raises(UserError) as error:
            check_sharding(TrainConfig(concept="x", output="y", shard_base=True, **more), World(0, count))  # type: ignore[arg-type]
        return error.value.message

    assert "several processes" in refused(1) and "quantized" in refused(quantization="int8")
    assert "validation.every" in refused(validation={"every": 5})
    assert "erasure_prob" in refused(interference={"erasure_prob": 0.1})
    check_sharding(TrainConfig(concept="x", output="y", shard_base=True), World(0, 2))


@pytest.mark.slow
def test_accelerate_launch(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The same through the launcher and the command line."""
    common = [f"{name}={value}" for name, value in MORE.items()]
    common += ["prior.loss_weight=0.5", "prior.num_images=3", "prior.cut_mix_prob=0.4"]
    outputs = {}
    for count in (1, 2):
        outputs[count] = tmp_path / str(count) / "rex.safetensors"
        batch = (f"batch_size={6 // count}", f"prior.batch_size={2 // count}")
        where = ("--base", tiny_base, "--device", "cpu", "--status", "auto")
        done = launch(count, "train", photos, "-o", outputs[count], *where, *common, *batch)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("Wrote") == 1 and done.stdout.count("Concept 'rex'") == 1
        status = read_status(outputs[count].with_name("rex.status.json"))
        assert status and status.state == "done" and status.step == 6 and not state_path(outputs[count]).exists()
    check_alike(outputs)


@dataclass
class Few:
    prompts: list[str]
    values: torch.Tensor
    none: None = None


def test_parts_of_a_batch_are_all_of_it() -> None:
    for count in (1, 2, 3, 5, 6):
        whole = Few([str(i) for i in range(count)], torch.arange(count))
        parts = [microbatch(whole, number, 3) for number in range(3)]
        assert [prompt for part, _ in parts for prompt in part.prompts] == whole.prompts
        assert torch.equal(torch.cat([part.values for part, _ in parts]), whole.values)
        assert sum(share for _, share in parts) == pytest.approx(1)
        assert all(share == len(part.prompts) / count for part, share in parts)


# --- memory --------------------------------------------------------------------------------------------------


def test_the_peak_is_of_what_lives_at_once() -> None:
    there = torch.empty(5000)
    with Peak(iter([there])) as peak:
        first = torch.empty(1000)  # 4,000 bytes
        second = first[:10] + 1  # a view costs nothing, its sum 40
        del first
        third = torch.empty(500)
        there.view(50, 100).t()
    assert peak.most == 4040 and peak.now == 40 + 2000 and len(second) + len(third) == 510


def test_memory_is_computed_without_taking_any(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    before = {name: list(model.state_dict()) for name, model in base.models.items()}

    def found(**more: object) -> Estimate:
        config = TrainConfig(concept="x", output="y", rank=4, **more)  # type: ignore[arg-type]
        return estimate(base.models, base.pipeline.vae, config, base.size, "cpu")

    plain, twice = (
        found(batch_size=8),
        found(batch_size=16, validation={"every": 5}, optimizer={"name": "prodigy", "ema_decay": 0.5}),
    )
    checked = found(batch_size=8, gradient_checkpointing=True)
    assert 1.8 < twice.phases["training"] / plain.phases["training"] < 2.1
    assert checked.phases["training"] < 0.7 * plain.phases["training"]
    numbers = sum(get_method("spectral-additive").count(*matrix_shape(weight), 4) for weight in base.weights().values())
    assert twice.adapter - plain.adapter == numbers * (16 + 4 - 8)
    assert set(plain.phases) == {"encoding photos", "training"} and "generating samples" in twice.phases
    assert before == {name: list(model.state_dict()) for name, model in base.models.items()}
    parameters = [p for model in (*base.models.values(), base.pipeline.vae) for p in model.parameters()]
    assert plain.weights == sum(4 * p.numel() for p in parameters)


@pytest.mark.slow
def test_an_autoencoder_that_overflows_is_counted_in_float32(tiny_base: Path) -> None:
    def photos(dtype: str) -> int:
        base = load_base(str(tiny_base), "cpu", dtype)
        config = TrainConfig(concept="x", output="y", rank=4, dtype=dtype)  # type: ignore[arg-type]
        return estimate(base.models, base.pipeline.vae, config, base.size, "cpu").phases["encoding photos"]

    weights = sum(4 * p.numel() for p in load_base(str(tiny_base), "cpu").pipeline.vae.parameters())
    assert photos("float16") == pytest.approx(photos("float32") + weights, rel=0.02)
    assert photos("bfloat16") < 0.6 * photos("float32")


def test_too_little_memory_is_told_before_training(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, config = load_base(str(tiny_base), "cpu"), TrainConfig(concept="x", output="y", rank=2)
    assert memory_note(base, config, 16) is None
    assert (memory.available(base.device) or 2**30) > 2**20
    monkeypatch.setattr(memory, "SMALL", 0)
    takes = Estimate(weights=4 * 2**30, adapter=0, phases={"training": 2**30}, context=0)
    monkeypatch.setattr(memory, "estimate", lambda *_: takes)
    for free in (2**31, None):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        note = memory_note(base, config, 16)
        assert note and "5.5 GiB at most" in note and ("6.0 GiB are there" in note) == bool(free)
    monkeypatch.setattr(memory, "available", lambda device: 2**28)  # beside the base's 4 GiB, which are taken already
    with pytest.raises(UserError, match="Use gradient_checkpointing=true"):
        memory_note(base, config, 16)


@pytest.mark.slow
def test_every_preset_fits_the_card_it_names() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    import memory as benchmark

    for name, config in benchmark.presets():
        assert benchmark.computed(name[:4], config).total < 0.95 * int(name[5:-2]) * 2**30, name
    assert benchmark.fusing_presets() == ["sd15-8gb", "sd15-12gb", "sd15-24gb"]
    for name in benchmark.fusing_presets():
        assert benchmark.distillation(name).total < 0.95 * int(name[5:-2]) * 2**30, name
