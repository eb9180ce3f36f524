"""The names that a family's original code gives to the layers of its network. ComfyUI and its LoRA files use them."""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "diffusion_model."  # of the original's names in LoRA files


@dataclass(frozen=True)
class OriginalNames:
    """How the original code of a family names the layers of its network, and how LoRA files with these names end.

    Attributes:
        table: a pattern of a layer's path in diffusers, its path in the original, and which third of that layer it is
            (``q``, ``k`` or ``v``), empty for all of it. The first pattern that matches counts.
        down: what the key of a LoRA's down factor ends with. diffusers' reader of the family must split fused layers
            under such keys, and ComfyUI must read them.
        up: the same for the up factor.
        diffusers_reads_kohya: whether diffusers reads these names in kohya's spelling.
        in_kohya: whether kohya's files of the family have these names too; else they have those of diffusers.
    """

    table: tuple[tuple[str, str, str], ...]
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    in_kohya: bool = True
    diffusers_reads_kohya: bool = True

    def find(self, path: str) -> tuple[str, str] | None:
        """The original's path of a layer, and the third of that layer that it is; None where it has no such name."""
        for pattern, name, part in self.table:
            if match := re.fullmatch(pattern, path):
                return match.expand(name), match.expand(part)
        return None
