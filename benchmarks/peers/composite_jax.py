"""The experts as a user writes them in JAX round a grouped matmul: sort, gather, activate, gather back, sum."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from benchmarks.gpu_jax import Peer
from benchmarks.gpu_problem import Problem

# (rows [R, D], weight [E, D, F], group sizes [E]) -> [R, F]
Product = Callable[[Any, Any, Any], Any]
OLDEST_CUBLASLT = 130400  # Transformer Engine's grouped GEMM on the device, on Hopper


def build(problem: Problem, *, product: str, gathers: bool = False) -> Peer:
    """The composite round one of PRODUCTS.

    Args:
        gathers: the gradients of both gathers as gathers too, by the inverse order; else as JAX makes them, scatters.
    """
    multiply, note, host = PRODUCTS[product]()

    def call(x: Any, weights: Any, indices: Any, up: Any, down: Any) -> Any:
        return experts(multiply, x, weights, indices, up, down, gathers)

    least = _expanded(problem) if product == "ragged_dot" and problem.x.is_cuda else {}
    return Peer(call=call, note=note, host=host, least=least)


def experts(
    multiply: Product, x_TD: Any, weights_TK: Any, indices_TK: Any, up_EDU: Any, down_EID: Any, gathers: bool = False
) -> Any:
    """[T, D]; every id is an expert."""
    import jax
    import jax.numpy as jnp

    n_tokens, k = indices_TK.shape
    ids_R = indices_TK.reshape(-1)
    order_R = jnp.argsort(ids_R, stable=True)
    inverse_R = jnp.argsort(order_R)
    sizes_E = jnp.bincount(ids_R, length=up_EDU.shape[0]).astype(jnp.int32)
    reorder = _reorder() if gathers else None
    if reorder is None:
        rows_RD = jnp.take(x_TD, order_R // k, axis=0)
    else:
        rows_RD = reorder(jnp.repeat(x_TD, k, axis=0), order_R, inverse_R)
    gate_RI, value_RI = jnp.split(multiply(rows_RD, up_EDU, sizes_E), 2, axis=-1)
    # The routing weight in float32: in bfloat16 JAX sums its gradient along a row in bfloat16. Seen on an H200 at I=768
    # as an error of 2.9 %, about what adding term after term costs.
    weights_R = jnp.take(weights_TK.reshape(-1), order_R).astype(jnp.float32)
    act_RI = (jax.nn.silu(gate_RI) * value_RI * weights_R[:, None]).astype(x_TD.dtype)
    out_RD = multiply(act_RI, down_EID, sizes_E)
    back_RD = jnp.take(out_RD, inverse_R, axis=0) if reorder is None else reorder(out_RD, inverse_R, order_R)
    return back_RD.reshape(n_tokens, k, -1).astype(jnp.float32).sum(1).astype(x_TD.dtype)


def _expanded(problem: Problem) -> dict[str, int]:
    """Bytes that XLA's ragged_dot needs at least on a GPU, where it copies the rows once for each expert.

    Seen in jax 0.11.2: forward the input of the up projection, and for a weight gradient both of its operands.
    """
    s, element = problem.shape, problem.x.element_size()
    copies = s.n_experts * s.rows * element
    return {"forward": copies * s.dim, "both": copies * (s.dim + 2 * s.inter)}


def _reorder() -> Callable[[Any, Any, Any], Any]:
    """(rows, order, its inverse) -> rows in that order; the gradient is gathered by the inverse."""
    import jax
    import jax.numpy as jnp

    @jax.custom_vjp
    def reorder(rows: Any, order: Any, inverse: Any) -> Any:
        return jnp.take(rows, order, axis=0)

    reorder.defvjp(
        lambda rows, order, inverse: (reorder(rows, order, inverse), (order, inverse)),
        lambda kept, drows: (reorder(drows, *kept[::-1]), None, None),
    )
    return reorder


def _ragged_dot() -> tuple[Product, str, str]:
    import jax

    return jax.lax.ragged_dot, f"jax {jax.__version__}", ""


def _tokamax() -> tuple[Product, str, str]:
    """Its default choice, with the help that its Triton kernels need on Triton 3.6."""
    import tokamax

    from moebius.jax_frontend import older_triton

    with suppress(ImportError):  # without jax-triton it has no Triton kernels
        older_triton.unpack_strides()

    def multiply(rows: Any, weight: Any, sizes: Any) -> Any:
        return tokamax.ragged_dot(rows, weight, sizes)

    return multiply, f"tokamax {getattr(tokamax, '__version__', '')}", ""


def _te() -> tuple[Product, str, str]:
    """Its own choice where that can run; else the GEMM that reads group sizes on the host, to which it never turns."""
    import transformer_engine
    import transformer_engine.jax
    import transformer_engine_jax
    from transformer_engine.jax.dense import grouped_dense

    cublas, host = transformer_engine_jax.get_cublasLt_version(), ""
    if cublas < OLDEST_CUBLASLT:
        # By its name: the package's attribute of that name is a function.
        gemm: Any = sys.modules["transformer_engine.jax.cpp_extensions.gemm"]
        gemm._v2_grouped_gemm_available = False
        host = "reads group sizes (V1)"

    def multiply(rows: Any, weight: Any, sizes: Any) -> Any:
        return grouped_dense(rows, weight, sizes, contracting_dims=((1,), (1,)))

    return multiply, f"transformer-engine {transformer_engine.__version__}, cublasLt {cublas}", host


PRODUCTS: dict[str, Callable[[], tuple[Product, str, str]]] = {
    "ragged_dot": _ragged_dot,
    "tokamax": _tokamax,
    "te": _te,
}
