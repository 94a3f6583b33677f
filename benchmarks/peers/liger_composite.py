"""The composite of PyTorch's operators with Liger's SwiGLU in it."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor, nn

from benchmarks.gpu_problem import Candidate, Problem
from benchmarks.peers import composite


def build(problem: Problem) -> Candidate:
    """See composite.build; the product with the routing weights is PyTorch's own."""
    silu_mul = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction

    def activate(gate: Tensor, value: Tensor) -> Tensor:
        act: Tensor = silu_mul.apply(gate, value)
        return act

    up, down = nn.Parameter(problem.up), nn.Parameter(problem.down)
    return Candidate(
        call=lambda x, weights, indices: composite.experts(x, weights, indices, up, down, activate),
        parameters=(up, down),
        gradients=lambda expert: (up.grad[expert], down.grad[expert]),  # type: ignore[index]
        note="liger-kernel's LigerSiLUMulFunction",
    )
