"""A pretended GPU: see ``gpu.py``."""

from .gpu import PretendedGPU, Refused

__all__ = ["PretendedGPU", "Refused"]
