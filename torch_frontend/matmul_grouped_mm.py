"""Backend "grouped_mm": torch.nn.functional.grouped_mm, with its rules kept inside.

It asks for strides of 16 bytes, refuses expanded gradients and leaves rows past the last group unwritten (measured:
torch 2.13, CPU); here widths are padded, operands laid out, and the tail is zeroed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_STRIDE_BYTES = 16


def product(rows: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """[R, F]; see Kernels.product."""
    width, ends = weight.shape[2], _ends(group_sizes)
    out = F.grouped_mm(_aligned_rows(rows), _aligned_matrices(weight), offs=ends)
    out = out[:, :width].contiguous()
    return _zero_past_end(out, ends)


def weight_gradient(rows: Tensor, dout: Tensor, group_sizes: Tensor) -> Tensor:
    """[e, D, F]; see Kernels.weight_gradient."""
    n_in, n_out = rows.shape[1], dout.shape[1]
    dweight = F.grouped_mm(_aligned_rows(rows).T, _aligned_rows(dout), offs=_ends(group_sizes))
    return dweight[:, :n_in, :n_out].contiguous()


def _ends(group_sizes: Tensor) -> Tensor:
    return group_sizes.cumsum(0, dtype=torch.int32)


def _excess(width: int, dtype: torch.dtype) -> int:
    return -width % (_STRIDE_BYTES // dtype.itemsize)


def _aligned_rows(rows: Tensor) -> Tensor:
    excess = _excess(rows.shape[1], rows.dtype)
    return F.pad(rows, (0, excess)) if excess else rows.contiguous()


def _aligned_matrices(weight: Tensor) -> Tensor:
    """Both widths padded; a transposed view stays one, since the kernel reads either layout."""
    excess_in, excess_out = (_excess(width, weight.dtype) for width in weight.shape[1:])
    if excess_in or excess_out:
        return F.pad(weight, (0, excess_out, 0, excess_in))
    if weight.mT.is_contiguous():
        return weight
    return weight.contiguous()


def _zero_past_end(out: Tensor, ends: Tensor) -> Tensor:
    if out.device.type == "cpu":
        out[int(ends[-1]) :].zero_()
        return out
    rows = torch.arange(out.shape[0], device=out.device, dtype=torch.int32)
    return out.masked_fill_((rows >= ends[-1])[:, None], 0.0)
