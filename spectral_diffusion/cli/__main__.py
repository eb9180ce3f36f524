"""``python -m spectral_diffusion.cli``."""

from . import main

main()
