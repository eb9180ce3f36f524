"""DoRA (Liu et al. 2024), trained through PEFT: a magnitude per output and a LoRA of the direction."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..linalg import Factors, dense_factors, flatten
from .registry import Method, Peft, Shapes, Tensors, register_method


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """LoRA's A (r, in) and B (out, r), and m (out), which starts at the norms of W's rows."""
    return {"A": (rank, in_features), "B": (out_features, rank), "m": (out_features,)}


def factors(parameters: Tensors, frozen: Tensors) -> Factors:
    """ΔW = m (W + BA) / |W + BA| − W, rows normed; of full rank."""
    W = frozen["W"]
    direction = W + flatten(parameters["B"]) @ flatten(parameters["A"])
    scaled = direction * (parameters["m"].reshape(-1) / direction.norm(dim=1))[:, None]
    return dense_factors(scaled - W)


def initialize(weight: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Set m to the norms of W's rows in float32; PEFT computes them in the base's precision."""
    magnitude = parameters["m"]
    magnitude.data.copy_(flatten(weight).float().norm(dim=1).reshape(magnitude.shape))


METHOD = register_method(
    Method(
        name="dora",
        summary="DoRA (Liu et al. 2024) through PEFT, alpha = rank",
        shapes=shapes,
        factors=factors,
        builds_on="weight",
        low_rank=False,
        neutral=frozenset({"m"}),
        peft=Peft(
            "LORA",
            lambda rank, steps: {"r": rank, "lora_alpha": rank, "use_dora": True},
            {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"},
            initialize=initialize,
        ),
    )
)
