"""Steps 5 and 7: one matrix per expert; and the plain dense projection.

Every backend is a pair of kernels, `product` and `weight_gradient`, behind one pair of functions that are each other's
derivatives. So grad, grad of grad and jit work the same for every backend.

Every product asks for precision "highest": float32 then means float32 also on a GPU, where JAX's default is TF32 and
PyTorch's is not. For 16-bit operands it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax import Array, lax

from moebius.core import checks
from moebius.core.registry import Backend, Problem, Registry
from moebius.jax_frontend.checks import check_group_sizes
from moebius.jax_frontend.dtypes import accumulate_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Kernels(NamedTuple):
    """One backend of the grouped matmul.

    Attributes:
        product: (rows [R, D], weight [e, D, F], group_sizes [e], transposed) -> [R, F]; rows past the end zero.
            `transposed`: weight is [e, F, D]; a flag, because XLA would copy all of weight.mT before the first block.
        weight_gradient: (rows [R, D], dout [R, F], group_sizes [e]) -> [e, D, F]; empty experts zero.
    """

    product: Callable[[Array, Array, Array, bool], Array]
    weight_gradient: Callable[[Array, Array, Array], Array]


def grouped_matmul(
    rows_RD: Float[Array, "R D"],
    weight_eDF: Float[Array, "e D F"],
    group_sizes_e: Int[Array, " e"],
    *,
    backend: str | None = None,
) -> Array:
    """Multiply each group of rows by its own expert's matrix.

    Spec: core.reference.grouped_matmul. Source: MegaBlocks, arXiv:2211.15841.

    Args:
        rows_RD: rows sorted by expert; float64, float32, bfloat16 or float16. Rows past
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
    name = choose(backend, rows_RD, weight_eDF.shape).name
    return _product(name, False, *_alike(rows_RD, weight_eDF, group_sizes_e))


def linear(x: Array, weight_FD: Float[Array, "F D"], bias_F: Float[Array, " F"] | None = None) -> Array:
    """x @ weight^T + bias in x's dtype, with the output-major weight of dense projections cast to it.

    Args:
        x: [..., D]. weight_FD: [F, D]. bias_F: [F] or None.
    """
    out = _project(*_alike(x, weight_FD.astype(x.dtype)))
    if bias_F is not None:
        out = out + bias_F.astype(x.dtype).astype(out.dtype)
    return out.astype(x.dtype)


def choose(backend: str | None, rows: Array, weight_shape: Any) -> Backend:
    """The registry row that serves `rows` against a weight of shape [e, D, F]; see Registry.choose."""
    return _choose(backend, *device_of(rows), str(rows.dtype), tuple(weight_shape))


@lru_cache(maxsize=4096)
def _choose(
    backend: str | None, device: str, capability: tuple[int, int] | None, dtype: str, shape: tuple[int, int, int]
) -> Backend:
    problem = Problem(
        device=device, dtype=dtype, dim=shape[1], inter_dim=shape[2], n_experts=shape[0], capability=capability
    )
    return BACKENDS.choose(backend, problem)


def device_of(rows: Any) -> tuple[str, tuple[int, int] | None]:
    """Kind and compute capability of the device of `rows`; while tracing, of JAX's default device."""
    traced = isinstance(rows, jax.core.Tracer) or not isinstance(rows, Array)
    device = jax.devices()[0] if traced else next(iter(rows.devices()))
    if device.platform != "gpu":
        return device.platform, None
    major, minor = str(device.compute_capability).split(".")
    return "cuda", (int(major), int(minor))


