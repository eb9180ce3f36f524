"""Pure mathematics of the spectral adapters: tensors in, tensors out; no files, no models.

Notation of the paper (*Spectral Adapter: Fine-Tuning in Spectral Space*, Zhang & Pilanci 2024): a weight
W (out, in) = U S Vᵀ with singular values falling; a band is r of its columns, U_b (out, r), S_b (r,),
V_b (in, r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

CORRECTED_FROM = 256  # side of a matrix from which a GPU's eigenvectors are found in float32 and corrected
BESIDE, CORRECTIONS = 32, 6  # further columns that are corrected along, and how often at most
RESIDUAL = 1e-14  # times the square root of the side: what a float64 decomposition leaves


class SingularTriplets(NamedTuple):
    """Columns of a singular value decomposition: U (out, r), S (r,), V (in, r)."""

    U: Tensor
    S: Tensor
    V: Tensor

    def columns(self, start: int, stop: int) -> SingularTriplets:
        """The columns ``start … stop − 1``."""
        return SingularTriplets(self.U[:, start:stop], self.S[start:stop], self.V[:, start:stop])

    def select(self, columns: Sequence[int]) -> SingularTriplets:
        """The given columns; negative ones count from the end."""
        chosen = list(columns)
        return SingularTriplets(
            self.U[:, chosen].contiguous(), self.S[chosen].contiguous(), self.V[:, chosen].contiguous()
        )


class Factors(NamedTuple):
    """A low-rank change of a weight: ΔW = up @ down, up (out, k), down (k, in)."""

    up: Tensor
    down: Tensor

    def delta(self) -> Tensor:
        """The dense ΔW (out, in)."""
        return self.up @ self.down


class SandwichFactors(NamedTuple):
    """A change between frozen frames: ΔW = left @ middle @ right, left (out, k), middle (k, k), right (k, in)."""

    left: Tensor
    middle: Tensor
    right: Tensor

    def factors(self) -> Factors:
        """The same change as ``up`` and ``down``."""
        return Factors(self.left @ self.middle, self.right)


def dense_factors(delta: Tensor) -> Factors:
    """A dense ΔW (out, in) as factors of its smaller side, the identity being one of them."""
    eye = torch.eye(min(delta.shape), dtype=delta.dtype, device=delta.device)
    return Factors(delta, eye) if delta.shape[1] <= delta.shape[0] else Factors(eye, delta)


class CayleyChange(torch.autograd.Function):
    """D = 2Q(I − Q)⁻¹ = 2(P − I) with P = (I − Q)⁻¹, for skew-symmetric Q (…, r, r).

    dP = P dQ P and P = I + D/2, so the backward pass takes two products and no second system. Nothing is checked: the
    eigenvalues of I − Q are 1 + iω, never 0, and a check would wait for the device.
    """

    @staticmethod
    def forward(ctx: Any, Q: Tensor) -> Tensor:
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        D: Tensor = torch.linalg.solve_ex(eye - Q, 2 * Q, left=False, check_errors=False)[0]
        ctx.save_for_backward(D)
        return D

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (D,) = ctx.saved_tensors
        P = torch.eye(D.shape[-1], dtype=D.dtype, device=D.device) + D / 2
        return 2 * (P.mT @ grads[0] @ P.mT)


def cayley_change(A: Tensor) -> Tensor:
    """D = R − I of the Cayley rotation R = (I + Q)(I − Q)⁻¹ with Q = (A − Aᵀ)/2; A and D (…, r, r).

    D = 2Q(I − Q)⁻¹ has no cancellation and is exactly 0 at A = 0. Always at least float32, whatever autocast says:
    below it R is orthogonal to a few parts in a thousand only.
    """
    with torch.autocast(A.device.type, enabled=False):
        A = A if A.dtype == torch.float64 else A.float()
        return cast(Tensor, CayleyChange.apply((A - A.mT) / 2))


def compose_changes(first: Tensor, then: Tensor) -> Tensor:
    """D of R₁R₂ from D₁ and D₂, without cancellation, and in full precision whatever autocast says."""
    with torch.autocast(first.device.type, enabled=False):
        return first + then + first @ then


def orthogonal_basis(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (size, size) in float64."""
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def balance(factors: Factors) -> Factors:
    """The same ΔW with every column of up as long as its row of down, so that half precision loses least."""
    up, down = factors.up.norm(dim=0), factors.down.norm(dim=1)
    both = (up > 0) & (down > 0)
    ratio = torch.where(both, (down / up.where(both, torch.ones_like(up))).sqrt(), torch.ones_like(up))
    return Factors(factors.up * ratio, factors.down / ratio[:, None])


