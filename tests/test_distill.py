"""Distillation: the fused network comes nearer to what its adapters predict alone, and to the base elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_photos
from typer.testing import CliRunner

from spectral_diffusion.adapters.apply import enabled_adapters
from spectral_diffusion.adapters.formats.native import load_adapter
from spectral_diffusion.cli import app
from spectral_diffusion.config.fuse import DistillConfig, FuseConfig
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import Cancelled, UserError
from spectral_diffusion.core.files import read_tensors
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.core.precision import MixedPrecision
from spectral_diffusion.merging import distill as distillation
from spectral_diffusion.merging import export as exporting
from spectral_diffusion.merging import teacher_targets
from spectral_diffusion.merging.distill import (
    Sample,
    batches,
    distillation_loss,
)
from spectral_diffusion.merging.export import ExportOptions, export
from spectral_diffusion.merging.fuse import fuse_adapters, fuse_to_folder
from spectral_diffusion.merging.memory import distillation_memory
from spectral_diffusion.merging.teacher_targets import DistillTargets, predict, prepare_targets
from spectral_diffusion.merging.unfuse import unfuse
from spectral_diffusion.models.base import Base
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.targets import EVERYTHING, find_targets
from spectral_diffusion.training import memory
from spectral_diffusion.training.memory import Estimate
from spectral_diffusion.training.run import train_to_file

SMALL = DistillConfig(
    steps=60, learning_rate=3e-3, num_images=4, num_prior_images=6, noises_per_image=4, batch_size=8, guidance_scale=2.0
)


@pytest.fixture(scope="module")
def pair(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters that change the tiny base a lot."""
    folder = tmp_path_factory.mktemp("pair")
    files = []
    for seed, name in enumerate(("rex", "brew")):
        config = TrainConfig(
            concept=make_photos(folder / "photos" / name, seed=seed), output=folder / f"{name}.safetensors",
            base=str(tiny_base), rank=2, steps=20, learning_rate=1e-1, device="cpu",
        )  # fmt: skip
        train_to_file(config)
        files.append(config.output)
    return files


def settings(files: list[Path], output: Path, **more: object) -> FuseConfig:
    return FuseConfig(adapters=files, output=output, device="cpu", **more)  # type: ignore[arg-type]


def off(base: Base, targets: DistillTargets) -> list[float]:
    """Mean squared distance from the targets: of every concept, and of generic images."""
    with torch.no_grad():
        return [
            float((predict(base, one.prompts, one.noisy, one.timesteps) - one.targets).square().mean())
            for one in (*targets.concepts, targets.prior)
        ]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 8])
def test_distilling_brings_concepts_and_the_base_nearer(
    pair: list[Path], tiny_base: Path, tmp_path: Path, rank: int
) -> None:
    adapters = [load_adapter(file) for file in pair]
    untouched = load_base(str(tiny_base), "cpu")
    for adapter in adapters:
        for token, vectors in adapter.tokens.items():
            untouched.add_token(token, vectors)
    exam = prepare_targets(
        untouched, sorted(adapters, key=lambda a: a.name), {}, SMALL, seed=5
    )  # images that are not among the targets
    assert off(untouched, exam)[-1] < 1e-12 < min(off(untouched, exam)[:-1])
    found = {}
    for steps in (0, SMALL.steps):
        base = load_base(str(tiny_base), "cpu")
        rate = 1e-2 if rank else SMALL.learning_rate
        distilling = SMALL.model_copy(update={"steps": steps, "rank": rank, "learning_rate": rate})
        factors = fuse_adapters(base, adapters, settings(pair, tmp_path, distill=distilling))
        assert (factors is None) == (steps > 0 and rank == 0)
        assert not any(p.requires_grad for model in base.models.values() for p in model.parameters())
        found[steps] = off(base, exam)
    assert all(after < before for before, after in zip(found[0], found[SMALL.steps], strict=True)), found


