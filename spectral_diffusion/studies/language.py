"""Top, bottom or random columns, or LoRA? The paper's Appendix F.3 as a small experiment on a CPU.

A tiny Llama learns to continue sequences whose next word depends on the last two; then a third of those rules change
and it is fine-tuned on the new language, with the same number of trained values for each change. Each change has the
same learning rates to choose from, on sequences that are not reported; three seeds.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ..adapters.attach import AdapterSpec, inject_adapter
from ..adapters.frozen import frozen_tensors
from ..methods import get_method
from ..models.targets import find_targets
from ..slots.ledger import Slot
from .charts import WANTED, chart_image, plotting
from .registry import Findings, Row, Table, study
from .runner import Figures, StudyRunner, TimeOver

WORDS, LENGTH, BATCH, RANK = 24, 32, 48, 2
CHANGED = 0.35  # of the rules
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
CHANGES = ("top", "bottom", "random", "lora", "rotation")
TARGETS = r"re:model\..*\.(q|k|v|o|gate|up|down)_proj"


def language(seed: int, before: Tensor | None = None) -> Tensor:
    """Next-word probabilities (words, words, words) after two words; some rules of ``before`` replaced."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.softmax(2.5 * torch.randn(WORDS, WORDS, WORDS, generator=generator), -1)
    if before is None:
        return table
    new = torch.rand(WORDS, WORDS, 1, generator=generator) < CHANGED
    return torch.where(new, table, before)


def sequences(table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, LENGTH) words sampled from a language."""
    tokens = [torch.randint(WORDS, (count,), generator=generator) for _ in range(2)]
    while len(tokens) < LENGTH:
        chances = table[tokens[-2], tokens[-1]]
        tokens.append(torch.multinomial(chances, 1, generator=generator)[:, 0])
    return torch.stack(tokens, 1)


def entropy(table: Tensor, batch: Tensor) -> float:
    """The lowest loss that a model can reach, in nats per word."""
    chances = table[batch[:, :-2], batch[:, 1:-1]].gather(-1, batch[:, 2:, None])
    return float(-chances.log().mean())


def language_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy of every word after the second, in nats."""
    logits = model(input_ids=batch).logits[:, 1:-1]
    return F.cross_entropy(logits.reshape(-1, WORDS), batch[:, 2:].reshape(-1))


def train_language(
    model: nn.Module, table: Tensor, steps: int, rate: float, seed: int, held_out: Tensor
) -> list[float]:
    """Held-out loss after every tenth of the steps, under AdamW with a linear decay."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    curve = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        loss = language_loss(model, sequences(table, BATCH, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            with torch.no_grad():
                curve.append(float(language_loss(model, held_out)))
    return curve


def inject_change(model: nn.Module, change: str, seed: int) -> list[nn.Parameter]:
    """Inject a rank-2 change (rank 16 for a rotation) into a model; returns the trained parameters."""
    columns = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[:RANK].sort().values.tolist()
    slot = {
        "top": Slot.interval(0, RANK),
        "bottom": Slot.interval(-RANK, 0),
        "random": Slot(tuple(columns)),
        "rotation": Slot.interval(0, 16),
    }.get(change)
    method = get_method({"lora": "lora", "rotation": "spectral-rotation"}.get(change, "spectral-additive"))
    rank = slot.rank if slot else RANK
    models: dict[str, nn.Module] = {"model": model}
    weights = {layer: module.weight.detach() for layer, module in find_targets(models, TARGETS).items()}
    frozen = frozen_tensors(method, weights, rank, slot, cached=False)
    injected = inject_adapter(models, AdapterSpec(method, rank, TARGETS, seed), frozen=frozen)
    return [parameter for _, parameter in injected.named_parameters()]


def measure_language(seed: int, pretraining: int, steps: int, rates: Sequence[float] = RATES) -> Figures:
    """One seed: the floor, the loss before fine-tuning, and every change's best curve."""
    torch.manual_seed(seed)
    old = language(seed)
    new = language(1000 + seed, old)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH)
    )  # fmt: skip
    test, choose = (sequences(new, 512, torch.Generator().manual_seed(s)) for s in (7_000 + seed, 8_000 + seed))
    before = train_language(model, old, pretraining, 3e-3, seed, sequences(old, 512, torch.Generator().manual_seed(9)))[
        -1
    ]
    out: Figures = {
        "floor": entropy(new, test),
        "pretrained": before,
        "untuned": float(language_loss(model, test).detach()),
        "methods": {},
    }
    for change in CHANGES:
        tried = []
        for rate in rates:
            tuned = copy.deepcopy(model).requires_grad_(False)
            trained = sum(parameter.numel() for parameter in inject_change(tuned, change, seed))
            curve = train_language(tuned, new, steps, rate, 100 + seed, test)
            with torch.no_grad():
                end = float(language_loss(tuned, choose))
            tried.append((end if math.isfinite(end) else math.inf, rate, curve, trained))
        best = min(tried)
        out["methods"][change] = {"rate": best[1], "curve": best[2], "trained": best[3]}
    return out


