"""The top singular vector finds the ideal neuron: the toy experiment of the paper's section 3.2 (Fig. 3).

A two-layer ReLU network on 2-D points learns a target that one neuron can represent, y = relu(uᵀx). Few of its ten
neurons end on u exactly; the others are off or dead. How near do the neurons and the two singular vectors of the
hidden weight come to u? And when the target turns by 25°, which rank-1 change follows it best: of the top column, of
the bottom column, or LoRA, with the same number of trained values? Medians over many seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..linalg import SingularTriplets
from ..methods import get_method
from .charts import WANTED, chart_image, plotting
from .registry import Findings, Table, study
from .runner import Figures, StudyRunner

NEURONS, POINTS = 10, 200
TURN = math.radians(25)


def target(points: Tensor, angle: float) -> Tensor:
    """relu(uᵀx) of points (n, 2), u at ``angle``."""
    return (points @ torch.tensor([math.cos(angle), math.sin(angle)])).relu()


def alignment_loss(weight: Tensor, out: Tensor, points: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of Σ_j a_j relu(w_jᵀx); weight (2, m) holds a neuron per column."""
    return ((points @ weight).relu() @ out - wanted).square().mean()


def pretrain(points: Tensor, angle: float, generator: torch.Generator, steps: int = 600) -> tuple[Tensor, Tensor]:
    """Hidden weight (2, m) and output weights (m,), from random ones, with the weight decay of the paper's problem."""
    weight = (0.5 * torch.randn(2, NEURONS, generator=generator)).requires_grad_(True)
    out = (0.5 * torch.randn(NEURONS, generator=generator)).requires_grad_(True)
    optimizer = torch.optim.Adam([weight, out], lr=0.02)
    wanted = target(points, angle)
    for _ in range(steps):
        loss = alignment_loss(weight, out, points, wanted) + 1e-3 * (weight.square().sum() + out.square().sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach(), out.detach()


def finetune(
    weight: Tensor, out: Tensor, points: Tensor, angle: float, change: str, generator: torch.Generator, steps: int = 300
) -> list[float]:
    """The loss after every step of a rank-1 change of the hidden weight."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    column = {"top": 0, "bottom": 1}.get(change)
    method = get_method("lora" if column is None else "spectral-additive")
    frozen = {} if column is None else SingularTriplets(U, S, Vh.mT).columns(column, column + 1)._asdict()
    parameters = {name: torch.zeros(shape) for name, shape in method.shapes(2, NEURONS, 1).items()}
    if column is None:
        parameters["A"] = torch.randn(1, NEURONS, generator=generator) / NEURONS**0.5
    for value in parameters.values():
        value.requires_grad_(True)
    optimizer = torch.optim.Adam(list(parameters.values()), lr=0.01)
    wanted, losses = target(points, angle), []
    for _ in range(steps):
        loss = alignment_loss(weight + method.delta(parameters, frozen).delta(), out, points, wanted)
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


def measure_alignment(seeds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures, and the plot's data: the first seed's weight and the median curves."""
    neurons, top, bottom = [], [], []
    curves: dict[str, list[list[float]]] = {"top": [], "bottom": [], "lora": []}
    shown: dict[str, Any] = {}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(POINTS, 2, generator=generator)
        angle = float(torch.rand((), generator=generator)) * 2 * math.pi
        weight, out = pretrain(points, angle, generator)
        off, vectors = angles_to(weight, angle)
        neurons.append(float(off.median()))
        top.append(float(vectors[0]))
        bottom.append(float(vectors[1]))
        for change, losses in curves.items():
            losses.append(finetune(weight, out, points, angle + TURN, change, generator))
        if seed == 0:
            shown = {"weight": weight, "angle": angle}
    middle = {change: torch.tensor(losses).median(0).values for change, losses in curves.items()}
    figures = {
        "seeds": seeds,
        "degrees_off": {
            "median_neuron": round(float(torch.tensor(neurons).median()), 2),
            "top_singular_vector": round(float(torch.tensor(top).median()), 2),
            "bottom_singular_vector": round(float(torch.tensor(bottom).median()), 2),
        },
        "loss_after_turn": {change: round(float(losses[-1]), 5) for change, losses in middle.items()},
        "loss_after_30_steps": {change: round(float(losses[29]), 5) for change, losses in middle.items()},
    }
    return figures, {**shown, "curves": middle}


def alignment_picture(shown: Mapping[str, Any]) -> Image.Image | None:
    """Neurons and singular vectors of the first seed; the median losses. None without matplotlib."""
    pyplot = plotting()
    if pyplot is None:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    weight, angle = shown["weight"], shown["angle"]
    U = torch.linalg.svd(weight, full_matrices=False).U
    size = float(weight.norm(dim=0).max())
    for index in range(NEURONS):
        left.plot([0, weight[0, index]], [0, weight[1, index]], color="0.6", marker="o", markevery=[1],
                  label="neurons" if index == 0 else None)  # fmt: skip
    u = torch.tensor([math.cos(angle), math.sin(angle)])
    for vector, color, label in ((u, "black", "ideal neuron u"), (U[:, 0], "C3", "top singular vector"),
                                  (U[:, 1], "C0", "bottom singular vector")):  # fmt: skip
        vector = vector * size * (1 if label.startswith("ideal") else float((u @ vector).sign()))
        left.annotate("", vector.tolist(), (0, 0), arrowprops={"color": color, "arrowstyle": "->", "linewidth": 2})
        left.plot([], [], color=color, label=label)
    left.set(xlim=(-1.3 * size, 1.3 * size), ylim=(-1.3 * size, 1.3 * size), aspect="equal", title="after pretraining")
    left.legend(fontsize=8)
    for change, label in (("top", "spectral-additive, top column"), ("bottom", "spectral-additive, bottom column"),
                       ("lora", "LoRA, rank 1")):  # fmt: skip
        right.semilogy(shown["curves"][change], label=label)
    right.set(xlabel="step", ylabel="median loss", title="after the target turns by 25°")
    right.legend(fontsize=8)
    return chart_image(figure)


@study(
    "alignment",
    "Fig. 3, sec. 3.2",
    "The top singular vector points at the ideal neuron, and tuning the top column follows a new target best.",
    (1, 0.1),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Degrees off, and losses after the target turns; medians over seeds."""
    figures, shown = measure_alignment(3 if quick else 50)
    off, early, late = figures["degrees_off"], figures["loss_after_30_steps"], figures["loss_after_turn"]
    rows = [
        {
            "rank-1 change": change,
            "median loss after 30 steps": f"{early[change]:.4f}",
            "at the end": f"{late[change]:.5f}",
        }
        for change in early
    ]
    tables = [
        Table("Degrees from the ideal neuron, medians over seeds", [{"seeds": figures["seeds"], **off}]),
        Table("After the target turns by 25°", rows),
    ]
    image = alignment_picture(shown)
    return Findings(tables, verdict(figures), {"picture": image} if image else {}, [] if image else [WANTED])


def verdict(figures: Figures) -> str:
    """How far off each vector is, and which change follows soonest."""
    off, early = figures["degrees_off"], figures["loss_after_30_steps"]
    order = ", ".join(
        f"{change} {early[change]:.4f}" for change in sorted(early, key=lambda change: float(early[change]))
    )
    return (
        f"The top singular vector is {off['top_singular_vector']:.1f}° off, the median neuron "
        f"{off['median_neuron']:.0f}°, the bottom one {off['bottom_singular_vector']:.0f}°. Median loss 30 steps after "
        f"the turn: {order}."
    )
