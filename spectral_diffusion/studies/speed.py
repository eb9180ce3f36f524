"""How soon does each method reach the same identity? Every method with its own sweep of the learning rate."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..methods import get_method
from ..metrics.statistics import difference_text, mean_text
from ..training.run import train_to_file
from .registry import Findings, Row, Table, not_allowed, study
from .runner import RATES, SEEDS, TEST_CONCEPTS, Figures, NotMeasured, StudyRunner, best_rate, scaled, seeded

STEPS = (60, 120, 240)
NAMES = (TEST_CONCEPTS[0], TEST_CONCEPTS[2], TEST_CONCEPTS[6])
REFERENCE = "spectral-additive"  # the others are compared with it, pair by pair
METHODS: dict[str, dict[str, Any]] = {  # with their settings
    "spectral-additive": {"slot": "0:8"},
    "spectral-rotation": {"slot": "0:8"},
    "lora": {},
    "dora": {},
    "adalora": {},
    "orthogonal": {"slot": "0:8"},
    "oft": {"rank": 8},
    "svdiff": {},
    "lidb": {},
    "vera": {},
    "pissa": {"slot": "0:8"},
    "milora": {"slot": "bottom"},
    "lora-xs": {"slot": "0:8"},
    "qr-lora": {"slot": "0:8"},
    "psoft": {"slot": "0:8"},
    "svft": {},
}
# LoRA by the optimizers that PEFT has for it. They change no count, so the study of budgets leaves them out.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lora, LoRA+": {"method": "lora", "optimizer": {"loraplus_lr_ratio": 16.0}},
    "lora, Riemannian": {"method": "lora", "optimizer": {"riemannian_reg": 1e-2}},
}
PLAIN = {"prior": {"loss_weight": 0.0}}


def speed_change(label: str) -> dict[str, Any]:
    """The settings of a method or an optimizer, without prior preservation, which costs every method the same."""
    return {"method": label, **(METHODS | OPTIMIZERS)[label], **PLAIN}


def own_rate(label: str) -> float:
    """What the method's learning rates are multiplied by before any search."""
    return get_method(speed_change(label)["method"]).lr_scale


@study(
    "speed",
    "Figs. 7, 10",
    "The spectral adapters train as fast as LoRA and reach a concept's identity as soon or sooner.",
    (180, 0.2),
)
def run(lab: StudyRunner, quick: bool) -> Findings:
    """Identity over training steps, and the seconds until each method reaches a common identity."""
    methods = ("spectral-additive", "lora", "lora, LoRA+") if quick else (*METHODS, *OPTIMIZERS)
    steps, names, seeds = ((2, 4), NAMES[:1], (0,)) if quick else (STEPS, NAMES, SEEDS)
    rates: dict[str, float] = {}
    trained: dict[str, int] = {}
    gains: dict[str, dict[int, list[float]]] = {}  # by method and steps, over seeds and concepts
    sweeps: list[Row] = []
    late: dict[str, list[str]] = {}
    for seed, method in itertools.product(seeds, methods):
        new: dict[int, list[float]] = {}
        try:
            if method not in rates:
                rates[method], trials = (own_rate(method), []) if quick else swept(lab, method)
                sweeps += [{"method": method, "rate": t["rate"], "identity": t["identity"]} for t in trials]
            for length, name in itertools.product(steps, names):
                measured = lab.alone(
                    name, **seeded(speed_change(method), seed), **scaled(lab, rates[method]), steps=length
                )
                trained[method] = measured["trained"]
                new.setdefault(length, []).append(measured["identity"] - lab.noun_baseline(name, seed)["identity"])
        except NotMeasured:
            late.setdefault(f"seed {seed}", []).append(method)
            continue
        for length, values in new.items():
            gains.setdefault(method, {}).setdefault(length, []).extend(values)
        lab.note(
            f"{method}, seed {seed}: gains {', '.join(mean_text(v, names) for v in new.values())} at {steps} steps"
        )
    curves = {method: [sum(by[s]) / len(by[s]) for s in steps] for method, by in gains.items()}
    rows: list[Row] = [
        {
            "method": method,
            "trained": trained[method],
            "pairs": len(by[steps[0]]),
            **{f"gain at {s}": mean_text(by[s], names) for s in steps},
            f"minus {REFERENCE} at {steps[-1]}": gains_against(gains, method, steps[-1], names),
        }
        for method, by in gains.items()
    ]
    wanted = 0.6 * max((max(gain) for gain in curves.values()), default=0.0)
    cost = steps_seconds(lab, list(curves), (1, 3) if quick else (2, 22))
    missing = not_allowed(late, len(methods))
    missing += [f"the seconds of {method}" for method in curves if method not in cost]
    for row in rows:
        method = row["method"]
        need = crossing(steps, curves[method], wanted)
        pace = cost.get(method)
        row |= {  # type: ignore[operator]
            f"steps to {wanted:.2f}": None if need is None else round(need),
            "ms a step": round(1000 * pace[1]) if pace else None,
            f"seconds to {wanted:.2f}": round(pace[0] + need * pace[1], 1) if pace and need is not None else None,
        }
    tables = [Table("Gain in identity over the untouched base, by training steps, over concepts and seeds", rows)]
    if sweeps:
        tables.append(
            Table("The sweeps: identity of three concepts that are not reported, two seeds, 120 steps", sweeps)
        )
    return Findings(tables, verdict(rows, wanted), missing=missing)