def test_a_learned_correction_is_part_of_the_merged_factors(pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    """So the fusion still goes out as an exact LoRA, with convolutions that no adapter changes."""
    few = SMALL.model_copy(
        update={"steps": 2, "rank": 3, "target_modules": "conv", "learning_rate": 1e-2, "token_learning_rate": 0.0}
    )
    before = load_base(str(tiny_base), "cpu").weights("attention+conv")
    base = load_base(str(tiny_base), "cpu")
    factors = fuse_adapters(base, [load_adapter(f) for f in pair], settings(pair, tmp_path, distill=few))
    assert factors is not None and set(factors) == set(before)
    for layer, weight in base.weights("attention+conv").items():
        moved = weight - before[layer]
        assert bool(moved.any()) and torch.allclose(moved, factors[layer].delta().float().view(moved.shape), atol=1e-6)
        assert factors[layer].up.shape[1] == (3 if ".conv" in layer or "_shortcut" in layer else 3 + 2 * 2 * 2)
    assert not any("lora" in name for name, _ in base.pipeline.unet.named_modules())


@pytest.mark.slow
def test_a_correction_takes_less_memory_and_whole_weights_need_float32(
    pair: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    base = load_base(str(tiny_base), "cpu", "bfloat16")
    layers = find_targets(base.models)
    whole, low = (
        distillation_memory(
            base.models, base.pipeline.vae, layers, SMALL.model_copy(update={"rank": rank}), base.size, "cpu"
        )
        for rank in (0, 1)
    )
    sizes = [layer.weight.shape for layer in layers.values()]
    assert low.adapter == 12 * sum(out + inside for out, inside in sizes) < whole.adapter
    adapters = [load_adapter(file) for file in pair]
    few = SMALL.model_copy(update={"steps": 1})
    with pytest.raises(UserError, match=r"needs them in float32.*distill\.rank=16"):
        fuse_adapters(base, adapters, settings(pair, tmp_path, distill=few))
    low_rank = few.model_copy(update={"rank": 2})
    assert fuse_adapters(base, adapters, settings(pair, tmp_path, distill=low_rank)) is not None


def test_only_the_concepts_own_words_learn_and_exports_hold_what_they_learnt(
    pair: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    few = SMALL.model_copy(update={"steps": 4})
    words = {"off": 0.0, "on": 1e-2}
    for name, rate in words.items():
        distilling = few.model_copy(update={"token_learning_rate": rate})
        fuse_to_folder(settings(pair, tmp_path / name, distill=distilling))
    untouched = load_base(str(tiny_base), "cpu")
    table = untouched.pipeline.text_encoder.get_input_embeddings().weight
    for name in words:
        base = load_base(str(tmp_path / name), "cpu")
        now = base.pipeline.text_encoder.get_input_embeddings().weight
        assert torch.equal(now[: len(untouched.pipeline.tokenizer)], table[: len(untouched.pipeline.tokenizer)])
        export(tmp_path / name, tmp_path / f"{name}.safetensors", "embedding", ExportOptions(device="cpu"))
        for file in pair:
            adapter = load_adapter(file)
            own, held = adapter.tokens[adapter.token]["text_encoder"], base.vectors(adapter.token)["text_encoder"]
            assert torch.equal(own, held) == (name == "off")
            written, _ = read_tensors(tmp_path / f"{name}.{adapter.name}.safetensors")
            assert torch.equal(written[adapter.token], held)


def test_what_an_adapter_says_to_the_empty_prompt_is_the_bases_to_say(pair: list[Path], tiny_base: Path) -> None:
    adapter = load_adapter(pair[0])
    base = load_base(str(tiny_base), "cpu")
    for token, vectors in adapter.tokens.items():
        base.add_token(token, vectors)
    few = SMALL.model_copy(update={"num_images": 2, "num_prior_images": 1, "noises_per_image": 2})
    [concept] = prepare_targets(base, [adapter], {}, few, 0).concepts
    predicted = {}
    for who in (adapter, None):
        with enabled_adapters(base, [(who, 1.0)] if who else []), torch.no_grad():
            for prompts in (concept.prompts, [""] * len(concept.prompts)):
                predicted[who is adapter, not prompts[0]] = predict(base, prompts, concept.noisy, concept.timesteps)
    own, own_empty, plain_empty = predicted[True, False], predicted[True, True], predicted[False, True]
    guided = own_empty + few.guidance_scale * (own - own_empty)
    assert torch.allclose(plain_empty + few.guidance_scale * (concept.targets - plain_empty), guided, atol=1e-4)
    assert not torch.allclose(concept.targets, own, atol=1e-3)


def test_targets_need_no_more_memory_at_once_than_a_step(
    pair: list[Path], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = load_adapter(pair[0])
    base = load_base(str(tiny_base), "cpu")
    for token, vectors in adapter.tokens.items():
        base.add_token(token, vectors)
    asked: list[int] = []

    def counted(base: Base, prompts: list[str], *rest: torch.Tensor) -> torch.Tensor:
        asked.append(len(prompts))
        return predict(base, prompts, *rest)

    monkeypatch.setattr(teacher_targets, "predict", counted)
    wanted = []
    for batch in (3, 16):
        few = SMALL.model_copy(
            update={"num_images": 4, "num_prior_images": 4, "noises_per_image": 2, "batch_size": batch}
        )
        wanted.append(prepare_targets(base, [adapter], {}, few, 0).concepts[0].targets)
        assert max(asked) == min(batch, 8)
        asked.clear()
    assert torch.allclose(*wanted, atol=1e-4)


@pytest.mark.slow
def test_a_step_in_small_batches_computed_twice_learns_the_same(
    pair: list[Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, asked, learned = [load_adapter(file) for file in pair], [], []

    def counted(base: Base, batch: list[Sample], precision: MixedPrecision) -> torch.Tensor:
        asked.append(len(batch))
        return distillation_loss(base, batch, precision)

    monkeypatch.setattr(distillation, "distillation_loss", counted)
    for more in (
        {"batch_size": 8},
        {"batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True},
    ):
        base, few = load_base(str(tiny_base), "cpu"), SMALL.model_copy(update={"steps": 3, **more})
        before = {name: weight.clone() for name, weight in base.weights().items()}
        losses: list[float] = []

        def keep(event: Event, losses: list[float] = losses) -> None:
            losses.extend([event.metrics["loss"]] if event.stage == "distill" else [])

        fuse_adapters(base, adapters, settings(pair, tmp_path, distill=few), Hooks(progress=keep))
        assert not base.pipeline.unet.is_gradient_checkpointing
        learned.append((losses, torch.cat([(w - before[name]).flatten() for name, w in base.weights().items()])))
    assert asked == [8] * 3 + [2] * 12
    assert learned[1][0] == pytest.approx(learned[0][0], rel=1e-4)
    assert (learned[1][1] - learned[0][1]).norm() < 0.02 * learned[0][1].norm()


@pytest.mark.slow
def test_the_memory_of_distillation_is_estimated_and_what_cannot_fit_refused_before_its_images(
    pair: list[Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = load_base(str(tiny_base), "cpu"), [load_adapter(file) for file in pair]
    learners = find_targets({"unet": base.pipeline.unet}, EVERYTHING)
    state = {name: list(model.state_dict()) for name, model in base.models.items()}

    def found(**more: Any) -> Estimate:
        config = SMALL.model_copy(update=more)
        return distillation_memory(base.models, base.pipeline.vae, learners, config, base.size, "cpu")

    whole, parts, checked = (
        found(batch_size=32),
        found(batch_size=8, gradient_accumulation_steps=4),
        found(batch_size=32, gradient_checkpointing=True),
    )
    assert parts.phases["distilling"] < 0.5 * whole.phases["distilling"]
    assert checked.phases["distilling"] < 0.8 * whole.phases["distilling"]
    assert whole.adapter == 8 * sum(layer.weight.numel() for layer in learners.values())
    assert state == {name: list(model.state_dict()) for name, model in base.models.items()}
    assert not any(p.requires_grad for p in base.pipeline.unet.parameters())

    monkeypatch.setattr(memory, "SMALL", 0)
    notes: list[str] = []
    few, seen = SMALL.model_copy(update={"steps": 1}), []
    fuse_adapters(base, adapters, settings(pair, tmp_path, distill=few), hooks=Hooks(notify=notes.append))
    assert any("at most while distilling" in one for one in notes)
    monkeypatch.setattr(memory, "available", lambda device: 2**10)
    monkeypatch.setitem(memory.CONTEXT, "cpu", 0)
    with pytest.raises(UserError, match=r"Distillation needs about .* Use distill\.gradient_checkpointing=true"):
        fuse_adapters(
            load_base(str(tiny_base), "cpu"),
            adapters,
            settings(pair, tmp_path, distill=few),
            Hooks(progress=lambda event: seen.append(event.stage)),
        )
    assert not seen


def test_generic_images_are_in_every_batch(pair: list[Path], tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    adapter = load_adapter(pair[0])
    for token, vectors in adapter.tokens.items():
        base.add_token(token, vectors)
    few = SMALL.model_copy(
        update={"num_images": 2, "num_prior_images": 1, "noises_per_image": 1, "batch_size": 2, "prior_share": 0.01}
    )
    targets = prepare_targets(base, [adapter], {}, few, 0)
    off_by = replace(targets.prior, targets=targets.prior.targets + 10.0)
    plain, moved = (
        distillation_loss(base, *batches(replace(targets, prior=one), few, 0, 0)) for one in (targets.prior, off_by)
    )
    assert moved > plain + 1


def test_a_merge_that_is_not_for_these_adapters_is_refused_before_teacher_images(
    pair: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    seen: list[str] = []
    wanted = settings(pair, tmp_path / "fused", merge="orthogonal", distill=SMALL)
    with pytest.raises(UserError, match="needs orthogonal adapters"):
        fuse_to_folder(
            wanted, Hooks(progress=lambda event: seen.append(event.stage)), base=load_base(str(tiny_base), "cpu")
        )
    assert not seen and not (tmp_path / "fused").exists()


@pytest.mark.parametrize("stage", ["teacher images", "calibrate", "distill"])
def test_a_fusion_stops_when_asked_and_writes_nothing(pair: list[Path], tmp_path: Path, stage: str) -> None:
    seen: list[str] = []
    wanted = settings(pair, tmp_path / "fused", merge="gradient", distill=SMALL)
    with pytest.raises(Cancelled):
        fuse_to_folder(wanted, Hooks(lambda event: seen.append(event.stage), should_stop=lambda: stage in seen))
    assert seen.count(stage) == 1 and not (tmp_path / "fused").exists()


def test_what_has_no_token_is_not_distilled(pair: list[Path], tiny_base: Path) -> None:
    adapters = [load_adapter(file) for file in pair]
    adapters[1] = replace(adapters[1], token="", vectors={})
    base = load_base(str(tiny_base), "cpu")
    before = {name: weight.clone() for name, weight in base.weights().items()}
    with pytest.raises(UserError, match="'brew' has no word of its own"):
        fuse_adapters(base, adapters, settings(pair, Path("fused"), distill=SMALL))
    assert all(torch.equal(weight, before[name]) for name, weight in base.weights().items())


def test_what_an_adapter_was_trained_on_top_of_is_distilled_too(pair: list[Path], tiny_base: Path) -> None:
    adapter = load_adapter(pair[0])
    adapter = replace(adapter, earlier={"<old>": adapter.vectors})
    base = load_base(str(tiny_base), "cpu")
    for token, vectors in adapter.tokens.items():
        base.add_token(token, vectors)
    few = SMALL.model_copy(update={"num_images": 2, "num_prior_images": 1, "noises_per_image": 1})
    targets = prepare_targets(base, [adapter], {}, few, 0).concepts
    assert [concept.prompts[0].split()[-1] for concept in targets] == ["<old>", adapter.token]


def test_scales_are_distilled(pair: list[Path], tiny_base: Path) -> None:
    adapter = load_adapter(pair[0])
    base = load_base(str(tiny_base), "cpu")
    for token, vectors in adapter.tokens.items():
        base.add_token(token, vectors)
    few = SMALL.model_copy(update={"num_images": 2, "num_prior_images": 1, "noises_per_image": 1})
    whole, none = (
        prepare_targets(base, [adapter], {adapter.name: strength}, few, 0).concepts[0] for strength in (1.0, 0.0)
    )
    plain = predict(base, none.prompts, none.noisy, none.timesteps)
    assert torch.allclose(none.targets, plain, atol=1e-6) and not torch.allclose(whole.targets, none.targets, atol=1e-3)


def test_a_distilled_folder_has_the_same_bits_again_and_after_unfusing(pair: list[Path], tmp_path: Path) -> None:
    few = SMALL.model_copy(update={"steps": 3})
    folders = [tmp_path / name for name in ("one", "two", "alone", "rest")]
    for folder, files in zip(folders, (pair, pair[::-1], pair[:1]), strict=False):
        fuse_to_folder(settings(files, folder, merge="gradient", distill=few))
    unfuse(folders[0], ["brew"], folders[3], device="cpu")
    one, two, alone, rest = (load_base(str(folder), "cpu").fingerprint.exact for folder in folders)
    assert one == two and alone == rest and one != rest


def test_other_layers_learn_only_where_they_are_named(pair: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    adapters = [load_adapter(file) for file in pair]
    few = SMALL.model_copy(update={"steps": 2, "num_images": 2, "num_prior_images": 2, "noises_per_image": 1})
    untouched = load_base(str(tiny_base), "cpu")
    before = {name: layer.weight for name, layer in find_targets(untouched.models, r"re:.*").items()}
    moved = {}
    for named in (None, "conv"):
        base = load_base(str(tiny_base), "cpu")
        distilling = few.model_copy(update={"target_modules": named})
        fuse_adapters(base, adapters, settings(pair, tmp_path, distill=distilling))
        now = {name: layer.weight for name, layer in find_targets(base.models, r"re:.*").items()}
        moved[named] = {name for name, weight in now.items() if not torch.equal(weight, before[name])}
    adapted = {layer for adapter in adapters for layer in adapter.layers}
    assert moved[None] == adapted and moved["conv"] == adapted | set(find_targets(untouched.models, "conv"))
    misspelt = few.model_copy(update={"target_modules": "convv"})
    with pytest.raises(UserError, match=r"distill\.target_modules: Unknown targets 'convv'"):
        fuse_adapters(untouched, adapters, settings(pair, tmp_path, distill=misspelt))


def test_a_distilled_folder_is_opened_once_to_be_exported(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse_to_folder(settings(pair, tmp_path / "fused", distill=SMALL.model_copy(update={"steps": 2})))
    opened: list[str] = []

    def counted(name: str, *more: str) -> Base:
        opened.append(name)
        return load_base(name, *more)

    monkeypatch.setattr(exporting, "load_base", counted)
    found = export(
        tmp_path / "fused", tmp_path / "out.safetensors", "checkpoint", ExportOptions(dtype="float16", device="cpu")
    )
    assert len(opened) == 1 and {"out.rex.safetensors", "out.brew.safetensors"} <= {file.name for file in found}
    held, _ = read_tensors(next(file for file in found if ".rex." in file.name))
    assert torch.equal(held["<rex>"], load_base(str(tmp_path / "fused"), "cpu").vectors("<rex>")["text_encoder"])
    export(tmp_path / "fused", tmp_path / "folder", "folder", ExportOptions(device="cpu"))
    assert len(opened) == 2


def test_what_cannot_be_done_with_a_distilled_folder_is_a_sentence(pair: list[Path], tmp_path: Path) -> None:
    few = SMALL.model_copy(update={"steps": 2})
    fuse_to_folder(settings(pair, tmp_path / "fused", distill=few))
    with pytest.raises(UserError, match="was distilled"):
        unfuse(tmp_path / "fused", ["brew"], tmp_path / "rest", subtract=True, device="cpu")
    with pytest.raises(UserError, match="export it as folder or checkpoint"):
        export(tmp_path / "fused", tmp_path / "both.safetensors", "kohya", ExportOptions(device="cpu"))
    export(tmp_path / "fused", tmp_path / "both", "folder", ExportOptions(device="cpu"))
    more = ["fuse", str(tmp_path / "fused"), str(pair[0]), "-o", str(tmp_path / "more"), "--config", "pocket-distilled"]
    assert "not with --config" in str(CliRunner().invoke(app, more).exception) and not (tmp_path / "more").exists()
    small = ["distill.num_images=2", "distill.num_prior_images=2", "distill.noises_per_image=2"]
    wild = ["distill.steps=3", "distill.learning_rate=1e30", *small, "--device", "cpu"]
    result = CliRunner().invoke(app, ["fuse", *map(str, pair), "-o", str(tmp_path / "wild"), *wild])
    assert result.exit_code == 1 and "Use distill.learning_rate=" in str(result.exception)
    assert not (tmp_path / "wild").exists()
