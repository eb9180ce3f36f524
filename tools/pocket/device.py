"""Draw planned scenes on the device: sprites composed by affine sampling, sketches, keyposes and maps of classes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import count, islice
from math import pi
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from spectral_diffusion.scenes.keypose import COLORS as POSE_COLOURS
from spectral_diffusion.scenes.keypose import LIMBS

from .batches import Batch
from .compute import Compute
from .plan import Layer, Plan, Planner
from .sprites import LIGHT, MARGIN, NOUNS, TINTS, Bank


@dataclass
class Scenes:
    """Drawn scenes. ``cover`` (n, layers, h, w) is how much each layer shows in each square of the latents."""

    images: Tensor  # (n, 3, H, W) in −1…1
    masks: Tensor  # (n, 1, H, W)
    sketches: Tensor  # (k, 1, H, W), of the plan's sketch_rows
    keyposes: Tensor  # (k, 3, H, W), of the plan's keypose_rows
    cover: list[tuple[Tensor, Tensor]]  # by layer: rows, (m, 1, H, W) what is seen of it


@dataclass
class DeviceRenderer:
    """Draws plans with the sprites of a bank."""

    bank: Bank
    compute: Compute

    def __call__(self, plan: Plan) -> Scenes:
        bank, put = self.bank, self._put
        height = bank.size
        width = 2 * height if plan.wide else height
        image = bank.backdrops[plan.wide][put(plan.backdrops)].float() / 255
        mirrored = put(plan.mirrored)[:, None, None, None]
        image = torch.where(mirrored, image.flip(-1), image)
        mask = image.new_zeros(plan.count, 1, height, width)
        sketch, poses = torch.zeros_like(mask), torch.zeros_like(image)
        cover: list[tuple[Tensor, Tensor]] = []
        for layer in plan.layers:
            rows = put(layer.rows)
            pixels = self.layer(layer, height, width)
            colour, alpha = pixels[:, :3], pixels[:, 3:]
            seen = mask.new_zeros(plan.count, 1, height, width).index_copy(0, rows, alpha)
            cover = [(r, a * (1 - seen[r])) for r, a in cover] + [(rows, alpha)]
            image = image.index_copy(0, rows, image[rows] * (1 - alpha) + colour)
            mask = torch.maximum(mask, seen)
            lines = torch.maximum(sketch[rows] * (1 - alpha), outline(colour, alpha))
            sketch = sketch.index_copy(0, rows, lines)
            poses = self.add_keyposes(poses, layer)
        strokes = thicken(sketch[put(plan.sketch_rows)], put(plan.strokes)) if plan.sketch_rows else sketch[:0]
        return Scenes(image * 2 - 1, mask, strokes, poses[put(plan.keypose_rows)], cover)

    def _put(self, values: list) -> Tensor:
        """A list of numbers on the device; rows are long."""
        tensor = torch.tensor(values) if values else torch.zeros(0, dtype=torch.long)
        return self.compute.move(tensor)

    def layer(self, layer: Layer, height: int, width: int) -> Tensor:
        """The things of one depth (m, 4, H, W), premultiplied."""
        x, y, side, angle, mirror = self._put(layer.places).unbind(1)
        size = self.bank.size
        textures = self.bank.textures[self._put(layer.sprites)].float() / 255
        down, across = grid(height, width, self.compute.device)
        dx, dy = across[None] - (x * height)[:, None, None], down[None] - (y * height)[:, None, None]
        turn = angle * (pi / 180)
        cos, sin = torch.cos(turn)[:, None, None], torch.sin(turn)[:, None, None]
        # From the picture's pixels to −1…1 in the texture's square; a turn to the left has y pointing up.
        pixels = (side * height)[:, None, None]
        factor = 2 * (size - 2 * MARGIN) / size / pixels
        u = (cos * dx - sin * dy) * factor * mirror[:, None, None]
        v = (sin * dx + cos * dy) * factor
        # The smaller copy whose pixels are nearest to the picture's.
        shrink = torch.log2((size - 2 * MARGIN) / (side * height)).round().clamp(0, 2)[:, None, None]
        scale = size / 2**shrink
        left = torch.where(shrink > 0, float(size), 0.0)
        top = torch.where(shrink > 1, size / 2, 0.0)
        inside = (u.abs() < 1) & (v.abs() < 1)
        tx = torch.where(inside, (left + (u + 1) / 2 * scale) / (1.5 * size) * 2 - 1, -3.0)
        ty = torch.where(inside, (top + (v + 1) / 2 * scale) / size * 2 - 1, -3.0)
        return F.grid_sample(textures, torch.stack([tx, ty], -1), align_corners=False)

    def add_keyposes(self, poses: Tensor, layer: Layer) -> Tensor:
        """The same pictures with the skeletons of a layer's puppets drawn over them."""
        first, height = self.bank.first_puppet, self.bank.size
        chosen = [i for i, sprite in enumerate(layer.sprites) if sprite >= first]
        if not chosen:
            return poses
        rows = self._put([layer.rows[i] for i in chosen])
        sprites = self._put([layer.sprites[i] - first for i in chosen])
        x, y, side, _, _ = self._put([layer.places[i] for i in chosen]).unbind(1)
        points = (torch.stack([x, y], 1)[:, None] + self.bank.keypoints[sprites] * side[:, None, None]) * height
        colour, alpha = skeletons(points, height, poses.shape[-1])
        return poses.index_copy(0, rows, poses[rows] * (1 - alpha) + colour)


