"""Several of your own things together in one picture, each still itself.

After *Spectral Adapter: Fine-Tuning in Spectral Space* (Zhang & Pilanci, 2024). The folders tell the story:
``data`` (photos) → ``training`` (an adapter in a slot) → ``fusion`` → ``generation`` (pictures).
"""

from . import pocket

__version__ = "0.1.0"
__all__ = ["pocket"]
