"""What the paper proves about rank, constructed in float64 with the library's own factors."""

from __future__ import annotations

import pytest
import torch

from spectral_diffusion.linalg import SingularTriplets
from spectral_diffusion.methods import get_method

ADDITIVE, LORA = get_method("spectral-additive"), get_method("lora")


def weight_of_rank(rank: int, rows: int = 20, columns: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    U = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64)).Q
    return (U * torch.linspace(3, 1, rank, dtype=torch.float64)) @ V.mT


def svd(weight: torch.Tensor) -> SingularTriplets:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return SingularTriplets(U, S, Vh.mT)


def rank_of(weight: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(weight, rtol=1e-10))


@pytest.mark.parametrize("r", [1, 3, 5])
def test_rank_capacity_of_lemma_3_1(r: int) -> None:
    """Additive tuning of r columns reaches every rank from n down to n − 2r: LoRA of rank r only to n − r."""
    n = 20
    weight = weight_of_rank(n)
    whole = svd(weight)
    band, other = whole.columns(0, r), whole.columns(r, 2 * r)
    # The band's own term is turned into minus the term of r other columns: its own r go, and those r too.
    parameters = {"A_U": -band.U - other.U * (other.S / band.S), "A_V": other.V - band.V}
    assert rank_of(weight + ADDITIVE.delta(parameters, band._asdict()).delta()) == n - 2 * r
    zero = {name: torch.zeros_like(value) for name, value in parameters.items()}
    assert rank_of(weight + ADDITIVE.delta(zero, band._asdict()).delta()) == n
    best = {"B": -band.U * band.S, "A": band.V.mT.contiguous()}
    assert rank_of(weight + LORA.factors(best, {}).delta()) == n - r
    # Both spend (n + m) r numbers, and n − r is LoRA's floor: its change has rank r.
    assert ADDITIVE.count(20, 30, r) == LORA.count(20, 30, r)
    assert rank_of(LORA.factors(best, {}).delta()) == r


def test_additive_keeps_a_low_rank_weight_low_rank_and_lora_does_not() -> None:
    """The remark after Lemma 3.1: k columns stay k columns, however they are moved."""
    k, r = 6, 4
    weight = weight_of_rank(k)
    band = svd(weight).columns(0, r)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    assert rank_of(weight + ADDITIVE.delta({"A_U": noise(20, r), "A_V": noise(30, r)}, band._asdict()).delta()) == k
    assert rank_of(weight + LORA.factors({"B": noise(20, r), "A": noise(r, 30)}, {}).delta()) == k + r
