"""Control images that T2I-Adapters turn into feature maps, several of them with weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import MultiAdapter, T2IAdapter
from PIL import Image
from torch import Tensor

from .. import pocket
from ..config.scene import Box, ControlImage, Kind, Region
from ..core.assets import preset_of
from ..core.errors import Fix, UserError, only_a_pickle, reason
from ..core.files import check_not_disguised, is_folder
from ..data.image_io import MAX_PIXELS, open_on_black, open_upright
from ..merging.manifest import read_manifest
from ..models.base import Base
from ..models.families import FAMILIES
from ..models.loading import quiet_loading
from ..training.control_adapter import feature_shapes_of
from .controlnet import load_controlnet, weighing
from .extract import are_fractions, clean_strokes, read_keypoints
from .keypose import draw_keypose
from .region_mask import weight_map

OTHER_WIDTH = 1024  # of the words of Stable Diffusion 2.x


@dataclass
class ControlMap:
    """A condition whose file has been read, and its T2I-Adapter once it is loaded."""

    image: Image.Image
    kind: Kind = "sketch"
    weight: float = 1.0
    adapter: str | None = None
    name: str = ""
    network: Any = None  # a T2IAdapter, or a family's ControlNet
    grid: tuple[int, int] | None = None  # the picture in tokens, for a ControlNet

    def at(self, width: int, height: int) -> Image.Image:
        """The control image at a picture's size, with as many channels as its adapter reads."""
        image = self.image.resize((width, height), Image.Resampling.BILINEAR)
        channels = self.network.config["in_channels"] if isinstance(self.network, T2IAdapter) else 3
        return image.convert("L" if channels == 1 else "RGB")


def read_control_image(condition: ControlImage) -> ControlMap:
    """Read a condition's file: a sketch either way round, a keypose picture, or keypoints as JSON.

    Raises:
        UserError: it cannot be read.
    """
    path = condition.file
    if condition.kind == "sketch":
        image = read_sketch(path)
    elif path.suffix.lower() == ".json":
        image = keypose_image(*read_keypoints(path))
    else:
        image = open_on_black(path)
    return ControlMap(image, condition.kind, condition.conditioning_scale, condition.adapter, path.name)


def keypose_image(people: Sequence[np.ndarray], size: tuple[int, int] | None, side: int = 512) -> Image.Image:
    """Keypoints in OpenPose's style; without a canvas on one that fits them, or that they are fractions of."""
    if size is None:
        furthest, fractions = np.nanmax(np.concatenate(people), axis=0), are_fractions(people)
        size = (side, side) if fractions else (int(furthest[0]) + 1, int(furthest[1]) + 1)
        people = [person * side for person in people] if fractions else people
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS // 16:  # it is rendered four times as large
        raise UserError(
            f"These keypoints need a canvas of {size[0]}×{size[1]} pixels, which cannot be drawn; scale them."
        )
    return draw_keypose(people, *size)


def read_sketch(path: Path) -> Image.Image:
    """A sketch as L, white strokes on black, inverted if necessary.

    Raises:
        UserError: not a readable image.
    """
    return clean_strokes(open_upright(path))


def own_adapter(base: Base, kind: Kind) -> str:
    """The T2I-Adapter that belongs to a base: one inside its folder, the fused base's, or the official one."""
    name = base.name
    for _ in range(8):  # a fusion of a fusion of …
        if name == "pocket":
            return str(pocket.t2i(kind))
        if is_folder(inside := Path(name) / f"t2i_{kind}"):
            return str(inside)
        manifest = read_manifest(Path(name)) if is_folder(name) else None
        if manifest is None:
            break
        name = str(manifest["base"])
    return base.family.t2i_adapters[kind]


def t2i_name(base: Base, name: str | None, kind: Kind) -> str:
    """The folder or hub id of a T2I-Adapter: the named one (``pocket`` is the pocket base's), or the base's own."""
    return str(pocket.t2i(kind)) if name == "pocket" else name or own_adapter(base, kind)


def weights_of(base: Base, condition: ControlImage) -> list[Path]:
    """The files of the network that reads a control image; none of one that is known by a hub id alone."""
    if base.family.controls == "t2i":
        name = t2i_name(base, condition.adapter, condition.kind)
    else:
        name = condition.adapter or ""
    path = Path(name or ".no-such-folder")
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def load_t2i_adapter(base: Base, name: str | None, kind: Kind = "sketch") -> T2IAdapter:
    """The named T2I-Adapter (folder or hub id), or the one that belongs to the base; ``pocket`` is the pocket base's.

    Raises:
        UserError: it cannot be loaded.
    """
    width = base.pipeline.unet.config.cross_attention_dim
    if not name and width == OTHER_WIDTH and own_adapter(base, kind) == base.family.t2i_adapters[kind]:
        raise UserError(
            f"There is no {kind} adapter for Stable Diffusion 2.x on the hub; train one with train-control, and name "
            "it with the condition's adapter."
        )
    name = t2i_name(base, name, kind)
    for file in sorted(Path(name).glob("*.safetensors")):
        check_not_disguised(file)
    try:
        with quiet_loading():
            adapter = T2IAdapter.from_pretrained(name, torch_dtype=base.dtype, use_safetensors=True)
    except Exception as error:
        if pickled := only_a_pickle(name, error):
            raise UserError(f"The {kind} adapter {pickled}") from error
        raise UserError(
            f"Cannot load the {kind} adapter '{name}' ({reason(error)}); name one for this base with the condition's "
            "adapter."
        ) from error
    return adapter.to(base.device).eval()


