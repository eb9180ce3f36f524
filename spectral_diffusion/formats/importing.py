"""LoRA files of other programs as adapters of this one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter
from ..base import Base, load_base
from ..errors import UserError
from ..files import check_writable
from ..linalg import kernel_of, sides
from ..machine import provenance
from ..methods import get_method
from ..methods.targets import find_targets
from ..tokens import check_name
from .lora import read_lora
from .native import is_native, load_adapter, save_adapter

EVERYTHING = "re:.*"  # foreign files adapt layers that no preset has, such as time_emb_proj


def import_lora(
    path: Path,
    output: Path | None,
    base_name: str,
    name: str | None = None,
    device: str = "auto",
    base: Base | None = None,
) -> Adapter:
    """A LoRA file of another program as an adapter of this one: method lora at the file's largest rank, no token.

    Raises:
        UserError: not such a file, or of another base; an output that cannot be written, or that would lose something.
    """
    if output:
        check_output(path, output)
    base = base or load_base(base_name, device)
    layers = find_targets(base.models, EVERYTHING)
    factors, _ = read_lora(path, layers)
    rank = max(len(one.down) for one in factors.values())
    parameters: dict[str, Tensor] = {}
    for layer, (up, down) in sorted(factors.items()):
        if (len(up), down.shape[1]) != sides(layers[layer].weight):
            raise UserError(f"{path} is a LoRA for another base: {layer} is of another size; use --base.")
        missing = rank - len(down)
        parameters[f"{layer}.A"] = torch.nn.functional.pad(down, (0, 0, 0, missing))
        parameters[f"{layer}.B"] = torch.nn.functional.pad(up, (0, missing))
    adapter = Adapter(
        name=check_name(name or Path(path).stem), noun="", token="", method=get_method("lora"), rank=rank, slot=None,
        targets=EVERYTHING, base=base.name, fingerprint=base.fingerprint, parameters=parameters,
        sizes={layer: sides(layers[layer].weight) for layer in sorted(factors)}, frozen={}, vectors={},
        kernels={layer: kernel for layer in sorted(factors) if (kernel := kernel_of(layers[layer].weight))},
        config={"imported": Path(path).name}, provenance=provenance(),
    )  # fmt: skip
    if output:
        save_adapter(adapter, output)
    return adapter


def check_output(path: Path, output: Path) -> None:
    """Refuse an output that is no adapter file, or that stands there and was not imported.

    Raises:
        UserError: it is.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"The output {output} must end in .safetensors.")
    if output.is_dir() or output.resolve() == Path(path).resolve():
        raise UserError(f"{output} is a folder, or what is imported; choose another output with -o.")
    if output.exists() and not (is_native(output) and "imported" in load_adapter(output).config):
        raise UserError(f"{output} was not imported, and would be lost; choose another output with -o.")
    check_writable(output)
