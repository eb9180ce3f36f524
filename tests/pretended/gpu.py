"""A pretended GPU on a CPU: it refuses what a real one would, and counts what costs time there.

Tensors are real CPU tensors, so every operation runs; a tag per storage says where the storage pretends to be. One mode
answers what Python asks (``tensor.device``, ``.to``, ``torch.zeros(device=…)``). The other sees every aten operation,
those of the backward pass included, and refuses mixed devices, generators of another device, float64 on MPS,
operations without an MPS kernel and norms of mixed precision. It counts kernels and synchronizations by the line
of the program that caused them.

    with PretendedGPU("cuda") as gpu:
        train_to_file(config)
    print(gpu.kernels.total(), gpu.syncs)
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from . import mps

CPU = torch.device("cpu")
PACKAGE = "/spectral_diffusion/"
QUESTIONS = {"device", "is_cuda", "is_cpu", "is_mps"}
MOVES = {"to", "cuda", "cpu", "mps"}
SYNCHRONIZING = {  # the host waits for their result
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_linalg_check_errors", "aten::equal",
    "aten::is_nonzero", "aten::_unique2", "aten::repeat_interleave.Tensor",
}  # fmt: skip
WITHOUT_KERNEL = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::lift_fresh",
    "aten::new_empty_strided", "aten::_local_scalar_dense", "aten::set_.source_Storage", "aten::resize_",
    "aten::_reshape_alias", "aten::_unsafe_view",
}  # fmt: skip
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_"}
INDEXED = {"aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
NORMS = {"aten::native_layer_norm", "aten::native_group_norm"}
NO_SCALARS = {"aten::cat", "aten::stack", "aten::mm", "aten::bmm", "aten::addmm", "aten::embedding"}
# CUDA's autocast runs these in float32; the CPU's list, which acts here, lacks them.
IN_FLOAT32 = {"layer_norm", "group_norm", "softmax", "log_softmax", "mse_loss", "norm", "cumsum", "pow", "prod"}


class Refused(RuntimeError):
    """What a real device would have refused."""


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor has no values: on the meta device, or fake."""
    return tensor.is_meta or type(tensor).__name__ == "FakeTensor"


class Places:
    """Where every storage pretends to be. One that nobody placed goes where it is used first."""

    def __init__(self) -> None:
        self._there: dict[int, torch.device] = {}
        self._open: set[int] = set()

    def put(self, tensor: Tensor, device: torch.device | None) -> None:
        if is_hollow(tensor):
            return
        key = tensor.untyped_storage()._cdata
        if key not in self._there and key not in self._open:
            weakref.finalize(tensor.untyped_storage(), self._forget, key)
        self._forget(key)
        if device is None:
            self._open.add(key)
        elif device.type != "cpu":
            self._there[key] = device

    def _forget(self, key: int) -> None:
        self._there.pop(key, None)
        self._open.discard(key)

    def of(self, tensor: Tensor) -> torch.device | None:
        key = tensor.untyped_storage()._cdata
        return None if key in self._open else self._there.get(key, CPU)


class Questions(TorchFunctionMode):
    """Answers what Python asks torch."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.gpu.answer(func, args, dict(kwargs or {}))


class Operations(TorchDispatchMode):
    """Sees every aten operation."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # which would see our own questions
            return self.gpu.run(func, args, kwargs or {})


