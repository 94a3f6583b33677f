"""Which kernels the grouped products of a problem are: those for Hopper where they serve, else those for any GPU."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

from moebius.core.kernels import plan_hopper, plan_portable
from moebius.core.kernels.plan import Launch
from moebius.core.registry import Problem

_OWN = "moebius' grouped products"


class Device(NamedTuple):
    """What a launch has to know of where it runs.

    Attributes:
        capability: compute capability. processors: multiprocessors.
    """

    capability: tuple[int, int]
    processors: int


INTERPRETER = Device((8, 0), 4)  # of which nothing depends on either


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, one operation after the other."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def against(problem: Problem) -> str | None:
    """Why the grouped products do not serve, in words; None where they do."""
    if problem.dtype not in ("float32", "bfloat16", "float16"):
        return f"{_OWN} take float32, bfloat16 and float16, not {problem.dtype}"
    if problem.device == "cpu" and interpreted():
        wrong = f"{_OWN} are wrong in bfloat16 under Triton's interpreter, which cuts digits off instead of rounding"
        return wrong if problem.dtype == "bfloat16" else None
    if problem.device == "cuda" and interpreted():
        return "Triton's interpreter is on (TRITON_INTERPRET=1), which computes on the CPU"
    if problem.device not in ("cuda", "meta"):  # what is on the meta device may come to any
        return f"{_OWN} compute on CUDA, not on {problem.device}"
    if problem.capability is not None and problem.capability < (8, 0):
        return f"{_OWN} need CUDA compute capability 8.0, not {'.'.join(map(str, problem.capability))}"
    return None


@lru_cache(maxsize=1024)
def fuses(dtype: str, device: Device, dim: int, inter_dim: int) -> bool:
    """Whether products and activation are one kernel."""
    return plan_hopper.serves(dtype, device.capability, dim, inter_dim)


@lru_cache(maxsize=1024)
def height(n_rows: int, n_experts: int, width_in: int, width_out: int, dtype: str, device: Device) -> int:
    """Rows of a tile of a product, for `list_tiles`."""
    if plan_hopper.serves(dtype, device.capability, width_in, width_out):
        return plan_hopper.HEIGHT
    return plan_portable.height(n_rows, n_experts, dtype)


@lru_cache(maxsize=1024)
def product(
    n_rows: int, n_experts: int, width_in: int, width_out: int, transposed: bool, dtype: str, device: Device
) -> Launch:
    """n_rows rows of width_in times matrices [e, width_in, width_out], where `transposed` [e, width_out, width_in]."""
    if plan_hopper.serves(dtype, device.capability, width_in, width_out):
        few = plan_hopper.few(n_rows, n_experts, width_out, device.processors)
        return plan_hopper.product(device.processors, width_in, width_out, transposed, few)
    how = {"dtype": dtype, "capability": device.capability, "height": plan_portable.height(n_rows, n_experts, dtype)}
    return plan_portable.product(n_rows, n_experts, width_in, width_out, transposed, **how)


@lru_cache(maxsize=1024)
def weight_gradient(n_experts: int, width_in: int, width_out: int, dtype: str, device: Device) -> Launch:
    """One [width_in, width_out] an expert."""
    if plan_hopper.serves(dtype, device.capability, width_in, width_out):
        return plan_hopper.weight_gradient(device.processors, n_experts, width_in, width_out)
    return plan_portable.weight_gradient(n_experts, width_in, width_out, dtype=dtype, capability=device.capability)
