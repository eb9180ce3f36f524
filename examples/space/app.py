"""The demo of spectral-diffusion on a Hugging Face Space."""

from contextlib import suppress

with suppress(ImportError):
    import spaces  # noqa: F401  (ZeroGPU wants it before torch)

from spectral_diffusion.app.hosted import build_hosted, launch_hosted

demo = build_hosted()

if __name__ == "__main__":
    launch_hosted(demo)
