"""NP-LoRA, KnOTS, OrthoFuse, the contrastive merge, and SSR's independence of how a change is factored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_photos
from test_merges import IN, OUT, RANK, combined, problem

from spectral_diffusion.config.fuse import FuseConfig, MergeConfig
from spectral_diffusion.config.train import TrainConfig
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.linalg import top_band
from spectral_diffusion.merging.fuse import fuse_to_folder
from spectral_diffusion.merging.merges import get_merge
from spectral_diffusion.merging.merges.orthofuse import rotation_log, rotation_mean
from spectral_diffusion.merging.merges.registry import Contribution
from spectral_diffusion.methods import get_method
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.training.run import train_to_file

EYE = torch.eye(6, dtype=torch.float64)


def refactored(contribution: Contribution, seed: int) -> Contribution:
    """The same change of rank r as other factors of rank r + 1."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(RANK, RANK, generator=generator, dtype=torch.float64) + 3 * torch.eye(RANK)
    A, B = mix @ contribution.parameters["A"], contribution.parameters["B"] @ torch.linalg.inv(mix)
    A, B = torch.cat([A, A[:1]]), torch.cat([B - 0, torch.zeros(OUT, 1).double()], 1)
    B[:, 0], B[:, -1] = 0.25 * B[:, 0], 0.75 * B[:, 0]
    other = replace(contribution, parameters={"A": A, "B": B})
    assert torch.allclose(other.factors().delta(), contribution.factors().delta(), atol=1e-12)
    return other


@pytest.mark.parametrize("name", ["ssr", "knots", "np-lora", "gradient", "contrastive"])
def test_a_merge_sees_the_changes_and_not_their_factors(name: str) -> None:
    contributions, prior = problem(60)
    options: dict[str, object] = {"styles": ["c0"]} if name == "np-lora" else {}
    if name == "ssr":
        options = {"ridge": 1e-2}  # where the ridge decides too
    once = combined(name, contributions, options, prior)
    again = combined(name, [refactored(c, seed) for seed, c in enumerate(contributions)], options, prior)
    assert torch.allclose(once, again, atol=1e-8 * float(once.norm())) and float(once.norm()) > 0


def test_np_lora_goes_from_the_sum_to_the_styles_null_space() -> None:
    contributions, _ = problem(4)
    weights = (0.7, 1.0, 0.4)
    contributions = [replace(c, scale=w) for c, w in zip(contributions, weights, strict=True)]
    deltas = [c.scale * c.factors().delta() for c in contributions]
    styles: dict[str, object] = {"styles": ["c1"]}
    assert torch.allclose(combined("np-lora", contributions, {**styles, "mu": 0.0}), sum(deltas), atol=1e-10)
    style, content = deltas[1], deltas[0] + deltas[2]
    V = torch.linalg.svd(style).Vh[:RANK].mT
    hard = combined("np-lora", contributions, {**styles, "mu": 1e12}) - style
    assert torch.allclose(hard @ V, torch.zeros(OUT, RANK).double(), atol=1e-9)
    assert torch.allclose(hard, content - content @ V @ V.mT, atol=1e-9)
    # The closed form is where |X − ΔW_c|² + μ |X V|² is smallest.
    soft = (combined("np-lora", contributions, {**styles, "mu": 3.0}) - style).requires_grad_(True)
    ((soft - content).square().sum() + 3 * (soft @ V).square().sum()).backward()
    assert soft.grad is not None and float(soft.grad.abs().max()) < 1e-9
    strongest = combined("np-lora", contributions, {**styles, "mu": 1e12, "directions": 1}) - style
    assert torch.allclose(strongest, content - content @ V[:, :1] @ V[:, :1].mT, atol=1e-9)


