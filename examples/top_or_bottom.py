"""Top, bottom or random columns, or LoRA? The paper's Appendix F.3 as a small honest experiment on a CPU.

The study is ``spectral_diffusion/studies/language.py``; this runs it alone, without the cache.

    python examples/top_or_bottom.py --plot docs/figures/top-or-bottom.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from spectral_diffusion.studies.language import language_picture, language_table, measure_language


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [measure_language(seed, arguments.pretraining, arguments.steps) for seed in range(arguments.seeds)]
    untuned = statistics.mean(one["untuned"] - one["floor"] for one in runs)
    rows = language_table(runs)
    methods = {row["method"]: {key: value for key, value in row.items() if key != "method"} for row in rows}
    print(json.dumps({"untuned_above_floor": round(untuned, 4), "methods": methods}, indent=1))
    if arguments.plot:
        image = language_picture(runs, arguments.steps)
        if image is None:
            raise SystemExit("The plot needs matplotlib: pip install 'spectral-diffusion[plots]'.")
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        image.save(arguments.plot)


if __name__ == "__main__":
    main()
