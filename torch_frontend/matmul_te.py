"""Backend "te": Transformer Engine's grouped GEMM on the stacked weights as they lie.

A plain tensor reaches that GEMM as a pointer and a shape; strides are not looked at. It is told how to read operands
(A, B) by a layout: "NN" is B @ A, "TN" is B @ A^T, "NT" is B^T @ A. So the input-major matrices serve uncopied, as
A of "NN" in the product and, as the transposed view that asks for the input gradient, as A of "TN".

Experts without rows are left out of every list. cuBLAS runs the others on Transformer Engine's streams and
workspaces, which wait for the current stream and are waited for.
Source: cpp_extensions/gemm.py and module/grouped_linear.py of Transformer Engine 2.20.2.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebius.core.errors import BackendUnavailable, Unsupported

OLDEST = (2, 20)


class Splits(NamedTuple):
    """Which rows are whose, on the host.

    Attributes:
        n_experts: e.
        experts: those with rows, ascending.
        sizes: their rows.
    """

    n_experts: int
    experts: list[int]
    sizes: list[int]


def prepare(group_sizes: Tensor) -> Splits:
    """One copy to the host, which waits for the device; see Kernels.prepare."""
    sizes = group_sizes.tolist()
    experts = [expert for expert, size in enumerate(sizes) if size]
    return Splits(len(sizes), experts, [sizes[expert] for expert in experts])


def product(rows: Tensor, weight: Tensor, splits: Splits) -> Tensor:
    """[R, F]; see Kernels.product. Neither layout of `weight`, contiguous or its transpose contiguous, is copied."""
    refuse_tf32(rows)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    if splits.experts:
        matrices, layout = as_stored(weight)
        parts = split_rows(rows, splits.sizes)
        gemm(select(matrices, splits.experts), parts, [out], layout, splits.sizes)
    return out


def weight_gradient(rows: Tensor, dout: Tensor, splits: Splits) -> Tensor:
    """[e, D, F]; see Kernels.weight_gradient."""
    refuse_tf32(rows)
    dweight, parts = empty_gradient(rows, dout, splits)
    if parts:
        gemm(split_rows(dout, splits.sizes), split_rows(rows, splits.sizes), parts, "NT", splits.sizes)
    return dweight


def as_stored(weight: Tensor) -> tuple[Tensor, str]:
    """Contiguous matrices [e, A0, A1] and the layout under which rows times them are the product with `weight`."""
    if weight.is_contiguous():
        return weight, "NN"
    if weight.mT.is_contiguous():
        return weight.mT, "TN"
    return weight.contiguous(), "NN"


def select(matrices: Tensor, experts: list[int]) -> list[Tensor]:
    """Views of some experts' matrices."""
    every = matrices.unbind(0)
    return [every[expert] for expert in experts]


def split_rows(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    """Views of each expert's rows; those past the end are in none."""
    rows = rows.contiguous()
    return [rows[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def empty_gradient(rows: Tensor, dout: Tensor, splits: Splits) -> tuple[Tensor, list[Tensor]]:
    """[e, D, F] with zeros for experts without rows, and views of what is to be written for the others."""
    dweight = rows.new_empty(splits.n_experts, rows.shape[1], dout.shape[1])
    every, filled = dweight.unbind(0), set(splits.experts)
    for expert, part in enumerate(every):
        if expert not in filled:
            part.zero_()
    return dweight, [every[expert] for expert in splits.experts]


def gemm(a: list[Any], b: list[Any], out: list[Tensor], layout: str, sizes: list[int], accurate: bool = False) -> None:
    """Write each group's product into `out`: one tensor for the rows of all groups, or one for each group.

    Args:
        a, b: operands, plain or quantised. layout: "NN", "TN" or "NT", see above. sizes: rows of each group.
        accurate: of FP8 alone: add partial sums in float32 proper ("split accumulator").
    """
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    general_grouped_gemm(
        a,
        b,
        out,
        [None] * len(a),
        out[0].dtype,
        layout=layout,
        m_splits=sizes,
        use_split_accumulator=accurate,
        single_output=layout != "NT",
    )


def refuse_tf32(rows: Tensor) -> None:
    """Float32 is multiplied in TF32, so only where PyTorch's own switch allows that.

    Raises:
        Unsupported: it does not.
    """
    if rows.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        raise Unsupported(
            "grouped_matmul backend 'te' in float32",
            "Transformer Engine multiplies float32 in TF32, with 10 bits, which PyTorch is set not to",
            "torch.set_float32_matmul_precision('high') to allow it, or name another backend",
        )


def check_version() -> None:
    """The package loads and is of a version whose grouped GEMM takes these arguments.

    Raises:
        BackendUnavailable: it is older. Otherwise whatever its import raises.
    """
    import transformer_engine
    import transformer_engine.pytorch

    found = str(transformer_engine.__version__)
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendUnavailable(
            "Transformer Engine's grouped GEMM", f"transformer_engine {found}, not {oldest} or newer", "upgrade it"
        )
