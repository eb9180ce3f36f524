"""How low can a tuned weight's rank go? Lemma 3.1, constructed with the library's own factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg import SingularTriplets
from ..methods import get_method
from .registry import Findings, Row, Table, study
from .runner import StudyRunner

SIDES = (40, 60)  # out and in of the weight


def weight_of_full_rank(seed: int = 0) -> Tensor:
    """A weight (out, in) in float64 with singular values from 3 down to 1."""
    out_features, in_features = SIDES
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(out_features, out_features, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(in_features, out_features, generator=generator, dtype=torch.float64)).Q
    return (U * torch.linspace(3, 1, out_features, dtype=torch.float64)) @ V.mT


def numerical_rank(weight: Tensor) -> int:
    """The numerical rank."""
    return int(torch.linalg.matrix_rank(weight, rtol=1e-10))


def lowest(weight: Tensor, rank: int) -> tuple[int, int]:
    """The lowest rank that tuning ``rank`` columns, and a LoRA of that rank, can bring a weight (out, in) to.

    The band's own term becomes minus the term of as many other columns, so that both vanish; the best a LoRA can do
    is to remove one term per rank.
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    whole = SingularTriplets(U, S, Vh.mT)
    band, other = whole.columns(0, rank), whole.columns(rank, 2 * rank)
    turned = {"A_U": -band.U - other.U * (other.S / band.S), "A_V": other.V - band.V}
    taken = {"B": -band.U * band.S, "A": band.V.mT.contiguous()}
    additive = get_method("spectral-additive").delta(turned, band._asdict()).delta()
    return numerical_rank(weight + additive), numerical_rank(weight + get_method("lora").factors(taken, {}).delta())


@study(
    "rank",
    "Lemma 3.1",
    "With as many trained numbers a spectral adapter reaches twice as far down in rank as LoRA.",
    (0.1, 0.02),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """The lowest rank each reaches, and how many numbers it trains for that."""
    weight, rows = weight_of_full_rank(), list[Row]()
    for rank in (1, 2, 4, 8, 16):
        additive, lora = lowest(weight, rank)
        rows.append(
            {
                "r": rank,
                "trained, spectral": get_method("spectral-additive").count(*SIDES, rank),
                "trained, LoRA": get_method("lora").count(*SIDES, rank),
                "lowest rank, spectral": additive,
                "lowest rank, LoRA": lora,
            }
        )
    return Findings([Table(f"A weight of {SIDES[0]} × {SIDES[1]} and full rank", rows)], verdict(rows))


def verdict(rows: Sequence[Row]) -> str:
    """Whether the lemma's n − 2r and n − r are reached."""
    n = SIDES[0]
    reached = all(
        (row["lowest rank, spectral"], row["lowest rank, LoRA"]) == (n - 2 * row["r"], n - row["r"]) for row in rows
    )
    return f"{'Yes' if reached else 'No'}: n − 2r against n − r, with as many trained numbers; n = {n}."
