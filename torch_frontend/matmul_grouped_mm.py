"""Backend "grouped_mm": torch.nn.functional.grouped_mm, with its rules kept inside.

It asks for strides and addresses of 16 bytes and refuses expanded gradients (measured: torch 2.13, CPU; the addresses
are from its source); here widths are padded and operands laid out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_STRIDE_BYTES = 16


def prepare(group_sizes: Tensor) -> Tensor:
    """[e] int32: the row after each group's last; see Kernels.prepare."""
    return group_sizes.cumsum(0, dtype=torch.int32)


def product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[R, F]; see Kernels.product."""
    width = weight.shape[2]
    out = F.grouped_mm(_aligned_rows(rows), _aligned_matrices(weight), offs=ends)
    return out[:, :width].contiguous()


def weight_gradient(rows: Tensor, dout: Tensor, ends: Tensor) -> Tensor:
    """[e, D, F]; see Kernels.weight_gradient."""
    n_in, n_out = rows.shape[1], dout.shape[1]
    dweight = F.grouped_mm(_aligned_rows(rows).T, _aligned_rows(dout), offs=ends)
    return dweight[:, :n_in, :n_out].contiguous()


def _excess(width: int, dtype: torch.dtype) -> int:
    return -width % (_STRIDE_BYTES // dtype.itemsize)


def _aligned_rows(rows: Tensor) -> Tensor:
    excess = _excess(rows.shape[1], rows.dtype)
    return F.pad(rows, (0, excess)) if excess else aligned(rows.contiguous())


def _aligned_matrices(weight: Tensor) -> Tensor:
    """Both widths padded; a transposed view stays one, since the kernel reads either layout."""
    excess_in, excess_out = (_excess(width, weight.dtype) for width in weight.shape[1:])
    if excess_in or excess_out:
        return F.pad(weight, (0, excess_out, 0, excess_in))
    if weight.mT.is_contiguous():
        return aligned(weight.mT).mT
    return aligned(weight.contiguous())


def aligned(value: Tensor) -> Tensor:
    """`value` itself, or a copy where it starts between 16 bytes, as a view into one flat buffer may."""
    return value.clone() if value.data_ptr() % _STRIDE_BYTES else value