def language_table(runs: Sequence[Figures]) -> list[Row]:
    """One row per change: the loss above the floor, mean and each seed."""
    rows: list[Row] = []
    for change in CHANGES:
        ends = [run["methods"][change]["curve"][-1] - run["floor"] for run in runs]
        rows.append(
            {
                "method": change,
                "trained": runs[0]["methods"][change]["trained"],
                "above the floor": statistics.mean(ends),
                "each seed": ", ".join(f"{end:.3f}" for end in ends),
                "rates chosen": ", ".join(f"{run['methods'][change]['rate']:g}" for run in runs),
            }
        )
    return rows


def language_picture(runs: Sequence[Mapping[str, Any]], steps: int) -> Image.Image | None:
    """Every change's loss above the floor: the mean over seeds, and the seeds. None without matplotlib."""
    pyplot = plotting()
    if pyplot is None:
        return None
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for index, change in enumerate(CHANGES):
        curves = torch.tensor([[v - run["floor"] for v in run["methods"][change]["curve"]] for run in runs])
        at = torch.arange(1, curves.shape[1] + 1) * (steps // 10)
        axes.plot(at, curves.mean(0), color=f"C{index}", label=f"{change} ({runs[0]['methods'][change]['trained']:,})")
        for curve in curves:
            axes.plot(at, curve, color=f"C{index}", alpha=0.25, linewidth=0.8)
    axes.set(xlabel="step", ylabel="held-out loss above the language's entropy, nats", yscale="log")
    axes.legend(title="method (trained values)", fontsize=8)
    return chart_image(figure)


@study(
    "language",
    "Figs. 1, 9, Appendix F.3",
    "Tuning the top columns of a language model beats LoRA and bottom columns.",
    (20, 0.1),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Held-out loss above the language's entropy, for every change."""
    pretraining, steps, seeds, rates = (4, 4, (0,), RATES[:1]) if quick else (1000, 200, (0, 1, 2), RATES)
    runs: list[Figures] = []
    missing: list[str] = []
    for seed in seeds:
        key = {"seed": seed, "pretraining": pretraining, "steps": steps, "rates": rates}
        try:
            runs.append(lab.cell("language-model", key, partial(measure_language, seed, pretraining, steps, rates)))
        except TimeOver:
            missing.append(f"seed {seed}")
    if not runs:
        return Findings([], "Nothing was measured yet.", missing=missing)
    rows = language_table(runs)
    image = language_picture(runs, steps)
    if image is None:
        missing.append(WANTED)
    untuned = statistics.mean(measured["untuned"] - measured["floor"] for measured in runs)
    title = f"Held-out loss above the language's entropy, nats per word; untuned {untuned:.3f}"
    return Findings([Table(title, rows)], verdict(rows), {"curves": image} if image else {}, missing)


def verdict(rows: Sequence[Row]) -> str:
    """The changes, best first."""
    order = sorted(rows, key=lambda row: float(row["above the floor"]))
    return (
        "Nats above the floor, best first: "
        + ", ".join(f"{r['method']} {r['above the floor']:.3f}" for r in order)
        + "."
    )
