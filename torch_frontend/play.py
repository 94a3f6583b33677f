"""Launches of core.kernels.plan, played on tensors, with little time on the host.

Triton's own way to a kernel looks at each argument and each constant again: on an H200's host up to 100 us a call,
where a layer of few tokens has 16 of them, and its kernels take 30. So that way is gone once for each code and kind of
arguments; the compiled kernel that it hands back is called from then on, as Triton calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import import_module
from math import prod
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moebius.core.kernels.interpreter import mend
from moebius.core.kernels.lookup import block_layout, kernel_of
from moebius.core.kernels.plan import Launch
from moebius.core.kernels.plan_grouped import interpreted

_WIDE = 1 << 31  # from here on an integer is another kind of argument to Triton

# (code of a launch, device, kind of each argument) -> (what Triton compiled, its constants in order).
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


Heard = tuple[Launch, Any, tuple[Any, ...]]  # a launch, what was compiled or None, the arguments
_heard: dict[int, list[Heard]] = {}  # of each thread that listens, by its number


def run(launch: Launch, *arguments: Any) -> None:
    """Play one launch on the device of its first argument."""
    if not launch.programs:
        return
    device = arguments[0].device
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        _play(launch, device.index or 0, arguments)
    else:
        with torch.cuda.device(device):
            _play(launch, device.index, arguments)


def _play(launch: Launch, device: int, arguments: tuple[Any, ...]) -> None:
    # What Triton compiles other code for: a dtype, an address between 16 bytes, an integer of 64 bits.
    kinds: list[Any] = [launch.code, device]
    given = []  # addresses as numbers: of a tensor Triton's launcher would ask for it, and the driver whether it is one
    for argument in arguments:
        if type(argument) is int:  # a look at Tensor's class takes longer
            kinds.append(argument >= _WIDE)
            given.append(argument)
        else:
            address = argument.data_ptr()
            kinds += argument.dtype, address % 16, argument.is_cuda  # of the CPU's Triton's own way says what is wrong
            given.append(address)
    key = tuple(kinds)
    found = _compiled.get(key)
    if _heard and (heard := _heard.get(get_ident())) is not None:
        with _disable_current_modes():  # what Triton does with tensors on its way is not the layer's
            _first(launch, key, arguments)
        heard.append((launch, _compiled.get(key), arguments))
    elif found is None:
        _first(launch, key, arguments)
    elif watched():
        compiled, constants = found
        compiled[(launch.programs, 1, 1)](*_with_descriptors(launch, arguments), *constants)
    else:
        compiled, constants = found
        for place, block in enumerate(launch.blocks):
            given[place] = described(given[place], arguments[place].shape, block)
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(launch.programs, 1, 1, stream, *handles(compiled), None, None, None, *given, *constants)


def handles(compiled: Any) -> tuple[Any, Any]:
    """What a compiled kernel's launcher is told of it, where nobody watches: the function, and how it is launched."""
    return compiled.function, compiled.packed_metadata


@contextmanager
def listening() -> Iterator[list[Heard]]:
    """What this thread launches inside; not one inside another."""
    thread = get_ident()
    assert thread not in _heard
    heard = _heard[thread] = []
    try:
        yield heard
    finally:
        del _heard[thread]


def watched() -> bool:
    """Whether a profiler of Triton's asks to be told of each launch."""
    runtime = _runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    )  # of a chain, or in older versions one


@cache
def _runtime() -> Any:
    return import_module("triton").knobs.runtime


def _first(launch: Launch, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
    """Triton's own way, which compiles, and tells what to call from now on; its interpreter tells nothing."""
    if interpreted():
        mend()
    function = kernel_of(launch.kernel)
    given = _with_descriptors(launch, arguments)
    compiled = function[(launch.programs,)](*given, **launch.constants, **launch.options())
    if compiled is not None:
        _compiled[key] = compiled, tuple(launch.constants[name] for name in function.arg_names[len(arguments) :])


def _with_descriptors(launch: Launch, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    described = [descriptor(a, block) for a, block in zip(arguments, launch.blocks, strict=False)]
    return (*described, *arguments[len(described) :])


def descriptor(operand: Tensor, block: tuple[int, ...]) -> Any:
    """How the tensor memory accelerator finds blocks of an operand, made on the host: in no memory of the device."""
    return _descriptors()(operand, *_place(operand.shape), list(block), block_layout(len(block)))


class _Address:
    """Stands for an operand in a descriptor that is kept longer than the operand."""

    __slots__ = ("address",)

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


@lru_cache(maxsize=4096)
def described(address: int, shape: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """`descriptor` without its checks, which an operand of this kind has passed, and without its operand."""
    made = object.__new__(_descriptors())
    made.base, made.block_shape, made.layout = _Address(address), list(block), block_layout(len(block))
    made.shape, made.strides = _place(shape)
    return made


def _place(shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Shape and strides of a contiguous operand; torch's own strides say nothing of an axis of one element."""
    return list(shape), [prod(shape[axis + 1 :]) for axis in range(len(shape))]


@cache
def _descriptors() -> type[Any]:
    found: type[Any] = import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor
    return found
