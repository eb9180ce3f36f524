"""How much of itself does each of K concepts keep when a merge alone makes the one model, without distillation?

Settings are chosen on the studies' tuning concepts (``--tuning``) and reported on the others, with the studies' own
training settings at their written learning rates. Adapters and figures are cached, so that several processes can train
different concepts of one work folder (``--train-only``).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from spectral_diffusion.studies.recipes import (
    OWN_PROMPTS,
    FusionVariant,
    alone,
    calibrated,
    train_changes,
    variant_cell,
)
from spectral_diffusion.studies.runner import TEST_CONCEPTS, TUNING_CONCEPTS, StudyRunner, study_settings

ERASED = {"interference": {"erasure_prob": 0.25}}
LONGER = {**ERASED, "steps": 320}  # as many photos under their own prompts as 240 steps without erasure show
CAREFUL = {"prior": {"loss_weight": 4.0}}


def contrast(repulsion: float, weight: float) -> dict[str, object]:
    """Settings of the contrastive merge."""
    return {**calibrated("contrastive", prior_weight=weight, **OWN_PROMPTS), "options": {"repulsion": repulsion}}


def variants_of(training: str) -> list[FusionVariant]:
    """The merges to try on adapters of one kind of training."""
    train = {"plain": {}, "erased": ERASED, "longer": LONGER, "careful": CAREFUL}[training]
    named: dict[str, dict[str, object]] = {"sum": {"merge": "spectral"}, "knots": {"merge": "knots"}}
    for weight in (1.0, 4.0, 16.0, 64.0, 256.0):
        named[f"gradient, μ = {weight:g}"] = calibrated(prior_weight=weight, **OWN_PROMPTS)
        named[f"ssr, μ = {weight:g}"] = calibrated("ssr", prior_weight=weight, **OWN_PROMPTS)
        named[f"contrastive .1, μ = {weight:g}"] = contrast(0.1, weight)
    named["contrastive .3, μ = 4"] = contrast(0.3, 4.0)
    more = {"num_images": 24}
    for weight in (4.0, 16.0, 64.0):
        named[f"gradient, 24 pictures, μ = {weight:g}"] = calibrated(prior_weight=weight, **more, **OWN_PROMPTS)
        named[f"ssr, 24 pictures, μ = {weight:g}"] = calibrated("ssr", prior_weight=weight, **more, **OWN_PROMPTS)
    named["gradient, 24 pictures, stage by stage, μ = 4"] = calibrated(
        prior_weight=4.0, calibrate_on="previous_stages", **more, **OWN_PROMPTS
    )
    return [FusionVariant(f"{training}: {name}", "", merge, train=train) for name, merge in named.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of cached adapters and figures")
    parser.add_argument("--training", choices=("plain", "erased", "longer", "careful"), default="plain")
    parser.add_argument("--tuning", action="store_true", help="the four tuning concepts instead of the eight others")
    parser.add_argument("--only", nargs="+", default=[""], help="only variants whose name contains one of these")
    parser.add_argument("--train-only", default="", help="only train: every second concept, from 0 or 1")
    arguments = parser.parse_args()
    lab = StudyRunner(folder=arguments.work, settings=study_settings(), note=print)
    names = TUNING_CONCEPTS if arguments.tuning else TEST_CONCEPTS
    variants = [v for v in variants_of(arguments.training) if any(part in v.kind for part in arguments.only)]
    changes = train_changes(lab, names, 0, quick=True)
    if arguments.train_only:
        for name, change in list(zip(names, changes, strict=True))[int(arguments.train_only) :: 2]:
            seconds = lab.trained(name, **{**change, **variants[0].train})[1]
            print(f"{name}: {seconds:.0f} s", flush=True)
        return
    whole = alone(lab, names, 0, quick=True)
    print("alone, plainly trained", {name: round(value, 3) for name, value in whole.items()}, flush=True)
    own = [float(lab.alone(n, **{**c, **variants[0].train})["identity"]) for n, c in zip(names, changes, strict=True)]
    print(f"alone as trained here: {sum(own) / sum(whole.values()):.3f} of that", flush=True)
    for variant in variants:
        begun = time.monotonic()
        cell = variant_cell(lab, variant, names, 0, quick=True)
        fused = sum(cell["concepts"][name]["identity"] for name in names)
        share = f"{fused / sum(whole.values()):.3f} of alone ({fused / sum(own):.3f} of its own)"
        text = sum(cell["concepts"][name]["text"] for name in names) / len(names)
        spent = time.monotonic() - begun
        print(
            f"{variant.kind}: {share}, drift {cell['drift']:.3f}, text {text:.2f} ({spent:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
