"""The pocket base: a tiny, real Stable Diffusion that ships with the package and runs on a CPU."""

from __future__ import annotations

from pathlib import Path

VERSION = "pocket@2"  # frozen: other weights are another version, and its evidence is made anew


def path() -> Path:
    """The diffusers folder that ``StableDiffusionPipeline.from_pretrained(str(path()))`` opens."""
    return Path(__file__).parent / "weights"


def t2i(kind: str) -> Path:
    """The folder of its T2I-Adapter for sketches or keyposes."""
    return path() / f"t2i_{kind}"


def adapter(name: str) -> Path:
    """The adapter of a ready-made concept, trained on the pocket base with its preset."""
    return Path(__file__).parent / "adapters" / f"{name}.safetensors"