def gains_against(
    gains: Mapping[str, Mapping[int, Sequence[float]]], method: str, steps: int, names: Sequence[str]
) -> str | None:
    """A method's gain minus the reference's, paired by concept and seed; None where their seeds differ."""
    own, reference = gains[method][steps], gains.get(REFERENCE, {}).get(steps, [])
    return difference_text(own, reference, names) if method != REFERENCE and len(own) == len(reference) else None


def swept(lab: StudyRunner, method: str) -> tuple[float, list[Figures]]:
    """The method's factor on the learning rates, chosen on concepts that are not reported."""
    rates = [own_rate(method) * factor for factor in RATES]
    return best_rate(lab, rates, **speed_change(method), steps=120)


def crossing(steps: Sequence[int], gains: Sequence[float], wanted: float) -> float | None:
    """The step count at which a piecewise linear curve from (0, 0) first reaches a gain; None if it never does."""
    x0, y0 = 0.0, 0.0
    for x1, y1 in zip(steps, gains, strict=True):
        if y1 >= wanted:
            return x0 + (x1 - x0) * (wanted - y0) / max(y1 - y0, 1e-9)
        x0, y0 = float(x1), y1
    return None


def steps_seconds(lab: StudyRunner, methods: Sequence[str], lengths: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """Per method the seconds before the first step and those of one step, from runs of these two lengths.

    Methods beyond the time limit are left out.
    """
    out: dict[str, tuple[float, float]] = {}
    for method in methods:

        def measure(method: str = method) -> dict[str, float]:
            times = {}
            base = lab.fresh()
            for steps in lengths:
                with tempfile.TemporaryDirectory() as folder:
                    change = {**speed_change(method), "steps": steps}
                    config = lab.train_config(TEST_CONCEPTS[0], change, Path(folder) / "a.safetensors")
                    begun = time.perf_counter()
                    train_to_file(config, base=base)
                    times[steps] = time.perf_counter() - begun
            short, long = lengths
            each = (times[long] - times[short]) / (long - short)
            return {"before": times[short] - short * each, "step": each}

        try:
            measured = lab.cell("step-seconds", {"method": method, "lengths": lengths}, measure, timed=True)
        except NotMeasured:
            continue
        out[method] = (measured["before"], measured["step"])
    return out


def verdict(rows: Sequence[Row], wanted: float) -> str:
    """Which methods reach the wanted gain, soonest first."""
    key = f"seconds to {wanted:.2f}"
    reached = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key])
    never = [row["method"] for row in rows if row[key] is None]
    who = ", ".join(f"{r['method']} ({r[key]:.0f} s)" for r in reached) or "none"
    text = f"A gain of {wanted:.2f} is reached by {who}"
    return text + (f"; not by {', '.join(never)} within {STEPS[-1]} steps." if never else ".")
