"""The mathematics, against dense float64 formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectral_diffusion.linalg import (
    Factors,
    SingularTriplets,
    cayley_change,
    compose_changes,
    cosine_between,
    frobenius_norm,
    gram_of,
    min_abs_cosine,
    solve_device,
    to_float64,
    top_band,
)
from spectral_diffusion.merging.activations import GramAccumulator
from spectral_diffusion.methods import get_method
from spectral_diffusion.methods.spectral_additive import factors
from spectral_diffusion.methods.spectral_rotation import prepare


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, small, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, small, generator=generator, dtype=torch.float64)).Q
    return (U * torch.linspace(1, 0.01, small, dtype=torch.float64)) @ V.mT


@pytest.mark.parametrize("shape", [(40, 40), (30, 70), (70, 30)])
@pytest.mark.parametrize("count", [1, 8, 30])
def test_top_band_is_the_svd(shape: tuple[int, int], count: int) -> None:
    weight = decaying(*shape)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    band = top_band(weight, count)
    assert torch.allclose(band.S, S[:count], rtol=1e-12)
    cosines = min_abs_cosine(band, SingularTriplets(U[:, :count], S[:count], Vh[:count].mT))
    assert torch.rad2deg(torch.acos(cosines.clamp(max=1))).max() < 2e-6  # acos near 1 sees half the digits
    sine = (band.U - U[:, :count] * (band.U * U[:, :count]).sum(0).sign()).norm(dim=0)
    assert torch.rad2deg(sine).max() < 1e-8


def test_signs_are_canonical_and_the_pair_flips_together() -> None:
    weight = decaying(20, 30)
    band = top_band(weight, 20)
    peak = band.U.gather(0, band.U.abs().argmax(0, keepdim=True))
    assert (peak > 0).all()
    assert torch.allclose((band.U * band.S) @ band.V.mT, weight, atol=1e-12)


def test_ill_conditioned_weight_takes_the_full_svd() -> None:
    weight = decaying(30, 30)
    U, S, Vh = torch.linalg.svd(weight)
    S[10:] = 0
    weight = (U * S) @ Vh
    band = top_band(weight, 15)
    assert torch.isfinite(band.V).all()
    assert torch.allclose(band.V.mT @ band.V, torch.eye(15, dtype=torch.float64), atol=1e-10)


def test_count_out_of_range() -> None:
    with pytest.raises(ValueError, match="between 1 and 4"):
        top_band(torch.randn(4, 5), 5)


def random_additive(
    rank: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, torch.Tensor], SingularTriplets]:
    generator = torch.Generator().manual_seed(1)
    band = top_band(decaying(24, 36), rank)
    parameters = {
        "A_U": 0.05 * torch.randn(24, rank, generator=generator, dtype=torch.float64),
        "A_V": 0.05 * torch.randn(36, rank, generator=generator, dtype=torch.float64),
    }
    return {k: v.to(dtype) for k, v in parameters.items()}, SingularTriplets(*(t.to(dtype) for t in band))


def test_additive_factors_equal_the_dense_formula() -> None:
    parameters, (U, S, V) = random_additive()
    dense = (U + parameters["A_U"]) * S @ (V + parameters["A_V"]).mT - (U * S) @ V.mT
    delta = factors(parameters, SingularTriplets(U, S, V)._asdict()).delta()
    assert (delta - dense).abs().max() <= 1e-12
    assert torch.linalg.matrix_rank(delta) <= 2 * 4


def test_additive_factors_with_singular_values_equal_the_dense_formula() -> None:
    parameters, (U, S, V) = random_additive()
    parameters["A_S"] = 0.3 * torch.randn(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dense = (U + parameters["A_U"]) * (S + parameters["A_S"]) @ (V + parameters["A_V"]).mT - (U * S) @ V.mT
    assert (factors(parameters, SingularTriplets(U, S, V)._asdict()).delta() - dense).abs().max() <= 1e-12


def test_additive_is_exactly_zero_at_init_in_every_precision() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        parameters, band = random_additive(dtype=dtype)
        zero = factors({k: torch.zeros_like(v) for k, v in parameters.items()}, band._asdict())
        assert torch.equal(zero.delta(), torch.zeros_like(zero.delta()))


def test_additive_factors_keep_their_digits_in_bfloat16() -> None:
    parameters, band = random_additive()
    small = {name: value * 1e-3 for name, value in parameters.items()}
    exact = factors(small, band._asdict()).delta()
    half = factors(
        {k: v.bfloat16() for k, v in small.items()}, {name: t.bfloat16() for name, t in band._asdict().items()}
    )
    rough = half.up.double() @ half.down.double()
    assert (rough - exact).norm() / exact.norm() < 0.01


def test_cayley_is_a_rotation_and_exactly_zero_at_zero() -> None:
    A = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    D = cayley_change(A)
    R = D + torch.eye(6).double()
    Q = (A - A.mT) / 2
    one = torch.eye(6).double()
    assert torch.allclose(R, (one + Q) @ torch.linalg.inv(one - Q), atol=1e-12)
    assert torch.allclose(R.mT @ R, one.expand(5, 6, 6), atol=1e-12)
    assert torch.equal(cayley_change(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))
    again = compose_changes(D[0], D[1]) + one
    assert torch.allclose(again, R[0] @ R[1], atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert cayley_change(A.bfloat16()).dtype == torch.float32


def test_rotation_factors_equal_the_dense_formula_and_compose() -> None:
    generator = torch.Generator().manual_seed(1)
    band = top_band(decaying(24, 36), 4)
    first, then = (
        {n: 0.5 * torch.randn(shape, generator=generator).double() for n, shape in
         {"A_U": (4, 4), "A_V": (4, 4), "c": (4,)}.items()}
        for _ in range(2)
    )  # fmt: skip
    one = torch.eye(4).double()
    U, S, V = band

    def turned(parameters: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            cayley_change(parameters["A_U"]) + one,
            cayley_change(parameters["A_V"]) + one,
            1 + parameters["c"],
        )

    R_U, R_V, scale = turned(first)
    dense = U @ R_U * (S * scale) @ (V @ R_V).mT - (U * S) @ V.mT
    rotation = get_method("spectral-rotation-s")
    found = rotation.delta(first, band._asdict())
    assert (found.delta() - dense).abs().max() <= 1e-12 and found.up.shape[1] == 4
    start = {name: value for name, value in prepare(first, band._asdict()).items() if name != "M"}
    P_U, P_V, more = turned(then)
    dense = U @ R_U @ P_U * (S * scale * more) @ (V @ R_V @ P_V).mT - (U * S) @ V.mT
    composed = rotation.delta(then, {**band._asdict(), **start}).delta()
    assert (composed - dense).abs().max() <= 1e-12


def test_norm_and_cosine_without_the_dense_matrix() -> None:
    generator = torch.Generator().manual_seed(2)
    one, two = (
        Factors(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 3), (3, 7))))
        for _ in range(2)
    )
    a, b = one.delta(), two.delta()
    assert frobenius_norm(one) == pytest.approx(float(a.norm()))
    assert cosine_between(one, two) == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))


class Devices(TorchDispatchMode):
    """Records every operation with the devices and precisions of what goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, set[str], set[tuple[str, torch.dtype]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)]
        kinds = {(value.device.type, value.dtype) for value in tensors}
        self.ops.append((func.name(), {device for device, _ in kinds}, kinds))
        return out


def test_apples_gpus_are_spared_solves_and_float64() -> None:
    """They have no backward of ``solve``, and refuse float64 even as what a copy to the CPU makes."""
    with FakeTensorMode(), Devices() as seen:
        A = torch.empty(3, 4, 4, device="mps")
        assert cayley_change(A).device.type == "mps"
        assert to_float64(A).device.type == gram_of(torch.empty(4, 6, device="mps")).device.type == "cpu"
        for size in (2, 8):  # a Gram matrix, and rows
            GramAccumulator(size).add(torch.empty(3, size, device="mps"))
    assert any("solve" in name for name, _, _ in seen.ops)
    for name, devices, kinds in seen.ops:
        assert "linalg" not in name or devices == {"cpu"}, name
        assert ("mps", torch.float64) not in kinds, name
        assert "copy" not in name or "mps" not in devices or torch.float64 not in {dtype for _, dtype in kinds}, name


def test_other_devices_solve_at_home() -> None:
    assert {solve_device(torch.empty(1, device=device)) for device in ("cpu", "meta")} == {
        torch.device("cpu"),
        torch.device("meta"),
    }
