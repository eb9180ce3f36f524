"""OrthoFuse (2026): the mean of rotations along geodesics, not of the matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from scipy.linalg import schur
from torch import Tensor

from ...adapters.adapter import Adapter
from ...config.fuse import MergeConfig
from ...config.settings import Settings
from ...core.errors import Fix, UserError
from ...linalg import Factors, to_float64
from .registry import Contribution, MergeContext, register_merge, scales_by_component

ROTATIONS = ("spectral-rotation", "oft")
CLOSE, MOST = 1e-12, 100  # of the mean: the length of the last step, and how many there are


class GeodesicOptions(Settings):
    """How the mean is finished."""

    restore: bool = Field(
        True, description="Turn as far as the adapters do on average: means of opposite rotations turn less."
    )


def rotations_of_one_frame(adapters: Sequence[Adapter], config: MergeConfig) -> None:
    """Only rotations of the same columns, or oft with the same blocks, at scales that can weigh them.

    Raises:
        UserError: an adapter of another method, or of other columns; a negative scale, or all 0.
    """
    if any(min(scales) < 0 or sum(scales) <= 0 for scales in scales_by_component(adapters, config)):
        raise UserError(
            "orthofuse weighs rotations by their scales, which are negative or 0 together.",
            Fix("scales", so="positive"),
        )
    first = adapters[0]
    for adapter in adapters:
        if adapter.method.name not in ROTATIONS:
            raise UserError(
                f"orthofuse is for {' and '.join(ROTATIONS)}; '{adapter.name}' is {adapter.method.name}.",
                Fix("merge", "spectral"),
            )
        same = adapter.method == first.method and adapter.rank == first.rank
        if not same or str(adapter.slot) != str(first.slot):
            raise UserError(
                f"orthofuse needs rotations of the same columns; '{first.name}' has {first.slot or first.rank} and "
                f"'{adapter.name}' {adapter.slot or adapter.rank}.",
                Fix("merge", "spectral"),
            )


@register_merge(
    "orthofuse",
    "OrthoFuse: the geodesic mean of rotations of the same columns (or of oft)",
    options=GeodesicOptions,
    check=rotations_of_one_frame,
    paper="OrthoFuse 2026, arXiv:2604.05183",
)
def orthofuse(contributions: Sequence[Contribution], context: MergeContext) -> Factors:
    """ΔW of the weighted Fréchet mean of the adapters' rotations, weights λ_i / Σ λ_i.

    For two it is the point on the geodesic between them, R_1 exp(t log(R_1ᵀ R_2)). With ``restore`` the angles of the
    mean are stretched to the adapters' mean size. An adapter without the layer is no rotation.
    """
    total = sum(contribution.scale for contribution in contributions)
    acting = [contribution for contribution in contributions if not contribution.absent]
    frozen, method = acting[0].frozen, acting[0].method
    prepare = method.prepare
    assert prepare is not None
    turned = [prepare(contribution.parameters, contribution.frozen) for contribution in acting]
    weights = [contribution.scale / total for contribution in acting]
    restore = context.get(GeodesicOptions).restore
    mean = {
        name: rotation_mean([to_float64(one[name]) for one in turned], weights, restore)
        for name in ("D_U", "D_V", "D")
        if name in turned[0]
    }
    if "D" in mean:
        return method.factors(mean, {name: to_float64(tensor) for name, tensor in frozen.items()})
    U, S, V = (to_float64(frozen[part]) for part in "USV")
    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    middle = (mean["D_U"] * S) @ (mean["D_V"] + eye).mT + S[:, None] * mean["D_V"].mT
    return Factors(U @ middle, V.mT)


def rotation_mean(changes: Sequence[Tensor], weights: Sequence[float], restore: bool) -> Tensor:
    """D = R − I of the weighted Fréchet mean of rotations I + D_i; weights that sum to less than 1 leave rest to I."""
    eye = torch.eye(len(changes[0]), dtype=torch.float64)
    rotations = [change.cpu() + eye for change in changes]
    mean = torch.linalg.matrix_exp(sum(w * rotation_log(R) for w, R in zip(weights, rotations, strict=True)))
    rest = 1 - sum(weights)
    for _ in range(MOST):
        step = sum(w * rotation_log(mean.mT @ R) for w, R in zip(weights, rotations, strict=True))
        step = step + rest * rotation_log(mean.mT)
        mean = mean @ torch.linalg.matrix_exp(step)
        if float(step.norm()) < CLOSE * len(eye):
            break
    if restore:
        angles = rotation_log(mean)
        wanted = sum(w * float(rotation_log(R).norm()) for w, R in zip(weights, rotations, strict=True))
        if float(angles.norm()) > 0:
            mean = torch.linalg.matrix_exp(angles * (wanted / float(angles.norm())))
    return (mean - eye).to(changes[0].device)


def rotation_log(R: Tensor) -> Tensor:
    """The skew-symmetric logarithm of a rotation, by the angles of its real Schur form."""
    T, Z = schur(R.numpy(), output="real")
    angles = np.zeros_like(T)
    index = 0
    while index < len(T) - 1:
        if abs(T[index + 1, index]) > np.finfo(T.dtype).eps:
            angle = np.arctan2(T[index + 1, index] - T[index, index + 1], T[index, index] + T[index + 1, index + 1])
            angles[index + 1, index], angles[index, index + 1] = angle, -angle
            index += 1
        index += 1
    return torch.from_numpy(Z @ angles @ Z.T)
