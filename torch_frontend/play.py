"""Launches of core.kernels.plan, played on tensors, with little time on the host.

Triton's own way to a kernel looks at each argument and each constant again: on an H200's host up to 100 us a call,
where a layer of few tokens has 16 of them, and its kernels take 30. So that way is gone once for each code and kind of
arguments; the compiled kernel that it hands back is called from then on, as Triton calls it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor

from moebius.core.kernels.plan import Launch

_WIDE = 1 << 31  # from here on an integer is another kind of argument to Triton

# (code of a launch, device, kind of each argument) -> (what Triton compiled, its constants in order).
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


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
    kinds = [(a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a >= _WIDE for a in arguments]
    key = (launch.code, device, *kinds)
    found = _compiled.get(key)
    if found is None:
        _first(launch, key, arguments)
        return
    compiled, constants = found
    if launch.blocks:
        described = [_described(a, block) for a, block in zip(arguments, launch.blocks, strict=False)]
        arguments = (*described, *arguments[len(described) :])
    if _watched():
        compiled[(launch.programs, 1, 1)](*arguments, *constants)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    handles = compiled.function, compiled.packed_metadata
    compiled.run(launch.programs, 1, 1, stream, *handles, None, None, None, *arguments, *constants)


def _watched() -> bool:
    """Whether a profiler of Triton's asks to be told of each launch."""
    runtime = _runtime()
    return bool(_calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook))


def _calls(hook: Any) -> Any:
    return getattr(hook, "calls", hook)  # a chain of hooks, or in older versions one


@cache
def _runtime() -> Any:
    return import_module("triton").knobs.runtime


def _first(launch: Launch, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
    """Triton's own way, which compiles, and tells what to call from now on; its interpreter tells nothing."""
    described = [descriptor(a, block) for a, block in zip(arguments, launch.blocks, strict=False)]
    function = kernel_of(launch.kernel)
    given = (*described, *arguments[len(described) :])
    compiled = function[(launch.programs,)](*given, **launch.constants, **launch.options())
    if compiled is not None:
        _compiled[key] = compiled, tuple(launch.constants[name] for name in function.arg_names[len(arguments) :])


def descriptor(operand: Tensor, block: tuple[int, ...]) -> Any:
    """How the tensor memory accelerator finds blocks of an operand, made on the host: in no memory of the device."""
    return _descriptors()(operand, *_place(operand), list(block), _layout(len(block)))


def _described(operand: Tensor, block: tuple[int, ...]) -> Any:
    """`descriptor` without its checks, which an operand of this kind has passed."""
    made = object.__new__(_descriptors())
    made.base, made.block_shape, made.layout = operand, list(block), _layout(len(block))
    made.shape, made.strides = _place(operand)
    return made


def _place(operand: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of a contiguous operand; torch's own strides say nothing of an axis of one element."""
    shape = list(operand.shape)
    return shape, [prod(shape[axis + 1 :]) for axis in range(len(shape))]


@cache
def _descriptors() -> type[Any]:
    found: type[Any] = import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor
    return found


@cache
def _layout(rank: int) -> Any:
    language = import_module("triton.experimental.gluon.language")
    return language.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


@cache
def kernel_of(name: str) -> Any:
    """The kernel that a launch calls "file.function"."""
    file, function = name.split(".")
    return getattr(import_module(f"moebius.core.kernels.{file}"), function)
