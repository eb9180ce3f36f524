"""The mathematics, against dense float64 formulas."""

from __future__ import annotations

import pytest
import torch

from spectral_diffusion.linalg import (
    Factors,
    SingularTriplets,
    cayley_change,
    compose_changes,
    corrected_eigenvectors,
    cosine_between,
    frobenius_norm,
    min_abs_cosine,
    top_band,
)
from spectral_diffusion.methods import get_method
from spectral_diffusion.methods.spectral_additive import WITH_VALUES
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


@pytest.mark.parametrize("shape", [(96, 96), (400, 300), (300, 500)])
@pytest.mark.parametrize("values", ["linear", "power", "steep", "noise"])
def test_eigenvectors_of_float32_are_corrected_to_float64(shape: tuple[int, int], values: str) -> None:
    """What a GPU computes: as exact as LAPACK's in float64, for spectra flat and steep."""
    small = min(shape)
    given = {
        "power": torch.arange(1, small + 1, dtype=torch.float64) ** -0.7,
        "steep": torch.exp(-torch.arange(small, dtype=torch.float64) / 12),
    }
    weight = decaying(*shape)
    if values in given:
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
        weight = (U * given[values]) @ Vh
    elif values == "noise":
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = weight.mT @ weight if shape[0] >= shape[1] else weight @ weight.mT
    found = corrected_eigenvectors(gram, 40)
    assert found
    exact, basis = (part.flip(-1) for part in torch.linalg.eigh(gram))
    assert torch.allclose(found[0], exact[:40], rtol=1e-9)
    sine = found[1] - basis[:, :40] * (found[1] * basis[:, :40]).sum(0).sign()
    assert float(sine.norm(dim=0).max()) < 1e-9
    single = torch.linalg.eigh(gram.float())[1].flip(1)[:, :40].double()
    assert float((single - basis[:, :40] * (single * basis[:, :40]).sum(0).sign()).norm(dim=0).max()) > 1e-6


def test_eigenvectors_that_float32_cannot_tell_apart_are_found_in_float64() -> None:
    """A cluster that reaches beyond the further columns."""
    small = 300
    Q = torch.linalg.qr(torch.randn(small, small, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    S = torch.cat([torch.linspace(2, 1.5, 10), 1 + 1e-9 * torch.arange(small - 10)]).double().square()
    gram = (Q * S) @ Q.mT
    assert corrected_eigenvectors(gram, 40) is None
    assert corrected_eigenvectors(gram, 10)


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
    delta = WITH_VALUES.delta(parameters, SingularTriplets(U, S, V)._asdict()).delta()
    assert (delta - dense).abs().max() <= 1e-12
    assert torch.linalg.matrix_rank(delta) <= 2 * 4


def test_additive_factors_with_singular_values_equal_the_dense_formula() -> None:
    parameters, (U, S, V) = random_additive()
    parameters["A_S"] = 0.3 * torch.randn(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dense = (U + parameters["A_U"]) * (S + parameters["A_S"]) @ (V + parameters["A_V"]).mT - (U * S) @ V.mT
    assert (WITH_VALUES.delta(parameters, SingularTriplets(U, S, V)._asdict()).delta() - dense).abs().max() <= 1e-12


def test_additive_is_exactly_zero_at_init_in_every_precision() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        parameters, band = random_additive(dtype=dtype)
        zero = WITH_VALUES.delta({k: torch.zeros_like(v) for k, v in parameters.items()}, band._asdict())
        assert torch.equal(zero.delta(), torch.zeros_like(zero.delta()))


def test_additive_factors_keep_their_digits_in_bfloat16() -> None:
    parameters, band = random_additive()
    small = {name: value * 1e-3 for name, value in parameters.items()}
    exact = WITH_VALUES.delta(small, band._asdict()).delta()
    half = WITH_VALUES.delta(
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


def test_the_rotation_s_gradient_is_that_of_its_formula() -> None:
    A = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)

    def formula(A: torch.Tensor) -> torch.Tensor:
        Q = (A - A.mT) / 2
        return torch.linalg.solve(torch.eye(5, dtype=A.dtype) - Q, 2 * Q, left=False)

    towards = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    [found] = torch.autograd.grad((cayley_change(A) * towards).sum(), A)
    [want] = torch.autograd.grad((formula(A) * towards).sum(), A)
    assert torch.equal(cayley_change(A), formula(A)) and (found - want).abs().max() <= 1e-12