def _check_features(base: Base, control: ControlMap, network: T2IAdapter) -> None:
    """Refuse a T2I-Adapter whose features are not of the sizes that the base's U-Net adds.

    Raises:
        UserError: they are not.
    """
    side = 16 * base.pipeline.vae_scale_factor * network.config["downscale_factor"]  # every level divides it
    with torch.no_grad():
        blank = torch.zeros(1, network.config["in_channels"], side, side, device=base.device, dtype=base.dtype)
        shapes = [tuple(feature.shape[1:3]) for feature in network(blank)]
    latents = side // base.pipeline.vae_scale_factor
    unet = base.pipeline.unet
    expected_shapes = [(channels, latents >> halvings) for channels, halvings in feature_shapes_of(unet)][
        : len(unet.down_blocks)
    ]
    # What is left over is added in the middle if it fits there, else nowhere.
    if any(size != expected for size, expected in zip(shapes, expected_shapes, strict=False)):
        name = t2i_name(base, control.adapter, control.kind)
        raise UserError(
            f"The {control.kind} adapter {name} is for another U-Net, which adds other features; name one for this "
            "base with the condition's adapter."
        )


def control_network(base: Base, controls: Sequence[ControlMap], size: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
    """The network that reads these control images, and the pipeline's options for it besides the images.

    Args:
        size: width and height of the pictures in pixels.

    Raises:
        UserError: the family has none; one cannot be loaded, or does not fit the base, the size or the others.
    """
    if base.family.controls == "t2i":
        adapter, weights = adapter_of(base, controls, size)
        return adapter, {"adapter_conditioning_scale": weights}
    if base.family.controls is None:
        titles = ", ".join(family.title for family in FAMILIES if family.controls)
        raise UserError(f"Sketches and keyposes work on {titles} only.", Fix("controls", so="left empty"))
    if base.family.controls == "reference":
        if (own := preset_of(base.name)) is not None:
            raise UserError(
                f"The base {own} has seen no control images and no reference pictures; the base pocket takes sketches.",
                Fix("controls", so="left empty"),
            )
        if any(control.weight != 1 or control.adapter for control in controls):
            raise UserError(
                f"{base.family.title} reads a control image as a reference picture, without a weight or an adapter.",
                Fix("controls", so="with conditioning_scale 1 and without an adapter"),
            )
        return None, {"image": [control.at(*size) for control in controls]}
    if len(controls) > 1:
        raise UserError(
            f"{base.family.title} takes one control image, and there are {len(controls)}.",
            Fix("controls", so="with one of them"),
        )
    [control] = controls
    control.network = control.network or load_controlnet(base, control.adapter)  # it may be of the coarse pictures
    token = base.denoiser.token_side
    control.grid = (size[1] // token, size[0] // token)
    return control.network, {"controlnet_conditioning_scale": control.weight}


def adapter_of(
    base: Base, controls: Sequence[ControlMap], size: tuple[int, int]
) -> tuple[T2IAdapter | MultiAdapter, Any]:
    """The network that reads these control images, and the weights that the pipeline takes.

    Raises:
        UserError: an adapter cannot be loaded, or does not fit the base, the picture's size or the others.
    """
    for control in controls:
        control.network = control.network or load_t2i_adapter(base, control.adapter, control.kind)
        _check_features(base, control, control.network)
        if any(side % control.network.config["downscale_factor"] for side in size):
            raise UserError(
                f"With this {control.kind} adapter the picture's sides must be divisible by "
                f"{control.network.config['downscale_factor']}; {size[0]}×{size[1]} are not."
            )
    networks = [control.network for control in controls]
    if len(controls) == 1:
        return networks[0], controls[0].weight
    try:
        return MultiAdapter(networks), [control.weight for control in controls]
    except ValueError as error:
        raise UserError(f"These conditions' adapters cannot be combined: {reason(error)}.") from error


@contextmanager
def weighed(controls: Sequence[ControlMap], regions: Sequence[Region], areas: Sequence[Box | Tensor]) -> Iterator[None]:
    """Multiply the control images' features by the regions' own weights, cell by cell (means where regions overlap)."""
    with ExitStack() as stack:
        for control in controls:
            weights = [region.weight_of(control.kind) for region in regions]
            if control.network is not None and any(weight != 1 for weight in weights):
                hook = weighing(weights, areas, control.grid) if control.grid else _weighing(weights, areas)
                stack.callback(control.network.register_forward_hook(hook).remove)
        yield


def _weighing(weights: Sequence[float], areas: Sequence[Box | Tensor]) -> Callable[..., list[Tensor]]:
    def weigh(module: Any, inputs: Any, features: list[Tensor]) -> list[Tensor]:
        return [feature * weight_map(weights, areas, *feature.shape[-2:]).to(feature) for feature in features]

    return weigh
