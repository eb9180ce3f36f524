"""An adapter: the result of training a concept, and the rule that says which bases it may be loaded on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config.train import is_style_noun
from ..core.errors import Fix, UserError
from ..linalg import Factors, SingularTriplets, bottom_band, frobenius_norm, min_abs_cosine, top_band
from ..methods import Method
from ..models.base import Base
from ..models.fingerprint import Fingerprint
from ..models.prompt_encoder import trigger_words
from ..slots.ledger import Slot
from .frozen import Frozen, with_weight

MIN_COSINE = 0.999
MAX_SHIFT = 5e-3  # of singular values, relative to the largest: more than any rounding to half precision does


@dataclass(eq=False)  # so that it can be a key
class Adapter:
    """One concept in one file.

    Attributes:
        parameters: ``component.layer.parameter`` to tensor.
        sizes: layer to the (out, in) of its weight as a matrix.
        frozen: layer to the stored tensors that the parameters are built on, such as the band's U, S, V.
        vectors: the token's embedding rows by text encoder, (n, width) each.
        per_layer_vectors: by text encoder the rows of every cross-attention layer, (layers, n, width) each, where
            they differ; ``vectors`` are then their mean, for all that holds one vector only.
        kernels: convolution to its kernel (in, kh, kw), into which a row of the matrix folds.
        fused: layer that holds several projections, to the names and rows of its parts (see :mod:`.split_linear`).
        family: the class of the base's pipeline.
        earlier: tokens and vectors of the concepts that this one was trained on top of, or jointly with.
        config: the resolved training settings; ``provenance``: libraries, processor and threads that made it.
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
    sizes: dict[str, tuple[int, int]]
    frozen: Frozen
    vectors: dict[str, Tensor]
    per_layer_vectors: dict[str, Tensor] = field(default_factory=dict)
    earlier: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    kernels: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    fused: dict[str, dict[str, int]] = field(default_factory=dict)
    family: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The adapted layers in a fixed order."""
        return list(self.sizes)

    @property
    def bands(self) -> dict[str, SingularTriplets]:
        """Layer to the columns it was trained on; empty for methods without them."""
        if self.method.builds_on != "columns":
            return {}
        return {
            layer: SingularTriplets(tensors["U"], tensors["S"], tensors["V"]) for layer, tensors in self.frozen.items()
        }

    @property
    def tokens(self) -> dict[str, dict[str, Tensor]]:
        """Every token it brings, with its vectors; none if it was imported without one."""
        return {**self.earlier, self.token: self.vectors} if self.token else dict(self.earlier)

    @property
    def trigger(self) -> str:
        """The words that stand for the concept in a prompt, on a base that learns no words; else empty."""
        return trigger_words(self) if self.token and not self.vectors else ""

    @property
    def is_style(self) -> bool:
        """Whether it is of a style, which has no place in a picture: its class noun says so."""
        return is_style_noun(self.noun)

    @property
    def styles(self) -> list[str]:
        """Its token where that is a style's."""
        return [self.token] if self.is_style and self.token else []

    @property
    def needs_base(self) -> bool:
        """Whether its ΔW can only be computed with the base's weights."""
        return self.method.builds_on in {"weight", "full_svd"}

    def parameters_of(self, layer: str) -> dict[str, Tensor]:
        """The trained parameters of one layer under the method's names."""
        names = self.method.shapes(*self.sizes[layer], self.rank)
        return {name: self.parameters[f"{layer}.{name}"] for name in names}

    def frozen_of(self, layer: str, weight: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors that one layer's parameters are built on; ``weight`` is the base's, for methods that need it.

        Raises:
            UserError: the weight is needed and missing, or it is another base's.
        """
        stored = self.frozen.get(layer, {})
        if self.method.builds_on == "random":
            assert self.method.init_frozen is not None
            return {**self.method.init_frozen(*self.sizes[layer], self.rank, self.slot), **stored}
        if not self.needs_base:
            return dict(stored)
        if weight is None:
            raise UserError(
                f"'{self.name}' is a {self.method.name} adapter: its ΔW can only be computed with its base loaded."
            )
        weight = weight.detach().cpu()  # where the parameters are
        if self.method.builds_on == "weight":
            return with_weight(self.method, stored, weight)
        band = top_band(weight, min(self.sizes[layer]))
        if float((band.S - stored["S"].to(band.S)).abs().max()) > MAX_SHIFT * float(band.S[0]):
            raise UserError(f"Adapter '{self.name}' does not fit this base: the singular values of {layer} differ.")
        return {name: value.float() for name, value in band._asdict().items()}

    def factors(self, layer: str, weight: Tensor | None = None) -> Factors:
        """The layer's ΔW.

        Raises:
            UserError: see :meth:`frozen_of`.
        """
        return self.method.delta(self.parameters_of(layer), self.frozen_of(layer, weight))

    def norm(self) -> float | None:
        """|ΔW| over all layers; None where the base is needed to compute it."""
        if self.needs_base:
            return None
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
    if adapter.fingerprint.same(here):
        return None
    if adapter.fingerprint.same_rounded(here):
        if adapter.method.builds_on != "full_svd":
            return None
        return (
            f"'{adapter.name}' is an {adapter.method.name} adapter of the same base in another precision: its singular "
            "vectors are found anew and near ones mix, so expect a few percent of difference; load the base as it was."
        )
    origin = f"it was trained on '{adapter.base}' (fingerprint {adapter.fingerprint.exact[:12]})"
    refusal = f"Adapter '{adapter.name}' does not fit the base '{base.name}': {origin}."
    own = Fix("base", adapter.base, "to load the base that it was trained on")
    weights, sizes = base.weights(adapter.targets), base.sizes(adapter.targets)
    for layer in adapter.layers:
        if layer not in sizes:
            raise UserError(refusal, own)
        if adapter.sizes[layer] != sizes[layer]:
            raise UserError(refusal, own)
    if not adapter.bands:
        if allow:
            return f"'{adapter.name}' was made for another base; loaded because allow_base is set."
        raise UserError(refusal, own, Fix("allow_base", "true", "to load it all the same, as its shapes fit"))
    assert adapter.slot is not None
    for layer, band in adapter.bands.items():
        slot = adapter.slot
        ends = bottom_band(weights[layer], slot.bottom) if slot.bottom else top_band(weights[layer], slot.top)
        expected = ends.select(slot.columns)
        if float(min_abs_cosine(band, expected).min()) < MIN_COSINE:
            raise UserError(refusal, own)
    if not allow:
        raise UserError(
            f"Adapter '{adapter.name}' fits the base '{base.name}' only approximately: {origin}.",
            own,
            Fix("allow_base", "true", "if this is a close relative of it"),
        )
    return f"'{adapter.name}' was trained on a close relative of this base; loaded because allow_base is set."


def check_finite(adapter: Adapter) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: a tensor has some.
    """
    named = {**adapter.parameters, **adapter.vectors}
    named |= {f"layerwise.{name}": tensor for name, tensor in adapter.per_layer_vectors.items()}
    for outer in (adapter.frozen, adapter.earlier):
        named |= {f"{key}.{name}": tensor for key, tensors in outer.items() for name, tensor in tensors.items()}
    for name, tensor in named.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"Adapter '{adapter.name}' holds NaN or infinity in {name}; train it again.")


def shared_columns(adapter: Adapter, other: Adapter) -> int:
    """How many columns (or rows) two adapters' slots have in common in a layer that both change, at most.

    Columns counted from the bottom are other ones in every size of layer.
    """
    a, b = adapter.slot, other.slot
    if not (a and b) or adapter.method.slot != other.method.slot:
        return 0
    where = {adapter.sizes[layer] for layer in adapter.sizes.keys() & other.sizes.keys()}
    counts = {inside if adapter.method.slot == "rows" else min(out, inside) for out, inside in where}
    return max((len(a.from_top(count) & b.from_top(count)) for count in counts), default=0)
