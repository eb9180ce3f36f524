"""Top, bottom or random columns, or LoRA? The paper's Appendix F.3 as a small honest experiment on a CPU.

A tiny Llama learns to continue sequences whose next word depends on the last two; then a third of those rules change
and it is fine-tuned on the new language, with the same number of trained values each way. Every way has the same three
learning rates to choose from, on sequences that are not reported; three seeds.

    python examples/top_or_bottom.py --plot docs/figures/top-or-bottom.png
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_diffusion.methods.tuner import SpectralConfig

WORDS, LENGTH, BATCH, RANK = 24, 32, 48, 2
CHANGED = 0.35  # of the rules
RATES = (3e-3, 1e-2, 3e-2)
WAYS = ("top", "bottom", "random", "lora", "rotation")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def language(seed: int, before: Tensor | None = None) -> Tensor:
    """Next-word probabilities (words, words, words) after two words; some rules of ``before`` drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.softmax(2.5 * torch.randn(WORDS, WORDS, WORDS, generator=generator), -1)
    if before is None:
        return table
    new = torch.rand(WORDS, WORDS, 1, generator=generator) < CHANGED
    return torch.where(new, table, before)


def sequences(table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, LENGTH) words drawn from a language."""
    words = [torch.randint(WORDS, (count,), generator=generator) for _ in range(2)]
    while len(words) < LENGTH:
        chances = table[words[-2], words[-1]]
        words.append(torch.multinomial(chances, 1, generator=generator)[:, 0])
    return torch.stack(words, 1)


def entropy(table: Tensor, batch: Tensor) -> float:
    """What no model can do better than, in nats per word."""
    chances = table[batch[:, :-2], batch[:, 1:-1]].gather(-1, batch[:, 2:, None])
    return float(-chances.log().mean())


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch).logits[:, 1:-1]
    return F.cross_entropy(logits.reshape(-1, WORDS), batch[:, 2:].reshape(-1))


def train(model: nn.Module, table: Tensor, steps: int, rate: float, seed: int, held_out: Tensor) -> list[float]:
    """Held-out loss every tenth of the way, after AdamW with a linear decay."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    curve = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        loss = loss_of(model, sequences(table, BATCH, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            with torch.no_grad():
                curve.append(float(loss_of(model, held_out)))
    return curve


def settings(way: str, seed: int) -> PeftConfig:
    """A PEFT configuration; all but rotation train the same number of values."""
    if way == "lora":
        return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    if way == "rotation":
        return SpectralConfig(r=16, method="spectral-rotation", slot="0:16", target_modules=TARGETS)
    columns = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[:RANK].sort().values.tolist()
    slot = {"top": f"0:{RANK}", "bottom": f"-{RANK}:0", "random": ",".join(map(str, columns))}[way]
    return SpectralConfig(r=RANK, slot=slot, target_modules=TARGETS)


def run(seed: int, pretraining: int, steps: int) -> dict:
    """One seed: the loss to reach, before fine-tuning, and every way's best curve."""
    torch.manual_seed(seed)
    old = language(seed)
    new = language(1000 + seed, old)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH)
    )  # fmt: skip
    test, choose = (sequences(new, 512, torch.Generator().manual_seed(s)) for s in (7_000 + seed, 8_000 + seed))
    before = train(model, old, pretraining, 3e-3, seed, sequences(old, 512, torch.Generator().manual_seed(9)))[-1]
    out: dict = {"floor": entropy(new, test), "pretrained": before, "untuned": float(loss_of(model, test)), "ways": {}}
    for way in WAYS:
        tried = []
        for rate in RATES:
            torch.manual_seed(seed)
            tuned = get_peft_model(copy.deepcopy(model), settings(way, seed))
            trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
            curve = train(tuned, new, steps, rate, 100 + seed, test)
            with torch.no_grad():
                tried.append((float(loss_of(tuned, choose)), rate, curve, trained))
        best = min(tried)
        out["ways"][way] = {"rate": best[1], "curve": best[2], "trained": best[3]}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(seed, arguments.pretraining, arguments.steps) for seed in range(arguments.seeds)]
    table = {}
    for way in WAYS:
        ends = [one["ways"][way]["curve"][-1] - one["floor"] for one in runs]
        table[way] = {
            "trained": runs[0]["ways"][way]["trained"],
            "rates": [one["ways"][way]["rate"] for one in runs],
            "above_floor": round(statistics.mean(ends), 4),
            "each_seed": [round(end, 4) for end in ends],
        }
    untuned = statistics.mean(one["untuned"] - one["floor"] for one in runs)
    print(json.dumps({"untuned_above_floor": round(untuned, 4), "ways": table}, indent=1))
    if arguments.plot:
        plot(runs, arguments.steps, arguments.plot)


def plot(runs: list[dict], steps: int, path: Path) -> None:
    """Every way's loss above what is possible: the mean over seeds, and the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for index, way in enumerate(WAYS):
        curves = torch.tensor([[v - one["floor"] for v in one["ways"][way]["curve"]] for one in runs])
        at = torch.arange(1, curves.shape[1] + 1) * (steps // 10)
        axes.plot(at, curves.mean(0), color=f"C{index}", label=f"{way} ({runs[0]['ways'][way]['trained']:,})")
        for curve in curves:
            axes.plot(at, curve, color=f"C{index}", alpha=0.25, linewidth=0.8)
    axes.set(xlabel="step", ylabel="held-out loss above the language's entropy, nats", yscale="log")
    axes.legend(title="way (trained values)", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
