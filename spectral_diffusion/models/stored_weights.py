"""The weights of a network as its files hold them, read one tensor at a time: those of a quantized one are gone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.files import read_header
from .split_linear import SplitLinear

WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers names one file; several are listed in an index
INDEX = f"{WEIGHTS}.index.json"


class Place(NamedTuple):
    """Where a tensor is: its name in a file, and its rows if it is a part of a fused layer."""

    file: Path
    key: str
    rows: tuple[int, int] | None


class StoredWeights(Mapping[str, Tensor]):
    """The parameters of a network by ``component.module.path.weight``, in one precision, on one device.

    Nothing is kept: every access reads from the file, so that a whole network never is in memory.

    Args:
        folder: of the network, in a diffusers folder.
        component: the network's name in the pipeline.
        network: without values, on the meta device, with its fused layers split.

    Raises:
        UserError: a parameter is in no file of the folder.
    """

    def __init__(
        self, folder: Path, component: str, network: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.component, self.network, self.dtype, self.device = component, network, dtype, device
        files = keys_of(folder)
        fused: dict[str, tuple[str, tuple[int, int]]] = {}
        for path, module in network.named_modules():
            if isinstance(module, SplitLinear):
                start = 0
                for part, count in module.rows().items():
                    fused[f"{path}.{part}.weight"] = f"{path}.weight", (start, start + count)
                    start += count
        self.places: dict[str, Place] = {}
        for name, _ in network.named_parameters():
            key, rows = fused.get(name, (name, None))
            if key not in files:
                raise UserError(f"{folder} holds no weight '{key}', which its config asks for; download it again.")
            self.places[f"{component}.{name}"] = Place(files[key], key, rows)

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        with safe_open(place.file, framework="pt") as file:
            if place.rows:
                tensor = file.get_slice(place.key)[place.rows[0] : place.rows[1]]
            else:
                tensor = file.get_tensor(place.key)
        return tensor.to(self.device, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """The network without values, by component."""
        return {self.component: self.network}


class LayerWeights(Mapping[str, Tensor]):
    """Layers' weights by ``component.module.path``, each read anew when it is used."""

    def __init__(self, layers: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self.layers, self.read = list(layers), read

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self.layers:
            raise KeyError(layer)
        return self.read(layer)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def keys_of(folder: Path) -> dict[str, Path]:
    """The names of a network's tensors, and the files that they are in.

    Raises:
        UserError: the folder holds no safetensors weights under diffusers' names.
    """
    index, whole = folder / INDEX, folder / WEIGHTS
    if index.is_file():
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: folder / Path(name).name for key, name in listed.items()}
    if not whole.is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}, which the bands of a quantized base are computed from.")
    return dict.fromkeys(read_header(whole)[0], whole)
