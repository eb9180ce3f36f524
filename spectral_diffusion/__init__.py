"""Several of your own things together in one picture, each still itself.

After *Spectral Adapter: Fine-Tuning in Spectral Space* (Zhang & Pilanci, 2024). The folders tell the story:
``data`` (photos) → ``training`` (an adapter in a slot) → ``fusion`` → ``generation`` (pictures).
"""

from typing import TYPE_CHECKING, Any

from . import pocket

if TYPE_CHECKING:
    from .adapters.tuner import SpectralConfig

__version__ = "0.1.0"
__all__ = ["SpectralConfig", "pocket"]


def __getattr__(name: str) -> Any:
    """Load ``SpectralConfig`` when it is asked for; that adds its type to PEFT."""
    if name == "SpectralConfig":
        from .adapters.tuner import SpectralConfig

        return SpectralConfig
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