def truncate(factors: Factors, rank: int) -> Factors:
    """The best approximation of ΔW of a lower rank, without forming it."""
    left, core_left = torch.linalg.qr(factors.up)
    right, core_right = torch.linalg.qr(factors.down.mT)
    U, S, Vh = torch.linalg.svd(core_left @ core_right.mT)
    keep = min(rank, len(S))
    root = S[:keep].sqrt()
    return Factors(left @ U[:, :keep] * root, root[:, None] * Vh[:keep] @ right.mT)


def flatten(weight: Tensor) -> Tensor:
    """A convolution kernel (out, in, kh, kw) as a matrix (out, in·kh·kw); a matrix unchanged."""
    return weight.reshape(weight.shape[0], -1)


def to_float64(tensor: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none, as Apple's."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Rows and columns (out, in·kh·kw) of a weight as a matrix."""
    rows, columns = flatten(weight).shape
    return rows, columns


def kernel_size(weight: Tensor) -> tuple[int, int, int] | None:
    """(in, kh, kw) of a convolution's weight; None of a matrix."""
    return (weight.shape[1], weight.shape[2], weight.shape[3]) if weight.dim() == 4 else None


def gram_of(weight: Tensor) -> Tensor:
    """The float64 Gram matrix of a weight's smaller side."""
    matrix = to_float64(flatten(weight))
    return matrix.mT @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mT


def top_band(weight: Tensor, count: int, gram: Tensor | None = None) -> SingularTriplets:
    """The ``count`` top singular triplets of a weight, in float64, with canonical signs.

    A float64 Gram matrix of the smaller side (``gram`` if it is known already; it is overwritten) and LAPACK's subset
    eigensolver, or on a GPU one in float32 that is corrected to float64: exact to float64 for columns well above the
    rounding floor of the Gram matrix, at a fraction of a full SVD's time. Weights too ill-conditioned for that
    (S_k < 1e-5 S_0) take the full float64 SVD.

    Raises:
        ValueError: ``count`` is not between 1 and the smaller side.
    """
    matrix = to_float64(flatten(weight))
    small = min(matrix.shape)
    if not 1 <= count <= small:
        raise ValueError(f"count must be between 1 and {small}, not {count}")
    tall = matrix.shape[0] >= matrix.shape[1]
    values, vectors = _top_eigenvectors(gram_of(weight) if gram is None else gram, count)
    S = values.clamp_min(0).sqrt()
    if S[-1] <= 1e-5 * S[0]:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return canonical_signs(SingularTriplets(U[:, :count], S[:count], Vh[:count].mT))
    other = (matrix @ vectors if tall else matrix.mT @ vectors) / S
    return canonical_signs(SingularTriplets(other, S, vectors) if tall else SingularTriplets(vectors, S, other))


def bottom_band(weight: Tensor, count: int) -> SingularTriplets:
    """The ``count`` smallest singular triplets, the smallest last, from a full float64 SVD: a Gram matrix has
    lost their digits.

    Raises:
        ValueError: ``count`` is not between 1 and the smaller side.
    """
    matrix = to_float64(flatten(weight))
    if not 1 <= count <= min(matrix.shape):
        raise ValueError(f"count must be between 1 and {min(matrix.shape)}, not {count}")
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return canonical_signs(SingularTriplets(U[:, -count:], S[-count:], Vh[-count:].mT))


def _top_eigenvectors(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest ``count`` eigenpairs of a symmetric matrix, largest first."""
    size = len(gram)
    if gram.device.type == "cpu" and count < size:
        from scipy.linalg import eigh

        values, vectors = eigh(
            gram.numpy(),
            subset_by_index=(size - count, size - 1),
            driver="evr",
            check_finite=False,
            overwrite_a=True,
        )
        return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)
    if size >= CORRECTED_FROM and (found := corrected_eigenvectors(gram, count)):
        return found
    eigenvalues, basis = torch.linalg.eigh(gram)
    return eigenvalues.flip(0)[:count], basis.flip(1)[:, :count]


def corrected_eigenvectors(gram: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The largest ``count`` eigenpairs of a symmetric float64 matrix, largest first, by way of float32.

    GPUs decompose in float32 many times faster. Every correction takes the float64 residuals R = G X − X Θ apart in the
    float32 basis of what is outside X, divides by the differences of the eigenvalues (one Newton step), and solves the
    small problem inside X anew; the error falls by some five digits each time. None where it does not fall, as
    inside a cluster of eigenvalues that is cut apart.
    """
    size = len(gram)
    if not torch.isfinite(trace := gram.trace()) or trace <= 0:
        return None
    values, basis = (part.flip(-1).double() for part in torch.linalg.eigh(gram.float()))
    width = min(size, count + BESIDE)
    X, outside, below = basis[:, :width], basis[:, width:], values[width:]
    for _ in range(CORRECTIONS):
        Q = torch.linalg.qr(X).Q
        image = gram @ Q
        inner, turn = torch.linalg.eigh(Q.mT @ image)
        inner, turn = inner.flip(0), turn.flip(1)
        X = Q @ turn
        residual = (image @ turn - X * inner)[:, :count]
        if float(residual.norm(dim=0).max() / inner[0].abs()) <= RESIDUAL * size**0.5:
            return inner[:count], X[:, :count]
        gaps = (inner[:count] - below[:, None]).clamp_min(1e-12 * inner[0].abs())
        X = torch.cat([X[:, :count] + outside @ ((outside.mT @ residual) / gaps), X[:, count:]], 1)
    return None


def canonical_signs(band: SingularTriplets) -> SingularTriplets:
    """Flip column pairs so that the largest |entry| of each column of U is positive."""
    peak = band.U.abs().argmax(0, keepdim=True)
    signs = torch.where(band.U.gather(0, peak) < 0, -1.0, 1.0).to(band.U.dtype)
    return SingularTriplets((band.U * signs).contiguous(), band.S.contiguous(), (band.V * signs).contiguous())


def min_abs_cosine(left: SingularTriplets, right: SingularTriplets) -> Tensor:
    """Per column, min(|cos(u, u')|, |cos(v, v')|): 1 where two bands hold the same directions. Found on the CPU."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.cpu().double(), b.cpu().double()
        return (a * b).sum(0).abs() / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-30)

    return torch.minimum(cosine(left.U, right.U), cosine(left.V, right.V))


def cosine_between(left: Factors, right: Factors) -> float:
    """⟨ΔW₁, ΔW₂⟩ / (|ΔW₁| |ΔW₂|) without forming either matrix; 0 where one of them is 0."""

    def inner(a: Factors, b: Factors) -> Tensor:
        return ((to_float64(a.up).mT @ to_float64(b.up)) * (to_float64(a.down) @ to_float64(b.down).mT)).sum()

    norm = (inner(left, left) * inner(right, right)).clamp_min(0).sqrt()
    return float(inner(left, right) / norm) if norm > 0 else 0.0


def row_space(factors: Factors) -> Tensor:
    """An orthonormal basis (in, k) of the inputs that ΔW reads, without forming it; rows of zeros add none."""
    if not len(factors.down):
        return to_float64(factors.down).mT
    Q, R = torch.linalg.qr(to_float64(factors.down).mT)
    left = torch.linalg.qr(to_float64(factors.up)).R
    _, S, Vh = torch.linalg.svd(left @ R.mT)
    kept = S.max() * max(factors.up.shape[0], factors.down.shape[1]) * torch.finfo(S.dtype).eps < S
    return Q @ Vh[: len(S)][kept].mT


def frobenius_norm(factors: Factors) -> float:
    """|ΔW| without forming the matrix."""
    up, down = to_float64(factors.up), to_float64(factors.down)
    return float(((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0).sqrt())
