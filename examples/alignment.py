"""The top singular vector finds the ideal neuron: the toy of the paper's section 3.2 (Fig. 3), with a plot.

The study is ``spectral_diffusion/studies/alignment.py``; this runs it alone, without the cache.

    python examples/alignment.py --plot docs/figures/alignment.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from spectral_diffusion.studies.alignment import alignment_picture, measure_alignment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures, shown = measure_alignment(arguments.seeds)
    print(json.dumps(figures))
    if arguments.plot:
        image = alignment_picture(shown)
        if image is None:
            raise SystemExit("The plot needs matplotlib: pip install 'spectral-diffusion[plots]'.")
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        image.save(arguments.plot)


if __name__ == "__main__":
    main()
