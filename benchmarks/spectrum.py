"""Time the spectrum of the Stable Diffusion 1.5 attention set against torch's full fp32 SVD.

Random weights with a decaying spectrum, 64 columns; eight matrices of every shape are computed as the layers of a
base are, against one full SVD in the same run with the same threads, weighted by how often the shape occurs (176).
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from spectral_diffusion.linalg import top_band
from spectral_diffusion.svd_cache import compute

SHAPES = {
    (768, 768): 48,
    (320, 320): 30,
    (640, 640): 30,
    (1280, 1280): 36,
    (320, 768): 10,
    (640, 768): 10,
    (1280, 768): 12,
}
COLUMNS = 64
TOGETHER = 8  # equal matrices computed one after the other, as the layers of a base are


def decaying(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """A random float32 matrix whose singular values fall like k^-0.7, as trained weights' roughly do."""
    small = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, small, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, small, generator=generator, dtype=torch.float64)).Q
    S = torch.arange(1, small + 1, dtype=torch.float64) ** -0.7 * rows**0.5
    return ((U * S) @ V.mT).float()


def degrees(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest angle between columns of two bases, through the sine so that small angles keep their digits."""
    signs = (found * exact).sum(0).sign()
    sine = (found / found.norm(dim=0) * signs - exact).norm(dim=0)
    return float(torch.rad2deg(sine.max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    generator = torch.Generator().manual_seed(0)
    ours = full = 0.0
    worst = worst32 = 0.0
    for (rows, columns), count in SHAPES.items():
        weight = decaying(rows, columns, generator)
        times: dict[str, list[float]] = {"ours": [], "full": []}
        for _ in range(rounds):
            start = time.perf_counter()
            bands = compute({str(index): weight for index in range(TOGETHER)}, COLUMNS).bands
            times["ours"].append((time.perf_counter() - start) / TOGETHER)
            start = time.perf_counter()
            U32 = torch.linalg.svd(weight, full_matrices=False).U
            times["full"].append(time.perf_counter() - start)
        assert len(bands) == TOGETHER
        band = top_band(weight, COLUMNS)
        U, _, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        worst = max(worst, degrees(band.U, U[:, :COLUMNS]), degrees(band.V, Vh[:COLUMNS].mT))
        worst32 = max(worst32, degrees(U32[:, :COLUMNS].double(), U[:, :COLUMNS]))
        a, b = (sorted(times[name])[rounds // 2] for name in ("ours", "full"))
        ours, full = ours + count * a, full + count * b
        print(f"{rows}x{columns} x{count}: {a * 1e3:.0f} ms against {b * 1e3:.0f} ms, ratio {a / b:.2f}")
    print(
        json.dumps(
            {
                "threads": torch.get_num_threads(),
                "seconds": round(ours, 2),
                "full_svd_seconds": round(full, 2),
                "ratio": round(ours / full, 3),
                "worst_degrees": worst,
                "fp32_svd_worst_degrees": worst32,
            }
        )
    )


if __name__ == "__main__":
    main()
