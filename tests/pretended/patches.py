"""What torch decides in C++ or before any mode sees it, for a pretended GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.utils.clip_grad as clip_grad
import torch.optim.optimizer as optimizer
import torch.utils._foreach_utils as foreach_utils
import torch.utils.checkpoint as checkpointing
from torch import Tensor

from spectral_diffusion import svd_cache

if TYPE_CHECKING:
    from .gpu import PretendedGPU

GIB = 1 << 30
CUDA: dict[str, Any] = {
    "is_available": lambda: True, "_lazy_init": lambda: None, "current_device": lambda: 0,
    "is_bf16_supported": lambda *args, **more: True, "empty_cache": lambda: None, "synchronize": lambda *args: None,
    "mem_get_info": lambda *args: (70 * GIB, 80 * GIB), "memory_reserved": lambda *args: 0,
    "memory_allocated": lambda *args: 0, "get_device_capability": lambda *args: (9, 0),
    "manual_seed_all": lambda *args: None, "is_current_stream_capturing": lambda: False,
}  # fmt: skip


class AtOnce:
    """An executor that works at once: modes belong to one thread."""

    def __init__(self, *args: Any) -> None: ...

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def submit(self, work: Callable[..., Any], *args: Any) -> Any:
        value = work(*args)
        return type("Done", (), {"result": staticmethod(lambda: value)})


@contextmanager
def patched(gpu: PretendedGPU) -> Iterator[None]:
    """Have torch take the pretended device for a real one."""
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        if gpu.kind == "cuda":
            for name, value in CUDA.items():
                patch(torch.cuda, name, value)
            patch(torch.cuda, "device_count", lambda: gpu.count)
        else:
            patch(torch.backends.mps, "is_available", lambda: True)
        patch(svd_cache, "ThreadPoolExecutor", AtOnce)
        _patch_autocast(gpu.kind, patch)
        _patch_optimizers(gpu, patch)
        _patch_checkpointing(gpu, patch, stack)
        _patch_functions(gpu, patch)
        yield


def _patch_autocast(kind: str, patch: Callable[[Any, str, Any], None]) -> None:
    """The pretended device's autocast is the CPU's."""
    autocast = torch.amp.autocast_mode.autocast
    begin, is_on, dtype_of = autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype

    def begin_on_cpu(self: Any, device_type: str, *args: Any, **more: Any) -> None:
        if device_type == kind:
            device_type = "cpu"
            if not args and more.get("dtype") is None:
                more["dtype"] = torch.float16
        begin(self, device_type, *args, **more)

    patch(autocast, "__init__", begin_on_cpu)
    patch(torch, "is_autocast_enabled", lambda device="cpu": is_on("cpu" if device == kind else device))
    patch(torch, "get_autocast_dtype", lambda device="cpu": dtype_of("cpu" if device == kind else device))


def _patch_optimizers(gpu: PretendedGPU, patch: Callable[[Any, str, Any], None]) -> None:
    """Optimizers group parameters by device in C++."""
    group = foreach_utils._group_tensors_by_device_and_dtype

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        def key(device: Any, dtype: Any, columns: Any) -> Any:
            first = columns[0][0] if columns[0] else None
            return (gpu.places.of(first) if isinstance(first, Tensor) else device), dtype

        found = group(lists, with_indices)
        return {key(*places, value[0]): value for places, value in found.items()}

    for module in (clip_grad, optimizer, foreach_utils):
        if hasattr(module, "_group_tensors_by_device_and_dtype"):
            patch(module, "_group_tensors_by_device_and_dtype", grouped)


def _patch_functions(gpu: PretendedGPU, patch: Callable[[Any, str, Any], None]) -> None:
    """The engine runs the backward pass of Python's functions without function modes too."""
    kind = torch.autograd.function.BackwardCFunction
    backward = kind.apply

    def with_questions(self: Any, *args: Any) -> Any:
        if torch._C._len_torch_function_stack():
            return backward(self, *args)
        with gpu.questions():
            return backward(self, *args)

    patch(kind, "apply", with_questions)


def _patch_checkpointing(gpu: PretendedGPU, patch: Callable[[Any, str, Any], None], stack: ExitStack) -> None:
    """The engine recomputes without function modes, and compares devices of before and after."""
    checkpoint = checkpointing.checkpoint

    def with_questions(function: Any, *args: Any, **more: Any) -> Any:
        def inside(*inputs: Any, **named: Any) -> Any:
            if torch._C._len_torch_function_stack():
                return function(*inputs, **named)
            with gpu.questions():
                return function(*inputs, **named)

        return checkpoint(inside, *args, **more)

    patch(checkpointing, "checkpoint", with_questions)
    checks = checkpointing._allowed_determinism_checks_to_fns
    stack.callback(checks.__setitem__, "default", checks["default"])
    checks["default"] = lambda tensor: (tensor.shape, tensor.dtype)
