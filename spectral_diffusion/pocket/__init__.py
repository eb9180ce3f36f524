"""The pocket bases: tiny, real models that ship with the package and run on a CPU."""

from __future__ import annotations

from pathlib import Path

VERSION = "pocket@2"  # frozen: other weights are another version, and its evidence is made anew
_HERE = Path(__file__).parent
BASES = {"pocket": _HERE / "weights"}  # a Stable Diffusion
if (_HERE / "transformer").is_dir():
    BASES["pocket-transformer"] = _HERE / "transformer"  # a FLUX.2 klein


def is_pocket(base: str) -> bool:
    """Whether a base's name is that of one that ships with the package, and no path."""
    return base in BASES


def path(base: str = "pocket") -> Path:
    """The diffusers folder of a pocket base, which the stock pipeline's ``from_pretrained(str(path()))`` opens."""
    return BASES[base]


def t2i(kind: str) -> Path:
    """The folder of the T2I-Adapter for sketches or keyposes."""
    return path() / f"t2i_{kind}"


def adapter(name: str) -> Path:
    """The adapter of a ready-made concept, trained on the pocket base with its preset."""
    return _HERE / "adapters" / f"{name}.safetensors"
