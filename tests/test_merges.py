"""Every merge against its definition; gradient fusion against what it minimises; concepts out and in again."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_photos, seldom
from typer.testing import CliRunner

from spectral_diffusion.adapters.apply import install_tokens
from spectral_diffusion.adapters.formats.native import load_adapter, save_adapter
from spectral_diffusion.cli import app
from spectral_diffusion.config.fuse import DistillConfig, FuseConfig, MergeConfig
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.core.files import read_tensors, write_tensors
from spectral_diffusion.core.hooks import Event, Hooks
from spectral_diffusion.linalg import Factors, matrix_shape
from spectral_diffusion.merging.activations import GramAccumulator
from spectral_diffusion.merging.calibration import calibrate, tokens_of_call
from spectral_diffusion.merging.export import ExportOptions, export
from spectral_diffusion.merging.fuse import fuse_adapters, fuse_to_folder, overlaps, shared_columns
from spectral_diffusion.merging.manifest import adapters_in_fusion, read_manifest, read_merged
from spectral_diffusion.merging.memory import calibration_memory
from spectral_diffusion.merging.merges import Contribution, all_merges, get_merge
from spectral_diffusion.merging.merges.registry import MERGES, Merge, MergeContext, weighted_sum
from spectral_diffusion.merging.search import search_scales
from spectral_diffusion.merging.unfuse import unfuse
from spectral_diffusion.methods import get_method
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.models.targets import find_targets
from spectral_diffusion.models.tokens import known_tokens
from spectral_diffusion.slots.ledger import Slot, read_columns
from spectral_diffusion.training.run import train_to_file

OUT, IN, RANK = 10, 16, 2


def settings(**more: object) -> FuseConfig:
    return FuseConfig(adapters=[Path("a")], output=Path("b"), **more)  # type: ignore[arg-type]


def combined(
    name: str,
    contributions: list[Contribution],
    options: dict[str, object] | None = None,
    prior: GramAccumulator | None = None,
    prior_weight: float = 1.0,
    seed: int = 0,
) -> torch.Tensor:
    """ΔW of a merge with its options."""
    merge = get_merge(name)
    return dense(merge.combine(contributions, MergeContext(merge.settings(options or {}), seed, prior, prior_weight)))


def problem(rows: int, concepts: int = 3) -> tuple[list[Contribution], GramAccumulator]:
    generator = torch.Generator().manual_seed(rows)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def seen() -> GramAccumulator:
        found = GramAccumulator(IN)
        mixing = noise(IN, IN)
        for _ in range(2):
            found.add(noise(rows // 2, IN) @ mixing)
        return found

    contributions = [
        Contribution(f"c{i}", get_method("lora"), {"A": noise(RANK, IN), "B": noise(OUT, RANK)}, {}, None, 1.0, seen())
        for i in range(concepts)
    ]
    return contributions, seen()


def dense(found: Factors | torch.Tensor) -> torch.Tensor:
    return found.delta() if isinstance(found, Factors) else found


def objective(
    delta: torch.Tensor, contributions: list[Contribution], anchor: float, ordinary: GramAccumulator
) -> float:
    total = 0.0
    for one in contributions:
        assert one.inputs is not None
        off = delta - one.scale * one.factors().delta()
        total += float((off @ one.inputs.gram() * off).sum())
    mean = sum(one.inputs.count for one in contributions if one.inputs) / len(contributions)
    return total + anchor * mean / ordinary.count * float((delta @ ordinary.gram() * delta).sum())


@pytest.mark.parametrize("rows", [4, 60])
@pytest.mark.parametrize("anchor", [0.0, 2.0])
def test_gradient_is_where_its_objective_is_smallest(rows: int, anchor: float) -> None:
    contributions, ordinary = problem(rows)
    merge = get_merge("gradient")
    found = merge.combine(contributions, MergeContext(merge.settings({"ridge": 1e-12}), 0, ordinary, anchor))
    assert isinstance(found, Factors) and found.up.shape[1] == 3 * RANK
    best = objective(found.delta(), contributions, anchor, ordinary)
    guess = torch.zeros(OUT, IN, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([guess], max_iter=2000, tolerance_grad=1e-14, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")  # fmt: skip
    grams = [one.inputs.gram() for one in contributions if one.inputs]
    deltas = [one.factors().delta() for one in contributions]
    weight = anchor * sum(one.inputs.count for one in contributions if one.inputs) / 3 / ordinary.count

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(((guess - d) @ g * (guess - d)).sum() for d, g in zip(deltas, grams, strict=True))
        loss = loss + weight * (guess @ ordinary.gram() * guess).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    theirs = objective(guess.detach(), contributions, anchor, ordinary)
    nothing = objective(torch.zeros(OUT, IN).double(), contributions, anchor, ordinary)
    assert best <= max(theirs * (1 + 1e-6), 1e-10 * nothing)


@pytest.mark.parametrize("rows", [4, 60])
def test_gradients_own_solver_takes_the_steps_of_mix_of_show(rows: int) -> None:
    """L-BFGS on the small factor is L-BFGS on the whole weight but for the first step's length, and arrives."""
    contributions, _ = problem(rows)
    merge = get_merge("gradient")
    context = MergeContext(merge.settings({"solver": "lbfgs", "iterations": 7}), 0, None, 0.0)
    found = merge.combine(contributions, context)
    grams = [one.inputs.gram() for one in contributions if one.inputs]
    deltas = [one.factors().delta() for one in contributions]
    count = sum(one.inputs.count for one in contributions if one.inputs)
    whole = torch.stack(deltas).mean(0).requires_grad_(True)
    optimizer = torch.optim.LBFGS([whole], max_iter=7, history_size=25, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-16, tolerance_change=1e-16)  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((((whole - d) @ g * (whole - d)).sum() - (d @ g * d).sum()) / count for d, g in zip(deltas, grams))
        loss.backward()
        return loss

    optimizer.step(closure)
    longer = merge.combine(
        contributions, replace(context, options=merge.settings({"solver": "lbfgs", "iterations": 500}))
    )
    exact = merge.combine(contributions, replace(context, options=merge.settings({"ridge": 1e-12})))
    ordinary = GramAccumulator(IN)
    ordinary.add(torch.zeros(1, IN))
    best, arrived, few, dense_few, start = (
        objective(dense(one), contributions, 0.0, ordinary)
        for one in (exact, longer, found, whole.detach(), torch.stack(deltas).mean(0))
    )
    assert best - 1e-9 * start <= arrived <= best + 1e-4 * start
    assert 0.5 * (start - dense_few) <= start - few <= 1.5 * (start - dense_few) and few < start


