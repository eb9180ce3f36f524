"""The app for `python app.py` and `gradio app.py`; on a hosted Space its demo, where nothing is trained or kept."""

import os
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ON_A_SPACE = bool(os.environ.get("SPACE_ID"))
if ON_A_SPACE:
    with suppress(ImportError):
        import spaces  # noqa: F401  (ZeroGPU wants it before torch)

from spectral_diffusion.app.hosted import build_hosted, launch_hosted  # noqa: E402
from spectral_diffusion.app.server import build_app, launch  # noqa: E402

demo = build_hosted() if ON_A_SPACE else build_app(Path("workspace"))

if __name__ == "__main__":
    if ON_A_SPACE:
        launch_hosted(demo)
    else:
        launch(demo, 7860)
