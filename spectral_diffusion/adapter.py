"""An adapter: what training a concept gives, and the rule that says which base it may be put on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .base import Base, Fingerprint
from .errors import UserError
from .linalg import Band, Factors, agreement, bottom_band, frobenius_norm, sides, top_band
from .methods import Method
from .slots import Slot

MIN_COSINE = 0.999


@dataclass
class Adapter:
    """One concept in one file.

    Attributes:
        parameters: ``component.layer.parameter`` to tensor.
        bands: layer to the columns it was trained on (empty for methods without a slot).
        vectors: the token's embedding rows by text encoder, (n, width) each.
        config: the resolved training settings; ``versions``: of the libraries that made it.
    """

    name: str
    noun: str
    token: str
    method: Method
    rank: int
    slot: Slot | None
    targets: str
    base: str
    fingerprint: Fingerprint
    parameters: dict[str, Tensor]
    bands: dict[str, Band]
    vectors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The adapted layers in a fixed order."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.parameters))

    def parameters_of(self, layer: str) -> dict[str, Tensor]:
        """The trained parameters of one layer under the method's names."""
        names = self.method.shapes(1, 1, 1)
        return {name: self.parameters[f"{layer}.{name}"] for name in names}

    def factors(self, layer: str) -> Factors:
        """The layer's ΔW."""
        return self.method.factors(self.parameters_of(layer), self.bands.get(layer))

    def norm(self) -> float:
        """|ΔW| over all layers."""
        return math.sqrt(sum(frobenius_norm(self.factors(layer)) ** 2 for layer in self.layers))

    def count(self) -> int:
        """Trained numbers, token vectors not counted."""
        return sum(t.numel() for t in self.parameters.values())


def check_base(adapter: Adapter, base: Base, allow: bool = False) -> str | None:
    """The loading rule. Returns a warning to show, or None.

    Same weights, or the same up to half precision: load. Otherwise the adapter's band is compared with
    the base's own singular vectors: all |cos| ≥ 0.999 is a related base, which needs ``allow``; anything
    else is refused.

    Raises:
        UserError: the adapter does not belong on this base.
    """
    here = base.fingerprint
    if adapter.fingerprint.same(here) or adapter.fingerprint.same_rounded(here):
        return None
    wanted = f"it was trained on '{adapter.base}' (fingerprint {adapter.fingerprint.exact[:12]})"
    refusal = f"Adapter '{adapter.name}' does not fit the base '{base.name}': {wanted}; use --base {adapter.base}."
    weights = base.weights(adapter.targets)
    for layer in adapter.layers:
        if layer not in weights:
            raise UserError(refusal)
        factors = adapter.factors(layer)
        if (factors.up.shape[0], factors.down.shape[1]) != sides(weights[layer]):
            raise UserError(refusal)
    if not adapter.bands:
        if allow:
            return f"'{adapter.name}' was made for another base; loaded because of --allow-base."
        raise UserError(f"{refusal} A file of the same shapes can be forced with --allow-base.")
    assert adapter.slot is not None
    for layer, band in adapter.bands.items():
        slot = adapter.slot
        ends = bottom_band(weights[layer], slot.bottom) if slot.bottom else top_band(weights[layer], slot.top)
        found = ends.pick(slot.columns)
        if float(agreement(band, found).min()) < MIN_COSINE:
            raise UserError(refusal)
    if not allow:
        raise UserError(
            f"Adapter '{adapter.name}' fits the base '{base.name}' only approximately: {wanted}; "
            "if this is a close relative of it, say --allow-base."
        )
    return f"'{adapter.name}' was trained on a close relative of this base; loaded because of --allow-base."


def check_finite(adapter: Adapter) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: some are there.
    """
    for name, tensor in {**adapter.parameters, **adapter.vectors}.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"Adapter '{adapter.name}' holds NaN or infinity in {name}; train it again.")