def test_np_lora_takes_styles_by_their_class_or_by_name() -> None:
    contributions, _ = problem(4)
    marked = [contributions[0], replace(contributions[1], is_style=True), contributions[2]]
    assert torch.equal(combined("np-lora", marked), combined("np-lora", contributions, {"styles": ["c1"]}))
    adapters: Any = [SimpleNamespace(name=f"c{index}", is_style=False) for index in range(3)]
    check = get_merge("np-lora").check
    with pytest.raises(UserError, match="needs a style"):
        check(adapters, MergeConfig())
    with pytest.raises(UserError, match="names 'ink', but the adapters are c0, c1, c2"):
        check(adapters, MergeConfig(options={"styles": ["ink"]}))


def test_knots_is_ties_in_the_common_basis() -> None:
    from peft.utils.merge_utils import ties

    contributions, _ = problem(4)
    deltas = [c.factors().delta() for c in contributions]
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    kept = 1e-9 * S[0] < S
    tasks = [part[kept] for part in Vh.split(IN, 1)]
    wanted = (U * S)[:, kept] @ ties(tasks, torch.ones(3).double(), 0.5)
    assert torch.allclose(combined("knots", contributions), wanted, atol=1e-9)
    same = [contributions[0], replace(contributions[0], name="again")]
    assert torch.allclose(combined("knots", same, {"density": 1.0}), deltas[0], atol=1e-9)


def rotation(seed: int, size: float = 0.4) -> torch.Tensor:
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    return torch.matrix_exp(A - A.mT)


def test_logarithms_of_rotations() -> None:
    for seed in range(20):
        R = rotation(seed, 0.2)
        log = rotation_log(R)
        assert torch.allclose(log, -log.mT, atol=1e-12) and torch.allclose(torch.matrix_exp(log), R, atol=1e-10)
    assert torch.equal(rotation_log(EYE), torch.zeros_like(EYE))
    plane = EYE.clone()
    plane[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]])  # four angles of 0
    assert torch.allclose(torch.matrix_exp(rotation_log(plane)), plane, atol=1e-12)


def test_the_mean_of_rotations_is_on_the_geodesic() -> None:
    first, second = rotation(1, 0.15), rotation(2, 0.15)
    for weight in (0.5, 0.4):
        wanted = first @ torch.matrix_exp(weight * rotation_log(first.mT @ second))
        mean = rotation_mean([first - EYE, second - EYE], [1 - weight, weight], restore=False) + EYE
        assert torch.allclose(mean, wanted, atol=1e-9) and torch.allclose(mean @ mean.mT, EYE, atol=1e-10)
    three = [rotation(seed, 0.15) for seed in range(3)]
    mean = rotation_mean([R - EYE for R in three], [0.2, 0.3, 0.5], restore=False) + EYE
    off = sum(w * rotation_log(mean.mT @ R) for w, R in zip((0.2, 0.3, 0.5), three, strict=True))
    assert float(off.norm()) < 1e-9  # Fréchet's condition
    assert torch.allclose(rotation_mean([first - EYE] * 3, [1 / 3] * 3, restore=True) + EYE, first, atol=1e-9)
    restored = rotation_mean([first - EYE, second - EYE], [0.5, 0.5], restore=True) + EYE
    norms = [float(rotation_log(R).norm()) for R in (first, second)]
    assert float(rotation_log(restored).norm()) == pytest.approx(sum(norms) / 2)


def turned(seed: int, band: dict[str, torch.Tensor], scale: float = 1.0) -> Contribution:
    generator = torch.Generator().manual_seed(seed)
    method = get_method("spectral-rotation")
    own = {
        name: 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in method.shapes(OUT, IN, 4).items()
    }
    return Contribution(f"c{seed}", method, own, band, None, scale)


