"""The app for `python app.py`, `gradio app.py` and hosted Spaces."""

import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from spectral_diffusion.app.server import build_app, launch

demo = build_app(Path("workspace"))

if __name__ == "__main__":
    launch(demo, 7860)
