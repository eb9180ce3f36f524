"""The top singular vector finds the ideal neuron: the toy of the paper's section 3.2 (Fig. 3), with a plot.

A two-layer ReLU network on 2-D points learns a target that one neuron could draw, y = relu(uᵀx). Few of its ten
neurons end on u exactly; the others are off or dead. How near do the neurons and the two singular vectors of the
hidden weight come to u? And when the target turns by 25°, which rank-1 change follows it best: of the top column, of
the bottom column, or LoRA, with the same number of trained values? Medians over many seeds, so that the answer may
be either.

    python examples/alignment.py --plot docs/figures/alignment.png
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from spectral_diffusion.linalg import Band
from spectral_diffusion.methods import get_method

NEURONS, POINTS = 10, 200
TURN = math.radians(25)


def target(points: Tensor, angle: float) -> Tensor:
    """relu(uᵀx) of points (n, 2), u at ``angle``."""
    return (points @ torch.tensor([math.cos(angle), math.sin(angle)])).relu()


def loss_of(weight: Tensor, out: Tensor, points: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of Σ_j a_j relu(w_jᵀx); weight (2, m) holds a neuron per column."""
    return ((points @ weight).relu() @ out - wanted).square().mean()


def pretrain(points: Tensor, angle: float, generator: torch.Generator, steps: int = 600) -> tuple[Tensor, Tensor]:
    """Hidden weight (2, m) and output weights (m,), from random ones, with the weight decay of the paper's problem."""
    weight = (0.5 * torch.randn(2, NEURONS, generator=generator)).requires_grad_(True)
    out = (0.5 * torch.randn(NEURONS, generator=generator)).requires_grad_(True)
    optimizer = torch.optim.Adam([weight, out], lr=0.02)
    wanted = target(points, angle)
    for _ in range(steps):
        loss = loss_of(weight, out, points, wanted) + 1e-3 * (weight.square().sum() + out.square().sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach(), out.detach()


def finetune(
    weight: Tensor, out: Tensor, points: Tensor, angle: float, way: str, generator: torch.Generator, steps: int = 300
) -> list[float]:
    """The loss after every step of a rank-1 change of the hidden weight."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    column = {"top": 0, "bottom": 1}.get(way)
    method = get_method("lora" if column is None else "spectral-additive")
    frozen = {} if column is None else Band(U, S, Vh.mT).columns(column, column + 1)._asdict()
    parameters = {name: torch.zeros(shape) for name, shape in method.shapes(2, NEURONS, 1).items()}
    if column is None:
        parameters["A"] = torch.randn(1, NEURONS, generator=generator) / NEURONS**0.5
    for value in parameters.values():
        value.requires_grad_(True)
    optimizer = torch.optim.Adam(list(parameters.values()), lr=0.01)
    wanted, losses = target(points, angle), []
    for _ in range(steps):
        loss = loss_of(weight + method.delta(parameters, frozen).delta(), out, points, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def angles_to(weight: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    """Degrees between u and every neuron (m,), and between the lines of u and the singular vectors (2,)."""
    u = torch.tensor([math.cos(angle), math.sin(angle)])
    U = torch.linalg.svd(weight, full_matrices=False).U
    neurons = torch.rad2deg(torch.acos((u @ weight / weight.norm(dim=0).clamp_min(1e-9)).clamp(-1, 1)))
    return neurons, torch.rad2deg(torch.acos((u @ U).abs().clamp(max=1)))


def run(seeds: int) -> tuple[dict, dict]:
    """The figures, and what the plot needs of the first seed and the medians."""
    neurons, top, bottom = [], [], []
    curves: dict[str, list[list[float]]] = {"top": [], "bottom": [], "lora": []}
    shown: dict = {}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(POINTS, 2, generator=generator)
        angle = float(torch.rand((), generator=generator)) * 2 * math.pi
        weight, out = pretrain(points, angle, generator)
        off, vectors = angles_to(weight, angle)
        neurons.append(float(off.median()))
        top.append(float(vectors[0]))
        bottom.append(float(vectors[1]))
        for way, found in curves.items():
            found.append(finetune(weight, out, points, angle + TURN, way, generator))
        if seed == 0:
            shown = {"weight": weight, "angle": angle}
    middle = {way: torch.tensor(found).median(0).values for way, found in curves.items()}
    figures = {
        "seeds": seeds,
        "degrees_off": {
            "median_neuron": round(float(torch.tensor(neurons).median()), 2),
            "top_singular_vector": round(float(torch.tensor(top).median()), 2),
            "bottom_singular_vector": round(float(torch.tensor(bottom).median()), 2),
        },
        "loss_after_turn": {way: round(float(found[-1]), 5) for way, found in middle.items()},
        "loss_after_30_steps": {way: round(float(found[29]), 5) for way, found in middle.items()},
    }
    return figures, {**shown, "curves": middle}


def plot(shown: dict, path: Path) -> None:
    """Neurons and singular vectors of the first seed; the median losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    weight, angle = shown["weight"], shown["angle"]
    U = torch.linalg.svd(weight, full_matrices=False).U
    size = float(weight.norm(dim=0).max())
    for index in range(NEURONS):
        left.plot([0, weight[0, index]], [0, weight[1, index]], color="0.6", marker="o", markevery=[1],
                  label="neurons" if index == 0 else None)  # fmt: skip
    u = torch.tensor([math.cos(angle), math.sin(angle)])
    for vector, colour, label in ((u, "black", "ideal neuron u"), (U[:, 0], "C3", "top singular vector"),
                                  (U[:, 1], "C0", "bottom singular vector")):  # fmt: skip
        vector = vector * size * (1 if label.startswith("ideal") else float((u @ vector).sign()))
        left.annotate("", vector.tolist(), (0, 0), arrowprops={"color": colour, "arrowstyle": "->", "linewidth": 2})
        left.plot([], [], color=colour, label=label)
    left.set(xlim=(-1.3 * size, 1.3 * size), ylim=(-1.3 * size, 1.3 * size), aspect="equal", title="after pretraining")
    left.legend(fontsize=8)
    for way, label in (("top", "spectral-additive, top column"), ("bottom", "spectral-additive, bottom column"),
                       ("lora", "LoRA, rank 1")):  # fmt: skip
        right.semilogy(shown["curves"][way], label=label)
    right.set(xlabel="step", ylabel="median loss", title="after the target turns by 25°")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures, shown = run(arguments.seeds)
    print(json.dumps(figures))
    if arguments.plot:
        plot(shown, arguments.plot)


if __name__ == "__main__":
    main()
