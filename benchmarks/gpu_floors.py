"""How fast the experts could be: the kernels that no implementation does without, at rates measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.gpu_problem import Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """The device's rates: FLOP/s of a large matrix product, bytes/s (read and written) of a large copy."""

    flops: float
    bytes: float


class Kernel(NamedTuple):
    """What one kernel must compute and move."""

    name: str
    flops: float
    bytes: float


def kernels(shape: Shape, backward: bool, element: int = 2) -> list[Kernel]:
    """A chain of fused kernels: gathers in the loads, activation in the epilogues, the sums over K apart.

    Forward: both products and the combine. Backward: gradient of the activation, both weight gradients, gradient of
    the rows, and their sum into dx. A gathered matrix counts once, by its T tokens; every written matrix once.
    Source: SonicMoE, arXiv:2512.14080, for the chain.
    """
    s = shape
    rows_D, rows_I = float(element * s.rows * s.dim), float(element * s.rows * s.inter)
    tokens_D, third = float(element * s.tokens * s.dim), s.weight_bytes(element) / 3
    product = 2.0 * s.rows * s.dim * s.inter
    forward = [
        Kernel("up", 2 * product, tokens_D + 2 * third + 3 * rows_I),
        Kernel("down", product, rows_I + third + rows_D),
        Kernel("combine", 0.0, rows_D + tokens_D),
    ]
    back = [
        Kernel("gradient of the activation", product, tokens_D + third + 5 * rows_I),
        Kernel("weight gradient of down", product, tokens_D + rows_I + third),
        Kernel("gradient of the rows", 2 * product, 2 * rows_I + 2 * third + rows_D),
        Kernel("weight gradient of up", 2 * product, tokens_D + 2 * rows_I + 2 * third),
        Kernel("sum into dx", 0.0, rows_D + tokens_D),
    ]
    return forward + back if backward else forward


def compute_floor(shape: Shape, backward: bool, ceilings: Ceilings) -> float:
    """Milliseconds of the products alone."""
    return 1e3 * shape.flops(backward) / ceilings.flops


def kernel_floor(shape: Shape, backward: bool, ceilings: Ceilings) -> float:
    """Milliseconds of the chain: each kernel takes as long as its arithmetic or its bytes, whichever is longer."""
    chain = kernels(shape, backward)
    return 1e3 * sum(max(kernel.flops / ceilings.flops, kernel.bytes / ceilings.bytes) for kernel in chain)
