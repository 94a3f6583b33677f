"""Backend "loop": one matrix product per expert, written straight into the result.

Slicing with autograd would make each expert's backward fill a gradient of all experts, quadratic in E; writing with
`out=` touches each expert once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prepare(group_sizes: Tensor) -> list[int]:
    """Rows of each expert, on the host; see Kernels.prepare."""
    sizes: list[int] = group_sizes.tolist()
    return sizes


def product(rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """[R, F]; see Kernels.product."""
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    start = 0
    for expert, size in enumerate(sizes):
        end = start + size
        if size:
            torch.mm(rows[start:end], weight[expert], out=out[start:end])
        start = end
    return out


def weight_gradient(rows: Tensor, dout: Tensor, group_sizes: list[int]) -> Tensor:
    """[e, D, F]; see Kernels.weight_gradient."""
    dweight = rows.new_empty(len(group_sizes), rows.shape[1], dout.shape[1])
    start = 0
    for expert, size in enumerate(group_sizes):
        end = start + size
        if size:
            torch.mm(rows[start:end].T, dout[start:end], out=dweight[expert])
        else:
            dweight[expert].zero_()
        start = end
    return dweight
