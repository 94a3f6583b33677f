"""Steps 5 and 7: one matrix per expert; and the plain dense projection.

Every backend is a pair of kernels, `product` and `weight_gradient`, behind one pair of `torch.library` operators that
are each other's derivatives. So autograd, double backward and torch.compile work the same for every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moebius.core import checks
from moebius.core.registry import Backend, Problem, Registry
from moebius.torch_frontend.checks import check_group_sizes

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_ANY = ""  # operators take no optional string


class Kernels(NamedTuple):
    """One backend of the grouped matmul.

    Attributes:
        product: (rows [R, D], weight [e, D, F] in any layout, group_sizes [e]) -> [R, F]; rows past the end zero.
        weight_gradient: (rows [R, D], dout [R, F], group_sizes [e]) -> [e, D, F]; empty experts zero.
    """

    product: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped_matmul(
    rows_RD: Float[Tensor, "R D"],
    weight_eDF: Float[Tensor, "e D F"],
    group_sizes_e: Int[Tensor, " e"],
    *,
    backend: str | None = None,
) -> Tensor:
    """Multiply each group of rows by its own expert's matrix.

    Spec: core.reference.grouped_matmul. Source: MegaBlocks, arXiv:2211.15841.

    Args:
        rows_RD: rows sorted by expert; float64 ("loop"), float32, bfloat16 or float16. Rows past
            sum(group_sizes_e) are padding: whatever they hold, inf and NaN too, touches nothing.
        weight_eDF: one matrix an expert, x @ W orientation; dtype of rows_RD.
        group_sizes_e: rows of each expert; int32, >= 0, sum <= R. Unit: rows.
        backend: a registered name, or None for the first that supports this problem.
    Returns:
        [R, F], dtype of rows_RD, accumulated in promote_types(dtype, float32); padding rows are zero.
    Raises:
        ShapeError, DTypeError: an axis named twice has two sizes; dtypes differ.
        ConfigError, BackendUnavailable, Unsupported: `backend` was named and cannot serve; says why.
    """
    checks.grouped_matmul(rows_RD, weight_eDF, group_sizes_e)
    check_group_sizes(group_sizes_e, rows_RD.shape[0])
    # Resolved inside the operator, at run time, so that torch.compile does not trace the registry.
    out_RF: Tensor = _product(rows_RD, weight_eDF, group_sizes_e, backend or _ANY)
    return out_RF


def linear(x: Tensor, weight_FD: Float[Tensor, "F D"], bias_F: Float[Tensor, " F"] | None = None) -> Tensor:
    """x @ weight^T + bias in x's dtype, with the output-major weight of dense projections cast to it.

    Args:
        x: [..., D]. weight_FD: [F, D]. bias_F: [F] or None.
    """
    return F.linear(x, weight_FD.to(x.dtype), None if bias_F is None else bias_F.to(x.dtype))


def choose(backend: str | None, rows: Tensor, weight_shape: Any) -> Backend:
    """The registry row that serves `rows` against a weight of shape [e, D, F]; see Registry.choose."""
    return _choose(backend, rows.device.type, str(rows.dtype), tuple(weight_shape), _capability(rows.device))


@lru_cache(maxsize=4096)
def _choose(
    backend: str | None, device: str, dtype: str, shape: tuple[int, int, int], capability: tuple[int, int] | None
) -> Backend:
    problem = Problem(
        device=device,
        dtype=dtype.removeprefix("torch."),
        dim=shape[1],
        inter_dim=shape[2],
        n_experts=shape[0],
        capability=capability,
    )
    return BACKENDS.choose(backend, problem)


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@torch.library.custom_op(
    "moebius::grouped_matmul",
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor group_sizes, str backend) -> Tensor",
)
def _product(rows: Tensor, weight: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    if 0 in (rows.shape[0], weight.shape[0]):
        return rows.new_zeros(rows.shape[0], weight.shape[2])
    return _kernels(backend, rows, weight.shape).product(rows, weight, group_sizes)


@torch.library.custom_op(
    "moebius::grouped_matmul_weight_gradient",
    mutates_args=(),
    schema="(Tensor rows, Tensor dout, Tensor group_sizes, str backend) -> Tensor",
)
def _weight_gradient(rows: Tensor, dout: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    if 0 in (rows.shape[0], group_sizes.shape[0]):
        return rows.new_zeros(group_sizes.shape[0], rows.shape[1], dout.shape[1])
    shape = group_sizes.shape[0], rows.shape[1], dout.shape[1]
    return _kernels(backend, rows, shape).weight_gradient(rows, dout, group_sizes)


@_product.register_fake
def _(rows: Tensor, weight: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_weight_gradient.register_fake
def _(rows: Tensor, dout: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    return rows.new_empty(group_sizes.shape[0], rows.shape[1], dout.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _product_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    rows, weight, group_sizes = ctx.saved_tensors
    needs = ctx.needs_input_grad
    drows = _product(dout, weight.mT, group_sizes, ctx.backend) if needs[0] else None
    dweight = _weight_gradient(rows, dout, group_sizes, ctx.backend) if needs[1] else None
    return drows, dweight, None, None


def _weight_gradient_backward(ctx: Any, dweight: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    rows, dout, group_sizes = ctx.saved_tensors
    needs = ctx.needs_input_grad
    drows = _product(dout, dweight.mT, group_sizes, ctx.backend) if needs[0] else None
    ddout = _product(rows, dweight, group_sizes, ctx.backend) if needs[1] else None
    return drows, ddout, None, None


_product.register_autograd(_product_backward, setup_context=_save)
_weight_gradient.register_autograd(_weight_gradient_backward, setup_context=_save)


def _kernels(backend: str, rows: Tensor, weight_shape: Any) -> Kernels:
    chosen = choose(None if backend == _ANY else backend, rows, weight_shape)
    kernels: Kernels = BACKENDS.implementation(chosen)
    return kernels


def _load_grouped_mm() -> Kernels:
    from moebius.torch_frontend import matmul_grouped_mm as backend

    return Kernels(backend.product, backend.weight_gradient)


def _load_loop() -> Kernels:
    from moebius.torch_frontend import matmul_loop as backend

    return Kernels(backend.product, backend.weight_gradient)


def _grouped_mm_supports(problem: Problem) -> str | None:
    if problem.dtype == "float64":
        return "torch's grouped_mm has no float64"
    if problem.device == "cuda" and problem.n_experts >= 1024:
        return f"torch's grouped_mm takes fewer than 1024 experts on CUDA, not {problem.n_experts}"
    return None


BACKENDS = Registry("moebius.torch_frontend", "grouped_matmul")
BACKENDS.add(
    name="grouped_mm",
    load=_load_grouped_mm,
    supports=_grouped_mm_supports,
    note="torch.nn.functional.grouped_mm: CUTLASS on Hopper in bfloat16",
)
BACKENDS.add(name="loop", load=_load_loop, reads_host=True, note="one matmul per expert; any dtype, float64 too")
BACKENDS.add_unbuilt("gmm", "te", "triton", "torch_mm_mxfp8")
