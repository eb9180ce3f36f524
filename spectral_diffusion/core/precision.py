"""Mixed precision by what the device does well.

A processor without bfloat16 instructions multiplies bfloat16 two hundred times more slowly than float32, one with them
nearly three times faster. So ``auto`` measures before it chooses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import Fix, UserError
from .machine import measured_once

MixedPrecision = Literal["no", "bf16", "fp16"]  # resolved; settings also have "auto"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MEASURED = "precision of 2026-11"  # the kept measurement's name: earlier ones counted the run that compiles kernels
CLEARLY = 0.9  # bfloat16 has to take less than this share of float32's time
SLOW = 30.0  # times float32's after which nothing more is measured; the first run also compiles its kernels


def resolve_mixed_precision(
    requested: str, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> MixedPrecision:
    """The mixed precision that ``requested`` means on a device.

    ``auto`` is ``no`` for networks that are in half precision already; on a CPU bfloat16 where a measurement says that
    it is quicker; on CUDA bfloat16 where the card has it, else float16 (with a scaled loss); elsewhere ``no``.

    Args:
        requested: ``auto``, ``no``, ``bf16`` or ``fp16``.
        dtype: of the frozen networks.

    Raises:
        UserError: bfloat16 is requested on a card that lacks it, or another precision than that of half networks.
    """
    kind = torch.device(device).type
    if requested == "bf16" and kind == "cuda" and torch.cuda.is_available() and not cuda_has_bf16():
        raise UserError("This GPU has no bfloat16.", Fix("mixed_precision", "fp16"), Fix("mixed_precision", "auto"))
    half = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype)
    if half and requested not in ("auto", "no", half):
        raise UserError(
            f"mixed_precision={requested} does not fit networks in {str(dtype).removeprefix('torch.')}.",
            Fix("mixed_precision", "auto"),
            Fix("dtype", "float32"),
        )
    if requested != "auto":
        return cast(MixedPrecision, requested)
    if dtype != torch.float32:
        return "no"
    if kind == "cpu":
        return cpu_precision()
    if kind == "cuda":
        return "bf16" if cuda_has_bf16() else "fp16"
    return "no"


def cpu_precision() -> MixedPrecision:
    """The mixed precision that this processor is quickest in."""
    return "bf16" if cpu_is_quick_in_bf16() else "no"


def cuda_has_bf16() -> bool:
    """Whether the CUDA device multiplies bfloat16 in hardware; older cards only emulate it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_is_quick_in_bf16() -> bool:
    """Whether this processor takes clearly less time in bfloat16; measured once and kept."""
    seconds = measured_once(MEASURED, measure_cpu, is_clear)
    try:
        return float(seconds["bf16"]) < CLEARLY * float(seconds["float32"])
    except (KeyError, TypeError, ValueError):  # the cache was edited
        return False


def is_clear(seconds: dict[str, float]) -> bool:
    """Whether one precision is clearly faster; on a machine that is busy with other work both take the same time."""
    return not CLEARLY < seconds["bf16"] / seconds["float32"] < 1 / CLEARLY


def measure_cpu() -> dict[str, float]:
    """Seconds that a training step's typical work takes on the CPU in float32 and in bfloat16."""
    single = _seconds(torch.float32)
    return {"float32": single, "bf16": _seconds(torch.bfloat16, max_seconds=SLOW * single)}


def _seconds(dtype: torch.dtype, max_seconds: float = float("inf"), repeats: int = 3) -> float:
    """The least of some timings of a product and a 3×3 convolution, both with their gradients."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_(True)

    rows, weight, pixels, kernel = made(512, 256), made(256, 256), made(4, 64, 16, 16), made(64, 64, 3, 3)

    def work() -> None:
        total = F.linear(rows, weight).float().sum() + F.conv2d(pixels, kernel, padding=1).float().sum()
        torch.autograd.grad(total, (rows, weight, pixels, kernel))

    taken = []
    for _ in range(repeats + 1):  # the first one also starts threads and chooses kernels
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
        if taken[-1] > max_seconds:
            break
    return min(taken[1:] or taken)


def autocast(device: torch.device, precision: MixedPrecision) -> Any:
    """The context of the networks' forward pass."""
    return torch.autocast(device.type, DTYPES.get(precision, torch.bfloat16), enabled=precision != "no")


def is_half(precision: MixedPrecision, dtype: torch.dtype) -> bool:
    """Whether networks of this dtype compute in half precision."""
    return precision != "no" or dtype != torch.float32


def loss_scaler(device: torch.device, precision: MixedPrecision, dtype: torch.dtype) -> torch.amp.GradScaler:
    """The loss scaler of float16, on every device; it does nothing in any other precision."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16" or dtype == torch.float16)


@contextmanager
def tf32(device: torch.device, allowed: bool) -> Iterator[None]:
    """CUDA rounds the factors of float32 products and convolutions to TensorFloat-32, or does not, on purpose."""
    if device.type != "cuda":
        yield
        return
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in backends]
    for part in backends:
        part.allow_tf32 = allowed
    try:
        yield
    finally:
        for part, value in zip(backends, before, strict=True):
            part.allow_tf32 = value


def precision_note(
    requested: str, precision: MixedPrecision, device: torch.device, allow_tf32: bool, notify: Callable[[str], None]
) -> None:
    """Say which precision was chosen, and why, and on CUDA whether float32 products are rounded."""
    names = {"no": "float32", "bf16": "bfloat16", "fp16": "float16 with a scaled loss"}
    if requested == "auto":
        notify(f"Precision: {names[precision]}, in which this {device.type.upper()} is quickest.")
    if device.type == "cuda":
        notify(f"TensorFloat-32 is {'on' if allow_tf32 else 'off'} for float32 products (allow_tf32).")