class PretendedGPU:
    """A device of kind ``cuda`` or ``mps`` while the context is open, or several.

    Attributes:
        count: how many devices there are.
        kernels: launched kernels by operation; ``lines``: by line of the program; ``syncs``: waiting for the device, by
            what and line. They count while ``counting`` is true.
    """

    def __init__(self, kind: str = "cuda", count: int = 1) -> None:
        self.kind, self.count, self.places = kind, count, Places()
        self.device = torch.device(kind, 0)  # where no other is named
        self.kernels: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.counting = False
        self._asked: list[torch.device | None] = []
        self._moving = False

    # ------------------------------------------------------------------ what is told

    def refuse(self, what: str) -> None:
        raise Refused(f"{what} ({program_line()})")

    def wait(self, what: str) -> None:
        if self.counting:
            self.syncs[f"{what} at {program_line()}"] += 1

    def _target(self, device: torch.device) -> torch.device:
        """Where a tensor goes that is sent to a device."""
        if device.type != self.kind:
            return CPU
        if (device.index or 0) >= self.count:
            self.refuse(f"{device}: there are {self.count}")
        return torch.device(self.kind, device.index or 0)

    def is_here(self, tensor: Tensor) -> bool:
        place = self.places.of(tensor)
        return place is not None and place.type == self.kind

    def _check_dtype(self, dtype: Any, device: torch.device) -> None:
        if self.kind == device.type == "mps" and dtype in (torch.float64, torch.complex128):
            self.refuse("float64 on MPS")

    def _check_generator(self, generator: Any, device: torch.device) -> None:
        if isinstance(generator, torch.Generator) and device.type == self.kind != generator.device.type:
            self.refuse(f"a generator of the {generator.device.type} for a tensor on {self.kind}")

    # ------------------------------------------------------------------ Python's questions

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "__get__":
            return self._answer_attribute(func, args, kwargs)
        if first is not None and name in MOVES and not is_hollow(first):
            return self._move(first, name, args[1:], kwargs)
        if first is not None and name in {"numpy", "__array__"} and self.is_here(first):
            self.refuse(f"numpy() of a tensor on {self.kind}")
        if first is not None and name == "tolist" and self.is_here(first):
            self.wait("tolist()")
        if name == "__deepcopy__" and first is not None:
            out = func(*args, **kwargs)
            self.places.put(out, self.places.of(first))
            return out
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if device is not None and device.type in (self.kind, "cpu"):
            return self._made(func, name, args, kwargs, device)
        if name in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(in_float32, (args, kwargs))
        with self._asking(None if tensors((args, kwargs)) else CPU if hasattr(torch, name) else None):
            return func(*args, **kwargs)

    def _answer_attribute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        what = getattr(getattr(func, "__self__", None), "__name__", "")
        if what not in QUESTIONS or is_hollow(args[0]):
            return func(*args, **kwargs)
        place = self.places.of(args[0]) or CPU
        return place if what == "device" else place.type == what.removeprefix("is_")

    def _made(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
        """A tensor that is made on a device."""
        self._check_generator(kwargs.get("generator"), device)
        self._check_dtype(kwargs.get("dtype"), device)
        target = self._target(device)
        with self._asking(target):
            out = func(*args, **{**kwargs, "device": CPU})
        if target is not CPU and name in {"tensor", "as_tensor", "asarray"}:
            self.wait("a copy to the device")
            out = out.clone()
        for made in tensors(out):
            self.places.put(made, target)
        return out

    def _move(self, tensor: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``.to`` and its relatives."""
        place = self.places.of(tensor) or CPU
        like = next((value for value in (*args, kwargs.get("other")) if isinstance(value, Tensor)), None)
        dtype = next((v for v in (*args, kwargs.get("dtype")) if isinstance(v, torch.dtype)), None)
        wanted = next((v for v in (*args, kwargs.get("device")) if isinstance(v, torch.device | str)), None)
        if like is not None:
            target, dtype = self.places.of(like) or place, like.dtype
        elif name in {"cuda", "mps"}:
            target = self.device
        else:
            target = CPU if name == "cpu" else place if wanted is None else torch.device(wanted)
        if target.type not in (self.kind, "cpu"):
            return Tensor.to(tensor, *args, **kwargs)  # the meta device
        target = self._target(target)
        self._check_dtype(dtype or tensor.dtype, target)
        if place.type != target.type and self.kind == "mps" and (dtype or tensor.dtype) == torch.float64:
            self.refuse("a copy from MPS as float64, which MPS itself would convert")
        options = {name: kwargs[name] for name in ("memory_format",) if kwargs.get(name) is not None}
        crosses = place != target
        if crosses and not (kwargs.get("non_blocking") and self.kind == target.type == "cuda"):
            self.wait("a copy to the device" if target.type == self.kind else "a copy to the host")
        self._moving = True
        try:
            with self._asking(target):
                copy = crosses or bool(kwargs.get("copy")) or True in args[1:]
                out = Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copy, **options)
        finally:
            self._moving = False
        if crosses:
            self.places.put(out, target)
        return out

    @contextmanager
    def _asking(self, device: torch.device | None) -> Iterator[None]:
        """Where tensors are made that come from no others."""
        self._asked.append(device)
        try:
            yield
        finally:
            self._asked.pop()

    # ------------------------------------------------------------------ operations

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, given = func.name(), tensors((args, kwargs))
        if any(map(is_hollow, given)):
            return func(*args, **kwargs)
        where = [self.places.of(tensor) for tensor in given]
        there = next((place for place in where if place and place.type == self.kind), None)
        on_device = there is not None
        if on_device:
            self._check(name, given, where, kwargs)
        out = func(*args, **kwargs)
        if on_device and name in SYNCHRONIZING:
            self.wait(name.removeprefix("aten::"))
        target = there
        if name == "aten::copy_":
            target = where[0]
            if len(where) > 1 and None not in where[:2] and where[0].type != where[1].type:  # type: ignore[union-attr]
                self.wait("a copy to the host" if where[0] == CPU else "a copy to the device")
        if on_device and self.counting and not self._moving and launches(func, name):
            self.kernels[name.removeprefix("aten::")] += 1
            self.lines[program_line()] += 1
        self._place(tensors(out), given, where, target)
        return out

    def _place(self, made: list[Tensor], given: list[Tensor], where: list[Any], target: torch.device | None) -> None:
        """Tag an operation's results."""
        known = {tensor.untyped_storage()._cdata for tensor in given if not is_hollow(tensor)}
        for tensor in made:
            if is_hollow(tensor):
                continue
            if tensor.untyped_storage()._cdata in known:  # a view, or written in place
                if self.places.of(tensor) is None and target is not None:
                    self.places.put(tensor, target)
            elif target is not None:
                self._check_dtype(tensor.dtype, target)
                self.places.put(tensor, target)
            elif not given:
                self.places.put(tensor, self._asked[-1] if self._asked else None)
            elif all(place is None for place in where):
                self.places.put(tensor, None)

    def _check(self, name: str, given: list[Tensor], where: list[Any], kwargs: dict[str, Any]) -> None:
        """Refuse an operation that the device would refuse."""
        if name in COPIES:
            return
        if self.kind == "mps" and not mps.has_kernel(name):
            self.refuse(f"{name} has no MPS kernel")
        if "randperm" not in name:
            self._check_generator(kwargs.get("generator"), self.device)
        devices = {str(place) for place in where if place is not None and place.type == self.kind}
        if len(devices) > 1:
            self.refuse(f"{name} of tensors on {' and '.join(sorted(devices))}")
        strangers = [tensor for tensor, place in zip(given, where, strict=True) if place == CPU]
        if name in INDEXED and where[0] is not None and where[0].type == self.kind:
            if strangers:
                self.wait("a copy of an index to the device")
            strangers = []
        elif not (name in NO_SCALARS or name.startswith("aten::_fused")):
            strangers = [tensor for tensor in strangers if tensor.dim()]  # numbers may come from the host
        if strangers:
            self.refuse(f"{name} of tensors on {self.kind} and on the CPU, {[tuple(t.shape) for t in given][:6]}")
        if name in NORMS and len({tensor.dtype for tensor in given}) > 1:
            self.refuse(f"{name} of mixed precisions")

    # ------------------------------------------------------------------ on and off

    def __enter__(self) -> PretendedGPU:
        from .patches import patched

        self._stack = ExitStack()
        self._stack.enter_context(patched(self))
        self._stack.enter_context(Operations(self))
        self._stack.enter_context(Questions(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def questions(self) -> Questions:
        """A mode for code that torch runs without the outer one."""
        return Questions(self)


def launches(func: Any, name: str) -> bool:
    """Whether an operation launches a kernel: it is no view and makes more than room."""
    views = any(made.alias_info is not None and not made.alias_info.is_write for made in func._schema.returns)
    return not views and name not in WITHOUT_KERNEL and name not in {"aten::detach", "aten::alias"}


def in_float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def program_line() -> str:
    """The innermost line of the package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if PACKAGE in path and "/tests/" not in path:
            return f"{path.rpartition(PACKAGE)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"
