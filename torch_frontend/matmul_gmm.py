"""Backend "gmm": the grouped_gemm package's product, one cuBLAS matmul an expert as it is installed by default.

It takes bfloat16, contiguous operands and int64 sizes on the host, and never reads past their sum. Source:
grouped_gemm 0.3.0; its operator with autograd is not used, since this project's operators are their own derivatives.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def prepare(group_sizes: Tensor) -> Tensor:
    """[e] int64 on the host; one copy, which waits for the device; see Kernels.prepare."""
    return group_sizes.to("cpu", torch.int64)


def product(rows: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """[R, F]; see Kernels.product. Neither layout of `weight`, contiguous or its transpose contiguous, is copied."""
    transposed = not weight.is_contiguous() and weight.mT.is_contiguous()
    matrices = weight.mT if transposed else weight.contiguous()
    return _gmm(rows.contiguous(), matrices, sizes, trans_b=transposed)


def weight_gradient(rows: Tensor, dout: Tensor, sizes: Tensor) -> Tensor:
    """[e, D, F]; see Kernels.weight_gradient."""
    dweight = _gmm(rows.contiguous(), dout.contiguous(), sizes, trans_a=True)
    for part, size in zip(dweight.unbind(0), sizes.tolist(), strict=True):
        if not size:  # not left to a matmul that contracts over nothing
            part.zero_()
    return dweight


def load() -> Any:
    """The package's backend module."""
    return import_module("grouped_gemm.backend")


def _gmm(a: Tensor, b: Tensor, sizes: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
    out: Tensor = load().gmm(a, b, sizes, trans_a, trans_b)
    return out
