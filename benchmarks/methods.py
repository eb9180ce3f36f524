"""What every method costs on a Stable Diffusion 1.5 U-Net (random weights), as a table: the study ``cost`` by itself.

Attention projections at rank 8 (64 blocks for OFT): trained numbers, preparation, a step (forward, backward, AdamW at
256² pixels), what it keeps for backward, its file, and merging it into the weights.
"""

from __future__ import annotations

import argparse

from spectral_diffusion.core.hooks import Hooks
from spectral_diffusion.evaluation.tables import markdown
from spectral_diffusion.methods import all_methods
from spectral_diffusion.studies.cost import cost_rows, measure_methods, sd15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=sorted(all_methods()))
    arguments = parser.parse_args()
    print(markdown(cost_rows(measure_methods(sd15(), arguments.methods, arguments.rounds, Hooks(notify=print)))))


if __name__ == "__main__":
    main()
