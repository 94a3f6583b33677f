"""Liger's fused experts: gathers in the loads, SwiGLU in the epilogue, weights output-major."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_problem import Candidate, Problem

# Of the candidates that its autotuner compiles and times for each shape, those that it may take here. All of them are
# 240 compilations a shape, minutes; these have its larger tiles, which win where experts have many rows.
KEPT: dict[str, Callable[[Any], bool]] = {
    "_fused_up_proj_swiglu_kernel": lambda c: _large(c) and c.num_stages in (3, 4),
    "_fused_down_proj_kernel": lambda c: _large(c) and c.num_stages in (3, 4),
    "_moe_bwd_down_proj_kernel": lambda c: _large(c) and c.num_stages in (2, 3),
    "_moe_bwd_dX_expanded_kernel": lambda c: _large(c) and c.num_stages in (3, 4),
    "_moe_bwd_dW1_kernel": lambda c: c.kwargs == {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32},
    "_moe_bwd_dW2_kernel": lambda c: c.kwargs == {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32},
    "_token_gather_weighted_sum_kernel": lambda c: c.kwargs["BLOCK_H"] >= 256 and c.kwargs["BLOCK_K"] == 4,
}


def build(problem: Problem) -> Candidate:
    """LigerFusedMoEFunction, choosing among KEPT."""
    function = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    few()
    up, down = (nn.Parameter(weight.mT.contiguous()) for weight in (problem.up, problem.down))
    return Candidate(
        call=lambda x, weights, indices: function.apply(x, up, down, indices.to(torch.int32), weights),
        parameters=(up, down),
        gradients=lambda expert: (up.grad[expert].mT, down.grad[expert].mT),  # type: ignore[index]
        note=f"liger-kernel {_version()}, the larger ones of its tiles",
    )


def few() -> None:
    """Leave the autotuners of its kernels what KEPT keeps."""
    kernels = import_module("liger_kernel.ops.fused_moe_kernels")
    for name, keeps in KEPT.items():
        tuner = getattr(kernels, name)
        tuner.configs = [config for config in tuner.configs if keeps(config)] or tuner.configs


def _large(config: Any) -> bool:
    return bool(config.kwargs == {"BLOCK_N": 128, "BLOCK_K": 64})


def _version() -> str:
    with suppress(PackageNotFoundError):
        return version("liger-kernel")
    return "of no known version"