@pytest.mark.parametrize("rows", [4, 60])
@pytest.mark.parametrize("name", sorted({*all_merges(), "mean"} - {"orthogonal", "orthofuse", "ssr"}))
def test_an_adapter_without_a_layer_wants_no_change_there(name: str, rows: int) -> None:
    contributions, ordinary = problem(rows)
    options: dict[str, object] = {"mean": {"form": "mean"}, "np-lora": {"styles": ["c0"]}}.get(name, {})
    merge = "spectral" if name == "mean" else name
    B = torch.zeros(OUT, RANK, dtype=torch.float64)
    still = replace(contributions[1], parameters={**contributions[1].parameters, "B": B})
    absent = replace(contributions[1], parameters={}, absent=(OUT, IN))
    found = [combined(merge, [contributions[0], one, contributions[2]], options, ordinary) for one in (still, absent)]
    assert torch.allclose(found[0], found[1], atol=1e-9) and float(found[1].norm()) > 0


def whole_sum(contributions: Sequence[Contribution], context: MergeContext) -> Factors:
    """A sum that refuses to work without what the layer saw."""
    assert all(contribution.inputs is not None for contribution in contributions)
    return weighted_sum(contributions, [1.0] * len(contributions))


def test_what_is_watched_is_no_more_than_was_said(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FuseConfig(adapters=three, output=tmp_path / "a", merge="gradient", calibration=QUICK, device="cpu")
    adapters = [adapter for path in three for adapter in adapters_in_fusion(path)]
    base = load_base(adapters[0].base, "cpu")
    for adapter in adapters:
        install_tokens(base, adapter)
    layers = find_targets(base.models)
    seen = calibrate(base, adapters[0].tokens, layers, config.calibration, 0)
    held = sum(8 * (one.matrix() if one.is_raw else one.gram()).numel() for one in seen.values())
    need = calibration_memory(
        {name: matrix_shape(layer.weight) for name, layer in layers.items()}, 2, config.calibration
    )
    assert held <= need / 3 <= 2 * held  # it, the ordinary prompts, and a copy while it is written
    monkeypatch.setattr("spectral_diffusion.merging.placement.available", lambda device: 1000)
    with pytest.raises(UserError, match=r"Calibrating .* are free; fuse fewer adapters"):
        fuse_to_folder(config)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("merge", "alive"), [("gradient", 1), ("ssr", 1), ("everything", 3)])