def label_maps(plan: Plan, scenes: Scenes, shrink: int, compute: Compute) -> Tensor:
    """Which class and which colour shows most in each square of ``shrink`` pixels: (n, 2, h, w), the last is none."""
    most = 1 - F.avg_pool2d(scenes.masks, shrink)
    none = constant((len(NOUNS), len(TINTS)), compute.device)[None, :, None, None]
    labels = none.expand(plan.count, 2, *most.shape[2:])
    for layer, (rows, seen) in zip(plan.layers, scenes.cover, strict=True):
        share, before = F.avg_pool2d(seen, shrink), most[rows]
        mine = compute.move(torch.tensor([layer.nouns, layer.tints])).T[:, :, None, None]
        labels = labels.index_copy(0, rows, torch.where(share > before, mine, labels[rows]))
        most = most.index_copy(0, rows, torch.maximum(share, before))
    return labels


@cache
def grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pixels' centres: y and x (H, W)."""
    y, x = torch.arange(height, device=device) + 0.5, torch.arange(width, device=device) + 0.5
    return tuple(torch.meshgrid(y, x, indexing="ij"))  # type: ignore[return-value]


@cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """Numbers that are on the device once and for all."""
    return torch.tensor(values, device=device)


def outline(colour: Tensor, alpha: Tensor) -> Tensor:
    """Edges of drawn things in 0…1, as :func:`render.outline` has them; ``colour`` is premultiplied."""

    def gradient(plane: Tensor) -> Tensor:
        padded = F.pad(plane, (1, 1, 1, 1), mode="replicate")
        across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
        down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
        return (across**2 + down**2).sqrt()

    light = (colour * constant(LIGHT, colour.device)[:, None, None]).sum(1, keepdim=True)
    inner = (gradient(light + 0.5 * (1 - alpha)) * 1.6 - 0.25).clamp(0, 1) * (alpha > 0.9)
    return torch.maximum((gradient(alpha) * 1.2 - 0.2).clamp(0, 1), inner)


def thicken(sketches: Tensor, strokes: Tensor) -> Tensor:
    """Sketches as different people might draw them: thicker, softer, harder; see :class:`plan.Plan`."""
    thicker, softer, threshold = (strokes[:, i, None, None, None] for i in range(3))
    out = torch.where(thicker > 0, F.max_pool2d(sketches, 3, 1, 1), sketches)
    weights = torch.exp(-constant((1.0, 0.0, 1.0), out.device) / (2 * 0.6**2))
    kernel = torch.outer(weights, weights)
    soft = F.conv2d(F.pad(out, (1, 1, 1, 1), mode="replicate"), (kernel / kernel.sum())[None, None])
    out = torch.where(softer > 0, soft, out)
    return torch.where(threshold > 0, (out > threshold).to(out.dtype), out)


