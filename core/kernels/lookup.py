"""What a launch names, in Triton: its kernel, and how a described block lies in shared memory. Loaded at first use."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any


@cache
def kernel_of(name: str) -> Any:
    """The kernel that a launch calls "file.function"."""
    file, function = name.split(".")
    return getattr(import_module(f"moebius.core.kernels.{file}"), function)


@cache
def block_layout(rank: int) -> Any:
    """Of a block of 16-bit elements with so many axes, as the tensor memory accelerator writes and wgmma reads it."""
    language = import_module("triton.experimental.gluon.language")
    return language.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)
