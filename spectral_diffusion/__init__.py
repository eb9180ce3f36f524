"""Several of your own things together in one picture, each still itself.

After *Spectral Adapter: Fine-Tuning in Spectral Space* (Zhang & Pilanci, 2024). The public API, which is loaded when a
name of it is first used::

    import spectral_diffusion as sd
    rex = sd.train(pipeline, "photos/rex", class_noun="dog", output="adapters/rex.safetensors")

The packages tell the story: ``data`` (photos) → ``training`` (an adapter in a slot) → ``merging`` → ``scenes``
(pictures).
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import pocket

if TYPE_CHECKING:
    from . import methods
    from .adapters.tuner import SpectralConfig
    from .api import (
        Adapter,
        Region,
        Scene,
        fuse,
        generate,
        identity,
        load_adapters,
        train,
        unload_adapters,
    )
    from .config.scene import ControlImage
    from .core.errors import Cancelled, UserError
    from .core.hooks import Event, Hooks
    from .merging import merges
    from .merging.merges.registry import register_merge
    from .methods.registry import register_method
    from .slots.ledger import Slot

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Cancelled",
    "ControlImage",
    "Event",
    "Hooks",
    "Region",
    "Scene",
    "Slot",
    "SpectralConfig",
    "UserError",
    "fuse",
    "generate",
    "identity",
    "load_adapters",
    "merges",
    "methods",
    "pocket",
    "register_merge",
    "register_method",
    "train",
    "unload_adapters",
]

# Where each name is defined. Nothing heavy is imported before it is used, so that `--help` stays quick.
_HOMES = {
    "SpectralConfig": "adapters.tuner",  # importing it adds its type to PEFT
    "Cancelled": "core.errors",
    "UserError": "core.errors",
    "Event": "core.hooks",
    "Hooks": "core.hooks",
    "ControlImage": "config.scene",
    "Slot": "slots.ledger",
    "register_merge": "merging.merges.registry",
    "register_method": "methods.registry",
}
_MODULES = {"merges": "merging.merges", "methods": "methods"}


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    if name in _MODULES:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    home = importlib.import_module(f".{_HOMES.get(name, 'api')}", __name__)
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