def skeletons(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """OpenPose drawings of people (m, 18, 2) in pixels: colour, premultiplied, and alpha, as draw_keypose has them."""
    device, thick = points.device, max(1.5, min(width, height) / 100)
    limbs = constant(LIMBS, device)
    starts = torch.cat([points[:, limbs[:, 0]], points], 1)[..., None, None]  # a joint is a limb without length
    ends = torch.cat([points[:, limbs[:, 1]], points], 1)[..., None, None]
    colours = constant(POSE_COLOURS, device) / 255
    palette = torch.cat([colours[: len(LIMBS)] * 0.6, colours])
    radius = constant((thick / 2,) * len(LIMBS) + (thick * 0.7,) * len(POSE_COLOURS), device)
    y, x = grid(height, width, device)
    ax, ay, bx, by = starts[:, :, 0], starts[:, :, 1], ends[:, :, 0], ends[:, :, 1]
    dx, dy = bx - ax, by - ay
    share = (((x - ax) * dx + (y - ay) * dy) / (dx**2 + dy**2).clamp_min(1e-6)).clamp(0, 1)
    distance = ((x - ax - share * dx) ** 2 + (y - ay - share * dy) ** 2).sqrt()
    alpha = (radius[:, None, None] + 0.5 - distance).clamp(0, 1)
    # Of each part, what the parts drawn after it leave to be seen.
    shown = torch.cat([(1 - alpha).flip(1).cumprod(1).flip(1)[:, 1:], torch.ones_like(alpha[:, :1])], 1)
    colour = torch.einsum("mphw,pc->mchw", alpha * shown, palette)
    return colour, 1 - (1 - alpha).prod(1, keepdim=True)


@dataclass
class Plans:
    """The plans of the steps in their order, made by processes some steps ahead, or without any when asked."""

    planner: Planner
    workers: int = 0
    reuse: int = 1  # see DeviceSource
    _ahead: Generator[tuple[int, Plan], None, None] | None = None

    def __call__(self, step: int) -> Plan:
        if not self.workers:
            return self.planner(step)
        if self._ahead is None:
            pool = ProcessPoolExecutor(self.workers, get_context("spawn"), begin_planning, (self.planner,))
            self._ahead = planned_ahead(pool, step, 3 * self.workers, self.reuse)
        at, plan = next(self._ahead)
        assert at == step, "steps are asked for in order"
        return plan

    def close(self) -> None:
        """End the processes."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


@dataclass
class DeviceSource:
    """The batches of the base's training, drawn and encoded on the device.

    Args:
        reuse: how often every batch is seen, 16 steps apart, each time with other noise and other timesteps. On a
            processor drawing and encoding take a quarter of a step and more.
    """

    renderer: DeviceRenderer
    vae: AutoencoderKL
    plans: Callable[[int], Plan]
    reuse: int = 1
    _held: dict[int, Batch] = field(default_factory=dict)

    def __call__(self, step: int) -> Batch:
        first = first_seen(step, self.reuse)
        if first not in self._held:
            self._held = {k: b for k, b in self._held.items() if k > first - 16 and self.reuse > 1}
            self._held[first] = self.batch(self.plans(first))
        return self._held[first]

    @torch.no_grad()
    def batch(self, plan: Plan) -> Batch:
        """Draw and encode a plan."""
        compute = self.renderer.compute
        scenes = self.renderer(plan)
        with compute.autocast():
            latents = self.vae.encode(scenes.images).latent_dist.mean.float()
        rows = [compute.move(torch.tensor(r, dtype=torch.long)) for r in (plan.sketch_rows, plan.keypose_rows)]
        shrink = scenes.masks.shape[-2] // latents.shape[-2]
        return Batch(
            latents,
            F.avg_pool2d(scenes.masks, shrink),
            compute.move(torch.from_numpy(plan.ids)),
            rows[0],
            scenes.sketches,
            rows[1],
            scenes.keyposes,
            label_maps(plan, scenes, shrink, compute),
        )


def first_seen(step: int, reuse: int) -> int:
    """The step at which a step's pictures were first seen."""
    return step - step % (16 * reuse) + step % 16 if reuse > 1 else step


_planner: Callable[[int], Plan] | None = None  # of a planning process


def begin_planning(planner: Planner) -> None:
    """Make a process ready to plan."""
    global _planner
    torch.set_num_threads(1)
    _planner = planner


def _planned(step: int) -> Plan:
    assert _planner
    return _planner(step)


def planned_ahead(pool: Executor, start: int, ahead: int, reuse: int = 1) -> Generator[tuple[int, Plan], None, None]:
    """Plans in order of their steps, made by a pool that :func:`begin_planning` made ready, some steps ahead."""
    steps = (step for step in count(start) if first_seen(step, reuse) == step)
    with pool:
        waiting = deque((step, pool.submit(_planned, step)) for step in islice(steps, ahead))
        while True:
            step, future = waiting.popleft()
            later = next(steps)
            waiting.append((later, pool.submit(_planned, later)))
            yield step, future.result()
