"""The app for `python app.py`, `gradio app.py` and hosted Spaces."""

from pathlib import Path

from spectral_diffusion.ui.app import build, launch

demo = build(Path("workspace"))

if __name__ == "__main__":
    launch(demo, 7860)
