"""Time gradient fusion in closed form against the L-BFGS of Mix-of-Show, from the same collected activations.

Both solve argmin over W of Σ |(W₀ + ΔW_i) X_i − W X_i|², ours in float64 with the Gram matrices' streaming counted,
theirs as its ``gradient_fusion.py`` does: float32, all rows at once, started at W₀, the best W seen. The weights are
square and random, the activations anisotropic; four concepts with four times as many rows as inputs each, or with so
few rows that all of them together are fewer than the inputs.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import RANK
from torch import Tensor

from spectral_diffusion.config.fuse import CalibrationConfig, FuseConfig
from spectral_diffusion.linalg import Factors
from spectral_diffusion.merging.activations import GramAccumulator
from spectral_diffusion.merging.merges import Contribution, get_merge
from spectral_diffusion.merging.merges.registry import MergeContext
from spectral_diffusion.methods import get_method

CONCEPTS = 4
STREAMED = 256  # rows that arrive together, as ``collect`` draws them
CHUNK = 5000  # rows of the reference's one matrix product
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: for a busy machine, with one thread
EACH, SUM = 10.0, 50.0  # how many times as fast we want to be


@dataclass(frozen=True)
class Case:
    """One weight, and what it sees of each concept."""

    weight: Tensor
    changes: list[Factors]
    rows: list[Tensor]


def make_case(width: int, rows: int, seed: int = 0) -> Case:
    """Changes of a tenth of the weight's size; what is seen decays as 1/j over a basis that the concepts share."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = noise(width, width) / width**0.5
    basis = torch.linalg.qr(noise(width, width)).Q
    decay = 1 / torch.arange(1, width + 1)
    size = 0.1 * (width / RANK) ** 0.5 / width
    changes = [Factors(size * noise(width, RANK), noise(RANK, width) / width**0.5) for _ in range(CONCEPTS)]
    seen = [((noise(1, width) + noise(rows, width)) * decay * (noise(width) / 2).exp()) @ basis for _ in changes]
    return Case(weight, changes, seen)


def closed_form(case: Case, config: FuseConfig) -> Tensor:
    """ΔW from the rows, streamed."""
    method, brought = get_method("lora"), []
    for index, (change, rows) in enumerate(zip(case.changes, case.rows, strict=True)):
        seen = GramAccumulator(rows.shape[1])
        for part in rows.split(STREAMED):
            seen.add(part)
        parameters = {"A": change.down, "B": change.up}
        brought.append(Contribution(f"c{index}", method, parameters, {}, None, 1.0, seen))
    merge = get_merge("gradient")
    found = merge.combine(brought, MergeContext(merge.settings(config.options), config.seed))
    assert isinstance(found, Factors)
    return found.delta()


def descend(weight: Tensor, rows: Tensor, wanted: Tensor, iterations: int, search: str | None) -> Tensor:
    """The reference's ``update_quasi_newton``, its options included; without a line search if ``search`` is None."""
    moved = weight.clone().requires_grad_(True)
    best, lowest = weight, float("inf")
    optimizer = torch.optim.LBFGS(
        [moved], lr=1, max_iter=iterations, history_size=25, line_search_fn=search, tolerance_grad=1e-16,
        tolerance_change=1e-16,
    )  # fmt: skip

    def closure() -> Tensor:
        nonlocal best, lowest
        optimizer.zero_grad()
        loss = torch.zeros(())
        for x, y in zip(rows.split(CHUNK), wanted.split(CHUNK), strict=True):
            loss = loss + F.mse_loss(F.linear(x, moved), y) * len(x) / len(rows)
        if loss.item() < lowest:
            best, lowest = moved.detach().clone(), loss.item()
        loss.backward()
        return loss

    optimizer.step(closure)
    return best


def objective(delta: Tensor, case: Case) -> float:
    """Σ |(ΔW − ΔW_i) X_i|² in float64."""
    total = 0.0
    for change, rows in zip(case.changes, case.rows, strict=True):
        off = delta.double() - change.up.double() @ change.down.double()
        total += sum(float((part.double() @ off.mT).square().sum()) for part in rows.split(CHUNK))
    return total


def measure(width: int, rows: int, rounds: int, iterations: int, search: str | None, clock: str) -> dict[str, Any]:
    """Median seconds of both over interleaved rounds, and what each reaches."""
    case = make_case(width, rows)
    config = FuseConfig(adapters=[Path("a")], output=Path("b"), calibration=CalibrationConfig(prior_weight=0.0))
    every = torch.cat(case.rows)
    pairs = zip(case.changes, case.rows, strict=True)
    wanted = torch.cat([F.linear(x, case.weight + change.delta()) for change, x in pairs])
    now, ours, theirs = CLOCKS[clock], [], []
    for _ in range(rounds):
        begun = now()
        found = closed_form(case, config)
        between = now()
        other = descend(case.weight, every, wanted, iterations, search)
        ours.append(between - begun)
        theirs.append(now() - between)
    start = objective(torch.zeros(()), case)
    reached, their = objective(found, case), objective(other.double() - case.weight.double(), case)
    return {
        "width": width,
        "rows": len(every),
        "seconds": round(median(ours), 4),
        "lbfgs_seconds": round(median(theirs), 3),
        "ratio": round(median(theirs) / median(ours), 1),
        "objective": reached,
        "lbfgs_objective": their,
        "start_objective": start,
        "as_low": reached <= max(their * (1 + 1e-6), 1e-10 * start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[320, 768, 1280])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--search", choices=["strong_wolfe", "none"], default="strong_wolfe")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    search = None if arguments.search == "none" else arguments.search
    measure(64, 16, 1, 2, search, arguments.clock)  # the first call of each routine loads it
    cases = []
    for width in arguments.widths:
        for rows in (4 * width, 77 // 2):
            cases.append(measure(width, rows, arguments.rounds, arguments.iterations, search, arguments.clock))
            print(json.dumps(cases[-1]), flush=True)
    ours, theirs = (sum(case[key] for case in cases) for key in ("seconds", "lbfgs_seconds"))
    summary = {
        "threads": torch.get_num_threads(),
        "search": arguments.search,
        "clock": arguments.clock,
        "seconds": round(ours, 3),
        "lbfgs_seconds": round(theirs, 2),
        "ratio": round(theirs / ours, 1),
        "smallest_ratio": min(case["ratio"] for case in cases),
        "met": theirs >= SUM * ours and all(case["ratio"] >= EACH and case["as_low"] for case in cases),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