def test_what_layers_see_is_there_of_one_adapter_at_a_time(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: str, alive: int
) -> None:
    """A merge of another kind, which wants all inputs at once, still gets them."""
    monkeypatch.setitem(MERGES.entries, "everything", Merge("everything", "", whole_sum, needs_activations=True))
    seen: list[weakref.ref[GramAccumulator]] = []
    most = 0

    def watched(*args: Any) -> dict[str, GramAccumulator]:
        nonlocal most
        gc.collect()
        found = calibrate(*args)
        full = {layer: gram for layer, gram in found.items() if not gram.is_raw}  # few rows may be kept
        assert full
        seen.extend(weakref.ref(gram) for gram in full.values())
        most = max(most, sum(ref() is not None for ref in seen) // len(full))
        return found

    monkeypatch.setattr("spectral_diffusion.merging.merge_layers.calibrate", watched)
    many = {**QUICK, "num_images": 8, "prior_weight": 0.0, "cache": False}
    config = FuseConfig(adapters=three, output=tmp_path / "a", merge=merge, calibration=many, device="cpu")
    adapters = [adapter for path in three for adapter in adapters_in_fusion(path)]
    base = load_base(adapters[0].base, "cpu")
    fuse_adapters(base, adapters, config)
    assert most == alive


@pytest.mark.parametrize("staging", ["adapter", "previous_stages"])
def test_what_does_not_fit_is_watched_in_passes_with_the_same_bits(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staging: str
) -> None:
    quick = {**QUICK, "calibrate_on": staging, "cache": False}
    results, notes = [], list[str]()
    for free in (None, 400_000):
        monkeypatch.setattr("spectral_diffusion.merging.placement.available", lambda device, free=free: free)
        adapters = [adapter for path in three for adapter in adapters_in_fusion(path)]
        base = load_base(adapters[0].base, "cpu")
        config = FuseConfig(adapters=three, output=tmp_path / "a", merge="gradient", calibration=quick, device="cpu")
        fuse_adapters(base, adapters, config, hooks=Hooks(notify=notes.append))
        results.append(base.weights())
    assert any("passes" in note for note in notes)
    assert all(torch.equal(weight, results[1][name]) for name, weight in results[0].items())


def test_merges_advise_by_how_many_are_fused() -> None:
    sum_of_slots = get_merge("spectral")
    assert sum_of_slots.advise(1) is None
    assert "four" in str(sum_of_slots.advise(3)) and "gradient" in str(sum_of_slots.advise(8))
    assert get_merge("gradient").advise(8) is None


def test_ssr_silences_what_acts_where_an_adapter_has_no_layer() -> None:
    contributions, _ = problem(60)
    absent = replace(contributions[1], parameters={}, absent=(OUT, IN))
    assert absent.inputs is not None
    ways = (contributions[:1], [contributions[0], absent])
    one, two = (combined("ssr", way) @ absent.inputs.gram() for way in ways)
    assert float(two.norm()) < 0.9 * float(one.norm())


def test_the_papers_form_shares_among_all_adapters() -> None:
    parts = {"A_U": (OUT, 2), "A_V": (IN, 2)}
    parameters = {name: torch.randn(shape, dtype=torch.float64) for name, shape in parts.items()}
    frozen = {"U": torch.randn(OUT, 2).double(), "S": torch.rand(2).double(), "V": torch.randn(IN, 2).double()}
    one = Contribution("a", get_method("spectral-additive"), parameters, frozen, Slot.interval(0, 2))
    other = replace(one, name="b", parameters={}, frozen={}, absent=(OUT, IN))
    found = combined("spectral", [one, other], {"form": "paper"})
    half = {name: value / 2 for name, value in parameters.items()}
    assert torch.allclose(found, replace(one, parameters=half).factors().delta())


@pytest.mark.parametrize("toward", ["zero", "mean"])
def test_the_dual_form_is_the_primal_one(toward: str) -> None:
    contributions, ordinary = problem(2)
    options: dict[str, object] = {"ridge": 1e-3, "ridge_to": toward}
    few = combined("gradient", contributions, options, ordinary)
    for one in contributions:
        assert one.inputs is not None and one.inputs.is_raw
        rows, count = one.inputs.matrix(), one.inputs.count
        one.inputs.restore(rows.mT @ rows, IN)
        one.inputs.count = count
    many = combined("gradient", contributions, options, ordinary)
    assert torch.allclose(few, many, atol=1e-9)
    mean = sum(one.factors().delta() for one in contributions) / 3
    rows = torch.cat([torch.linalg.cholesky(one.inputs.gram() + 1e-12 * torch.eye(IN)).mT for one in contributions
                      if one.inputs] + [ordinary.matrix()])  # fmt: skip
    never = torch.linalg.svd(rows)[2][-4:]  # directions that nothing was seen of
    goal = mean if toward == "mean" else torch.zeros_like(mean)
    assert torch.allclose(few @ never.mT, goal @ never.mT, atol=1e-5)


def test_one_concept_alone_stays_what_it_is() -> None:
    contributions, _ = problem(60, concepts=1)
    delta = contributions[0].factors().delta()
    for name in ("gradient", "ssr", "fedavg", "cat", "spectral"):
        options: dict[str, object] = {"ridge": 0.0} if get_merge(name).needs_activations else {}
        assert torch.allclose(combined(name, contributions, options), delta, atol=1e-8), name


def test_ssr_is_least_squares_inside_the_subspace() -> None:
    contributions, ordinary = problem(60)
    merge = get_merge("ssr")
    found = merge.combine(contributions, MergeContext(merge.settings({"ridge": 0.0})))
    assert isinstance(found, Factors)
    best = objective(found.delta(), contributions, 0.0, ordinary)
    free = combined("gradient", contributions, {"ridge": 0.0})
    summed = combined("cat", contributions)
    assert objective(free, contributions, 0.0, ordinary) <= best <= objective(summed, contributions, 0.0, ordinary)
    up = torch.cat([one.factors().up for one in contributions], 1)
    router = torch.linalg.lstsq(up, found.delta()).solution @ torch.linalg.pinv(
        torch.cat([one.factors().down for one in contributions], 0)
    )
    for entry in range(0, 36, 5):  # no neighbouring router is better
        for shift in (1e-4, -1e-4):
            other = router.clone()
            other.view(-1)[entry] += shift
            down = torch.cat([one.factors().down for one in contributions], 0)
            assert objective(up @ other @ down, contributions, 0.0, ordinary) >= best - 1e-9


def test_simple_merges_are_their_formulas() -> None:
    contributions, _ = problem(60)
    contributions = [
        Contribution(one.name, one.method, one.parameters, {}, None, strength, None)
        for one, strength in zip(contributions, (1.0, 0.5, 2.0), strict=True)
    ]
    parts = [one.scale * one.factors().delta() for one in contributions]
    total = sum(parts, start=torch.zeros(OUT, IN).double())

    def found(name: str, seed: int = 0, **options: object) -> torch.Tensor:
        return combined(name, contributions, options, seed=seed)

    assert torch.allclose(found("cat"), total) and torch.allclose(found("fedavg"), total / 3.5)
    U, S, Vh = torch.linalg.svd(total)
    assert torch.allclose(found("svd", svd_rank=3), (U[:, :3] * S[:3]) @ Vh[:3])
    assert torch.allclose(found("dare", density=1.0), total)
    assert torch.equal(found("dare", seed=3), found("dare", seed=3))
    assert not torch.equal(found("dare", seed=3), found("dare", seed=4))
    assert found("ties").shape == total.shape


def test_columns_from_the_bottom_are_told_where_they_are_those_from_the_top() -> None:
    def adapter(name: str, columns: str, **sizes: tuple[int, int]) -> Any:
        method = get_method("spectral-additive")
        return SimpleNamespace(name=name, slot=read_columns(columns), method=method, sizes=sizes)

    wide = adapter("wide", "120:128", a=(128, 128), b=(64, 64))
    assert shared_columns(wide, adapter("low", "-8:0", a=(128, 128))) == 8
    assert shared_columns(wide, adapter("low", "-8:0", b=(64, 64))) == 0
    assert shared_columns(wide, adapter("other", "120:128", c=(128, 128))) == 0  # in no layer do they meet
    assert len(overlaps([wide, adapter("low", "-8:0", a=(128, 128))])) == 1
    assert shared_columns(wide, adapter("far", "124:132", a=(128, 128))) == 4


def test_dare_drops_by_layer_and_adapter_alone() -> None:
    contributions, _ = problem(60)
    one, other = (replace(contribution, inputs=None) for contribution in contributions[:2])

    def dropped(held: Contribution) -> torch.Tensor:
        return combined("dare", [held]) == 0

    assert not torch.equal(dropped(replace(one, layer="a")), dropped(replace(one, layer="b")))
    both = combined("dare", [one, other])
    assert torch.allclose(both, combined("dare", [one]) + combined("dare", [other]))


def test_in_ties_the_strengths_vote() -> None:
    contributions, _ = problem(60)
    one, other = (replace(contribution, inputs=None, scale=1.0) for contribution in contributions[:2])
    alone = combined("ties", [one])
    assert torch.equal(combined("ties", [one, replace(other, scale=0.0)]), alone)
    against = replace(other, parameters={**other.parameters, "A": -other.parameters["A"]}, scale=-1.0)
    assert torch.equal(combined("ties", [one, against]), combined("ties", [one, other]))


def test_a_layer_that_nothing_changes_is_no_trouble_for_ssr() -> None:
    """SDXL reads its first text encoder before the last layer, whose adapters stay zero."""
    contributions, prior = problem(20)
    none = [replace(c, parameters={n: torch.zeros_like(v) for n, v in c.parameters.items()}) for c in contributions]
    merge = get_merge("ssr")
    context = MergeContext(merge.settings({}), 0, prior, 1.0)
    delta = dense(merge.combine(none, context))
    assert delta.shape == (OUT, IN) and not delta.any()


def test_fedavg_of_nothing_is_nothing() -> None:
    contributions, _ = problem(60)
    none = [replace(one, inputs=None, scale=0.0) for one in contributions]
    assert not combined("fedavg", none).any()
    adapters: Any = [SimpleNamespace(name=name, layers=["unet.a"]) for name in ("dog", "mug")]
    check = get_merge("fedavg").check
    check(adapters, MergeConfig(scales={"dog": 0.0, "mug": 0.0}))
    with pytest.raises(UserError, match="fedavg divides by the sum"):
        check(adapters, MergeConfig(scales={"dog": -1.0}))


def test_activations_do_not_depend_on_how_they_came() -> None:
    rows = torch.randn(50, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few, many = GramAccumulator(IN), GramAccumulator(IN)
    few.add(rows[:10])
    for part in rows.split(7):
        many.add(part)
    assert few.is_raw and not many.is_raw and torch.allclose(many.gram(), rows.mT @ rows)
    down = torch.randn(3, IN, dtype=torch.float64)
    assert torch.allclose(few.matmul(down), down @ few.gram()) and torch.allclose(many.matmul(down), down @ many.gram())


@pytest.mark.parametrize("stride", [1, 2])
def test_rows_of_a_convolution_are_what_its_kernel_multiplies(stride: int) -> None:
    layer = torch.nn.Conv2d(3, 5, 3, stride=stride, padding=1, bias=False)
    x = torch.randn(2, 3, 8, 8)
    rows = tokens_of_call(layer, x)
    y = layer(x).permute(0, 2, 3, 1).reshape(-1, 5)
    assert torch.allclose(rows @ layer.weight.reshape(5, -1).mT, y, atol=1e-5)


@pytest.fixture(scope="module")
def three(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A spectral dog, a LoRA mug and a rotated hat."""

    folder = tmp_path_factory.mktemp("three")
    files = []
    for index, (name, method) in enumerate(
        (("dog", "spectral-additive"), ("mug", "lora"), ("hat", "spectral-rotation"))
    ):
        config = TrainConfig(
            concept=make_photos(folder / name, seed=index), output=folder / f"{name}.safetensors", rank=2, steps=3,
            base=str(tiny_base), method=method, learning_rate=3e-2, text_encoder_learning_rate=3e-2, device="cpu",
        )  # fmt: skip
        train_to_file(config)
        files.append(config.output)
    return files


def weights(folder: Path) -> dict[str, torch.Tensor]:
    base = load_base(str(folder), "cpu")
    return {f"{name}.{key}": value for name, model in base.models.items() for key, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return set(left) == set(right) and all(torch.equal(value, right[key]) for key, value in left.items())


QUICK = {"num_images": 2, "num_inference_steps": 2}


@pytest.mark.parametrize(
    "merge",
    seldom(
        sorted(set(all_merges()) - {"orthogonal", "orthofuse"}),
        ("spectral", "gradient", "ssr", "ties", "np-lora", "contrastive", "fedavg"),
    ),
)
def test_every_merge_fuses_any_mix_and_unfuses_to_the_same_bits(three: list[Path], tmp_path: Path, merge: str) -> None:
    def fuse(files: list[Path], name: str) -> Path:
        config = FuseConfig(
            adapters=files, output=tmp_path / name, merge=merge, calibration=QUICK, scales={"dog": 0.7}
            if any(file.stem == "dog" for file in files) else {}, device="cpu",
            options={"styles": ["dog"]} if merge == "np-lora" else {},
        )  # fmt: skip
        fuse_to_folder(config)
        return tmp_path / name

    whole = fuse(three, "whole")
    unfuse(whole, ["hat"], tmp_path / "rest")
    fresh = fuse(three[:2], "fresh")
    assert same(weights(tmp_path / "rest"), weights(fresh)) and not same(weights(whole), weights(fresh))
    again = FuseConfig(
        adapters=[fresh, three[2]], output=tmp_path / "again", merge=merge, calibration=QUICK, scales={"dog": 0.7},
        device="cpu", options={"styles": ["dog"]} if merge == "np-lora" else {},
    )  # fmt: skip
    fuse_to_folder(again)
    assert same(weights(tmp_path / "again"), weights(whole))
    recipe = read_manifest(tmp_path / "rest")
    assert recipe and set(recipe["concepts"]) == {"dog", "mug"} and recipe["merge"] == merge


def test_a_removed_style_is_no_option_any_more(three: list[Path], tmp_path: Path) -> None:
    def fuse(files: list[Path], name: str, styles: list[str]) -> Path:
        config = FuseConfig(adapters=files, output=tmp_path / name, merge="np-lora", device="cpu",
                            options={"styles": styles})  # fmt: skip
        fuse_to_folder(config)
        return tmp_path / name

    whole = fuse(three, "whole", ["dog", "mug"])
    unfuse(whole, ["mug"], tmp_path / "rest")
    assert same(weights(tmp_path / "rest"), weights(fuse([three[0], three[2]], "fresh", ["dog"])))
    with pytest.raises(UserError, match="Without dog, mug the rest cannot be fused by np-lora"):
        unfuse(whole, ["dog", "mug"], tmp_path / "none")


def test_removing_everything_gives_the_base(three: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    fuse_to_folder(FuseConfig(adapters=three, output=tmp_path / "fused", device="cpu"))
    unfuse(tmp_path / "fused", ["dog", "mug", "hat"], tmp_path / "base")
    assert same(weights(tmp_path / "base"), weights(tiny_base))
    with pytest.raises(UserError, match=r"No concept 'hta' in .*did you mean 'hat'"):
        unfuse(tmp_path / "fused", ["hta"], tmp_path / "x")


def test_a_fusion_never_replaces_what_it_is_built_on_or_what_else_lies_there(
    three: list[Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = tmp_path / "fused"
    config = FuseConfig(adapters=three[:2], output=fused, device="cpu")
    fuse_to_folder(config)
    (fused / ".DS_Store").write_bytes(b"")  # as a file manager leaves it
    fuse_to_folder(config)  # an earlier fusion may be made again
    before = weights(fused)
    with pytest.raises(UserError, match="the base that is built on"):
        fuse_to_folder(FuseConfig(adapters=three[2:], base=str(fused), allow_base=True, output=fused, device="cpu"))
    with pytest.raises(UserError, match="may hold the only copy"):
        unfuse(fused, ["dog"], fused)
    monkeypatch.chdir(fused)
    with pytest.raises(UserError, match="the folder that you are in"):
        fuse_to_folder(config.model_copy(update={"output": Path()}))
    monkeypatch.chdir(tmp_path)
    shutil.copy(three[2], fused / "adapters" / "mine.safetensors")
    for name in ("mine.safetensors", "notes.txt"):
        with pytest.raises(UserError, match=f"holds {name}, which would be lost"):
            fuse_to_folder(config)
        (fused / "adapters" / name).unlink(missing_ok=True)
        (fused / "notes.txt").write_text("mine")
    assert (fused / "notes.txt").exists() and same(weights(fused), before)
    (fused / "notes.txt").unlink()
    (fused / "manifest.json").write_text("{")  # a damaged fusion may be made again too
    fuse_to_folder(config)
    assert same(weights(fused), before) and read_manifest(fused)


def test_unfusing_on_another_precision_says_that_bits_differ(
    three: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    fuse_to_folder(FuseConfig(adapters=three, output=tmp_path / "fused", device="cpu"))
    half = tmp_path / "half"
    load_base(str(tiny_base), "cpu", "float16").pipeline.save_pretrained(half)
    notes: list[str] = []
    unfuse(tmp_path / "fused", ["hat"], tmp_path / "a", base_name=str(tiny_base), hooks=Hooks(notify=notes.append))
    assert not any("precision" in note for note in notes)
    unfuse(
        tmp_path / "fused", ["dog", "mug", "hat"], tmp_path / "b", base_name=str(half), hooks=Hooks(notify=notes.append)
    )
    assert any("another precision" in note for note in notes) and not any("last bit." in note for note in notes)


def test_subtracting_needs_nothing_of_what_stays(tiny_base: Path, three: list[Path], tmp_path: Path) -> None:
    config = TrainConfig(
        concept=make_photos(tmp_path / "fox"), output=tmp_path / "fox.safetensors", base=str(tiny_base), rank=2,
        steps=1, method="dora", device="cpu",
    )  # fmt: skip
    train_to_file(config)
    fuse_to_folder(FuseConfig(adapters=[three[0], config.output], output=tmp_path / "fused", device="cpu"))
    unfuse(tmp_path / "fused", [three[0].stem], tmp_path / "rest", subtract=True)
    assert [one.name for one in adapters_in_fusion(tmp_path / "rest")] == ["fox"]
    with pytest.raises(UserError, match="no LoRA holds"):
        read_merged(tmp_path / "rest")


def test_without_the_base_subtracting_comes_close_and_says_how_close(
    three: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    fuse_to_folder(FuseConfig(adapters=three, output=tmp_path / "fused", device="cpu"))
    notes: list[str] = []
    unfuse(tmp_path / "fused", ["hat"], tmp_path / "rest", subtract=True, hooks=Hooks(notify=notes.append))
    fuse_to_folder(FuseConfig(adapters=three[:2], output=tmp_path / "fresh", device="cpu"))
    bound = float(notes[-1].split("within ")[1].split()[0])
    layers = load_base(str(tmp_path / "fresh"), "cpu").weights()
    for name, weight in load_base(str(tmp_path / "rest"), "cpu").weights().items():
        assert float((weight - layers[name]).abs().max()) <= bound < 1e-5
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "fused", half)
    file = half / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, metadata = read_tensors(file)
    write_tensors(file, {name: value.half() for name, value in tensors.items()}, metadata)
    with pytest.raises(UserError, match="is not float32"):
        unfuse(half, ["hat"], tmp_path / "x", subtract=True)
    assert set(read_merged(tmp_path / "rest")) == set(read_merged(tmp_path / "fresh"))
    for name in ("rest", "fresh"):  # the removed token stays in the tokenizer, but in no checkpoint
        export(tmp_path / name, tmp_path / f"{name}.safetensors", "checkpoint", ExportOptions(device="cpu"))
    checkpoints = [read_tensors(tmp_path / f"{name}.safetensors")[0] for name in ("rest", "fresh")]
    [shapes, wanted] = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in checkpoints]
    assert shapes == wanted
    averaged = FuseConfig(adapters=three, output=tmp_path / "mean", merge="fedavg", device="cpu")
    fuse_to_folder(averaged)
    with pytest.raises(UserError, match="Only plain sums"):
        unfuse(tmp_path / "mean", ["hat"], tmp_path / "x", subtract=True)


def test_merged_factors_are_kept_where_there_are_some(three: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    fuse_to_folder(
        FuseConfig(adapters=three, output=tmp_path / "fused", merge="gradient", calibration=QUICK, device="cpu")
    )
    plain, fused = load_base(str(tiny_base), "cpu").weights(), load_base(str(tmp_path / "fused"), "cpu").weights()
    for layer, factors in read_merged(tmp_path / "fused").items():
        assert torch.allclose(fused[layer] - plain[layer], factors.delta(), atol=1e-5)
    assert [adapter.name for adapter in adapters_in_fusion(tmp_path / "fused")] == ["dog", "hat", "mug"]
    fuse_to_folder(FuseConfig(adapters=three, output=tmp_path / "ties", merge="ties", device="cpu"))
    with pytest.raises(UserError, match="dense changes"):
        read_merged(tmp_path / "ties")


def test_staged_fusion_and_its_own_cache(three: list[Path], tmp_path: Path) -> None:
    found = []
    for index, staging in enumerate(("adapter", "adapter", "previous_stages")):
        told: list[str] = []
        config = FuseConfig(
            adapters=three, output=tmp_path / str(index), merge="gradient",
            calibration={**QUICK, "calibrate_on": staging}, device="cpu",
        )  # fmt: skip
        stages: list[str] = []
        fuse_to_folder(
            config, Hooks(progress=lambda event, stages=stages: stages.append(event.stage), notify=told.append)
        )
        assert any("MiB" in text for text in told)
        found.append((weights(tmp_path / str(index)), "calibrate" in stages))
    assert same(found[0][0], found[1][0]) and not found[1][1]  # the second time nothing is recorded again
    assert not same(found[0][0], found[2][0]) and found[2][1]


def test_rows_that_two_orthogonal_adapters_share_are_told_before_anything_is_drawn(
    tiny_base: Path, tmp_path: Path
) -> None:
    files = []
    for index, name in enumerate(("dog", "mug")):
        folder = tmp_path / name  # ledgers of their own, so both take the first rows
        config = TrainConfig(
            concept=make_photos(folder / "photos", seed=index), output=folder / f"{name}.safetensors", name=name,
            token=f"<{name}>", rank=2, steps=1, base=str(tiny_base), method="orthogonal", device="cpu",
        )  # fmt: skip
        train_to_file(config)
        files.append(config.output)
    base, adapters = load_base(str(tiny_base), "cpu"), [load_adapter(file) for file in files]
    config = FuseConfig(adapters=files, output=tmp_path / "fused", merge="orthogonal", device="cpu")
    for call in (lambda: fuse_to_folder(config), lambda: search_scales(base, adapters, config)):
        with pytest.raises(UserError, match=r"'dog' \(.*\) and 'mug' \(.*\) share rows"):
            call()
    assert all(adapter.token not in known_tokens(base.pipeline.tokenizer) for adapter in adapters)


def test_a_fusion_that_is_stopped_while_it_watches_stops_at_once(three: list[Path], tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(event: Event) -> None:
        if event.stage == "calibrate":
            seen.append(event.done)
            raise UserError("Stopped.")

    config = FuseConfig(
        adapters=three,
        output=tmp_path / "fused",
        merge="gradient",
        calibration={**QUICK, "tokens_per_call": 7},
        device="cpu",
    )
    with pytest.raises(UserError, match=r"^Stopped\.$"):
        fuse_to_folder(config, Hooks(progress=stop))
    assert len(seen) == 1 and not (tmp_path / "fused").exists()


def test_strengths_of_one_component(three: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    config = FuseConfig(adapters=three[:1], output=tmp_path / "f", scales={"dog.text_encoder": 0.0}, device="cpu")
    fuse_to_folder(config)
    plain, fused = load_base(str(tiny_base), "cpu").weights(), load_base(str(tmp_path / "f"), "cpu").weights()
    adapter = load_adapter(three[0])
    for layer, weight in fused.items():
        delta = adapter.factors(layer).delta() * (not layer.startswith("text_encoder"))
        assert torch.allclose(weight - plain[layer], delta, atol=1e-6)
    with pytest.raises(UserError, match=r"names 'dog\.vae'"):
        fuse_to_folder(config.model_copy(update={"scales": {"dog.vae": 1.0}, "output": tmp_path / "g"}))


def test_tune_finds_what_is_nearest_and_leaves_the_base_alone(three: list[Path], tiny_base: Path) -> None:
    base = load_base(str(tiny_base), "cpu")
    before = {layer: weight.clone() for layer, weight in base.weights().items()}
    config = settings(calibration=QUICK)
    one = search_scales(base, [load_adapter(three[0])], config, (0.25, 0.6, 1.0))
    at = {candidate.scale: candidate for candidate in one}
    assert at[1.0].concepts < 1e-6  # alone at full strength it is itself
    assert at[0.25].concepts > at[0.6].concepts > at[1.0].concepts and at[0.25].drift < at[1.0].drift
    assert [candidate.score for candidate in one] == sorted(candidate.score for candidate in one)
    assert all(torch.equal(weight, before[layer]) for layer, weight in base.weights().items())
    base = load_base(str(tiny_base), "cpu")
    both = search_scales(
        base, [load_adapter(path) for path in three], settings(merge="gradient", calibration=QUICK), (1.0,), (0.0, 2.0)
    )
    assert {one.prior_weight for one in both} == {0.0, 2.0}
    drift = {one.prior_weight: one.drift for one in both}
    assert drift[2.0] < drift[0.0]


def test_names_that_leave_the_folder_are_refused(three: list[Path], tmp_path: Path) -> None:
    adapter = load_adapter(three[0])
    adapter.name = "../../escaped"
    save_adapter(adapter, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="cannot be a file's name"):
        load_adapter(tmp_path / "bad.safetensors")


def test_a_name_with_a_dot_has_its_strength(three: list[Path], tmp_path: Path) -> None:
    adapter = load_adapter(three[0])
    adapter.name = "dog-v1.5"
    save_adapter(adapter, tmp_path / "dog.safetensors")
    strength = {"dog-v1.5": 0.5, "dog-v1.5.unet": 0.0}
    fuse_to_folder(FuseConfig(adapters=[tmp_path / "dog.safetensors"], output=tmp_path / "f", scales=strength))
    for layer, factors in read_merged(tmp_path / "f").items():
        wanted = 0.0 if layer.startswith("unet") else 0.5
        assert torch.allclose(factors.delta(), wanted * adapter.factors(layer).delta(), atol=1e-7)


def test_what_is_watched_does_not_depend_on_what_was_watched_before(
    three: list[Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache warmed by a fusion of other layers gives the bits of a cold one, anchor included."""

    wide = TrainConfig(
        concept=make_photos(tmp_path / "wide", seed=9), output=tmp_path / "wide.safetensors", rank=2, steps=2,
        base=str(tiny_base), target_modules=r"re:unet\..*\.(to_q|net\.2)", learning_rate=3e-2, device="cpu",
    )  # fmt: skip
    train_to_file(wide)
    found = []
    for cache, before in (("cold", []), ("warm", [[three[0]], [wide.output], [three[0], wide.output, three[1]]])):
        monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path / cache))
        for index, files in enumerate([*before, [three[0], wide.output]]):
            output = tmp_path / f"{cache}-{index}"
            fuse_to_folder(
                FuseConfig(
                    adapters=files,
                    output=output,
                    merge="gradient",
                    calibration={**QUICK, "tokens_per_call": 8},
                    device="cpu",
                )
            )
        found.append(weights(output))
    assert same(*found)


def test_a_fusion_that_is_added_to_keeps_its_strengths(three: list[Path], tmp_path: Path) -> None:
    def run(*words: object) -> None:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output

    run("fuse", three[0], three[1], "-o", tmp_path / "two", "--strength", "dog=0.5", "--strength", "mug=0.3",
        "--device", "cpu")  # fmt: skip
    run("fuse", tmp_path / "two", "--add", three[2], "-o", tmp_path / "all", "--strength", "hat=0.7", "--device", "cpu")
    recipe = read_manifest(tmp_path / "all")
    assert recipe and recipe["scales"] == {"dog": 0.5, "mug": 0.3, "hat": 0.7}
    assert recipe["settings"]["distill"]["guidance_scale"] == DistillConfig().guidance_scale  # not the pocket preset's
    run("unfuse", tmp_path / "all", "--remove", "hat", "-o", tmp_path / "again")
    assert same(weights(tmp_path / "again"), weights(tmp_path / "two"))
    run("export", tmp_path / "all", "-o", tmp_path / "all.safetensors")
    run("import", tmp_path / "all.safetensors", "-o", tmp_path / "in.safetensors", "--base", recipe["base"])
    run(
        "tune",
        three[0],
        three[1],
        "--strengths",
        "0.5,1",
        "calibration.num_images=2",
        "calibration.num_inference_steps=2",
    )
    tune = ["tune", str(three[0]), str(three[1]), "--strengths", "1", "--json", "--merge", "gradient"]
    tune += ["calibration.num_images=1", "calibration.num_inference_steps=1"]
    tuned = CliRunner().invoke(app, tune)
    assert [candidate["scale"] for candidate in json.loads(tuned.stdout)] == [1.0]
    wrong = CliRunner().invoke(app, [*tune, "options.density=0.3"])
    assert isinstance(wrong.exception, UserError) and "options.density" in str(wrong.exception)
    without = CliRunner().invoke(app, [*tune, "options.solver=lbfgs", "--prior-weights", "0"])
    assert without.exit_code == 0, without.output  # it is the candidates' settings that have to fit
    for option, value, why in (
        ("--strengths", "", "--strengths needs at least one number"),
        ("--strengths", "1,nan", "have to be finite"),
        ("--prior-weights", "inf", "have to be finite"),
    ):
        odd = CliRunner().invoke(app, ["tune", str(three[0]), str(three[1]), option, value])
        assert isinstance(odd.exception, UserError) and why in str(odd.exception)
    named = ["tune", f"adapters=[{three[0]}, {three[1]}]", *tune[3:5], *tune[6:]]
    said = CliRunner().invoke(app, named)
    assert said.exit_code == 0 and f"Best: fuse {three[0]} {three[1]} --merge gradient" in said.stdout, said.output
    broken = json.loads((tmp_path / "all" / "manifest.json").read_text())
    del broken["base"]
    (tmp_path / "all" / "manifest.json").write_text(json.dumps(broken))
    for verb in (("unfuse", "--remove", "hat"), ("export",), ("inspect",)):
        more = [] if verb[0] == "inspect" else ["-o", str(tmp_path / "x.safetensors")]
        done = CliRunner().invoke(app, [verb[0], str(tmp_path / "all"), *verb[1:], *more])
        assert isinstance(done.exception, UserError) and "is damaged; fuse the adapters again" in str(done.exception)


def test_the_merges_are_listed_with_their_own_settings() -> None:
    text = CliRunner().invoke(app, ["merges"]).output
    assert all(f"{name}: " in text for name in all_merges())
    assert "options.density=0.5" in text and "arXiv:2306.01708" in text
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(app, ["merges", "--json"]).output)}
    assert "ridge" in rows["gradient"]["options"]["properties"]