def test_orthofuse_keeps_the_singular_values() -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    band = dict(zip("USV", top_band(weight, 4), strict=True))
    contributions = [turned(seed, band) for seed in range(3)]
    merged = combined("orthofuse", contributions)
    before, after = torch.linalg.svdvals(weight), torch.linalg.svdvals(weight + merged)
    assert torch.allclose(before, after, atol=1e-9) and float(merged.norm()) > 0.1
    mean = sum(c.factors().delta() for c in contributions) / 3
    assert float((torch.linalg.svdvals(weight + mean) - before).abs().max()) > 1e-3  # which a mean of matrices does not
    single = combined("orthofuse", [contributions[0]])
    assert torch.allclose(single, contributions[0].factors().delta(), atol=1e-9)
    absent = replace(contributions[1], parameters={}, frozen={}, absent=(OUT, IN))
    half = combined("orthofuse", [contributions[0], absent], {"restore": False})
    assert 0.3 < float(half.norm() / single.norm()) < 0.7


def test_contrastive_is_where_its_objective_is_smallest() -> None:
    contributions, prior = problem(60)
    nu, ridge = 0.3, 1e-9
    found = combined("contrastive", contributions, {"repulsion": nu, "ridge": ridge}, prior, 2.0).requires_grad_(True)
    grams = [c.inputs.gram() for c in contributions if c.inputs]
    deltas = [c.scale * c.factors().delta() for c in contributions]
    loss = torch.zeros((), dtype=torch.float64)
    for i, gram in enumerate(grams):
        for j, delta in enumerate(deltas):
            weight = 1.0 if i == j else -nu / 2
            loss = loss + weight * ((found - delta) @ gram * (found - delta)).sum()
    count = sum(c.inputs.count for c in contributions if c.inputs) / 3
    loss = loss + 2.0 * count / prior.count * (found @ prior.gram() * found).sum()
    loss.backward()
    scale = float((deltas[0] @ grams[0]).abs().max())
    assert found.grad is not None and float(found.grad.abs().max()) < 1e-5 * scale
    none = combined("contrastive", contributions, {"repulsion": 0.0}, prior, 2.0)
    assert torch.allclose(none, combined("gradient", contributions, {}, prior, 2.0), atol=1e-9)
    adapters: Any = [SimpleNamespace(name=name, layers=["unet.a"]) for name in ("dog", "mug")]
    with pytest.raises(UserError, match="negative or 0 together"):
        get_merge("orthofuse").check(adapters, MergeConfig(scales={"mug": -0.5}))


@pytest.mark.parametrize("method", ["spectral-rotation", "oft"])
def test_orthofuse_fuses_trained_rotations_and_refuses_others(tiny_base: Path, tmp_path: Path, method: str) -> None:
    files = []
    for seed, name in enumerate(("rex", "mug")):
        photos = make_photos(tmp_path / "photos" / name, seed=seed)
        files.append(tmp_path / name / f"{name}.safetensors")  # ledgers of their own: both take the first columns
        train_to_file(
            TrainConfig(
                concept=photos, output=files[-1], base=str(tiny_base), rank=2, steps=2, learning_rate=0.1, device="cpu",
                method=method, crops_per_image=1,
            )
        )  # fmt: skip
    given: dict[str, Any] = {"merge": "orthofuse", "base": str(tiny_base), "device": "cpu"}
    fuse_to_folder(FuseConfig(adapters=files, output=tmp_path / "fused", **given))
    before, after = load_base(str(tiny_base), "cpu"), load_base(str(tmp_path / "fused"), "cpu")
    changed = 0
    for name, weight in before.weights().items():
        other = after.weights()[name]
        changed += not torch.equal(weight, other)
        assert torch.allclose(torch.linalg.svdvals(weight), torch.linalg.svdvals(other), atol=1e-4)
    assert changed
    lora = tmp_path / "lora.safetensors"
    train_to_file(
        TrainConfig(
            concept=tmp_path / "photos" / "rex", output=lora, base=str(tiny_base), rank=2, steps=1, device="cpu",
            method="lora", token="<dog>", name="dog", crops_per_image=1,
        )
    )  # fmt: skip
    with pytest.raises(UserError, match="orthofuse is for spectral-rotation and oft; 'dog' is lora"):
        fuse_to_folder(FuseConfig(adapters=[lora, files[0]], output=tmp_path / "other", **given))