def _alike(*arrays: Array) -> list[Array]:
    """Inside shard_map: arrays that vary over the same mesh axes; elsewhere the arrays as they are.

    A derivative rule must return each gradient as its argument varies. Made alike before the rule, a replicated
    weight gets the sum of its gradients from the transpose of this step.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes: frozenset[Any] = frozenset().union(*varying)
    return [
        lax.pcast(array, tuple(axes - own), to="varying") if axes - own else array
        for array, own in zip(arrays, varying, strict=True)
    ]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(backend: str, transposed: bool, rows: Array, weight: Array, group_sizes: Array) -> Array:
    if 0 in (rows.shape[0], weight.shape[0]):
        return lax.full_like(rows, 0, shape=(rows.shape[0], weight.shape[1 if transposed else 2]))
    return _kernels(backend).product(rows, weight, group_sizes, transposed)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weight_gradient(backend: str, rows: Array, dout: Array, group_sizes: Array) -> Array:
    if 0 in (rows.shape[0], group_sizes.shape[0]):
        return lax.full_like(rows, 0, shape=(group_sizes.shape[0], rows.shape[1], dout.shape[1]))
    return _kernels(backend).weight_gradient(rows, dout, group_sizes)


Saved = tuple[Array, Array, Array]


def _product_forward(backend: str, transposed: bool, *arrays: Array) -> tuple[Array, Any]:
    return _product(backend, transposed, *arrays), arrays


def _product_backward(backend: str, transposed: bool, saved: Saved, dout: Array) -> tuple[Array, Array, None]:
    rows, weight, group_sizes = saved
    drows = _product(backend, not transposed, dout, weight, group_sizes)
    pair = (dout, rows) if transposed else (rows, dout)
    return drows, _weight_gradient(backend, *pair, group_sizes), None


def _weight_gradient_forward(backend: str, *arrays: Array) -> tuple[Array, Any]:
    return _weight_gradient(backend, *arrays), arrays


def _weight_gradient_backward(backend: str, saved: Saved, dweight: Array) -> tuple[Array, Array, None]:
    rows, dout, group_sizes = saved
    drows = _product(backend, True, dout, dweight, group_sizes)
    return drows, _product(backend, False, rows, dweight, group_sizes), None


_product.defvjp(_product_forward, _product_backward)
_weight_gradient.defvjp(_weight_gradient_forward, _weight_gradient_backward)


# A rule of our own, because JAX's would multiply float32 gradients by 16-bit operands, which a GPU does in float32.
@jax.custom_vjp
def _project(x: Array, weight: Array) -> Array:
    """x @ weight^T, not yet rounded."""
    return _dot(x, weight, (x.ndim - 1, 1))


def _project_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _project(x, weight), (x, weight)


def _project_backward(saved: tuple[Array, Array], dout: Array) -> tuple[Array, Array]:
    x, weight = saved
    dout = dout.astype(x.dtype)
    dx = _dot(dout, weight, (x.ndim - 1, 0)).astype(x.dtype)
    dout_TF, x_TD = dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
    return dx, _dot(dout_TF, x_TD, (0, 0)).astype(weight.dtype)


_project.defvjp(_project_forward, _project_backward)


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    accumulate = accumulate_dtype(a.dtype)
    return lax.dot_general(a, b, dimensions, precision="highest", preferred_element_type=accumulate)


def _kernels(backend: str) -> Kernels:
    kernels: Kernels = BACKENDS.implementation(BACKENDS[backend])
    return kernels


def _load_loop() -> Kernels:
    from moebius.jax_frontend import matmul_loop as backend

    return Kernels(backend.product, backend.weight_gradient)


def _load_ragged_dot() -> Kernels:
    from moebius.jax_frontend import matmul_ragged_dot as backend

    return Kernels(backend.product, backend.weight_gradient)


BACKENDS = Registry("moebius.jax_frontend", "grouped_matmul")
BACKENDS.add(name="loop", load=_load_loop, note="blocks of rows, one expert each; any dtype, cost follows the rows")
BACKENDS.add(
    name="ragged_dot",
    load=_load_ragged_dot,
    only_when_named=True,
    note="jax.lax.ragged_dot: every row times every expert on a CPU; NaN in one expert's matrix reaches every row",
)
BACKENDS.add_unbuilt("tokamax", "te", "triton")
